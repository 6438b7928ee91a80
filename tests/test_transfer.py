"""Layers found on one task, tested on another: every cell against plain models on plain rows, and what is refused."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from families import tiny_tokenizer
from folders import Material, command, make_rows, show, task_text, write_rows
from folders import material_fixture as material_fixture
from oracles import oracle_replies
from pyarrow import parquet
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

import tale_ray
import tale_ray.cluster.worker
from tale_ray.attempt.transfer_plan import unique
from tale_ray.cluster.worker import Worker
from tale_ray.search.pace import Pace, UnitShape
from tale_ray.store.reader import RunReader
from tale_ray.store.run import RunWriter
from tale_ray.tasks.prompts import encode
from tale_ray.tasks.splits import row_digest

NUM_SHARED = 40  # rows of the first task that the second one has, too


@pytest.fixture(scope="module", name="model")
def model_fixture(material: Material) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(material.model)


@pytest.fixture(scope="module", name="rows")
def rows_fixture(material: Material, model: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows by task and digest; those of `second` and `third` lie beside the first task's, with task files."""
    first = [json.loads(line) for line in (material.folder / "rows.jsonl").read_text().splitlines()]
    found = {"tiny": first, "second": first[:NUM_SHARED] + make_rows(model, seed=1), "third": make_rows(model, seed=2)}
    for name in ("second", "third"):
        write_rows(material.folder / f"{name}.jsonl", found[name])
        (material.folder / f"{name}.yaml").write_text(task_text(name, rows=f"{name}.jsonl"))
    return {name: {row_digest(row): row for row in each} for name, each in found.items()}


@pytest.fixture(scope="module", name="searched")
def searched_fixture(material: Material, rows: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs; tests take copies, so that none sees what another one scored.

    With other seeds, some test rows of each task are rows that the other one was searched on.
    """
    folder = tmp_path_factory.mktemp("transfer")
    for seed, name, task in ((0, "one", material.task), (1, "two", material.folder / "second.yaml")):
        options = ("--seed", seed, "--epsilon", "0.3", "--max-removed", "3")
        outcome = material.search(folder / name, "--task", task, *options)
        assert outcome.code == 0, outcome.err
        assert len(show(folder / name)["rounds"]) == 3
    return folder


@pytest.fixture(name="runs")
def runs_fixture(searched: Path, tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(searched, tmp_path / "runs")
    return tmp_path / "runs" / "one", tmp_path / "runs" / "two"


@pytest.fixture(name="no_model")
def no_model_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tale_ray.cluster.worker, "load_model", None)


def transferred(*arguments: Any) -> dict[str, Any]:
    outcome = command("transfer", *arguments, "--local", "--json")
    assert outcome.code == 0, outcome.err
    return outcome.json  # type: ignore[no-any-return]


def digests_of(run: Path, scope: str) -> list[str]:
    return list(parquet.read_table(run / "answers" / f"{scope}.parquet")["row_digest"].to_pylist())


def plain_answers(model: Any, rows: Sequence[dict[str, Any]], removed: Sequence[int]) -> tuple[list[bool], int]:
    """Which rows a model that was rebuilt without some layers answers correctly, one by one; and unreadable replies."""
    prompts = [encode(tiny_tokenizer(), [{"role": "user", "content": row["question"]}]) for row in rows]
    replies = oracle_replies(model, tiny_tokenizer(), removed, prompts, 1)
    correct = [reply.strip() == row["answer"] for reply, row in zip(replies, rows, strict=True)]
    return correct, sum(re.search(r"t\d+", reply) is None for reply in replies)


def test_every_cell_is_what_a_plain_model_answers(
    runs: tuple[Path, Path], material: Material, model: Any, rows: dict[str, dict[str, dict[str, Any]]]
) -> None:
    found = transferred(*runs, "--task", material.folder / "third.yaml", "--splits", "search=0.2,test=0.5")
    assert [task["name"] for task in found["tested_on"]] == ["tiny", "second", "third"]
    seen = {digest for run in runs for scope in ("round-0000", "select-0000") for digest in digests_of(run, scope)}
    kept = next(path for path in (runs[0] / "answers").glob("transfer-*") if len(digests_of(runs[0], path.stem)) == 50)
    tested = {"tiny": digests_of(runs[0], "test-0000"), "second": digests_of(runs[1], "test-0000")}
    tested["third"] = digests_of(runs[0], kept.stem)
    used = {name: [digest for digest in digests if digest not in seen] for name, digests in tested.items()}
    left_out = {name: len(tested[name]) - len(used[name]) for name in tested}
    assert left_out["tiny"] > 0, "the second task's search rows are some of the first one's test rows"
    assert left_out["second"] > 0
    assert {task["name"]: task["left_out"] for task in found["tested_on"]} == left_out
    removed = {name: show(run)["selected"]["removed"] for name, run in zip(("tiny", "second"), runs, strict=True)}
    assert {source["name"]: source["removed"] for source in found["searched_on"]} == removed
    assert all(removed.values())

    p_values = []
    scores = iter(found["scores"])
    for searched_on in removed:
        for tested_on in tested:
            score = next(scores)
            assert (score["searched_on"], score["tested_on"]) == (searched_on, tested_on)
            assert score["is_own"] == (searched_on == tested_on)
            asked = [rows[tested_on][digest] for digest in used[tested_on]]
            full, num_full = plain_answers(model, asked, ())
            pruned, num_pruned = plain_answers(model, asked, removed[searched_on])
            for side, answers, invalid in (("baseline", full, num_full), ("pruned", pruned, num_pruned)):
                counts = [score[side][name] for name in ("correct", "total", "invalid")]
                assert counts == [sum(answers), len(asked), invalid]
                wilson = binomtest(sum(answers), len(asked)).proportion_ci(0.95, method="wilson")
                assert score[side]["interval"] == pytest.approx([wilson.low, wilson.high])
            wins = sum(a and not b for a, b in zip(pruned, full, strict=True))
            losses = sum(b and not a for a, b in zip(pruned, full, strict=True))
            assert (score["wins"], score["losses"], score["ties"]) == (wins, losses, len(asked) - wins - losses)
            assert score["difference"] == pytest.approx((wins - losses) / len(asked))
            exact = float(mcnemar([[0, wins], [losses, 0]], exact=True).pvalue) if wins + losses else 1.0
            assert score["p_value"] == pytest.approx(exact)
            p_values.append(exact)
    assert found["num_tests"] == 6
    corrected = multipletests(p_values, method="holm")[1]
    assert [score["p_value_holm"] for score in found["scores"]] == pytest.approx(list(corrected))
    assert any(score["wins"] + score["losses"] for score in found["scores"] if not score["is_own"])


def test_nothing_is_scored_twice(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = transferred(*runs)
    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*") if path.is_file()}
    for run in runs:
        assert json.loads((run / "results" / "transfer.json").read_text()) == {**found, "schema_version": 1}
        assert not list((run / "partial").glob("transfer-*"))
        RunReader(str(run)).check()
    monkeypatch.setattr(tale_ray.cluster.worker, "load_model", None)
    assert transferred(*runs) == found
    after = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*") if path.is_file()}
    assert after == before, "nothing is written where nothing is new"


def test_answers_without_other_layers_are_others(
    runs: tuple[Path, Path], material: Material, searched: Path, tmp_path: Path
) -> None:
    """Answers are found again by what decides them: layers of another round, or of none, are not taken for these."""
    further = ("--task", material.folder / "third.yaml", "--splits", "search=0.2,test=0.5")
    first = transferred(*runs, *further, "--pick", "1")
    last = transferred(*runs, *further, "--pick", "final")
    assert transferred(*runs, *further, "--pick", "1") == first != last
    alone = Path(shutil.copytree(searched, tmp_path / "alone"))
    assert transferred(alone / "one", alone / "two", *further, "--pick", "final")["scores"] == last["scores"]
    other_way_round = transferred(*reversed(runs), *further, "--pick", "final")["scores"]
    assert sorted(other_way_round, key=str) == sorted(last["scores"], key=str)
    assert len(list((runs[0] / "answers").glob("transfer-*"))) == 5, "the full model's to the third task, and 2 of each"


def test_the_runs_stay_what_they_were(runs: tuple[Path, Path]) -> None:
    before = [show(run) for run in runs]
    transferred(*runs, "--pick", "1")
    assert [show(run) for run in runs] == before
    for run in runs:
        assert command("resume", run).code == 0
        assert (run / "answers" / "test-0001.parquet").exists(), "its own test rows, as `evaluate --store` keeps them"
    assert [show(run) for run in runs] == before


def test_an_interrupted_matrix_goes_on_with_what_is_there(
    runs: tuple[Path, Path], searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(shutil.copytree(searched, tmp_path / "whole"))
    expected = transferred(whole / "one", whole / "two")["scores"]
    monkeypatch.setattr(Pace, "shape", lambda *_: UnitShape(rows=4, candidates=1))
    score, cells = Worker.score, []

    def dies(worker: Worker, unit: Any) -> Any:
        if len(cells) == 11:
            raise KeyboardInterrupt
        cells.append((unit.scope, unit.rows))
        return score(worker, unit)

    monkeypatch.setattr(Worker, "score", dies)
    assert command("transfer", *runs, "--local").code == 75
    assert not (runs[0] / "results" / "transfer.json").exists()
    assert list((runs[0] / "partial").glob("transfer-*/*.parquet")) or list((runs[1] / "partial").glob("transfer-*/*"))
    for run in runs:
        assert RunReader(str(run)).lease() is None, "the runs are free again"

    def counts(worker: Worker, unit: Any) -> Any:
        cells.append((unit.scope, unit.rows))
        return score(worker, unit)

    monkeypatch.setattr(Worker, "score", counts)
    assert transferred(*runs)["scores"] == expected
    done = [(scope, row) for scope, rows in cells for row in rows]
    assert len(done) == len(set(done)), "no row is scored twice"
    assert len({scope for scope, _ in done}) == 2


def test_a_person_sees_it(runs: tuple[Path, Path], tmp_path: Path) -> None:
    found = transferred(*runs)
    table = command("transfer", *runs)
    assert table.code == 0, table.err
    page = tmp_path / "report.html"
    assert command("report", runs[1], "-o", page).code == 0
    for text in (table.out, page.read_text()):
        for task in found["tested_on"]:
            assert f"{task['rows']['count']} test rows" in text
            baseline = task["baseline"]
            assert f"{100 * baseline['correct'] / baseline['total']:.1f}% [" in text
        for source in found["searched_on"]:
            assert f"without {', '.join(map(str, source['removed']))}" in text
        for score in found["scores"]:
            low, high = score["pruned"]["interval"]
            shown = f"{100 * score['pruned']['correct'] / score['pruned']['total']:.1f}% "
            assert f"{shown}[{100 * low:.1f}, {100 * high:.1f}]" in text
            low, high = score["difference_interval"]
            assert f"{100 * score['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]" in text
        assert "left out for all models" in text
        assert "for 4 cells" in text
    assert "left out for all models" in table.err, "said before anything is scored, too"


def test_a_result_that_removes_nothing_is_the_full_model(runs: tuple[Path, Path]) -> None:
    found = transferred(*runs, "--pick", "0")
    assert found["num_tests"] == 0
    for score in found["scores"]:
        assert score["pruned"] == score["baseline"]
        assert (score["p_value"], score["p_value_holm"], score["difference"]) == (1.0, 1.0, 0.0)
    assert "the uncut model *" in command("transfer", *runs, "--pick", "0").out


def test_runs_that_share_a_task_share_its_column(runs: tuple[Path, Path], material: Material, tmp_path: Path) -> None:
    """Three runs, two of them on the same rows: a row each, a column for each task; and another seed has its own."""
    other = tmp_path / "other"
    assert material.search(other, "--strategy", "reverse", "--max-removed", "2").code == 0
    found = transferred(*runs, other, "--pick", "final")
    assert [task["name"] for task in found["tested_on"]] == ["tiny", "second"]
    assert [source["name"] for source in found["searched_on"]] == ["tiny (one)", "second", "tiny (other)"]
    own = [(score["searched_on"], score["tested_on"]) for score in found["scores"] if score["is_own"]]
    assert own == [("tiny (one)", "tiny"), ("second", "second"), ("tiny (other)", "tiny")]
    seeded = tmp_path / "seeded"
    assert material.search(seeded, "--seed", "1", "--max-removed", "2", "--epsilon", "0.5").code == 0
    found = transferred(runs[0], seeded, "--pick", "final")
    assert [task["name"] for task in found["tested_on"]] == ["tiny (one)", "tiny (seeded)"]
    assert all(task["left_out"] for task in found["tested_on"])


def test_names_differ() -> None:
    assert unique(["a", "b"], ["x", "y"]) == ["a", "b"]
    assert unique(["a", "a", "b"], ["x", "y", "y"]) == ["a (x)", "a (y)", "b"]
    assert unique(["a", "a"], ["x", "x"]) == ["a (x) 1", "a (x) 2"]


@pytest.mark.ray
def test_workers_on_ray_answer_the_same(
    runs: tuple[Path, Path], searched: Path, tmp_path: Path, ray_address: str
) -> None:
    outcome = command("transfer", *runs, "--address", ray_address, "--workers", 2, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("worker-0 joined") <= 1, "workers join once, whatever they are asked"
    whole = Path(shutil.copytree(searched, tmp_path / "whole"))
    assert outcome.json["scores"] == transferred(whole / "one", whole / "two")["scores"]


def test_the_python_api(runs: tuple[Path, Path], material: Material) -> None:
    third = material.folder / "third.yaml"
    found = tale_ray.transfer(
        tale_ray.open_run(runs[0]), runs[1], tasks=third, splits={"search": 0.2, "test": 0.5}, local=True
    )
    assert found == transferred(*runs, "--task", third, "--splits", "search=0.2,test=0.5")
    with pytest.raises(tale_ray.errors.ConfigError, match="splits is for further tasks, and runs have their own"):
        tale_ray.transfer(*runs, splits="search=0.2", local=True)
    with pytest.raises(tale_ray.errors.ConfigError, match="option 'epsilom' is not known"):
        tale_ray.transfer(*runs, epsilom=1)
    with pytest.raises(tale_ray.errors.ConfigError, match="no run is named"):
        tale_ray.transfer(local=True)


# Refused, in words, before any model is loaded.


@pytest.mark.usefixtures("no_model")
class TestRefusals:
    def test_runs_of_other_models(self, runs: tuple[Path, Path], tmp_path: Path) -> None:
        manifest = json.loads((runs[1] / "run.json").read_text())
        manifest["model"]["digest"] = "f" * 64
        manifest["config"]["model"] |= {"model": "org/other", "revision": "v2"}
        (runs[1] / "run.json").write_text(json.dumps(manifest))
        refused = command("transfer", *runs, "--local")
        assert refused.code == 2
        digest = model_digest(runs[0])
        assert f"{runs[0]} and {runs[1]} have different models: " in refused.err
        named = "org/other at revision v2 (SHA-256 ffffffffffff, float32)"
        assert f"(SHA-256 {digest[:12]}, float32) and {named}" in refused.err
        manifest["model"] |= {"digest": digest, "dtype": "bfloat16"}
        (runs[1] / "run.json").write_text(json.dumps(manifest))
        assert f"(SHA-256 {digest[:12]}, bfloat16)" in command("transfer", *runs, "--local").err

    def test_runs_that_have_not_ended(self, runs: tuple[Path, Path]) -> None:
        (runs[1] / "rounds" / "round-0003.parquet").unlink()
        refused = command("transfer", *runs, "--local")
        assert refused.code == 2
        assert f"{runs[1]} is interrupted" in refused.err
        assert f"go on with `tale-ray resume {runs[1]}`" in refused.err
        with RunWriter.claim(str(runs[0])):
            assert f"{runs[0]} is running" in command("transfer", *runs, "--local").err

    def test_what_has_no_test_rows(self, runs: tuple[Path, Path], material: Material) -> None:
        third = material.folder / "third.yaml"
        refused = command("transfer", runs[0], "--task", third, "--splits", "search=1", "--local")
        assert refused.code == 2
        assert "task third has no test rows" in refused.err
        assert "give the test split a share with --splits" in refused.err
        manifest = json.loads((runs[1] / "run.json").read_text())
        del manifest["rows"]["test"]
        (runs[1] / "run.json").write_text(json.dumps(manifest))
        assert f"{runs[1]} has no test rows" in command("transfer", *runs, "--local").err

    def test_a_task_all_of_whose_test_rows_were_searched_on(
        self, runs: tuple[Path, Path], material: Material, rows: Any
    ) -> None:
        own = [rows["tiny"][digest] for digest in digests_of(runs[0], "round-0000")]
        write_rows(material.folder / "seen.jsonl", own)
        (material.folder / "seen.yaml").write_text(task_text("seen", rows="seen.jsonl"))
        refused = command("transfer", runs[0], "--task", material.folder / "seen.yaml", "--local")
        assert refused.code == 2
        assert "all 15 test rows of task seen are rows that one of the runs was searched on" in refused.err

    def test_nothing_to_transfer(self, runs: tuple[Path, Path], tmp_path: Path) -> None:
        same = Path(shutil.copytree(runs[0], tmp_path / "same"))
        for arguments, words in (
            ((), "no run is named"),
            ((runs[0],), "tiny is the only task, and nothing is tested on another one"),
            ((runs[0], same), "tiny is the only task, and nothing is tested on another one"),
            ((runs[0], runs[0]), "is named twice"),
            ((runs[0], tmp_path / "gone"), "is not a run"),
            ((*runs, "--shots", 2), "shots is for further tasks"),
            ((*runs, "--pick", "7"), "pick '7' is not a result"),
            ((*runs, "--model", tmp_path / "nowhere"), "nowhere does not exist"),
        ):
            refused = command("transfer", *arguments, "--local")
            assert (refused.code, refused.out) == (2, ""), arguments
            assert words in refused.err

    def test_a_study(self, runs: tuple[Path, Path], tmp_path: Path) -> None:
        (tmp_path / "study.json").write_text("{}")
        assert "is a study, not a run: name one of its runs" in command("transfer", runs[0], tmp_path, "--local").err

    def test_rows_and_tasks_that_are_no_longer_those_of_a_run(
        self, runs: tuple[Path, Path], material: Material, tmp_path: Path
    ) -> None:
        for name in ("second.yaml", "second.jsonl"):
            shutil.copy(material.folder / name, tmp_path / name)
        manifest = json.loads((runs[1] / "run.json").read_text())
        manifest["config"]["task"]["task"] = str(tmp_path / "second.yaml")
        (runs[1] / "run.json").write_text(json.dumps(manifest))
        lines = (tmp_path / "second.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "second.jsonl").write_text("".join(lines[1:]))
        refused = command("transfer", *runs, "--local")
        assert refused.code == 2
        assert f"rows of task second are not those that {runs[1]} was searched on" in refused.err
        assert refused.err.strip().endswith("restore its data")
        (tmp_path / "second.jsonl").write_text("".join(lines))
        text = (tmp_path / "second.yaml").read_text()
        (tmp_path / "second.yaml").write_text(text.replace("max_new_tokens: 1", "max_new_tokens: 2"))
        assert command("transfer", *runs, "--local").err.strip().endswith("has changed; restore the task file")


def model_digest(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text())["model"]["digest"])


def test_answers_that_were_changed_are_named(runs: tuple[Path, Path]) -> None:
    transferred(*runs)
    kept = next((runs[0] / "answers").glob("transfer-*.parquet"))
    other = RunReader(str(runs[0])).answers("test-0000")
    assert other is not None
    shutil.copy(runs[0] / "answers" / "test-0000.parquet", kept)
    refused = command("transfer", *runs, "--local")
    assert refused.code == 2
    assert f"{kept} was changed" in refused.err
    kept.unlink()
    assert transferred(*runs)


def test_another_model_in_the_place_of_the_runs_is_refused(runs: tuple[Path, Path], material: Material) -> None:
    refused = command("transfer", *runs, "--local", "--model", material.other_model)
    assert refused.code == 2
    assert "is not the one that" in refused.err
    assert "say with --model where it is" in refused.err
    assert not list((runs[0] / "answers").glob("transfer-*"))
