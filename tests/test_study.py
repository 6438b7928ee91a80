"""The same search with several seeds: ordinary runs under one folder, and one table of them."""

import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from folders import Material, command, show
from folders import material_fixture as material_fixture

import tale_ray
import tale_ray.attempt.study
from tale_ray.errors import ConfigError, StoreError
from tale_ray.store.study import StudyFolder

SEEDS = (0, 1, 2)
NAMES = ("baseline", "best", "bsba", "final", "selected")


@pytest.fixture(scope="module", name="study")
def study_fixture(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = tmp_path_factory.mktemp("studies") / "study"
    outcome = material.search(study, "--seeds", "0,1,2")
    assert outcome.code == 0, outcome.err
    assert "seed 1, 2 of 3" in outcome.err
    assert "in how many of 3 runs a layer is removed" in outcome.out
    return study


@pytest.fixture(name="copy")
def copy_fixture(study: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(study, tmp_path / "moved" / "study"))


def test_the_runs_are_those_of_one_search_each(study: Path, material: Material, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    assert material.search(alone, "--seed", "1").code == 0
    one, other = show(alone), show(study / "seed-1")
    for name in ("rounds", "rejected_round", "test", "selected", "optimism", "rows"):
        assert one[name] == other[name]
    digests = {
        json.loads((study / f"seed-{seed}" / "run.json").read_text())["rows"]["test"]["digest"] for seed in SEEDS
    }
    assert len(digests) == len(SEEDS), "every seed has rows of its own"


def test_the_summary_of_a_study(study: Path) -> None:
    summary = show(study)
    assert (summary["state"], summary["seeds"], summary["task"], summary["num_layers"]) == (
        "finished",
        [0, 1, 2],
        "tiny",
        6,
    )
    runs = [show(study / f"seed-{seed}") for seed in SEEDS]
    assert [{"seed": seed, **run} for seed, run in zip(SEEDS, runs, strict=True)] == summary["runs"]
    assert set(summary["test"]) == set(NAMES)
    for name in NAMES:
        accuracies = [run["test"][name]["correct"] / run["test"][name]["total"] for run in runs]
        entry = summary["test"][name]
        assert entry["accuracy"]["mean"] == pytest.approx(statistics.mean(accuracies))
        assert entry["accuracy"]["standard_deviation"] == pytest.approx(statistics.stdev(accuracies))
        if name != "baseline":
            gains = [run["test"][name]["difference"] for run in runs]
            assert entry["difference"]["mean"] == pytest.approx(statistics.mean(gains))
            assert entry["optimism"]["mean"] == pytest.approx(statistics.mean(run["optimism"][name] for run in runs))
            assert entry["p_values"] == [run["test"][name]["p_value"] for run in runs]
            assert min(entry["p_values_holm"]) == pytest.approx(min(1.0, 3 * min(entry["p_values"])))
    for name in ("selected", "final"):
        counted = [sum(layer in run[name]["removed"] for run in runs) for layer in range(6)]
        assert summary["removed"][name] == counted
    assert summary["removed"]["runs"] == 3


def test_one_table_for_a_person(study: Path) -> None:
    text = command("show", study).out
    for seed in SEEDS:
        entry = show(study)["runs"][seed]["test"]["selected"]
        assert f"{100 * entry['correct'] / entry['total']:.1f}% [{100 * entry['interval'][0]:.1f}, " in text
    mean = show(study)["test"]["baseline"]["accuracy"]["mean"]
    assert f"{100 * mean:.1f}%" in next(line for line in text.splitlines() if "mean" in line and "%" in line)
    assert f"see one of its runs with: tale-ray show {study}/seed-0" in text


def test_a_finished_study_is_not_searched_again(
    study: Path, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tale_ray.cluster.worker.load_model", None)
    outcome = material.search(study, "--seeds", "0,1,2")
    assert outcome.code == 0, outcome.err
    assert outcome.out == command("show", study).out


def test_a_killed_study_goes_on_where_it_was(
    study: Path, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "study"
    searched: list[int] = []
    run_search = tale_ray.attempt.study.run_search

    def dies_in_the_second(config: Any, interruption: Any) -> Any:
        searched.append(config.task.seed)
        for number, event in enumerate(run_search(config, interruption)):
            if searched == [0, 1] and number == 12:
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(tale_ray.attempt.study, "run_search", dies_in_the_second)
    assert material.search(folder, "--seeds", "0,1,2").code != 0
    killed = show(folder)
    assert killed["state"] in ("interrupted", "failed")
    assert killed["runs"][0]["state"] == "finished"
    assert killed["runs"][2] is None
    assert killed["removed"]["runs"] == 1, "what is not finished is not counted"
    assert f"go on with: tale-ray resume {folder}" in command("show", folder).out
    assert command("resume", folder).code == 0
    assert show(folder)["test"] == show(study)["test"]
    assert show(folder)["removed"] == show(study)["removed"]


def test_a_moved_study_goes_on(copy: Path, study: Path) -> None:
    shutil.rmtree(copy / "seed-2")
    assert show(copy)["state"] == "interrupted"
    assert command("resume", copy).code == 0
    assert show(copy)["test"] == show(study)["test"]


def test_runs_with_other_options_than_the_study_are_not_mixed_in(copy: Path) -> None:
    assert command("resume", copy / "seed-1", "--epsilon", "0.3").code == 0
    summary = show(copy)
    assert (summary["state"], summary["removed"]["runs"]) == ("interrupted", 2)
    assert f"go on with: tale-ray resume {copy}" in command("show", copy).out
    smaller = command("resume", copy)
    assert (smaller.code, "epsilon" in smaller.err) == (2, True)
    assert command("resume", copy, "--epsilon", "0.3").code == 0
    summary = show(copy)
    assert (summary["state"], summary["removed"]["runs"]) == ("finished", 3)
    assert {run["epsilon"] for run in summary["runs"]} == {0.3}


def test_a_run_whose_test_rows_are_not_scored_is_not_finished(copy: Path) -> None:
    (copy / "seed-2" / "results" / "test.json").unlink()
    assert show(copy)["state"] == "interrupted"
    assert command("resume", copy).code == 0
    assert show(copy)["state"] == "finished"


def test_a_seed_without_a_right_row_does_not_keep_the_others_from_being_searched(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_search = tale_ray.attempt.study.run_search

    def nothing_right_with_seed_1(config: Any, interruption: Any) -> Any:
        if config.task.seed == 1:
            config = replace(config, task=replace(config.task, task=str(material.zero_task)))
        return run_search(config, interruption)

    monkeypatch.setattr(tale_ray.attempt.study, "run_search", nothing_right_with_seed_1)
    study = tmp_path / "study"
    for _ in range(2):  # the second time goes on, and finds the same
        outcome = material.search(study, "--seeds", "0,1,2", "--max-removed", "1")
        assert outcome.code == 1
        assert "seed 1: the full model answers 0 of 50 search rows correctly" in outcome.err
    summary = show(study)
    assert [run["state"] for run in summary["runs"]] == ["finished", "failed", "finished"]
    assert (summary["state"], summary["removed"]["runs"]) == ("failed", 2)
    assert f"see what failed with: tale-ray show {study}/seed-1" in command("show", study).out


def test_one_seed_has_no_deviation(material: Material, tmp_path: Path) -> None:
    assert material.search(tmp_path / "study", "--seeds", "7", "--max-removed", "1").code == 0
    assert show(tmp_path / "study")["test"]["best"]["accuracy"]["standard_deviation"] is None
    assert command("show", tmp_path / "study").code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seeds", "0,0"], "a seed is given twice"),
        (["--seeds", "zero"], "'zero' is not a list of seeds"),
        (["--seeds", ""], "is not a list of seeds"),
        (["--seeds", "0,1", "--seed", "3"], "exclude each other"),
    ],
)
def test_wrong_seeds_are_refused(material: Material, tmp_path: Path, options: list[str], words: str) -> None:
    outcome = material.search(tmp_path / "study", *options)
    assert outcome.code == 2
    assert words in outcome.err
    assert not (tmp_path / "study").exists()


def test_a_study_is_not_compared_as_if_it_were_one_run(study: Path, copy: Path) -> None:
    """The remedy that is named works: runs of one seed have the same test rows."""
    refused = command("compare", study, copy)
    assert refused.code == 2
    assert f"{study} is a study of the seeds 0, 1, 2: each of its runs has other test rows" in refused.err
    remedy = f"tale-ray compare {study}/seed-0 {copy}/seed-0"
    assert f"`{remedy}`" in refused.err
    assert command(*remedy.split()[1:]).code == 0
    assert "other test rows" in command("compare", study / "seed-0", study / "seed-1").err
    alone = command("compare", study)
    assert "e.g." not in alone.err
    assert f"`tale-ray show {study}` has all its runs in one table" in alone.err
    beside = command("compare", copy / "seed-2", study)
    assert f"`tale-ray compare {copy}/seed-2 {study}/seed-2`" in beside.err


def test_folders_that_are_no_study_or_another_one_are_refused(material: Material, study: Path, tmp_path: Path) -> None:
    other = material.search(study, "--seeds", "0,1")
    assert (other.code, "holds a study of the seeds 0,1,2" in other.err) == (2, True)
    never = material.search(study, "--seeds", "0,1,2", "--resume", "never")
    assert (never.code, "--resume never" in never.err) == (2, True)
    must = material.search(tmp_path / "none", "--seeds", "0,1", "--resume", "must")
    assert (must.code, "holds no study" in must.err) == (2, True)
    run = material.search(study / "seed-0", "--seeds", "0,1")
    assert (run.code, "is not the folder of a study" in run.err) == (2, True)
    evaluated = command("evaluate", "--run", study)
    assert (evaluated.code, "is a study, not a run" in evaluated.err) == (2, True)
    dry = material.search(study, "--seeds", "0,1", "--dry-run")
    assert (dry.code, "holds a study of the seeds 0,1,2" in dry.err) == (2, True)
    single = material.search(study)
    assert single.code == 2
    assert show(study)["state"] == "finished", "nothing was lost"


def test_another_configuration_is_refused_as_of_a_run(material: Material, study: Path) -> None:
    outcome = material.search(study, "--seeds", "0,1,2", "--epsilon", "0.05")
    assert outcome.code == 2
    assert "epsilon" in outcome.err


def test_damage_is_named(copy: Path) -> None:
    path = copy / "study.json"
    whole = json.loads(path.read_text())
    for content in ({**whole, "seeds": []}, {**whole, "seeds": "0,1"}, {}, {**whole, "schema_version": 99}):
        path.write_text(json.dumps(content))
        outcome = command("show", copy)
        assert outcome.code == 2
        assert "study.json" in outcome.err


def test_the_config_file_may_name_seeds(material: Material, tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text(f"seeds: [3, 4]\nmax_removed: 1\nrun: {tmp_path / 'study'}\n")
    arguments = ["--config", file, "--model", material.model, "--task", material.task, "--local"]
    assert command("search", *arguments, "--dry-run").code == 0
    assert command("search", *arguments).code == 0
    assert show(tmp_path / "study")["seeds"] == [3, 4]
    one = command("search", *arguments, "--seed", "3", "--run", tmp_path / "run")
    assert one.code == 0, "the command line wins"
    assert "rounds" in show(tmp_path / "run")


def test_the_default_folder_names_the_seeds(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = command(
        *["search", "--model", material.model, "--task", material.task, "--local"],
        *["--max-removed", "0", "--seeds", "1,0"],
    )
    assert outcome.code == 0, outcome.err
    (study,) = (tmp_path / "runs").iterdir()
    assert study.name.startswith("tiny-")
    assert study.name.endswith("-seeds-1-0")


def test_the_python_api(study: Path, material: Material, tmp_path: Path) -> None:
    opened = tale_ray.open_study(study)
    assert opened.summary == show(study)
    assert [run.final.removed for run in opened.runs.values()] == [
        tuple(run["final"]["removed"]) for run in show(study)["runs"]
    ]
    selected = opened.runs[0].selected
    assert selected is not None
    assert selected.number == show(study)["runs"][0]["selected"]["round"]
    options = {"model": material.model, "task": material.task, "local": True, "max_removed": 1}
    found = tale_ray.search(seeds=[0, 1], run=tmp_path / "study", **options)
    assert found.summary["seeds"] == [0, 1]
    assert tale_ray.resume_study(tmp_path / "study").summary == found.summary
    with pytest.raises(ConfigError, match="exclude each other"):
        tale_ray.search(seeds=[0, 1], seed=0, run=tmp_path / "study", **options)
    with pytest.raises(ConfigError, match="exclude each other"):
        tale_ray.search(seeds=3, seed=0, run=tmp_path / "study", **options)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="'0' is not a whole number"):
        tale_ray.search(seeds=["0"], run=tmp_path / "study", **options)  # type: ignore[list-item]
    with pytest.raises(StoreError, match="is not a study"):
        tale_ray.open_study(study / "seed-0")


def test_runs_of_a_study_on_storage_with_options_lie_under_its_folder() -> None:
    assert StudyFolder("s3://bucket/studies/one?endpoint_override=localhost").run(3) == (
        "s3://bucket/studies/one/seed-3?endpoint_override=localhost"
    )
