"""Runs side by side: recomputed from the stored answers by other libraries; and answers that are stored afterwards."""

from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from folders import Material, command, show
from folders import material_fixture as material_fixture
from pyarrow import parquet
from report_runs import Shape, write_report_run
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from tale_ray.config import StrategySection

SHAPES = {
    "one": Shape(seed=0),
    "two": Shape(seed=1, accuracies=(0.8, 0.9, 0.9, 0.9, 0.9, 0.9), model="org/other", model_digest="1" * 64),
    "three": Shape(seed=2, rounds=2, accuracies=(0.8, 0.2, 0.2), strategy=StrategySection(epsilon="0.1")),
}


@pytest.fixture(scope="module", name="runs")
def runs_fixture(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("compare")
    for name, shape in SHAPES.items():
        write_report_run(folder / name, shape)
    return [folder / name for name in SHAPES]


def compared(*runs: Path) -> dict[str, Any]:
    outcome = command("compare", *runs, "--json")
    assert outcome.code == 0, outcome.err
    return outcome.json  # type: ignore[no-any-return]


def stored_answers(run: Path, number: int) -> list[bool] | None:
    path = run / "answers" / f"test-{number:04d}.parquet"
    return list(parquet.read_table(path)["correct"].to_pylist()) if path.exists() else None


def test_cells_and_pairs_are_those_of_the_stored_answers(runs: list[Path]) -> None:
    found, summaries = compared(*runs), [show(run) for run in runs]
    assert [row["num_removed"] for row in found["numbers"]] == [0, 1, 2, 3, 4, 5]
    expected: list[tuple[int, int, int]] = []
    p_values = []
    for row in found["numbers"]:
        number = row["num_removed"]  # is the round: each removes one layer
        by_run = [
            stored_answers(run, number) if number < len(each["rounds"]) + 1 else None
            for run, each in zip(runs, summaries, strict=True)
        ]
        for cell, run, own, summary in zip(row["cells"], runs, by_run, summaries, strict=True):
            if number > len(summary["rounds"]):
                assert cell is None
                continue
            assert cell["removed"] == ([] if not number else summary["rounds"][number - 1]["removed"])
            if own is None:
                assert cell["correct"] is None
                assert cell["evaluate"] == f"tale-ray evaluate --run {run} --pick {number} --split test --store"
            else:
                assert (cell["correct"], cell["total"], cell["evaluate"]) == (sum(own), 60, None)
                wilson = binomtest(sum(own), 60).proportion_ci(0.95, method="wilson")
                assert cell["interval"] == pytest.approx([wilson.low, wilson.high])
        for one, other in combinations(range(3), 2):
            first, second = by_run[one], by_run[other]
            if first is not None and second is not None:
                expected.append((number, one, other))
                pair = next(each for each in found["pairs"] if (each["num_removed"], *each["runs"]) == expected[-1])
                wins = sum(a and not b for a, b in zip(first, second, strict=True))
                losses = sum(b and not a for a, b in zip(first, second, strict=True))
                assert (pair["wins"], pair["losses"], pair["difference"]) == (wins, losses, (wins - losses) / 60)
                exact = float(mcnemar([[0, wins], [losses, 0]], exact=True).pvalue) if wins + losses else 1.0
                assert pair["p_value"] == pytest.approx(exact)
                if not pair["is_same"]:
                    p_values.append(exact)
    assert [(each["num_removed"], *each["runs"]) for each in found["pairs"]] == expected
    assert [(each["num_removed"], *each["runs"]) for each in found["pairs"] if each["is_same"]] == [(0, 0, 2)]
    corrected = multipletests(p_values, method="holm")[1]
    assert [each["p_value_holm"] for each in found["pairs"] if not each["is_same"]] == pytest.approx(list(corrected))
    for run, summary in zip(found["runs"], summaries, strict=True):
        assert (run["work"], run["seconds"], run["state"]) == (summary["work"], summary["seconds"], summary["state"])


def test_a_person_sees_them(runs: list[Path], tmp_path: Path) -> None:
    outcome = command("compare", *runs, "--figure", tmp_path / "figure.svg")
    assert outcome.code == 0, outcome.err
    found = compared(*runs)
    labels = [run["label"] for run in found["runs"]]
    assert labels == ["tale/bundled (one)", "tale/other", "tale/bundled (three)"]
    svg = (tmp_path / "figure.svg").read_text()
    assert ElementTree.fromstring(svg) is not None
    for label in labels:
        assert label in outcome.out
        assert label in svg
    cell = found["numbers"][0]["cells"][0]
    line = next(line for line in outcome.out.splitlines() if line.startswith("│              0 │"))
    assert f"{100 * cell['correct'] / 60:.1f}% [{100 * cell['interval'][0]:.1f}, " in line
    assert "not scored" in outcome.out
    assert "the same layers" in outcome.out
    assert f"{found['runs'][0]['work']['layer_applications']:,}" in outcome.out
    assert "note: the runs searched on other rows" not in outcome.out


def test_what_cannot_be_compared_is_refused(runs: list[Path], tmp_path: Path) -> None:
    write_report_run(tmp_path / "rows", Shape(first_row=7))
    write_report_run(tmp_path / "none", Shape(splits=("search",)))
    for arguments, words in (
        ((runs[0], tmp_path / "rows"), "have other test rows"),
        ((runs[0], tmp_path / "none"), "has no test rows"),
        ((runs[0],), "1 run is nothing to compare"),
        ((runs[0], runs[0]), "is named twice"),
        ((runs[0], tmp_path / "gone"), "is not a run"),
        ((*runs, "--figure", tmp_path / "figure.doc"), "has no known ending"),
        ((*runs, "--figure", runs[0] / "figure.png"), "is in the run folder"),
    ):
        outcome = command("compare", *arguments)
        assert outcome.code == 2
        assert words in outcome.err
    assert "--seed" in command("compare", runs[0], tmp_path / "rows").err


def test_answers_are_stored_afterwards(material: Material, tmp_path: Path) -> None:
    """What `compare` misses, its own command brings; show, resume and check find nothing wrong with it."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert material.search(one, "--epsilon", "0.3").code == 0
    assert material.search(two, "--epsilon", "0.3", "--max-removed", "2").code == 0
    before = show(one)
    row = next(row for row in compared(one, two)["numbers"] if row["cells"][0] and row["cells"][0]["correct"] is None)
    arguments = row["cells"][0]["evaluate"].split()[1:]
    scored = command(*arguments, "--local", "--json")
    assert scored.code == 0, scored.err
    filled = next(each for each in compared(one, two)["numbers"] if each["num_removed"] == row["num_removed"])
    assert filled["cells"][0]["correct"] == scored.json["correct"]
    assert sum(stored_answers(one, filled["cells"][0]["round"]) or []) == scored.json["correct"]
    assert show(one) == before
    assert command("resume", one).code == 0
    assert show(one) == before


def test_answers_of_others_are_not_stored(material: Material, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert material.search(run, "--max-removed", "1").code == 0
    names = sorted(path.name for path in (run / "answers").iterdir())
    evaluate = ("evaluate", "--run", run, "--local", "--store")
    for more, words in (
        (("--model", material.other_model), "leave out the options that change either"),
        (("--seed", "1"), "leave out the options that change either"),
        (("--split", "all"), "split all cannot be stored"),
        (("--remove", "3,4,5"), "has no round without exactly layers [3, 4, 5]"),
    ):
        outcome = command(*evaluate, *more)
        assert outcome.code == 2
        assert words in outcome.err
    alone = command("evaluate", "--model", material.model, "--task", material.task, "--local", "--store")
    assert "name it with --run" in alone.err
    assert sorted(path.name for path in (run / "answers").iterdir()) == names
