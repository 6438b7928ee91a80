"""The command `finetune`: kills change nothing, what is written is standard."""

import json
import math
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import FAMILIES, tiny_tokenizer
from folders import Material, command, show, task_text, write_rows
from folders import material_fixture as material_fixture
from test_model_load import write_gguf
from tuned import FAST, SPLITS, adapters, record, tune
from tuned import run_fixture as run_fixture
from tuned import trained_fixture as trained_fixture

import tale_ray.model.load
from tale_ray.attempt.rows import prepare_rows
from tale_ray.config import ModelSection, TaskSection
from tale_ray.errors import ConfigError
from tale_ray.model.load import load_model
from tale_ray.option_texts import parse_splits
from tale_ray.tasks.replies import encode_training
from tale_ray.tuning import loop
from tale_ray.tuning.checkpoint import read_checkpoint
from tale_ray.tuning.loop import Trainer

# Interruptions.


def check_same(one: Path, other: Path) -> None:
    """Both trainings ended with the same weights, bit for bit, by the same losses."""
    for name, weight in adapters(one).items():
        assert torch.equal(weight, adapters(other)[name]), name
    first, second = record(one), record(other)
    for name in ("losses", "evaluations", "kept_step", "digest", "why", "steps_done"):
        assert first[name] == second[name], name
    assert (one / "model" / "model.safetensors").read_bytes() == (other / "model" / "model.safetensors").read_bytes()


def test_interrupted_at_any_step_the_weights_are_the_same(
    trained: Path, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    own = Trainer._step
    steps: list[int] = []

    def asked_to_stop(self: Trainer) -> float:
        loss = own(self)
        steps.append(self.progress.step)
        if len(steps) in (1, 3, 4):
            os.kill(os.getpid(), 15)
        return loss

    monkeypatch.setattr(Trainer, "_step", asked_to_stop)
    for done in (1, 3, 4):  # 3: the select rows are due
        stopped = tune(material, out, "--remove", "3,1")
        assert stopped.code == 75, stopped.err
        assert "run the same command again" in stopped.err
        progress, _ = read_checkpoint(out / "state")
        assert progress is not None
        assert progress.step == done
    assert tune(material, out, "--remove", "3,1").code == 0
    assert steps == list(range(1, len(steps) + 1)), "no step is taken twice"
    check_same(out, trained)


def drive(arguments: list[str], pause: float) -> None:
    """The command in a process of its own that ends at once after its fifth step, as kill -9 ends it."""
    own = Trainer._step
    loop.PAUSE = pause

    def dies(self: Trainer) -> float:
        loss = own(self)
        if self.progress.step == 5:
            os.kill(os.getpid(), 9)
        return loss

    Trainer._step = dies  # type: ignore[method-assign]
    command(*arguments)


@pytest.mark.parametrize(("pause", "step"), [(math.inf, 3), (0.0, 4)])
def test_killed_it_goes_on_from_its_checkpoint_with_the_same_weights(
    trained: Path, material: Material, tmp_path: Path, pause: float, step: int
) -> None:
    """From the last evaluation of the select rows where checkpoints take long, from the last step where they do not."""
    out = tmp_path / "out"
    options = ["--model", material.model, "--task", material.task, "--splits", SPLITS, "--remove", "3,1"]
    arguments = ["finetune", *map(str, options), "--out", str(out), *map(str, FAST)]
    process = multiprocessing.get_context("spawn").Process(target=drive, args=(arguments, pause))
    process.start()
    process.join(120)
    assert process.exitcode == -9
    progress, _ = read_checkpoint(out / "state")
    assert progress is not None
    assert progress.step == step
    outcome = command(*arguments)
    assert outcome.code == 0, outcome.err
    assert f"training goes on after step {step} of 10" in outcome.err
    check_same(out, trained)


def test_a_kill_between_training_and_merging(
    trained: Path, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("tale_ray.attempt.finetune._merge", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tune(material, out, "--remove", "3,1")
    monkeypatch.setattr(Trainer, "_step", None)
    assert tune(material, out, "--remove", "3,1").code == 0
    check_same(out, trained)


def test_a_finished_training_is_not_done_again(
    trained: Path, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tale_ray.model.load, "load_model", None)
    before = record(trained)
    outcome = tune(material, trained, "--remove", "3,1", "--json")
    assert outcome.code == 0, outcome.err
    assert {**before, "out": str(trained)} == {**outcome.json, "schema_version": 1}
    assert not (trained / "state").exists()


# From Python.

QUICK = {"epochs": 1, "batch_size": 4, "rank": 2, "learning_rate": 0.0005, "eval_every": 3, "splits": SPLITS}


def test_python_trains_as_the_command_does(trained: Path, material: Material, tmp_path: Path) -> None:
    given = {**QUICK, "model": material.model, "task": material.task, "remove": (3, 1)}
    found = tale_ray.finetune(tmp_path / "out", **given, target_modules="all-linear", patience=5)
    check_same(trained, tmp_path / "out")
    assert tale_ray.finetune(tmp_path / "out", **given) == found, "a finished training is told again"
    assert found["out"] == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": True}, "rank True is not of the right kind"),
        ({"target_modules": 5}, "target modules 5 is not of the right kind"),
        ({"workers": "2"}, "workers '2' is not a whole number"),
        ({"training_seed": 2**64}, "seed 18446744073709551616 is out of range: torch takes seeds of 64 bits"),
        ({"epochs": 1e308}, "epochs 1e\\+308 is out of range: that is more than 1e\\+12 steps"),
        ({"target_modules": ()}, "target modules '' are no list of layers"),
        ({"target_modules": ("q_proj", 3)}, "target modules .* is not of the right kind"),
        ({"merged_dtype": "int8"}, "merged dtype 'int8' is not known: choose one of trained, float32"),
        ({"time_limit": "soon"}, "duration 'soon' is not understood"),
        ({"lerning_rate": 1e-4}, "option 'lerning_rate' is not known"),
        ({"pick": 3}, "pick '3' is a result of a run: name the run too"),
        ({"task": None}, "task is missing"),
    ],
)
def test_python_refuses_nonsense_before_a_model_is_loaded(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(tale_ray.model.load, "load_model", None)
    with pytest.raises(ConfigError, match=words):
        tale_ray.finetune(tmp_path / "out", **{**QUICK, "model": material.model, "task": material.task, **options})
    assert not (tmp_path / "out").exists()


# What is written.


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_the_merged_checkpoint_is_standard_and_computes_what_was_trained(trained: Path, material: Material) -> None:
    from peft import PeftModel

    model = tf.AutoModelForCausalLM.from_pretrained(trained / "model")
    assert model.config.num_hidden_layers == 4
    loaded = load_model(ModelSection(model=str(material.model)), "float32")
    tokens = torch.arange(3, 40).reshape(1, -1)
    with loaded.layers.without((3, 1)), torch.inference_mode():
        plain = loaded.model(input_ids=tokens).logits
        tuned = PeftModel.from_pretrained(loaded.model, str(trained / "adapter")).eval()
        expected = tuned(input_ids=tokens, use_cache=False).logits
    with torch.inference_mode():
        found = model(input_ids=tokens).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert tf.AutoTokenizer.from_pretrained(trained / "model").encode("t5") == [5]
    card = (trained / "model" / "README.md").read_text()
    assert "without 2 layers, fine-tuned on tiny" in card
    assert "**3, 1**" in card
    outcome = command("search", "--local", "--model", trained / "model", "--task", material.task, "--dry-run")
    assert outcome.code == 0, outcome.err


def test_the_adapter_of_a_pruned_model_does_not_name_the_full_one(trained: Path, material: Material) -> None:
    config = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"{material.model.name} without layers 3, 1"


def test_float32_is_merged_without_rounding_to_the_dtype_of_the_training(material: Material, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dtypes = ("--dtype", "bfloat16", "--merged-dtype", "float32", "--alpha", 4)
    outcome = tune(material, out, *dtypes, "--splits", "search=0.3,test=0.3,finetune=0.4")  # the last weights are kept
    assert outcome.code == 0, outcome.err
    name, trained = "model.layers.2.mlp.up_proj", adapters(out)
    low, high = (trained[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    full = tf.AutoModelForCausalLM.from_pretrained(material.model, dtype=torch.bfloat16).get_submodule(name).weight
    merged = tf.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).get_submodule(name).weight
    torch.testing.assert_close(merged, full.float() + 2 * high @ low, atol=1e-7, rtol=1e-6)
    assert not torch.equal(merged, merged.bfloat16().float())


def test_demonstrations_come_before_learned_rows_as_before_scored_ones(material: Material, tmp_path: Path) -> None:
    for shots in (0, 2):
        outcome = tune(material, tmp_path / f"{shots}", "--shots", shots, "--steps", 3)
        assert outcome.code == 0, outcome.err
    assert "--task T --shots 2 --splits" in outcome.out
    rows = prepare_rows(TaskSection(task=str(material.task), splits=parse_splits(SPLITS), shots=2))
    assert len(rows.shots) == 2
    assert all(example.demonstrations == rows.shots for example in (*rows.finetune, *rows.examples["test"]))
    tokenizer = tiny_tokenizer()
    shown = sum(len(encode_training(tokenizer, example, [0])) for example in rows.finetune)  # some end token
    assert record(tmp_path / "2")["tokens"] == shown
    assert shown > 2 * record(tmp_path / "0")["tokens"]


def test_the_record_says_what_was_done(trained: Path) -> None:
    found = record(trained)
    assert (found["state"], found["task"], found["removed"], found["steps"]) == ("finished", "tiny", [3, 1], 10)
    assert found["rows"]["finetune"]["count"] == 40
    assert len(found["losses"]) == found["steps_done"] == 10
    assert [each["step"] for each in found["evaluations"]] == [0, 3, 6, 9, 10]
    assert found["kept"] == min(found["evaluations"], key=lambda each: each["loss"])
    assert found["trainable_parameters"] == sum(each.numel() for each in adapters(trained).values())
    assert found["adapted"] == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    assert min(found["seconds"].values()) > 0
    assert found["merged"]["dtype"] == "float32"


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    config = FAMILIES["llama"]()
    config.tie_word_embeddings = True
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows = [{"question": f"t{number}", "answer": f"t{number % 5 + 3}"} for number in range(3, 90)]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "task.yaml").write_text(task_text("tied"))
    out = tmp_path / "out"
    outcome = command(
        "finetune",
        "--model",
        folder,
        "--task",
        tmp_path / "task.yaml",
        "--out",
        out,
        *FAST,
        "--merged-dtype",
        "bfloat16",
    )
    assert outcome.code == 0, outcome.err
    model = tf.AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    full = tf.AutoModelForCausalLM.from_pretrained(folder)
    found, expected = model.get_input_embeddings().weight.float(), full.get_input_embeddings().weight
    assert torch.equal(found, expected.bfloat16().float()), "embeddings are not trained"
    assert record(out)["merged"]["dtype"] == "bfloat16"


def test_a_gguf_file_is_trained_and_merged_as_plain_weights(material: Material, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tiny_tokenizer().save_pretrained(folder)
    write_gguf(folder)
    out = tmp_path / "out"
    outcome = tune(material, out, "--model", folder, "--gguf", "tiny.gguf", "--json")
    assert outcome.code == 0, outcome.err
    config = json.loads((out / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    tf.AutoModelForCausalLM.from_pretrained(out / "model")


def test_a_result_of_a_run_is_trained_on_the_rows_that_the_run_kept_apart(
    run: Path, material: Material, tmp_path: Path
) -> None:
    outcome = tune(material, tmp_path / "out", "--run", run, "--pick", "final", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["removed"] == show(run)["final"]["removed"]
    assert (outcome.json["run"], outcome.json["pick"]) == (str(run), "final")
    stored = json.loads((run / "run.json").read_text())["rows"]
    assert outcome.json["rows"]["finetune"] == stored["finetune"]
    other = tune(material, tmp_path / "other", "--run", run, "--model", material.other_model)
    assert other.code == 0, "another model is asked for"


def test_the_model_of_a_run_has_to_be_the_one_that_was_searched(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(material.model, model)
    assert material.search(run, "--splits", SPLITS, "--model", model, "--max-removed", 1).code == 0
    shutil.copy(material.other_model / "model.safetensors", model)
    monkeypatch.setattr(tale_ray.model.load, "load_model", None)
    outcome = tune(material, tmp_path / "out", "--run", run)
    assert outcome.code == 2
    assert f"the model {model} is not the one that {run} was searched with" in outcome.err
    assert not (tmp_path / "out").exists()
