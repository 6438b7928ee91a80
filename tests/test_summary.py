"""`show --json` has exactly the fields of the contract, of their types, at every moment of a run's life."""

import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from folders import Material, command, show
from folders import material_fixture as material_fixture

import tale_ray.cluster.worker
from tale_ray.errors import StoreError
from tale_ray.results.summary import summarize
from tale_ray.search.driver import Driver
from tale_ray.store.lease import machine_name, process_start
from tale_ray.store.reader import RunReader

NUMBER = (int, float)
SCORE = {"correct": int, "total": int, "invalid": int}
PICK = {"round": int, "removed": [int], "correct": int, "total": int}
CANDIDATE = {"layer": int, "correct": int, "seen": int, "status": str}
ROUND = {"round": int, "removed_layer": int, "removed": [int], **SCORE, "candidates": [CANDIDATE]}
RESULT = {"round": int, "removed": [int], **SCORE, "interval": [NUMBER]}
COMPARED = {
    **RESULT,
    **dict.fromkeys(("difference", "p_value", "p_value_holm"), NUMBER),
    "difference_interval": [NUMBER],
    **dict.fromkeys(("wins", "losses", "ties"), int),
}
NAMES = ("best", "bsba", "final", "selected")
FIELDS: dict[str, Any] = {
    "run": str,
    "state": str,
    "model": str,
    "task": str,
    "num_layers": int,
    "epsilon": float,
    "rows": dict.fromkeys(("shots", "search", "select", "test"), int),
    "baseline": SCORE,
    "rounds": [ROUND],
    "rejected_round": ROUND,
    **dict.fromkeys(NAMES, PICK),
    "test": {"baseline": RESULT, **dict.fromkeys(NAMES, COMPARED)},
    "optimism": dict.fromkeys(NAMES, NUMBER),
    "stop_reason": str,
    "attempts": int,
    "seconds": {"load": NUMBER, "search": NUMBER},
    "work": dict.fromkeys(("units", "candidate_rows", "layer_applications", "retries", "wasted_rows"), int),
}
STATES = ("running", "finished", "interrupted", "failed")
STOP_REASONS = (
    *("below_floor", "max_removed", "one_layer_left", "no_candidates", "baseline_zero", "error", "interrupted"),
    None,
)
NULL_BEFORE_THE_MODEL_IS_LOADED = {"model", "task", "num_layers", "epsilon"}
NULL_BEFORE_THE_BASELINE = {"baseline", "best", "bsba", "final", "selected"}
MAY_BE_NULL = {"rejected_round", "test", "optimism", "stop_reason", "selected"}


def assert_form(value: Any, form: Any, where: str, null: frozenset[str] = frozenset()) -> None:
    if isinstance(form, Mapping):
        assert isinstance(value, dict), where
        assert set(value) == set(form), f"fields of {where or 'the summary'}"
        for name, inner in form.items():
            if value[name] is None:
                assert name in null, f"{where}{name} is null"
            else:
                assert_form(value[name], inner, f"{where}{name}.")
    elif isinstance(form, list):
        assert isinstance(value, list), where
        for item in value:
            assert_form(item, form[0], where)
    else:
        assert isinstance(value, form), f"{where} is {value!r}"
        assert not isinstance(value, bool), where


def checked(summary: dict[str, Any], *null: str) -> dict[str, Any]:
    assert_form(summary, FIELDS, "", frozenset({*MAY_BE_NULL, *null}))
    assert summary["state"] in STATES
    assert summary["stop_reason"] in STOP_REASONS
    for entry in [*summary["rounds"], *filter(None, [summary["rejected_round"]])]:
        for candidate in entry["candidates"]:
            assert candidate["status"] in ("exact", "bounded_out")
            assert (candidate["seen"] == entry["total"]) is (candidate["status"] == "exact")
    return summary


class Killed(BaseException):
    """Stands for the end of a process."""


def test_the_fields_through_the_life_of_a_run(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    seen: dict[str, dict[str, Any]] = {}
    load, score, store = tale_ray.cluster.worker.load_model, Driver._score, Driver._finish

    def while_it_loads(*arguments: Any) -> Any:
        seen["load"] = show(run)
        seen["load"]["text"] = command("show", run).out
        return load(*arguments)

    def before_a_round(self: Driver, scoring: Any) -> Any:
        seen[scoring.scope] = show(run)
        return score(self, scoring)

    def before_it_is_stored(self: Driver, *arguments: Any) -> Any:
        seen[f"end of {arguments[0].number}"] = show(run)
        if arguments[0].number == 2 and "killed" not in seen:
            seen["killed"] = {}
            raise Killed
        return store(self, *arguments)

    monkeypatch.setattr(tale_ray.cluster.worker, "load_model", while_it_loads)
    monkeypatch.setattr(Driver, "_score", before_a_round)
    monkeypatch.setattr(Driver, "_finish", before_it_is_stored)
    with pytest.raises(Killed):
        material.search(run)

    assert f"{run}: loading the model, nothing is stored yet" in seen["load"].pop("text")
    loading = checked(seen["load"], *NULL_BEFORE_THE_MODEL_IS_LOADED, *NULL_BEFORE_THE_BASELINE)
    assert {loading[name] for name in NULL_BEFORE_THE_MODEL_IS_LOADED | NULL_BEFORE_THE_BASELINE} == {None}
    assert (loading["state"], loading["attempts"], loading["rounds"]) == ("running", 0, [])
    started = checked(seen["round-0000"], *NULL_BEFORE_THE_BASELINE)
    assert (started["state"], started["attempts"], started["baseline"]) == ("running", 1, None)
    assert (started["model"], started["task"]) == (str(material.model), "tiny")
    assert (started["num_layers"], started["epsilon"]) == (6, 0.1)
    assert started["rows"] == {"shots": 0, "search": 50, "select": 20, "test": 30}
    assert started["work"]["units"] == 0
    baseline = checked(seen["end of 0"], *NULL_BEFORE_THE_BASELINE)
    assert baseline["work"]["units"] > 0
    assert baseline["work"]["candidate_rows"] == 0
    first = checked(seen["end of 1"])
    assert first["rounds"] == [], "only committed rounds are shown"
    assert (
        first["best"]
        == first["final"]
        == {"round": 0, "removed": [], "correct": first["baseline"]["correct"], "total": 50}
    )
    assert first["work"]["candidate_rows"] == 6 * 50, "units of the round under way count; the baseline does not"
    second = checked(seen["end of 2"])
    assert len(second["rounds"]) == 1
    assert second["work"]["candidate_rows"] == (6 + 5) * 50

    killed = checked(show(run))
    assert (killed["state"], killed["stop_reason"]) == ("failed", "error"), "an error that nobody expected"
    assert command("resume", run).code == 0
    assert "6 layers: running" in seen["load"].pop("text")
    loading_again = checked(seen["load"])
    assert (loading_again["state"], loading_again["attempts"], len(loading_again["rounds"])) == ("running", 1, 1)
    finished = checked(show(run))
    assert (finished["state"], finished["stop_reason"], finished["attempts"]) == ("finished", "below_floor", 2)
    assert finished["rejected_round"]["round"] == len(finished["rounds"]) + 1
    assert finished["test"]["final"]["removed"] == finished["final"]["removed"] == finished["rounds"][-1]["removed"]
    assert finished["seconds"]["load"] > 0
    assert finished["seconds"]["search"] > 0
    candidates = sum(len(entry["candidates"]) for entry in [*finished["rounds"], finished["rejected_round"]])
    assert finished["work"]["candidate_rows"] == 50 * candidates


def test_results_follow_their_definitions(material: Material, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert material.search(run, "--epsilon", "0.5", "--remove", "1").code == 0
    summary = checked(show(run))
    baseline = {"round": 0, "removed": [], "correct": summary["baseline"]["correct"], "total": 50}
    entries = [baseline, *summary["rounds"]]
    correct = [entry["correct"] for entry in entries]
    best = entries[correct.index(max(correct))]
    bsba = [entry for entry in entries if entry["correct"] >= correct[0]][-1]
    for name, entry in (("best", best), ("bsba", bsba), ("final", entries[-1])):
        assert summary[name] == {key: entry[key] for key in ("round", "removed", "correct", "total")}
    assert summary["rounds"][0]["removed"][0] == 1, "the layers it started without come first"
    assert all(1 not in [each["layer"] for each in entry["candidates"]] for entry in summary["rounds"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--max-removed", "1"], "max_removed"),
        (["--epsilon", "1"], "one_layer_left"),
        (["--epsilon", "1", "--keep-layers", "0,1,2,4,5"], "no_candidates"),
    ],
)
def test_stop_reasons(material: Material, tmp_path: Path, options: list[str], reason: str) -> None:
    run = tmp_path / "run"
    assert material.search(run, *options, "--rows", "5", "--splits", "search=0.5").code == 0
    summary = checked(show(run))
    assert (summary["state"], summary["stop_reason"]) == ("finished", reason)
    assert summary["test"] is None
    assert "evaluate --run" in command("show", run).out, "without test rows nothing is left to do"


def test_a_run_whose_test_rows_are_missing_says_so(material: Material, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert material.search(run, "--max-removed", "0").code == 0
    (run / "results" / "test.json").unlink()
    assert checked(show(run))["state"] == "finished"
    assert f"the test rows are not scored yet: tale-ray resume {run}" in command("show", run).out


def lease(**changes: Any) -> str:
    """A lease of this process, which lives, until the year 2100."""
    fields = {
        "schema_version": 1,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()),
        "machine": machine_name(),
        "attempt": 1,
        "nonce": "0",
        "expires": 4102444800.0,
        "renewed": 0.0,
    }
    return json.dumps({**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "running"),
        ({"host": "elsewhere"}, "running"),
        ({"process_start": 1.0}, "interrupted"),
        ({"expires": 1.0}, "interrupted"),
        ({"host": "elsewhere", "expires": 1.0}, "interrupted"),
    ],
)
def test_who_counts_as_running(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], state: str
) -> None:
    run = tmp_path / "run"

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Driver, "_finish", interrupt)
        assert material.search(run, "--rows", "5").code == 75
    (run / "lease.json").write_text(lease(**changes))
    summary = checked(show(run), *NULL_BEFORE_THE_BASELINE)
    assert summary["state"] == state
    assert summary["stop_reason"] == (None if state == "running" else "interrupted")


@pytest.fixture(scope="module", name="finished")
def finished_fixture(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert material.search(run, "--max-removed", "1", "--rows", "10").code == 0
    return run


def test_foreign_folders_beside_units_are_passed_over(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("round-abc", "round-", "rounds-0002", "mine"):
        (run / "partial" / name).mkdir(parents=True)
    assert show(run)["work"] == show(finished)["work"]


def changed(content: Any, where: list[str], value: Any) -> Any:
    """A JSON value with one of its parts replaced, or left out (None)."""
    name, *rest = where
    new = changed(content[name], rest, value) if rest else value
    return {key: inner for key, inner in {**content, name: new}.items() if inner is not None or rest}


@pytest.mark.parametrize(
    ("file", "where", "value"),
    [
        ("run.json", "config", []),
        ("run.json", "config.model", None),
        ("run.json", "config.model.model", 5),
        ("run.json", "config.strategy.epsilon", "much"),
        ("run.json", "config.strategy.remove", 3),
        ("run.json", "config.task.splits", {"search": 1}),
        ("run.json", "config.task.colour", "red"),
        ("run.json", "model.num_layers", "6"),
        ("run.json", "model.num_layers", True),
        ("run.json", "model.dtype", None),
        ("run.json", "task.name", 1),
        ("run.json", "rows", {"search": 5}),
        ("run.json", "rows.search.count", "many"),
        ("run.json", "tokens", {"search": 5}),
        ("run.json", "created", 5),
        ("attempts/attempt-0001.json", "retries", "x"),
        ("attempts/attempt-0001.json", "attempt", "1"),
        ("results/test.json", "best", [1]),
        ("results/test.json", "best.removed", 5),
        ("results/test.json", "best.round", None),
        ("results/test.json", "best.correct", "all"),
    ],
)
def test_a_value_of_another_type_in_a_file_is_named(
    finished: Path, tmp_path: Path, file: str, where: str, value: Any
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    content = json.loads((run / file).read_text())
    (run / file).write_text(json.dumps(changed(content, where.split("."), value)))
    with pytest.raises(StoreError, match=f"{run / file} was changed: .*(put back|delete)"):
        summarize(RunReader(str(run)))
    assert command("resume", run).code == 2


@pytest.mark.parametrize(("name", "value"), [("epsilon", "much"), ("epsilon", None), ("max_removed", "few")])
def test_a_changed_identity_is_another_configuration(finished: Path, tmp_path: Path, name: str, value: Any) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    content = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**content, "identity": {**content["identity"], name: value}}))
    outcome = command("resume", run)
    assert outcome.code == 2, outcome.err
    assert f"{name}: the run has {json.dumps(value)}, asked for is" in outcome.err
