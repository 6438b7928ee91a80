"""The Python API: the same requests and results as the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from folders import Material, command, show
from folders import material_fixture as material_fixture

import tale_ray
from tale_ray.api import evaluated_config, make_config, resumed_config
from tale_ray.attempt.evaluate import run_evaluation
from tale_ray.attempt.search import ModelLoaded
from tale_ray.errors import BaselineZero, ConfigError, Interrupted, StoreError
from tale_ray.records import Score
from tale_ray.search.interruption import Interruption


@pytest.fixture(scope="module", name="options")
def options_fixture(material: Material) -> dict[str, Any]:
    return {"model": material.model, "task": material.task, "epsilon": "0.1", "local": True}


@pytest.fixture(scope="module", name="run")
def run_fixture(material: Material, options: dict[str, Any]) -> Any:
    return tale_ray.search(**options, run=material.folder / "api", rows=20)


def test_a_search_returns_its_run(run: Any, material: Material) -> None:
    assert run.uri == str(material.folder / "api")
    assert run.summary == show(run.uri)
    assert run.best.number == run.summary["best"]["round"]
    assert run.bsba.number == run.summary["bsba"]["round"]
    assert list(run.final.removed) == run.summary["final"]["removed"]
    assert run.final.number == len(run.summary["rounds"]) > 0
    assert tale_ray.open_run(material.folder / "api") == run


def test_a_finished_run_is_returned_again(run: Any, options: dict[str, Any]) -> None:
    before = run.summary
    assert tale_ray.search(**options, run=run.uri, rows=20) == run
    assert tale_ray.resume(run.uri) == run
    assert run.summary == before


def test_resume_goes_on(material: Material, options: dict[str, Any]) -> None:
    run = tale_ray.search(**options, run=material.folder / "on", rows=20, max_removed=1)
    assert run.summary["stop_reason"] == "max_removed"
    assert len(run.history.rounds) == 2
    on = tale_ray.resume(material.folder / "on", max_removed=2)
    assert len(on.history.rounds) == 3
    assert on.summary["attempts"] == 2


def test_evaluate(run: Any, options: dict[str, Any]) -> None:
    final = run.summary["final"]
    scored = tale_ray.evaluate(run=run.uri, pick="final", split="search")
    assert isinstance(scored, Score)
    assert (scored.correct, scored.total) == (final["correct"], 20)
    again = tale_ray.evaluate("search", **options, rows=20, remove=final["removed"])
    assert again == scored
    test = tale_ray.evaluate(run=run.uri, pick="final")
    assert test.correct == run.summary["test"]["final"]["correct"]
    assert tale_ray.evaluate("all", **options).total == 100


@pytest.fixture(name="movable")
def movable_fixture(material: Material, tmp_path: Path) -> Any:
    """A run whose model and task may be changed under its feet."""
    shutil.copytree(material.model, tmp_path / "model")
    for name in ("tiny.yaml", "rows.jsonl"):
        shutil.copy(material.folder / name, tmp_path / name)
    return tale_ray.search(
        model=tmp_path / "model", task=tmp_path / "tiny.yaml", local=True, max_removed=0, run=tmp_path / "run"
    )


def test_another_model_is_not_scored_as_the_one_of_the_run(movable: Any, material: Material, tmp_path: Path) -> None:
    expected = movable.summary["test"]["best"]["correct"]
    assert tale_ray.evaluate(run=movable.uri).correct == expected
    with pytest.raises(StoreError, match=r"would be scored in bfloat16, and .* was searched in float32"):
        manifest = json.loads((tmp_path / "run" / "run.json").read_text())
        manifest["config"]["model"]["dtype"] = "bfloat16"
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "run.json").write_text(json.dumps(manifest))
        tale_ray.evaluate(run=tmp_path / "other", remove=())
    assert tale_ray.evaluate(run=movable.uri, dtype="bfloat16").total == 30
    shutil.copy(material.other_model / "model.safetensors", tmp_path / "model" / "model.safetensors")
    with pytest.raises(StoreError, match=r"is not the one that .*run was searched with .* name it with --model"):
        tale_ray.evaluate(run=movable.uri)
    refused = command("evaluate", "--run", movable.uri, "--json")
    assert (refused.code, refused.out) == (2, "")
    assert tale_ray.evaluate(run=movable.uri, model=tmp_path / "model").total == 30
    assert tale_ray.evaluate(run=movable.uri, model=material.model).correct == expected


def test_other_rows_are_not_scored_as_those_of_the_run(movable: Any, material: Material, tmp_path: Path) -> None:
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[1:]))
    with pytest.raises(StoreError, match=r"rows of task tiny are not those that .*run was searched on"):
        tale_ray.evaluate(run=movable.uri)
    assert tale_ray.evaluate(run=movable.uri, seed=1).total > 0, "other rows may be asked for"
    assert tale_ray.evaluate(run=movable.uri, task=material.task).correct == movable.summary["test"]["best"]["correct"]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    text = (tmp_path / "tiny.yaml").read_text()
    (tmp_path / "tiny.yaml").write_text(text.replace("max_new_tokens: 1", "max_new_tokens: 2"))
    with pytest.raises(StoreError, match="`max_new_tokens` has changed; restore the task file"):
        tale_ray.evaluate(run=movable.uri)


def test_an_evaluation_is_not_stopped_in_the_hands_of_its_caller(run: Any) -> None:
    """A request to stop waits while an event is shown, and is honoured by the next step."""
    interruption = Interruption()
    events = run_evaluation(*evaluated_config(run.uri), "test", interruption)
    for event in events:
        if isinstance(event, ModelLoaded):
            break
    interruption.request("enough")
    with pytest.raises(Interrupted, match="enough"):
        next(events)


def test_errors_are_those_of_the_commands(material: Material, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BaselineZero, match="0 of 50"):
        tale_ray.search(**{**options, "task": material.zero_task}, run=tmp_path / "zero")
    with pytest.raises(StoreError, match="is not a run"):
        tale_ray.open_run(tmp_path)
    with pytest.raises(StoreError, match="is not a run"):
        tale_ray.resume(tmp_path)
    with pytest.raises(ConfigError, match="pick '1' is a result of a run"):
        tale_ray.evaluate(**options, pick="1")
    with pytest.raises(ConfigError, match="both say which layers"):
        tale_ray.evaluate(run=tmp_path, pick="best", remove="1")
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        tale_ray.serch  # noqa: B018


def test_an_epsilon_stored_as_a_fraction_is_the_same(run: Any, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run.uri, tmp_path / "run"))
    stored = json.loads((moved / "run.json").read_text())
    assert stored["identity"]["epsilon"] == "0.1"
    stored["identity"]["epsilon"] = "1/10"
    (moved / "run.json").write_text(json.dumps(stored))
    assert tale_ray.resume(moved).summary["rounds"] == run.summary["rounds"]
    with pytest.raises(StoreError, match="only a larger"):
        tale_ray.resume(moved, epsilon="0.0999")


def test_resume_refuses_what_would_change_a_decision(run: Any) -> None:
    with pytest.raises(StoreError, match=r"epsilon: the run has \"0.1\", asked for is \"0.02\" \(only a larger"):
        tale_ray.resume(run.uri, epsilon="0.02")
    with pytest.raises(ConfigError, match="option 'epsilom' is not known"):
        tale_ray.resume(run.uri, epsilom="0.2")


def test_texts_are_read_as_on_the_command_line() -> None:
    texts = make_config(
        model=Path("/models/m"),
        task="t",
        splits="search=0.5",
        epsilon=0.08,
        remove="3,7",
        keep_layers="1",
        wait_resources="5m",
        time_limit="1h",
        batch_bytes="1MiB",
    )
    values = make_config(
        model="/models/m",
        task="t",
        splits={"search": "0.5"},
        epsilon="0.08",
        remove=[3, 7],
        keep_layers=(1,),
        wait_resources=300,
        time_limit=3600.0,
        batch_bytes=2**20,
    )
    assert texts == values


def test_shares_are_numbers_too() -> None:
    assert make_config(model="m", task="t", splits={"search": 0.5, "test": 0.3}) == make_config(
        model="m", task="t", splits="search=0.5,test=0.3"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "t"}, "model is missing"),
        ({"model": "m"}, "task is missing: name it with --task, in the --config file, or as task=... in Python"),
        ({"model": "m", "task": "t", "rowz": 3}, "option 'rowz' is not known"),
        ({"model": "m", "task": "t", "rows": "3"}, "rows '3' is not a whole number"),
        ({"model": "m", "task": "t", "splits": {"train": 0.5}}, "'train' is not known: the splits are shots, search"),
        ({"model": "m", "task": "t", "splits": {"search": True}}, "share of the search split 'True' is not a number"),
        ({"model": "m", "task": "t", "remove": "a"}, "remove 'a' is not a list of layers"),
        ({"model": "m", "task": "t", "epsilon": None}, "epsilon 'None' is not a number"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make_config(**options)
    assert words in str(refused.value)


def test_a_resumed_run_is_in_the_place_that_is_asked_for(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def place(**options: Any) -> tuple[bool, str | None, int | None]:
        resources = resumed_config(run.uri, **options).resources
        return resources.local, resources.address, resources.workers

    assert place() == (True, None, None)
    assert place(address="ray://a") == (False, "ray://a", None)
    assert place(workers=3) == (False, None, 3)
    assert place(workers=1) == (True, None, 1)
    assert place(time_limit="1h") == (True, None, None)
    monkeypatch.setenv("RAY_ADDRESS", "ray://variable")
    assert place() == (True, None, None)
    assert place(workers=3) == (False, "ray://variable", 3)
    assert place(address="ray://a") == (False, "ray://a", None)
    assert resumed_config(run.uri, time_limit="1h").storage.time_limit_seconds == 3600
    assert resumed_config(run.uri).storage.time_limit_seconds is None


def test_a_resumed_run_stays_on_its_cluster(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = json.loads((Path(run.uri) / "run.json").read_text())
    stored["config"]["resources"] |= {"local": False, "address": "ray://stored"}
    (tmp_path / "run.json").write_text(json.dumps(stored))

    def place(**options: Any) -> tuple[bool, str | None, int | None]:
        resources = resumed_config(str(tmp_path), **options).resources
        return resources.local, resources.address, resources.workers

    for variable in ("", "ray://variable"):
        monkeypatch.setenv("RAY_ADDRESS", variable)
        assert place() == (False, "ray://stored", None)
        assert place(workers=3) == (False, "ray://stored", 3)
        assert place(address="ray://given", workers=3) == (False, "ray://given", 3)
        assert place(local=True) == (True, None, None)


def test_a_search_in_a_ray_job_joins_its_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("tale_ray.api.run_search", lambda config, _: seen.append(config.resources.address) or [])
    monkeypatch.setenv("RAY_ADDRESS", "ray://variable")
    for place in ({}, {"local": True}, {"address": "ray://given"}):
        tale_ray.search(model="bundled", task="boolean_synthetic", **place)
    monkeypatch.delenv("RAY_ADDRESS")
    tale_ray.search(model="bundled", task="boolean_synthetic")
    assert seen == ["ray://variable", None, "ray://given", None]


def test_the_command_line_can_go_on_with_it(run: Any) -> None:
    assert command("resume", run.uri).code == 0


def test_a_report_of_a_run(run: Any, tmp_path: Path) -> None:
    assert command("report", run.uri, "-o", tmp_path / "command.html").code == 0
    assert run.report(tmp_path / "api.html", plots=str(tmp_path / "plots")) == tmp_path / "api.html"
    assert (tmp_path / "api.html").read_text() == (tmp_path / "command.html").read_text()
    assert (tmp_path / "plots" / "trajectory.svg").exists()
    with pytest.raises(ConfigError, match="is in the run folder"):
        run.report(Path(run.uri) / "report.html")


def test_runs_are_compared(run: Any, material: Material, options: dict[str, Any], tmp_path: Path) -> None:
    other = tale_ray.search(**options, run=tmp_path / "other", rows=20, strategy="reverse", max_removed=2)
    assert tale_ray.compare(run, tmp_path / "other") == command("compare", run.uri, other.uri, "--json").json
    with pytest.raises(ConfigError, match="1 run is nothing to compare"):
        tale_ray.compare(run)


def test_latency_of_a_result(run: Any, tmp_path: Path) -> None:
    moved = tale_ray.open_run(shutil.copytree(run.uri, tmp_path / "run"))
    few = {"prompt_tokens": 4, "new_tokens": 2, "repeats": 1, "batch_sizes": (1,)}
    found = moved.latency(1, **few)
    assert (found["round"], found["prompt_tokens"], len(found["batches"])) == (1, 4, 1)
    assert not (tmp_path / "run" / "results" / "latency.json").exists()
    stored = moved.latency("final", store=True, **few)
    assert json.loads((tmp_path / "run" / "results" / "latency.json").read_text()) == {**stored, "schema_version": 1}
    with pytest.raises(ConfigError, match="repeats: 0 is too small"):
        moved.latency(1, repeats=0)
