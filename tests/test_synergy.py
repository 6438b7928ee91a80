"""Pruning and fine-tuning in every order: the stages are ordinary, nothing is done twice, the numbers are theirs."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import Material, command, show
from folders import material_fixture as material_fixture
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

import tale_ray
from tale_ray.attempt.synergy_folder import REGIMES
from tale_ray.errors import UsageError
from tale_ray.search.driver import held_out_scope
from tale_ray.store.reader import RunReader
from tale_ray.tuning import loop
from tale_ray.tuning.loop import Trainer

SPLITS = "search=0.2,select=0.2,test=0.2,finetune=0.4"
FAST = ("--epochs", 1, "--batch-size", 4, "--rank", 2, "--learning-rate", 0.0005, "--eval-every", 3, "--patience", 0)
STAGES = ("tale", "ft", "ft-tale", "tale-ft", "tale-ft-tale")


def arguments(material: Material, study: Path, *more: Any) -> list[str]:
    given = [str(part) for part in more]
    options = {"--model": material.model, "--task": material.task, "--splits": SPLITS, "--epsilon": "0.2"}
    flat = [part for name, value in options.items() if name not in given for part in (name, value)]
    return [str(part) for part in ("synergy", *flat, "--study", study, *FAST, *given)]


@pytest.fixture(scope="module", name="study")
def study_fixture(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing disturbed."""
    study = tmp_path_factory.mktemp("studies") / "study"
    outcome = command(*arguments(material, study, "--seeds", "0,1"))
    assert outcome.code == 0, outcome.err
    assert "stage 10 of 10: seed 1, tale-ft-tale" in outcome.err
    return study


@pytest.fixture(name="found")
def found_fixture(material: Material, study: Path) -> Any:
    outcome = command(*arguments(material, study, "--seeds", "0,1", "--json"))
    assert outcome.code == 0, outcome.err
    return outcome.json


def regime(found: Any, name: str, seed: int) -> Any:
    (entry,) = (each for each in found["regimes"] if each["regime"] == name)
    return next(each for each in entry["seeds"] if each["seed"] == seed)


def test_stages_are_ordinary_runs_and_trainings(study: Path) -> None:
    for seed in (0, 1):
        for stage in STAGES:
            place = study / f"seed-{seed}" / stage
            if stage.endswith("ft"):
                assert json.loads((place / "finetune.json").read_text())["state"] == "finished"
            else:
                assert show(place)["state"] == "finished"
        first, trained = show(study / f"seed-{seed}" / "tale"), study / f"seed-{seed}" / "tale-ft" / "finetune.json"
        assert json.loads(trained.read_text())["removed"] == first["selected"]["removed"]


def test_accuracies_are_those_of_the_runs(study: Path, found: Any) -> None:
    assert [each["regime"] for each in found["regimes"]] == list(REGIMES)
    for seed in (0, 1):
        runs = {stage: show(study / f"seed-{seed}" / stage)["test"] for stage in STAGES if not stage.endswith("ft")}
        expected = {
            "base": runs["tale"]["baseline"],
            "tale": runs["tale"]["selected"],
            "ft": runs["ft-tale"]["baseline"],
            "ft-tale": runs["ft-tale"]["selected"],
            "tale-ft": runs["tale-ft-tale"]["baseline"],
            "tale-ft-tale": runs["tale-ft-tale"]["selected"],
        }
        for name, entry in expected.items():
            values = regime(found, name, seed)
            assert (values["correct"], values["total"]) == (entry["correct"], entry["total"]), name
            interval = binomtest(entry["correct"], entry["total"]).proportion_ci(method="wilson")
            assert values["interval"] == pytest.approx([interval.low, interval.high])


def test_layers_are_numbered_as_in_the_full_model(study: Path, found: Any) -> None:
    for seed in (0, 1):
        first = show(study / f"seed-{seed}" / "tale")["selected"]["removed"]
        then = show(study / f"seed-{seed}" / "tale-ft-tale")["selected"]["removed"]
        left = [layer for layer in range(6) if layer not in first]
        values = regime(found, "tale-ft-tale", seed)
        assert values["removed"] == [*first, *(left[layer] for layer in then)]
        assert values["num_layers"] == 6 - len(first) - len(then)


def test_comparisons_are_exact_and_paired(study: Path, found: Any) -> None:
    def answers(stage: str, number: int) -> list[bool]:
        sheet = RunReader(str(study / "seed-1" / stage)).answers(held_out_scope("test", number))
        assert sheet is not None
        return [answer.correct for answer in sheet.answers]

    one, other = answers("tale-ft-tale", 0), answers("ft-tale", 0)
    wins = sum(left and not right for left, right in zip(one, other, strict=True))
    losses = sum(right and not left for left, right in zip(one, other, strict=True))
    (entry,) = (
        each for each in found["comparisons"] if (each["first"], each["second"], each["seed"]) == ("tale-ft", "ft", 1)
    )
    assert (entry["wins"], entry["losses"]) == (wins, losses)
    assert entry["p_value"] == pytest.approx(binomtest(wins, wins + losses).pvalue if wins + losses else 1.0)
    p_values = [each["p_value"] for each in found["comparisons"]]
    assert len(p_values) == 20
    expected = multipletests(p_values, method="holm")[1]
    assert [each["p_value_holm"] for each in found["comparisons"]] == pytest.approx(list(expected))


def test_every_report_of_the_study_shows_the_regimes(study: Path, found: Any, tmp_path: Path) -> None:
    values = regime(found, "tale-ft", 1)
    shown = f"{values['num_layers']}</td><td>{100 * values['accuracy']:.1f}%"
    for stage in ("tale", "ft-tale", "tale-ft-tale"):
        place = study / "seed-1" / stage
        stored = json.loads((place / "results" / "synergy.json").read_text())
        assert {**stored, "study": found["study"]} == {**found, "schema_version": stored["schema_version"]}
        assert command("report", place, "-o", tmp_path / f"{stage}.html").code == 0
        text = (tmp_path / f"{stage}.html").read_text(encoding="utf-8")
        assert f'<tr><th scope="row">TALE then FT</th><td>1</td><td>{shown}' in text


def test_a_block_is_removed_before_it_is_trained(material: Material, tmp_path: Path) -> None:
    """A training has no use for the limit that this strategy needs."""
    chosen = ("--strategy", "contiguous", "--max-removed", 2, "--regimes", "tale,tale-ft", "--pick", "final", "--json")
    outcome = command(*arguments(material, tmp_path / "study", "--epsilon", "1", *chosen))
    assert outcome.code == 0, outcome.err
    assert len(regime(outcome.json, "tale-ft", 0)["removed"]) == 2


def test_training_is_measured(study: Path, found: Any) -> None:
    for seed, each in enumerate(found["training"]):
        stored = json.loads((study / f"seed-{seed}" / "ft" / "finetune.json").read_text())
        full = stored["seconds"]["training"] / stored["steps_done"]
        assert each["full"]["seconds_per_step"] == pytest.approx(full)
        assert each["seconds_per_step_ratio"] == pytest.approx(each["pruned"]["seconds_per_step"] / full)
        assert regime(found, "ft-tale", seed)["trainable_parameters"] == stored["trainable_parameters"]
    assert regime(found, "tale", 0)["trainable_parameters"] == 0


def test_a_finished_study_is_shown_again_and_nothing_is_loaded(
    study: Path, found: Any, material: Material, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tale_ray.cluster.worker.load_model", None)
    monkeypatch.setattr("tale_ray.model.load.load_model", None)
    figure = tmp_path / "figure.svg"
    outcome = command(*arguments(material, study, "--seeds", "0,1", "--plot", figure))
    assert outcome.code == 0, outcome.err
    for words in ("(TALE then FT) then TALE", "p (Holm)", "of the CPU time", f"study: {study}"):
        assert words in outcome.out
    seconds, steps = (
        [sum(each[model][name] for each in found["training"]) for model in ("pruned", "full")]
        for name in ("seconds", "steps")
    )
    ratio = (seconds[0] / steps[0]) / (seconds[1] / steps[1])
    assert f"all seeds: a step of the pruned models takes {ratio:.2f} of the time" in outcome.out
    assert "accuracy on test rows" in figure.read_text()


def test_python_finds_what_the_command_does(
    study: Path, found: Any, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tale_ray.model.load.load_model", None)  # the study is finished
    names = [name.removeprefix("--").replace("-", "_") for name in FAST[::2]]
    options = {**dict(zip(names, FAST[1::2], strict=True)), "splits": SPLITS, "epsilon": "0.2"}
    given: dict[str, Any] = {**options, "model": material.model, "task": material.task}
    assert tale_ray.synergy(study, **given, seeds=(0, 1)) == found
    assert tale_ray.synergy(study, **given, seeds="0,1", regimes=("base", "ft")) == found
    for wrong, words in (
        ({"seeds": ()}, "seeds is empty"),
        ({"seed": 3}, "seed 3 is not for a study of several: name it in seeds"),
        ({"regimes": ("tael",)}, "regimes: 'tael' is not known"),
        ({"pick": "best", "seeds": (0, 1)}, "another configuration"),
    ):
        with pytest.raises(UsageError, match=words):
            tale_ray.synergy(study, **given, **wrong)


def drive(given: list[str]) -> None:
    """The command in a process of its own, which ends at once, as kill -9 ends it, in its second training."""
    own, models = Trainer._step, set()
    loop.PAUSE = 0.0

    def dies(self: Trainer) -> float:
        loss = own(self)
        models.add(id(self))
        if len(models) == 2 and self.progress.step == 5:
            os.kill(os.getpid(), 9)
        return loss

    Trainer._step = dies  # type: ignore[method-assign]
    command(*given)


def winners(run: Path) -> list[Any]:
    """Rounds without what was not scored because it could not win, which depends on the clock."""
    return [(entry["removed"], entry["correct"]) for entry in show(run)["rounds"]]


def decisions(study: Path) -> Iterator[Any]:
    for stage in STAGES:
        place = study / "seed-0" / stage
        if stage.endswith("ft"):
            stored = json.loads((place / "finetune.json").read_text())
            yield [stored[name] for name in ("losses", "evaluations", "kept_step", "digest")]
            yield (place / "model" / "model.safetensors").read_bytes()
        else:
            yield [show(place)[name] for name in ("selected", "test", "stop_reason")]
            yield winners(place)


def test_killed_in_the_middle_it_goes_on_at_the_stage_and_the_step(
    study: Path, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "study"
    given = arguments(material, folder)
    process = multiprocessing.get_context("spawn").Process(target=drive, args=(given,))
    process.start()
    process.join(200)
    assert process.exitcode == -9
    assert not (folder / "seed-0" / "tale-ft" / "model").exists()
    stages = [folder / "seed-0" / stage for stage in ("tale", "ft")]
    before = {path: path.stat().st_mtime_ns for stage in stages for path in stage.rglob("*") if path.is_file()}
    steps: list[int] = []
    own = Trainer._step

    def counted(self: Trainer) -> float:
        steps.append(self.progress.step)
        return own(self)

    monkeypatch.setattr(Trainer, "_step", counted)
    outcome = command(*given)
    assert outcome.code == 0, outcome.err
    assert "training goes on after step 4 of 10" in outcome.err
    assert steps == list(range(4, 10)), "no training but the one that was killed, from the step that was lost"
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before, "finished stages are not touched"
    assert list(decisions(folder)) == list(decisions(study))


def test_fewer_regimes_need_fewer_stages_and_more_go_on(study: Path, material: Material, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    outcome = command(*arguments(material, folder, "--regimes", "base,ft", "--json"))
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in (folder / "seed-0").iterdir()) == ["ft", "ft-tale", "tale"]
    assert show(folder / "seed-0" / "ft-tale")["rounds"] == [], "only the model itself is scored"
    assert [each["regime"] for each in outcome.json["regimes"]] == ["base", "ft"]
    assert outcome.json["training"] == []
    more = command(*arguments(material, folder, "--json"))
    assert more.code == 0, more.err
    assert len(more.json["regimes"]) == 6
    assert winners(folder / "seed-0" / "ft-tale") == winners(study / "seed-0" / "ft-tale")


def test_fewer_regimes_are_told_of_though_more_were_begun(material: Material, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    assert command(*arguments(material, folder, "--regimes", "base,tale")).code == 0
    values = json.loads((folder / "synergy.json").read_text())
    (folder / "synergy.json").write_text(json.dumps({**values, "regimes": list(REGIMES)}))  # stopped after one stage
    outcome = command(*arguments(material, folder, "--regimes", "base,tale", "--json"))
    assert outcome.code == 0, outcome.err
    assert [each["regime"] for each in outcome.json["regimes"]] == ["base", "tale"]
    assert sorted(path.name for path in (folder / "seed-0").iterdir()) == ["tale"]
    outcome = command(*arguments(material, folder, "--regimes", "base,ft", "--json"))
    assert outcome.code == 0, outcome.err
    assert [each["regime"] for each in outcome.json["regimes"]] == ["base", "tale", "ft"], (
        "of ft-tale only ft is scored"
    )


@pytest.mark.parametrize("regimes", [5, None, (1, 2)])
def test_python_refuses_regimes_that_are_no_names(material: Material, tmp_path: Path, regimes: Any) -> None:
    with pytest.raises(UsageError, match=r"regimes .* is no list of names"):
        tale_ray.synergy(tmp_path, model=material.model, task=material.task, regimes=regimes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", 3], "option.rank: the study has 2, asked for is 3"),
        (["--seeds", "0,2"], "seeds: the study has [0, 1], asked for is [0, 2]"),
        (["--epsilon", "0.3"], "search.epsilon: the study has"),
        (["--pick", "best"], "pick: the study has"),
        (["--rows", 10], "counts: the study has"),
    ],
)
def test_another_configuration_is_refused(study: Path, material: Material, options: list[Any], words: str) -> None:
    seeds = [] if "--seeds" in options else ["--seeds", "0,1"]
    outcome = command(*arguments(material, study, *seeds, *options))
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert "holds a study with another configuration; nothing was changed" in outcome.err
    assert words in outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--splits", "search=0.5,select=0.2,test=0.3"], "has no finetune rows"),
        (["--splits", "search=0.5,finetune=0.5"], "has no test rows with seed 0"),
        (["--splits", "search=0.3,test=0.3,finetune=0.4"], "has no select rows with seed 0"),
        (["--regimes", "base,tael"], "regimes: 'tael' is not known"),
        (["--regimes", "base,base"], "name one at least, and each once"),
        (["--seeds", "0,0"], "a seed is given twice"),
        (["--rank", 0], "rank 0 is out of range"),
        (["--plot", "figure.doc"], "has no known ending"),
        (["--model", "./nowhere"], "model folder ./nowhere does not exist"),
        (["--epsilon", "2"], "epsilon '2' is out of range"),
        (["--study", "s3://bucket/both"], "--study s3:/bucket/both is no local folder"),
        (["--study", "~nobody-of-that-name/both"], "cannot be a folder"),
    ],
)
def test_nonsense_is_refused_before_anything_is_loaded_or_written(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[Any], words: str
) -> None:
    monkeypatch.setattr("tale_ray.cluster.worker.load_model", None)
    outcome = command(*arguments(material, tmp_path / "study", *options))
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert words in outcome.err
    assert not (tmp_path / "study").exists()


def test_a_folder_of_something_else_is_refused(study: Path, material: Material, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    assert "it holds letter.txt" in command(*arguments(material, tmp_path / "full")).err
    assert "is in the run folder" in command(*arguments(material, study / "seed-0" / "tale")).err
    moved = Path(shutil.copytree(study, tmp_path / "moved"))
    (moved / "synergy.json").write_text("{")
    assert "is truncated or was changed" in command(*arguments(material, moved, "--seeds", "0,1")).err
    values = json.loads((study / "synergy.json").read_text())
    for changed in ({"pick": "best"}, {"seeds": [0]}, {"seeds": None}, {"regimes": [{}]}, {"config": {}}):
        (moved / "synergy.json").write_text(json.dumps({**values, **changed}))
        outcome = command(*arguments(material, moved, "--seeds", "0,1"))
        assert (outcome.code, outcome.out) == (2, ""), changed
        assert "synergy.json was changed" in outcome.err
