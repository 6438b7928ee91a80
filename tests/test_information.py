"""The command `information`: right rows, right layers, nothing stored unasked, refusals before a model is loaded."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from folders import Material, command, show
from folders import material_fixture as material_fixture
from scipy.stats import spearmanr

import tale_ray
import tale_ray.cluster.worker
from tale_ray.attempt.information import InformationOptions, probed_rows
from tale_ray.attempt.rows import PreparedRows
from tale_ray.errors import ConfigError, TaskError
from tale_ray.records import CandidateScore, Example, Round, Score
from tale_ray.results import probe
from tale_ray.results.information import correlation_json
from tale_ray.results.probe import ProbeRule
from tale_ray.search.history import History
from tale_ray.store.reader import RunReader
from tale_ray.store.run import RunWriter
from tale_ray.tasks.spec import load_task

TASK = ("--task", "boolean_synthetic")
SPLITS = "search=0.05,select=0.03,test=0.04,finetune=0.05"  # of 1200 rows: 60, 36, 48, 60
NUM_LAYERS = 12


@pytest.fixture(scope="module", autouse=True)
def few_penalties() -> Iterator[None]:
    """How well a probe reads is tested elsewhere (test_probe.py): here it only has to read something, soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "STRENGTHS", (1e-3, 1e-1))
        yield


@pytest.fixture(scope="module", name="run")
def run_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("information") / "run"
    options = ("--local", "--exhaustive", "--max-removed", 2, "--epsilon", "1", "--splits", SPLITS)
    outcome = command("search", "--model", "bundled", *TASK, *options, "--run", run)
    assert outcome.code == 0, outcome.err
    return run


@pytest.fixture(scope="module", name="plot")
def plot_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plots") / "depth.svg"


@pytest.fixture(scope="module", name="found")
def found_fixture(run: Path, plot: Path) -> Any:
    outcome = command("information", run, "--pick", "final", "--json", "--plot", plot)
    assert outcome.code == 0, outcome.err
    assert "task boolean_synthetic: 84 rows, 2 labels" in outcome.err
    return outcome.json


@pytest.mark.slow
def test_json(run: Path, found: Any) -> None:
    final = show(run)["final"]
    assert set(found) == {
        *("run", "pick", "round", "removed", "task", "model", "rows", "labels", "measured", "versions", "num_layers"),
        *("hidden_size", "dtype", "device", "entropy", "probe", "full", "pruned", "controls", "correlation", "seconds"),
    }
    assert (found["run"], found["pick"], found["round"]) == (str(run), "final", final["round"])
    assert found["removed"] == final["removed"]
    assert (found["model"], found["dtype"], found["device"]) == ("bundled", "float32", "cpu")
    assert (found["num_layers"], found["hidden_size"]) == (NUM_LAYERS, 128)
    assert found["rows"] == {"count": 84, "splits": {"select": 36, "test": 48}, "repeated": 0, "rare": 0}
    assert sum(found["labels"].values()) == 84
    left = [layer for layer in range(NUM_LAYERS) if layer not in final["removed"]]
    assert [point["layer"] for point in found["full"]] == [None, *range(NUM_LAYERS)]
    assert [point["layer"] for point in found["pruned"]] == [None, *left]
    for point in (*found["full"], *found["pruned"]):
        assert set(point) == {"layer", "bits", "interval", "gain", "gain_interval", "accuracy", "shuffled"}
        assert point["interval"][0] <= point["bits"] <= point["interval"][1]
        assert point["bits"] <= found["entropy"] <= 1
        assert abs(point["shuffled"]) < 0.2, "of 84 rows"
    same = next(at for at, layer in enumerate(left) if layer != at)  # below the first removed layer nothing differs
    for full, pruned in zip(found["full"][: same + 1], found["pruned"], strict=False):
        assert pruned["bits"] == pytest.approx(full["bits"], abs=1e-3)
    assert abs(found["full"][0]["bits"]) < 0.01, "the last token of all prompts is the same"
    assert found["full"][-1]["bits"] > 0.2
    assert RunReader(str(run)).result("information") is None, "nothing is stored unasked"


@pytest.mark.slow
def test_gains_beside_what_removing_a_layer_costs(run: Path, found: Any) -> None:
    summary, told = show(run), found["correlation"]
    base = summary["baseline"]["correct"]
    gains = [point["gain"] for point in found["full"][1:]]
    changes = [(each["correct"] - base) / 60 for each in summary["rounds"][0]["candidates"]]
    assert (told["num_exact"], told["num_bounded_out"], told["reason"]) == (NUM_LAYERS, 0, None)
    assert [pair["gain"] for pair in told["layers"]] == gains
    assert [pair["change"] for pair in told["layers"]] == pytest.approx(changes)
    assert told["spearman"] == pytest.approx(spearmanr(gains, changes).statistic)
    assert told["interval"][0] <= told["spearman"] <= told["interval"][1]
    assert 0 < told["p_value"] <= 1


@pytest.mark.slow
def test_the_figure_is_a_file(found: Any, plot: Path) -> None:
    texts = {text.text for text in ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}text")}
    assert {"full model", "H(Y)", "controls", f"without {', '.join(map(str, found['removed']))}"} <= texts


@pytest.mark.slow
def test_python_says_the_same(run: Path, found: Any) -> None:
    same = tale_ray.information(run, pick="final")
    for name in ("measured", "seconds"):
        same.pop(name)
    assert same == {name: value for name, value in found.items() if name not in ("measured", "seconds")}


@pytest.mark.slow
def test_the_result_is_kept_and_reported_if_that_is_asked_for(run: Path, tmp_path: Path) -> None:
    kept = Path(shutil.copytree(run, tmp_path / "run"))
    before = show(kept)
    few = ("--pick", "2", "--rows", 60, "--folds", 3)
    outcome = command("information", kept, "--store", *few)
    assert outcome.code == 0, outcome.err
    assert "after" in outcome.out
    assert "removed" in outcome.out
    assert "H(Y) = " in outcome.out
    assert "controls: shuffled labels" in outcome.out
    assert "rank correlation of gains" in outcome.out
    stored = json.loads((kept / "results" / "information.json").read_text())
    assert (stored["round"], stored["rows"]["count"], stored["probe"]["folds"]) == (2, 60, 3)
    assert show(kept) == before
    RunReader(str(kept)).check()
    assert command("report", kept, "-o", tmp_path / "r.html").code == 0
    assert 'id="information"' in (tmp_path / "r.html").read_text()
    assert command("resume", kept, "--local").code == 0, "the run is as good as before"
    with RunWriter.claim(str(kept)):
        held = command("information", kept, "--json", "--store", *few)
    assert held.code == 2
    assert held.json["round"] == 2, "what was measured is printed all the same"
    assert "is being written by process" in held.err


@pytest.mark.slow
def test_a_figure_that_cannot_be_written_loses_nothing(
    run: Path, found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tale_ray.cli_information.run_information", lambda *_, **__: found)
    kept = Path(shutil.copytree(run, tmp_path / "run"))
    outcome = command("information", kept, "--store", "--json", "--plot", "/proc/nothing/depth.svg")
    assert outcome.code == 2
    assert "cannot be written" in outcome.err
    assert outcome.json == found
    assert (kept / "results" / "information.json").is_file()


def test_of_a_model_without_a_run(found: Any) -> None:
    options = ("--splits", SPLITS, "--remove", "2", "--split", "select,test", "--json")
    outcome = command("information", "--model", "bundled", *TASK, *options)
    assert outcome.code == 0, outcome.err
    other = outcome.json
    assert [other[name] for name in ("run", "pick", "round", "correlation")] == [None] * 4
    assert other["full"] == found["full"], "the same rows and the same model"
    assert [point["layer"] for point in other["pruned"]] == [None, 0, 1, *range(3, NUM_LAYERS)]
    assert other.keys() == found.keys()


@pytest.mark.slow
def test_of_a_result_that_removes_nothing(run: Path) -> None:
    outcome = command("information", run, "--pick", "0", "--rows", 50, "--json")
    assert outcome.code == 0, outcome.err
    assert (outcome.json["pruned"], outcome.json["removed"], outcome.json["round"]) == (None, [], 0)
    assert "pruned" not in command("information", run, "--pick", "0", "--rows", 50).out


# Which rows.


def prepared(targets: Sequence[str] = ("a", "b"), count: int = 60, **splits: int) -> PreparedRows:
    def rows(name: str, number: int) -> tuple[Example, ...]:
        digests = [hashlib.sha256(f"{name} {at}".encode()).hexdigest() for at in range(number)]
        return tuple(
            Example(digest, ({"role": "user", "content": digest},), "", targets[at % len(targets)])
            for at, digest in enumerate(digests)
        )

    examples: Any = {name: rows(name, splits.get(name, count)) for name in ("search", "select", "test")}
    filled = {name: found for name, found in examples.items() if found}
    return PreparedRows(
        load_task("boolean_synthetic"), filled, (), finetune=rows("finetune", splits.get("finetune", 0))
    )


def test_rows_that_the_search_has_seen_are_taken_only_if_that_is_said() -> None:
    default = probed_rows(prepared(), InformationOptions(), was_searched=True)
    assert default.splits == {"select": 60, "test": 60}
    free = probed_rows(prepared(), InformationOptions(), was_searched=False)
    assert free.splits == {"search": 60, "select": 60, "test": 60}
    for splits in (("search",), ("test", "search")):
        with pytest.raises(ConfigError, match="split 'search' holds the rows that the search chose its layers on"):
            probed_rows(prepared(), InformationOptions(splits=splits), was_searched=True)  # type: ignore[arg-type]
    allowed = InformationOptions(splits=("search", "test"), allow_search_rows=True)
    assert probed_rows(prepared(), allowed, was_searched=True).splits == {"search": 60, "test": 60}
    tuned = InformationOptions(splits=("finetune",))
    assert probed_rows(prepared(finetune=55), tuned, was_searched=True).splits == {"finetune": 55}


def test_empty_splits_are_named() -> None:
    with pytest.raises(TaskError, match=r"split select of task boolean_synthetic is empty.*--allow-search-rows"):
        probed_rows(prepared(select=0, test=0), InformationOptions(), was_searched=True)
    with pytest.raises(TaskError, match="split finetune of task boolean_synthetic is empty"):
        probed_rows(prepared(), InformationOptions(splits=("finetune",)), was_searched=False)


def test_rows_with_the_same_content_are_probed_once() -> None:
    rows = prepared(select=3, test=2)
    again = {**rows.examples, "test": (*rows.examples["select"], *rows.examples["test"], rows.examples["test"][0])}
    twice = PreparedRows(rows.spec, again, ())
    found = probed_rows(twice, InformationOptions(), was_searched=True)
    assert (found.splits, found.repeated) == ({"select": 3, "test": 2}, 4)
    assert len({example.digest for example in found.examples}) == len(found.examples) == 5


def test_rows_that_ask_the_same_are_probed_once_whatever_their_digests() -> None:
    rows = prepared(select=3, test=2)
    first = rows.examples["select"][0]
    again = {**rows.examples, "test": (replace(first, digest="0" * 64), *rows.examples["test"])}
    found = probed_rows(PreparedRows(rows.spec, again, ()), InformationOptions(), was_searched=True)
    assert (found.splits, found.repeated) == ({"select": 3, "test": 2}, 1)
    assert first in found.examples


def test_some_of_the_rows_are_the_same_ones_whatever_their_order() -> None:
    rows = prepared()
    some = probed_rows(rows, InformationOptions(rows=20), was_searched=True)
    backwards: Any = {split: found[::-1] for split, found in rows.examples.items()}
    other = probed_rows(PreparedRows(rows.spec, backwards, ()), InformationOptions(rows=20), was_searched=True)
    assert len(some.examples) == sum(some.splits.values()) == 20
    assert {example.digest for example in some.examples} == {example.digest for example in other.examples}
    assert all(some.splits.values()), "of both splits"


def test_rare_labels_are_left_out_if_that_is_said() -> None:
    rows = prepared(("a", "b") * 12 + ("c",))
    kept = probed_rows(rows, InformationOptions(), was_searched=True)
    with pytest.raises(ConfigError, match="label 'c' is too rare: it has 4 of 120 rows"):
        ProbeRule().check_labels(kept.labels)
    left = probed_rows(rows, InformationOptions(drop_rare_labels=True), was_searched=True)
    assert (left.rare, len(left.examples)) == ({"c": 4}, 116)
    ProbeRule().check_labels(left.labels)


# Beside accuracy.


def history(statuses: Sequence[str], *, committed: bool = True, start: tuple[int, ...] = ()) -> History:
    base = History(num_layers=len(statuses), start=start).with_round(
        Round(0, None, (), Score(50, 100, 0), (CandidateScore(None, 50, 100, 0, "exact", 0.0),), True)
    )
    candidates: Any = tuple(
        CandidateScore(layer, 40 + layer, 100 if status == "exact" else 70, 0, status, 0.0)
        for layer, status in enumerate(statuses)
    )
    return base.with_round(Round(1, 0, (*start, 0), Score(40, 100, 0), candidates, committed))


FULL = [{"layer": None, "gain": None}, *({"layer": layer, "gain": 0.1 * layer} for layer in range(6))]


@pytest.mark.parametrize("committed", [True, False])
def test_only_candidates_that_were_scored_on_all_rows_count(committed: bool) -> None:
    found = correlation_json(history(["exact", "bounded_out", *["exact"] * 4], committed=committed), FULL, seed=0)
    assert (found["num_exact"], found["num_bounded_out"]) == (5, 1)
    assert [pair["layer"] for pair in found["layers"]] == [0, 2, 3, 4, 5]
    assert [pair["change"] for pair in found["layers"]] == pytest.approx([-0.10, -0.08, -0.07, -0.06, -0.05])
    assert found["spearman"] == pytest.approx(1.0)
    assert found["p_value"] < 0.05


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        (
            history(["exact", *["bounded_out"] * 5]),
            "scored 1 candidate on all rows, and at least 4 are needed.*--exhaustive",
        ),
        (history(["exact"] * 6, start=(3,)), "did not start from the full model"),
        (History(num_layers=6).with_round(history(["exact"]).rounds[0]), "round 1 is not finished"),
    ],
)
def test_no_correlation_has_a_reason(rounds: History, words: str) -> None:
    found = correlation_json(rounds, FULL, seed=0)
    assert (found["spearman"], found["p_value"], found["interval"]) == (None, None, None)
    assert re.search(words, found["reason"])


# Refusals.


@pytest.fixture(name="no_model")
def no_model_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(tale_ray.cluster.worker, "load_model", load_model)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--split", "search"], "split 'search' holds the rows that the search chose its layers on"),
        (["--split", "select,everything"], "split 'everything' is not known: choose some of search, select, test"),
        (["--split", "shots"], "split 'shots' is not known"),
        (["--split", "test,test"], "names none, or one twice"),
        (["--split", ""], "split '' is not known"),
        (["--rows", "0"], "rows 0 are too few"),
        (["--rows", "49"], "49 rows are too few for a probe: it needs at least 50"),
        (["--folds", "2"], "folds 2 are too few: there are at least 3"),
        (["--folds", "80"], "and 80 folds need at least 80 of every label"),
        (["--probe-seed", "-1"], "probe seed -1 is negative"),
        (["--probe-seed", str(2**32)], "probe seed 4294967296 is too large"),
        (["--plot", "a" * 300 + ".svg"], "cannot be written"),
        (["--pick", "wrst"], "pick 'wrst' is not a result of"),
        (["--task", "boolean_synthetic"], "task 'boolean_synthetic' is given with a run, which has its own"),
        (["--shots", "2"], "shots 2 is given with a run"),
        (["--splits", "search=1"], "splits 'search=1' is given with a run"),
        (["--remove", "3"], "remove '3' is given with a run"),
        (["--model", "./nowhere"], "model folder ./nowhere does not exist"),
        (["--gpus-per-worker", "3"], "3 GPUs per worker are asked for"),
        (["--plot", "depth.pdf"], "--plot depth.pdf has no known ending: name a .png or .svg file"),
    ],
)
def test_refusals_of_a_run_before_a_model_is_loaded(run: Path, options: list[str], words: str) -> None:
    outcome = command("information", run, *options)
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert words in outcome.err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "model is missing: name it with --model"),
        (["--model", "bundled"], "task is missing: name it with --task"),
        (["--model", "bundled", *TASK, "--pick", "best"], "pick 'best' is a result of a run"),
        (["--model", "bundled", *TASK, "--store"], "--store keeps the result in a run"),
        (["--model", "bundled", *TASK, "--remove", "12"], "layer 12 cannot be removed: the model has 12 layers"),
        (["--model", "bundled", "--task", "nothing"], "nothing"),
    ],
)
def test_refusals_without_a_run(options: list[str], words: str) -> None:
    outcome = command("information", *options)
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert words in outcome.err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"folds": "5"}, "folds '5' is not a whole number"),
        ({"probe_seed": 1.5}, "seed 1.5 is not a whole number"),
        ({"rows": 60.5}, "rows 60.5 is not a whole number"),
        ({"split": 5}, "split 5 is no list of splits"),
        ({"drop_rare_labels": "no"}, "drop rare labels 'no' is neither true nor false"),
        ({"pick": "selected"}, "pick 'selected' is a result of a run"),
    ],
)
def test_python_refuses_nonsense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tale_ray.information(model="bundled", task="boolean_synthetic", **options)


ONE_TOKEN = "max_new_tokens: 1"
TASK_FILE = """
name: asked
source: {path: json, data_files: rows.jsonl}
messages: [{role: user, content: "{{ question }}"}]
reply: "{{ answer }}"
target: "{{ answer }}"
answer: {type: %s}
%s
"""


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("kind", "more", "answers", "words"),
    [
        ("number", "max_new_tokens: 8", range(100), "label '0' is too rare, as are 99 more of 100 labels"),
        ("word, labels: ['yes', 'no']", ONE_TOKEN, ["yes"] * 100, "all 100 rows have the label 'yes'"),
        ("word, labels: ['yes', 'no']", ONE_TOKEN, ["yes", "no"] * 20, "40 rows are too few for a probe"),
        (
            "word, labels: ['yes', 'no']",
            ONE_TOKEN,
            ["yes"] * 97 + ["no"] * 3,
            "label 'no' is too rare: it has 3 of 100 rows",
        ),
        ("likelihood, choices: \"['yes', 'no']\"", "", ["yes", "no"] * 50, "has answers of type likelihood"),
    ],
)
def test_tasks_whose_labels_cannot_be_probed(
    tmp_path: Path, kind: str, more: str, answers: Sequence[Any], words: str
) -> None:
    rows = [json.dumps({"question": f"how many {at}", "answer": str(answer)}) for at, answer in enumerate(answers)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "task.yaml").write_text(TASK_FILE % (kind, more))
    outcome = command("information", "--model", "bundled", "--task", tmp_path / "task.yaml")
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert words in outcome.err


@pytest.mark.usefixtures("no_model")
def test_missing_extras_are_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sklearn", None)
        outcome = command("information", run)
    assert outcome.code == 2
    assert "pip install 'tale-ray[information]'" in outcome.err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'tale-ray[plots]'" in command("information", run, "--plot", "depth.svg").err


def test_another_model_or_other_rows_are_refused(run: Path, material: Material, tmp_path: Path) -> None:
    other = command("information", run, "--model", material.other_model)
    assert other.code == 2
    assert "is not the one that" in other.err
    changed = Path(shutil.copytree(run, tmp_path / "run"))
    manifest = json.loads((changed / "run.json").read_text())
    manifest["rows"]["test"]["digest"] = "0" * 64
    (changed / "run.json").write_text(json.dumps(manifest))
    outcome = command("information", changed)
    assert outcome.code == 2
    assert "the test rows of task boolean_synthetic are not those that" in outcome.err
