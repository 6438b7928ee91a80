"""What is said of rows that the search has not seen: recomputed here from the stored answers, by other libraries."""

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from folders import Material, command, show
from folders import material_fixture as material_fixture
from pyarrow import parquet
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from tale_ray.search.driver import Driver

NUM_SELECT_ROWS, NUM_TEST_ROWS = 20, 30
NAMES = ("best", "bsba", "final", "selected")


@pytest.fixture(scope="module", name="finished")
def finished_fixture(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of several rounds; tests that change it take a copy."""
    run = tmp_path_factory.mktemp("held_out") / "run"
    outcome = material.search(run, "--epsilon", "0.3")
    assert outcome.code == 0, outcome.err
    assert len(show(run)["rounds"]) > 2
    return run


@pytest.fixture(name="copy")
def copy_fixture(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def answers(run: Path, split: str, number: int) -> list[bool]:
    """Which rows of a split the model without the layers of a round answers correctly."""
    table = parquet.read_table(run / "answers" / f"{split}-{number:04d}.parquet")
    assert set(table["split"].to_pylist()) == {split}
    return list(table["correct"].to_pylist())


def removed_by_round(summary: dict[str, Any]) -> list[list[int]]:
    return [[], *(entry["removed"] for entry in summary["rounds"])]


def test_the_selected_round_is_the_last_within_one_standard_error_of_the_best(finished: Path) -> None:
    summary = show(finished)
    correct = [sum(answers(finished, "select", number)) for number in range(len(summary["rounds"]) + 1)]
    best = max(correct)
    variance = Fraction(best * (NUM_SELECT_ROWS - best), NUM_SELECT_ROWS)  # of the count of the best
    near = [number for number, count in enumerate(correct) if (best - count) ** 2 <= variance]
    assert summary["selected"] == {
        "round": near[-1],
        "removed": removed_by_round(summary)[near[-1]],
        "correct": correct[near[-1]],
        "total": NUM_SELECT_ROWS,
    }
    stored = json.loads((finished / "results" / "selected.json").read_text())
    assert [entry["correct"] for entry in stored["rounds"]] == correct


def test_results_on_test_rows_are_compared_with_the_full_model(finished: Path) -> None:
    summary = show(finished)
    test = summary["test"]
    assert set(test) == {"baseline", *NAMES}
    full = answers(finished, "test", 0)
    assert test["baseline"]["correct"] == sum(full)
    p_values = {}
    for name in NAMES:
        entry, own = test[name], answers(finished, "test", test[name]["round"])
        assert entry["removed"] == removed_by_round(summary)[entry["round"]]
        assert (entry["correct"], entry["total"]) == (sum(own), NUM_TEST_ROWS)
        wilson = binomtest(sum(own), NUM_TEST_ROWS).proportion_ci(0.95, method="wilson")
        assert entry["interval"] == pytest.approx([wilson.low, wilson.high])
        wins = sum(one and not other for one, other in zip(own, full, strict=True))
        losses = sum(other and not one for one, other in zip(own, full, strict=True))
        assert (entry["wins"], entry["losses"], entry["ties"]) == (wins, losses, NUM_TEST_ROWS - wins - losses)
        assert entry["difference"] == (wins - losses) / NUM_TEST_ROWS
        assert entry["difference_interval"][0] <= entry["difference"] <= entry["difference_interval"][1]
        p_values[entry["round"]] = float(mcnemar([[0, wins], [losses, 0]], exact=True).pvalue) if wins + losses else 1.0
        assert entry["p_value"] == pytest.approx(p_values[entry["round"]])
        assert summary["optimism"][name] == pytest.approx(
            (summary[name]["correct"] if name != "selected" else searched(summary)[entry["round"]]) / 50
            - summary["baseline"]["correct"] / 50
            - entry["difference"]
        )
    compared = sorted(number for number in p_values if number)
    corrected = dict(
        zip(compared, multipletests([p_values[number] for number in compared], method="holm")[1], strict=True)
    )
    assert {test[name]["round"]: test[name]["p_value_holm"] for name in NAMES} == pytest.approx(
        {number: corrected.get(number, 1.0) for number in p_values}
    )


def searched(summary: dict[str, Any]) -> list[int]:
    return [summary["baseline"]["correct"], *(entry["correct"] for entry in summary["rounds"])]


def test_a_person_sees_them(finished: Path) -> None:
    text, test = command("show", finished).out, show(finished)["test"]["selected"]
    line = next(line for line in text.splitlines() if "selected" in line and "[" in line)
    assert f"{100 * test['correct'] / NUM_TEST_ROWS:.1f}% [{100 * test['interval'][0]:.1f}, " in line
    assert f"{100 * test['difference']:+.1f} [" in line
    assert "optimism" in text
    assert f"evaluate --run {finished} --pick selected" in text


def test_an_evaluation_is_compared_with_the_full_model_of_the_run(finished: Path) -> None:
    entry = show(finished)["test"]["selected"]
    scored = command("evaluate", "--run", finished, "--pick", "selected", "--json").json
    names = ("removed", "correct", "interval", "difference", "difference_interval", "wins", "losses", "p_value")
    assert {name: scored[name] for name in names} == {name: entry[name] for name in names}
    text = command("evaluate", "--run", finished, "--pick", "selected", "--split", "all").out
    assert "against the full model of the run on the same rows" in text
    others = command("evaluate", "--run", finished, "--remove", "1", "--seed", "1", "--json").json
    assert others["p_value"] is None, "the run has no answers to these rows"


def test_a_search_that_goes_on_selects_again(finished: Path, copy: Path, material: Material) -> None:
    before = show(finished)
    assert command("resume", copy, "--epsilon", "1").code == 0
    after = show(copy)
    assert len(after["rounds"]) > len(before["rounds"])
    stored = json.loads((copy / "results" / "selected.json").read_text())
    assert len(stored["rounds"]) == len(after["rounds"]) + 1
    assert after["test"]["final"]["removed"] == after["final"]["removed"]


def test_results_of_other_rounds_are_not_shown(finished: Path, copy: Path) -> None:
    path = copy / "results" / "selected.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "rounds": stored["rounds"][:-1]}))
    summary = show(copy)
    assert summary["selected"] is None
    assert set(summary["test"]) == {"baseline", "best", "bsba", "final"}, "the selected one is not known"
    assert f"the select rows are not scored yet: tale-ray resume {copy}" in command("show", copy).out
    assert "has no selected round" in command("evaluate", "--run", copy, "--pick", "selected").err
    assert command("resume", copy).code == 0
    assert show(copy)["selected"] == show(finished)["selected"]


def test_damage_is_named(copy: Path) -> None:
    path = copy / "results" / "selected.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "correct": "many"}))
    outcome = command("show", copy)
    assert outcome.code == 2
    assert "selected.json" in outcome.err
    assert "delete it" in outcome.err


def test_without_select_rows_nothing_is_selected(material: Material, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert material.search(run, "--max-removed", "1", "--splits", "search=0.5,test=0.3").code == 0
    summary = show(run)
    assert summary["selected"] is None
    assert set(summary["test"]) == {"baseline", "best", "bsba", "final"}
    assert not (run / "results" / "selected.json").exists()


def test_what_was_scored_on_select_rows_is_not_scored_again(
    finished: Path, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []
    score = Driver._score

    def dies_in_the_third(self: Driver, scoring: Any) -> Any:
        scored.append(scoring.scope)
        if scored.count("select-0002") == 1 and scoring.scope == "select-0002":
            raise KeyboardInterrupt
        return score(self, scoring)

    monkeypatch.setattr(Driver, "_score", dies_in_the_third)
    run = tmp_path / "run"
    assert material.search(run, "--epsilon", "0.3").code != 0
    assert command("resume", run).code == 0
    select = [scope for scope in scored if scope.startswith("select")]
    assert select[:4] == ["select-0000", "select-0001", "select-0002", "select-0002"]
    assert len(select) == len(set(select)) + 1
    for name in ("selected", "test", "optimism"):
        assert show(run)[name] == show(finished)[name]
