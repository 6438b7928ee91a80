"""What `finetune` refuses, and that nothing is lost by it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from folders import Material, task_text, write_rows
from folders import material_fixture as material_fixture
from tuned import record, tune
from tuned import run_fixture as run_fixture
from tuned import trained_fixture as trained_fixture

import tale_ray.model.load


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", 0], "rank 0 is out of range: it is at least 1"),
        (["--alpha", -1], "alpha -1.0 is out of range: it is above 0"),
        (["--alpha", "nan"], "alpha nan is out of range"),
        (["--dropout", 1], "dropout 1.0 is out of range: it is a share from 0 to below 1"),
        (["--learning-rate", 0], "learning rate 0.0 is out of range"),
        (["--learning-rate", 2], "learning rate 2.0 is out of range"),
        (["--epochs", 0], "epochs 0.0 is out of range"),
        (["--epochs", "inf"], "epochs inf is out of range"),
        (["--steps", 0], "steps 0 is out of range"),
        (["--batch-size", 0], "batch size 0 is out of range"),
        (["--accumulate", -2], "accumulate -2 is out of range"),
        (["--weight-decay", -0.1], "weight decay -0.1 is out of range"),
        (["--max-grad-norm", 0], "max grad norm 0.0 is out of range"),
        (["--warmup-steps", 10], "warmup steps 10 are as many as the 10 steps"),
        (["--warmup-steps", -1], "warmup steps -1 is out of range"),
        (["--eval-every", 11], "eval every 11 steps is never in a training of 10"),
        (["--patience", -1], "patience -1 is out of range"),
        (["--target-modules", ""], "target modules: '' is no name of a layer"),
        (["--target-modules", "all-linear,q_proj"], "are no list of layers"),
        (["--workers", 0], "workers 0 is too small"),
        (["--workers", 8], "batch size 4 is less than the 8 workers"),
        (["--address", "h:1"], "one worker trains in this process"),
        (["--splits", "search=0.5,test=0.5"], "has no finetune rows: its rows are"),
        (["--splits", "search=0.5,finetune=0.1"], "has 10 finetune rows, and training needs 16"),
        (["--batch-size", 64], "has 40 finetune rows, and training needs 64"),
        (["--remove", "6"], "layer 6 cannot be removed: the model has 6 layers"),
        (["--model", "./nowhere"], "model folder ./nowhere does not exist"),
        (["--task", "bolean_synthetic"], "is not known"),
        (["--pick", "best"], "pick 'best' is a result of a run: name the run too"),
        (["--gpus-per-worker", 3], "3 GPUs per worker are asked for"),
    ],
)
def test_nonsense_is_refused_before_a_model_is_loaded(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[Any], words: str
) -> None:
    monkeypatch.setattr(tale_ray.model.load, "load_model", None)
    outcome = tune(material, tmp_path / "out", *options)
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert words in outcome.err
    assert not (tmp_path / "out").exists()


def own_task(folder: Path, rows: list[dict[str, Any]]) -> Path:
    write_rows(folder / "rows.jsonl", rows)
    path = folder / "own.yaml"
    path.write_text(task_text("own"))
    return path


def test_rows_that_are_scored_too_are_refused(material: Material, tmp_path: Path) -> None:
    rows = [{"question": f"t{number % 40 + 3}", "answer": f"t{number % 4 + 3}", "id": number} for number in range(80)]
    outcome = tune(material, tmp_path / "out", "--task", own_task(tmp_path, rows))
    assert outcome.code == 2
    assert "rows are both in finetune and in" in outcome.err
    assert "splits share no row" in outcome.err


def test_rows_of_one_label_are_refused(material: Material, tmp_path: Path) -> None:
    rows = [{"question": f"t{number}", "answer": "t3"} for number in range(3, 90)]
    outcome = tune(material, tmp_path / "out", "--task", own_task(tmp_path, rows))
    assert outcome.code == 2
    assert "finetune rows of task own have the reply 't3': a model would learn to say that" in outcome.err


def test_without_peft_it_is_said_how_to_install_it(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tale_ray.tuning.options.importlib.util.find_spec", lambda _: None)
    outcome = tune(material, tmp_path / "out")
    assert outcome.code == 2
    assert "pip install 'tale-ray[finetune]'" in outcome.err


def test_a_folder_of_something_else_is_refused(trained: Path, material: Material, tmp_path: Path, run: Path) -> None:
    other = tune(material, trained, "--remove", "3,1", "--rank", 3)
    assert other.code == 2
    assert "holds a training with another configuration" in other.err
    assert "option.rank: the folder has 2, asked for is 3" in other.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    assert "it holds letter.txt" in tune(material, tmp_path / "full").err
    assert "is in the run folder" in tune(material, run / "out").err
    (tmp_path / "file").write_text("")
    assert "is no folder" in tune(material, tmp_path / "file").err
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "finetune.json").write_text("{")
    assert "is truncated or was changed" in tune(material, tmp_path / "broken").err


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("s3://bucket/tuned", "--out s3:/bucket/tuned is no local folder"),
        ("~nobody-of-that-name/tuned", "cannot be a folder"),
        ("a" * 300, "cannot be a folder"),
        ("/proc/nothing/tuned", "cannot be written"),
    ],
)
def test_what_can_be_no_folder_is_refused(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tale_ray.model.load, "load_model", None)
    outcome = tune(material, out)  # type: ignore[arg-type]  # as it is typed
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert words in outcome.err
    assert not [*tmp_path.iterdir()]


def test_a_finished_training_that_was_changed_is_refused(
    trained: Path, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tale_ray.model.load, "load_model", None)

    def refusal(path: Path) -> str:
        outcome = tune(material, path, "--remove", "3,1")
        assert (outcome.code, outcome.out) == (2, ""), outcome
        return outcome.err

    for name in ("model", "adapter"):
        folder = Path(shutil.copytree(trained, tmp_path / f"without-{name}"))
        shutil.rmtree(folder / name)
        assert f"{folder / name} is gone" in refusal(folder)
    folder = Path(shutil.copytree(trained, tmp_path / "other"))
    shutil.copy(material.other_model / "model.safetensors", folder / "model")
    assert "is not what was merged there" in refusal(folder)
    for changed in ({"state": "odd"}, {"kept_step": None}, {"seconds": {}}, {"rows": {}}):
        (folder / "finetune.json").write_text(json.dumps({**record(trained), **changed}))
        assert "finetune.json was changed" in refusal(folder)


def test_what_was_refused_with_its_model_leaves_the_folder_free(material: Material, tmp_path: Path) -> None:
    assert tune(material, tmp_path / "out", "--target-modules", "q_prj").code == 2
    outcome = tune(material, tmp_path / "out", "--target-modules", "q_proj")
    assert outcome.code == 0, outcome.err
    other = tune(material, tmp_path / "out", "--target-modules", "v_proj")
    assert "holds a training with another configuration" in other.err


def test_a_damaged_checkpoint_is_refused_before_a_model_is_loaded(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tune(material, tmp_path / "out", "--target-modules", "q_prj").code == 2
    (tmp_path / "out" / "state" / "checkpoint.safetensors").write_bytes(b"torn")
    monkeypatch.setattr(tale_ray.model.load, "load_model", None)
    outcome = tune(material, tmp_path / "out", "--target-modules", "q_prj")
    assert outcome.code == 2
    assert "checkpoint.safetensors is damaged" in outcome.err


def test_names_that_no_layer_has_are_refused(material: Material, tmp_path: Path) -> None:
    outcome = tune(material, tmp_path / "out", "--target-modules", "nowhere_proj")
    assert outcome.code == 2
    assert "target modules nowhere_proj cannot be trained" in outcome.err
    outcome = tune(material, tmp_path / "other", "--target-modules", "lm_head")
    assert outcome.code == 2
    assert "target modules name the embedding or the head" in outcome.err
