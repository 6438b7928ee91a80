"""What the commands do and say: results on stdout, progress on stderr, the exit codes of the contract."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from families import tiny_tokenizer
from folders import Material, command, show
from folders import material_fixture as material_fixture

import tale_ray.cluster.worker
from tale_ray.store.reader import RunReader
from tale_ray.tasks.spec import builtin_tasks, load_task


@pytest.fixture(scope="module", name="finished")
def finished_fixture(material: Material) -> Path:
    """A run that is finished; tests that change it take a copy."""
    run = material.folder / "finished"
    outcome = material.search(run)
    assert outcome.code == 0, outcome.err
    return run


@pytest.fixture(name="copy")
def copy_fixture(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "moved" / "run"))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*arguments: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(tale_ray.cluster.worker, "load_model", load_model)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("_")
    }


# A search and its result.


def test_a_search_shows_its_result_on_stdout_and_its_progress_on_stderr(material: Material, tmp_path: Path) -> None:
    outcome = material.search(tmp_path / "run")
    assert outcome.code == 0
    summary = show(tmp_path / "run")
    assert summary["baseline"]["correct"] > 25, "the material is worth a search"
    assert len(summary["rounds"]) >= 2
    assert summary["rejected_round"] is not None
    assert "finished (below_floor)" in outcome.out
    assert "1 attempt, " in outcome.out
    assert f"run: {tmp_path / 'run'}\n" in outcome.out, "a path is never broken into lines"
    progress = outcome.err.splitlines()
    assert "task tiny: 50 search rows, 20 select rows, 30 test rows" in progress
    assert any(line.startswith("model: llama, 6 layers, float32 on cpu") for line in progress)
    for entry in summary["rounds"]:
        layer, correct = entry["removed_layer"], entry["correct"]
        assert f"round {entry['round']}: layer {layer} removed, {correct}/50 = {2 * correct}.0%" in progress
    assert outcome.out == command("show", tmp_path / "run").out


def test_a_finished_run_prints_its_result_again(finished: Path, material: Material, no_model: None) -> None:
    before = files(finished)
    again = material.search(finished)
    assert again.code == 0
    assert again.out == command("show", finished).out
    assert "nothing is left to do" in again.err
    resumed = command("resume", finished)
    assert (resumed.code, resumed.out) == (0, again.out)
    assert files(finished) == before


def test_the_default_folder_is_named_by_task_and_digest(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = command("search", "--local", "--model", material.model, "--task", material.task, "--dry-run")
    assert plan.code == 0
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"
    run = plan.out.splitlines()[-1].removeprefix("run folder: ")
    assert run.startswith("runs/tiny-")
    assert len(run) == len("runs/tiny-") + 12
    done = command("search", "--local", "--model", material.model, "--task", material.task, "--max-removed", "0")
    assert done.code == 0
    (other,) = (tmp_path / "runs").iterdir()
    assert other.name.startswith("tiny-")
    assert other.name != Path(run).name, "another limit is another run"


def test_a_dry_run_says_what_would_be_done(material: Material, tmp_path: Path, no_model: None) -> None:
    outcome = material.search(tmp_path / "run", "--dry-run", "--rows", "1", "--splits", "search=0.5")
    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        "task tiny: 1 search row",
        "note: no rows are left to report on: accuracies on the search rows are optimistic, report no others",
        f"model {material.model}: present",
        f"run folder: {tmp_path / 'run'}",
    ]
    assert not (tmp_path / "run").exists()


# The same run, elsewhere or with other resources.


def test_a_larger_epsilon_continues_and_keeps_the_rejected_round(
    material: Material, copy: Path, tmp_path: Path
) -> None:
    before, stored = show(copy), files(copy)
    rejected = before["rejected_round"]
    outcome = material.search(copy, "--epsilon", "0.4")
    assert outcome.code == 0, outcome.err
    after = show(copy)
    number = rejected["round"]
    assert after["rounds"][: number - 1] == before["rounds"]
    assert after["rounds"][number - 1] == rejected, "the rejected round is committed as it was"
    assert after["epsilon"] == 0.4
    assert f"round-{number:04d}: " in outcome.err
    assert "candidate-rows are there" in outcome.err
    for name, content in stored.items():
        if name.startswith("rounds/"):
            assert files(copy)[name] == content, "no round file is rewritten"
    assert material.search(tmp_path / "fresh", "--epsilon", "0.4").code == 0
    fresh = show(tmp_path / "fresh")
    for name in ("rounds", "rejected_round", "best", "bsba", "final", "test", "stop_reason"):
        assert after[name] == fresh[name]
    assert after["work"]["candidate_rows"] == fresh["work"]["candidate_rows"], "nothing was scored twice"


def test_resume_takes_larger_limits(material: Material, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert material.search(run, "--max-removed", "1").code == 0
    assert len(show(run)["rounds"]) == 1
    outcome = command("resume", run, "--max-removed", "2")
    assert outcome.code == 0, outcome.err
    assert (len(show(run)["rounds"]), show(run)["stop_reason"]) == (2, "max_removed")
    assert command("resume", run, "--epsilon", "0.4", "--max-removed", "3").code == 0
    assert (len(show(run)["rounds"]), show(run)["epsilon"]) == (3, 0.4)
    for smaller in (("--max-removed", "1"), ("--epsilon", "0.05")):
        refused = command("resume", run, *smaller)
        assert refused.code == 2
        assert "another configuration" in refused.err


def test_a_smaller_epsilon_is_another_configuration(material: Material, copy: Path, no_model: None) -> None:
    before = files(copy)
    outcome = material.search(copy, "--epsilon", "0.05", "--seed", "3", "--keep-layers", "2")
    assert outcome.code == 2
    first, *lines = outcome.err.strip().splitlines()
    assert f"{copy} holds a run with another configuration; nothing was changed" in first
    assert '  epsilon: the run has "0.1", asked for is "0.05" (only a larger one goes on)' in lines
    assert "  keep_layers: the run has [], asked for is [2]" in lines
    assert "  seed: the run has 0, asked for is 3" in lines
    assert any(line.startswith("  rows.search: the run has") for line in lines)
    assert files(copy) == before


def test_options_that_change_no_decision_may_change(material: Material, finished: Path, no_model: None) -> None:
    outcome = material.search(finished, "--workers", "1", "--batch-bytes", "1GiB", "--time-limit", "1h", "--exhaustive")
    assert outcome.code == 0, outcome.err
    reordered = material.search(finished, "--splits", "test=0.3,search=0.5,select=0.2")
    assert reordered.code == 0, "shares are cut in one order, however they are written"


def test_a_moved_run_of_a_moved_model_and_task_goes_on(material: Material, tmp_path: Path) -> None:
    model, task = tmp_path / "model", tmp_path / "task"
    shutil.copytree(material.model, model)
    task.mkdir()
    for name in ("tiny.yaml", "rows.jsonl"):
        shutil.copy(material.folder / name, task / name)
    run = tmp_path / "run"
    outcome = material.search(run, "--model", model, "--task", task / "tiny.yaml", "--max-removed", "1")
    assert outcome.code == 0, outcome.err
    (run / "results" / "test.json").unlink()  # so that something is left to do
    for answers in (run / "answers").glob("test-*"):
        answers.unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in (model, task, run):
        folder.rename(elsewhere / folder.name)
    lost = command("resume", elsewhere / "run")
    assert lost.code == 2
    assert f"task file {task / 'tiny.yaml'} does not exist" in lost.err
    lost = command("resume", elsewhere / "run", "--task", elsewhere / "task" / "tiny.yaml")
    assert lost.code == 2
    assert f"model folder {model} does not exist" in lost.err
    found = command(
        *("resume", elsewhere / "run"),
        *("--task", elsewhere / "task" / "tiny.yaml", "--model", elsewhere / "model"),
    )
    assert found.code == 0, found.err
    summary = show(elsewhere / "run")
    assert summary["attempts"] == 2
    assert summary["test"] is not None
    assert summary["model"] == str(elsewhere / "model")


def test_relative_paths_mean_the_same_elsewhere(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(material.folder)
    paths = ("--model", "model", "--task", "tiny.yaml", "--run", "relative")
    assert command("search", "--local", *paths, "--max-removed", "0").code == 0
    monkeypatch.chdir(tmp_path)
    resumed = command("resume", material.folder / "relative")
    assert resumed.code == 0, resumed.err


def test_a_changed_model_is_refused(material: Material, copy: Path, no_model: None) -> None:
    before = files(copy)
    outcome = command("resume", copy, "--model", material.other_model)
    assert outcome.code == 2
    assert "another configuration" in outcome.err
    assert "  model: the run has" in outcome.err
    assert files(copy) == before


def test_a_changed_row_is_refused(material: Material, copy: Path, tmp_path: Path, no_model: None) -> None:
    shutil.copy(material.task, tmp_path / "tiny.yaml")
    lines = (material.folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[1:]))
    outcome = command("resume", copy, "--task", tmp_path / "tiny.yaml")
    assert outcome.code == 2
    assert "  rows." in outcome.err


def test_other_prompts_are_refused_after_loading(material: Material, copy: Path) -> None:
    """The model's digest covers the tokenizer, so only another version of a library can do this."""
    (copy / "results" / "test.json").unlink()
    manifest = json.loads((copy / "run.json").read_text())
    manifest["tokens"]["search"] = "0" * 64
    (copy / "run.json").write_text(json.dumps(manifest))
    outcome = command("resume", copy)
    assert outcome.code == 2
    assert "other prompts" in outcome.err
    assert not (copy / "lease.json").exists()


# A baseline of zero.


def test_a_chat_template_that_writes_tokens_without_an_embedding(material: Material, tmp_path: Path) -> None:
    model = shutil.copytree(material.model, tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>"]})
    tokenizer.chat_template = "{% for message in messages %}<user> {{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(model)
    outcome = material.search(tmp_path / "run", "--model", model)
    assert outcome.code == 2, outcome.err
    assert "token 97 is in a prompt" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_baseline_of_zero(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    outcome = material.search(run, "--task", material.zero_task)
    assert (outcome.code, outcome.out) == (1, "")
    reason = outcome.err.strip().splitlines()[-1]
    assert "the full model answers 0 of 50 search rows correctly, so there is nothing to protect" in reason
    assert "no answer could be read from 50 of its replies" in reason
    summary = show(run)
    assert (summary["state"], summary["stop_reason"]) == ("failed", "baseline_zero")
    assert summary["baseline"] == {"correct": 0, "total": 50, "invalid": 50}
    assert [path.name for path in (run / "rounds").iterdir()] == ["round-0000.parquet"]
    assert "tale-ray tasks show" in command("show", run).out

    monkeypatch.setattr(tale_ray.cluster.worker, "load_model", None)
    before = files(run)
    again = material.search(run, "--task", material.zero_task)
    assert again.code == 1
    assert again.err.strip().splitlines()[-1] == reason
    assert command("resume", run).code == 1
    assert files(run) == before


# Damage.


def test_damage_is_named_and_nothing_is_overwritten(material: Material, copy: Path, no_model: None) -> None:
    def refused(name: str, *words: str) -> None:
        for outcome in (material.search(copy, "--epsilon", "0.4"), command("resume", copy)):
            assert outcome.code == 2, outcome.err
            assert str(copy / name) in outcome.err
            for each in words:
                assert each in outcome.err
        assert files(copy) == before

    original = files(copy)
    (partial,) = {path.parent for path in (copy / "partial").rglob("*.parquet")}
    for path in (copy / "rounds" / "round-0001.parquet", sorted(partial.iterdir())[0], copy / "run.json"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        before = files(copy)
        refused(path.relative_to(copy).as_posix(), "is truncated")
        assert command("show", copy).code == (0 if path.parent == partial else 2), (
            "a unit of a finished round is not read"
        )
        path.write_bytes(whole)
    (copy / "rounds" / "notes.txt").write_text("mine")
    before = files(copy)
    refused("rounds/notes.txt", "is foreign", "move it elsewhere")
    assert {name: content for name, (content, _) in before.items() if name != "rounds/notes.txt"} == {
        name: content for name, (content, _) in original.items()
    }


# Reading.


def test_the_rounds_are_a_table_for_everybody(finished: Path) -> None:
    code = f"import pandas; print(pandas.read_parquet({str(finished / 'rounds')!r}).to_json(orient='records'))"
    found = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    summary = show(finished)
    winners = [row["layer"] for row in found if row["winner"] and row["committed"] and row["round"]]
    assert winners == summary["final"]["removed"]
    counts = {(row["round"], row["layer"]): row["correct"] for row in found}
    for entry in [*summary["rounds"], summary["rejected_round"]]:
        for candidate in entry["candidates"]:
            assert counts[entry["round"], candidate["layer"]] == candidate["correct"]


def test_answers_are_there_for_every_committed_round(finished: Path) -> None:
    for entry in show(finished)["rounds"]:
        sheet = pandas.read_parquet(finished / "answers" / f"round-{entry['round']:04d}.parquet")
        assert int(sheet["correct"].sum()) == entry["correct"]


# Other commands.


def test_an_evaluation_of_a_run_equals_what_the_run_says(finished: Path) -> None:
    summary = show(finished)
    for pick in ("best", "bsba", "final", "1"):
        entry = summary["rounds"][0] if pick == "1" else summary[pick]
        scored = command("evaluate", "--run", finished, "--pick", pick, "--split", "search", "--json")
        assert scored.code == 0, scored.err
        assert {name: scored.json[name] for name in ("split", "removed", "correct", "total")} == {
            "split": "search",
            "removed": entry["removed"],
            "correct": entry["correct"],
            "total": entry["total"],
        }
    test = command("evaluate", "--run", finished, "--pick", "final", "--json").json
    assert test["correct"] == summary["test"]["final"]["correct"]
    assert test["accuracy"] == test["correct"] / test["total"]
    before = files(finished)
    whole = command("evaluate", "--run", finished, "--pick", "0", "--split", "all", "--json").json
    assert whole["total"] == 100
    assert files(finished) == before, "an evaluation stores nothing"
    assert command("evaluate", "--run", finished, "--pick", "7").code == 2
    assert command("evaluate", "--run", finished, "--pick", "best", "--remove", "1").code == 2


def test_an_evaluation_of_a_model(material: Material, finished: Path) -> None:
    model = ("evaluate", "--local", "--model", material.model, "--task", material.task)
    final = show(finished)["final"]
    layers = ",".join(map(str, final["removed"]))
    scored = command(*model, "--remove", layers, "--split", "search", "--json").json
    assert scored["correct"] == final["correct"]
    text = command(*model, "--remove", "3,1", "--rows", "10", "--split", "search")
    assert text.out.startswith("search rows, layers removed: 3, 1: ")
    assert "/10 = " in text.out
    assert "evaluation" not in text.out
    with_run = command("evaluate", "--run", finished, "--remove", "", "--split", "search", "--json").json
    assert with_run["correct"] == show(finished)["baseline"]["correct"], "layers may be named instead of a result"


def test_the_config_file_and_who_wins(material: Material, tmp_path: Path) -> None:
    options = {
        "model": str(material.model),
        "task": str(material.task),
        "epsilon": 0.1,
        "rows": 10,
        "remove": [3, 1],
        "local": True,
        "max_removed": 2,
        "run": str(tmp_path / "of-the-file"),
    }
    path = tmp_path / "options.yaml"
    path.write_text(json.dumps(options))
    for arguments in (["--config", path, "--rows", "7"], ["--rows", "7", "--config", path]):
        outcome = command("search", *arguments, "--run", tmp_path / "run")
        assert outcome.code == 0, outcome.err
    config = RunReader(str(tmp_path / "run")).manifest().config
    assert config["task"]["rows"] == 7
    assert config["strategy"]["remove"] == [3, 1]
    assert config["strategy"]["epsilon"] == "0.1"
    assert show(tmp_path / "run")["rows"]["search"] == 7
    assert not (tmp_path / "of-the-file").exists()


def test_splits_of_a_config_file(material: Material, tmp_path: Path, no_model: None) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("splits:\n  search: 0.4\n  test: 0.25\n")
    outcome = material.search(tmp_path / "run", "--config", path, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("task tiny: 40 search rows, 25 test rows\n")


def test_tasks() -> None:
    listed = command("tasks")
    assert listed.code == 0
    for name in builtin_tasks():
        assert f"{name}: " in listed.out
    assert "generated (boolean, seed 0, 1200 rows)" in listed.out


@pytest.mark.parametrize("name", [*builtin_tasks(), "a task of one's own"])
def test_what_is_shown_of_a_task_is_a_task(material: Material, tmp_path: Path, name: str) -> None:
    shown = command("tasks", "show", name if name in builtin_tasks() else material.task)
    assert shown.code == 0
    assert shown.out.startswith("# ")
    original = load_task(name if name in builtin_tasks() else str(material.task))
    assert shown.out.split("\n", 1)[1].strip() == original.text.strip()
    assert yaml.safe_load(shown.out)["name"] == original.name
    (tmp_path / "copy.yaml").write_text(shown.out)
    copy = load_task(str(tmp_path / "copy.yaml"))
    assert copy.identity() == original.identity()
    assert copy.source == original.source


@pytest.mark.parametrize("asked", [[], ["--local"], ["--address", "ray://asked"]])
def test_where_ray_is(material: Material, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: list[str]) -> None:
    """The command line, then what a run was made with, then the variable that Ray's own tools read."""
    from tale_ray import cli

    seen = []
    monkeypatch.setattr(cli, "_search", lambda config, *_: seen.append(config.resources))
    monkeypatch.setenv("RAY_ADDRESS", "ray://variable")
    options = ["--model", material.model, "--task", material.task, "--run", tmp_path / "run"]
    assert command("search", *options, *asked).code == 0
    expected = {"": "ray://variable", "--local": None, "--address": "ray://asked"}["".join(asked[:1])]
    assert (seen[0].address, seen[0].local) == (expected, asked == ["--local"])


def test_a_local_run_goes_on_locally_unless_asked(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tale_ray import cli

    seen = []
    monkeypatch.setattr(cli, "_search", lambda config, *_: seen.append(config.resources))
    monkeypatch.setenv("RAY_ADDRESS", "ray://variable")
    for arguments in ([], ["--workers", "4"], ["--address", "ray://asked"]):
        assert command("resume", finished, *arguments).code == 0
    assert [(each.local, each.address, each.workers) for each in seen] == [
        (True, None, None),
        (False, "ray://variable", 4),
        (False, "ray://asked", None),
    ]


@pytest.mark.slow
def test_the_package_is_a_command_too() -> None:
    """And says so without importing torch, ray or transformers."""
    code = (
        "import sys, runpy; sys.argv = ['tale_ray', '--version']\n"
        "try: runpy.run_module('tale_ray', run_name='__main__')\n"
        "except SystemExit as ended: assert not ended.code\n"
        "assert not {'torch', 'ray', 'transformers', 'datasets'} & set(sys.modules)"
    )
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert plain.returncode == 0, plain.stderr
    wrong = [sys.executable, "-m", "tale_ray", "search", "--rows", "x"]
    result = subprocess.run(wrong, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert result.returncode == 2
    assert "python -m tale_ray search" in result.stderr
