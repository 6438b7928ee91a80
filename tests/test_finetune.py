"""Fine-tuning: the loss is that of plain transformers and peft, kills change nothing, what is written is standard."""

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import FAMILIES, tiny_loaded, tiny_tokenizer
from folders import Material, command, show, task_text, write_rows
from folders import material_fixture as material_fixture
from safetensors.torch import load_file
from test_model_load import write_gguf
from torch.nn.functional import cross_entropy

import tale_ray.model.load
from tale_ray.attempt.rows import prepare_rows
from tale_ray.config import ModelSection, TaskSection
from tale_ray.errors import ConfigError, StoreError, TaleRayError, TaskError
from tale_ray.model.load import load_model
from tale_ray.records import Example
from tale_ray.tasks.prompts import encode_example
from tale_ray.tasks.replies import TrainingRow, encode_training
from tale_ray.tuning.batches import IGNORED, make_batch, step_rows
from tale_ray.tuning.checkpoint import read_checkpoint
from tale_ray.tuning.job import TrainingJob, run_job
from tale_ray.tuning.loop import Place, Trainer
from tale_ray.tuning.options import TuningOptions
from tale_ray.tuning.records import Evaluated, StepDone, TrainingBegun, TrainingEnded

SPLITS = "search=0.2,select=0.2,test=0.2,finetune=0.4"
FAST = ("--epochs", 1, "--batch-size", 4, "--rank", 2, "--learning-rate", 0.0005, "--eval-every", 3)


def tune(material: Material, out: Path, *more: Any) -> Any:
    given = [str(part) for part in more]
    options = {"--model": material.model, "--task": material.task, "--splits": SPLITS}
    flat = [
        part for name, value in options.items() if name not in given and "--run" not in given for part in (name, value)
    ]
    return command("finetune", *flat, "--out", out, *FAST, *given)


@pytest.fixture(scope="module", name="trained")
def trained_fixture(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing disturbed, of the model without two of its layers."""
    out = tmp_path_factory.mktemp("trained") / "out"
    outcome = tune(material, out, "--remove", "3,1")
    assert outcome.code == 0, outcome.err
    return out


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "finetune.json").read_text())  # type: ignore[no-any-return]


# What is learned.


class Chat:
    """A tokenizer of words with a chat template like that of many models: turns end with a token and a new line."""

    template = (
        "{% for message in messages %}{{ '<s> ' + message['content'] + ' </s> t4 ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s> ' }}{% endif %}"
    )


def example(reply: str = "t9") -> Example:
    return Example("d" * 64, ({"role": "user", "content": "t5 t6"},), reply, reply)


def test_the_prompt_is_the_one_that_is_scored_and_the_reply_ends_where_the_template_ends_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = Chat.template
    row = encode_training(tokenizer, example(), [2])
    assert row.prompt_ids == encode_example(tokenizer, example()).token_ids == (1, 5, 6, 2, 4, 1)
    assert row.reply_ids == (9, 2), "without what the template writes after the end token"
    assert encode_training(tokenizer, example(), []).reply_ids == (9, 2, 4), "a model without an end token"


def test_without_a_template_the_reply_is_that_of_a_demonstration_and_an_end_token() -> None:
    tokenizer = tiny_tokenizer()
    row = encode_training(tokenizer, example(), [2, 7])
    assert row.prompt_ids == encode_example(tokenizer, example()).token_ids
    assert row.reply_ids == (9, 2)


def test_a_template_that_writes_finished_chats_otherwise() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if add_generation_prompt %}t3 t5 t6 t8{% else %}t3 t5 t6 t9{% endif %}"
    assert encode_training(tokenizer, example(), [2]) == TrainingRow((3, 5, 6, 8), (9, 2))


def test_a_row_without_a_reply_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = Chat.template
    with pytest.raises(TaskError, match="which has no tokens to learn"):
        encode_training(tokenizer, example(""), [2])


def test_of_choices_the_right_one_is_learned_as_it_is_scored() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = Chat.template
    chosen = replace(example(), choices=("t7", "t8 t9"), target="1")
    scored = encode_example(tokenizer, chosen).choices[1]
    assert encode_training(tokenizer, chosen, [2]) == TrainingRow(scored.context_ids, scored.continuation_ids)


def test_only_replies_have_labels() -> None:
    rows = [TrainingRow((3, 4, 5), (6, 2)), TrainingRow((7,), (8, 9, 2))]
    batch = make_batch(rows, torch.device("cpu"))
    assert batch.tokens_BT.tolist() == [[3, 4, 5, 6, 2], [7, 8, 9, 2, 0]]
    assert batch.mask_BT.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.labels_BT.tolist() == [[IGNORED, IGNORED, 6, 2, IGNORED], [8, 9, 2, IGNORED, IGNORED]]


def test_every_epoch_has_every_row_once() -> None:
    steps = [step_rows(5, step, 10, 4) for step in range(5)]
    drawn = [row for step in steps for row in step]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert steps == [step_rows(5, step, 10, 4) for step in range(5)]
    assert steps[0] != step_rows(6, 0, 10, 4)


# The loop.


def make_job(
    model: Path, folder: Path, examples: Any, select: Any = (), removed: Any = (), **options: Any
) -> TrainingJob:
    chosen = TuningOptions(**{"rank": 2, "batch_size": 4, "learning_rate": 0.01, "dropout": 0.0, **options})
    return TrainingJob(
        digest="of this test",
        section=ModelSection(model=str(model)),
        dtype="float32",
        removed=tuple(removed),
        model_digest=None,
        base="tiny",
        examples=tuple(examples),
        select=tuple(select),
        max_new_tokens=1,
        options=chosen,
        folder=folder / "state",
        adapter=folder / "adapter",
    )


def examples_of(material: Material) -> Any:
    section = TaskSection(task=str(material.task), splits=dict(part.split("=") for part in SPLITS.split(",")))  # type: ignore[arg-type]
    return prepare_rows(section)


@pytest.fixture(name="job")
def job_fixture(material: Material, tmp_path: Path) -> Callable[..., TrainingJob]:
    rows = examples_of(material)
    (tmp_path / "state").mkdir()

    def made(model: Path = material.model, **options: Any) -> TrainingJob:
        return make_job(model, tmp_path, rows.finetune, rows.examples["select"], **options)

    return made


def plain_losses(job: TrainingJob, steps: int) -> list[float]:
    """The losses of some steps by plain transformers and peft, row by row, and torch's own optimizer."""
    from peft import LoraConfig, get_peft_model

    model = tf.AutoModelForCausalLM.from_pretrained(job.section.model, dtype=torch.float32)
    tokenizer = tf.AutoTokenizer.from_pretrained(job.section.model)
    rows = [encode_training(tokenizer, each, [2]) for each in job.examples]
    torch.manual_seed(job.options.seed)
    tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=32.0, target_modules="all-linear", task_type="CAUSAL_LM"))  # type: ignore[arg-type]
    parameters = [each for _, each in sorted(tuned.named_parameters()) if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    losses = []
    for step in range(steps):
        positions = step_rows(job.options.seed, step, len(rows), job.options.rows_per_step)
        parts = []
        for position in positions:
            row = rows[position]
            tokens = torch.tensor([(*row.prompt_ids, *row.reply_ids)])
            logits = tuned(input_ids=tokens).logits[0, len(row.prompt_ids) - 1 : -1]
            parts.append(cross_entropy(logits, torch.tensor(row.reply_ids), reduction="sum"))
        loss = torch.stack(parts).sum() / sum(len(rows[position].reply_ids) for position in positions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, job.options.max_grad_norm)
        optimizer.param_groups[0]["lr"] = job.options.rate(step, job.options.num_steps(len(rows)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_losses_are_those_of_plain_transformers_and_peft(job: Callable[..., TrainingJob]) -> None:
    made = job(steps=6, patience=None)
    losses = [event.loss for event in run_job(made) if isinstance(event, StepDone)]
    assert losses == pytest.approx(plain_losses(made, 6), rel=1e-4)
    assert losses[0] != losses[-1]


def test_accumulated_batches_are_one_step(job: Callable[..., TrainingJob]) -> None:
    def losses(**options: Any) -> list[float]:
        made = job(steps=4, patience=None, **options)
        shutil.rmtree(made.folder)
        made.folder.mkdir()
        return [event.loss for event in run_job(made) if isinstance(event, StepDone)]

    assert losses(batch_size=2, accumulate=4) == pytest.approx(losses(batch_size=8), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_learn_without_a_layer_and_nothing_but_the_adapter_changes(family: str, tmp_path: Path) -> None:
    rows = [replace(example(f"t{20 + number % 3}"), digest=str(number)) for number in range(16)]
    (tmp_path / "state").mkdir()
    made = make_job(tmp_path, tmp_path, rows, rows, removed=[1], steps=12, eval_every=4, patience=None)
    loaded = tiny_loaded(family)
    before = {name: each.clone() for name, each in loaded.model.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tale_ray.tuning.job.load_model", lambda *_: loaded)
        events = list(run_job(made))
    losses = [event.evaluation.loss for event in events if isinstance(event, Evaluated)]
    assert min(losses) < losses[0]
    after = {name.replace(".base_layer", ""): each for name, each in loaded.model.state_dict().items()}
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name
    assert loaded.layers.num_layers == len(loaded.layers.full)
    trained = load_file(made.adapter / "adapter_model.safetensors")
    left = len(loaded.layers.full) - 1
    assert not any(f".{left}." in name for name in trained), "the adapter is numbered as the pruned model is"


def test_select_rows_decide_by_the_tokens_that_are_scored(job: Callable[..., TrainingJob]) -> None:
    made = job(steps=1)
    found = next(event.evaluation for event in run_job(made) if isinstance(event, Evaluated))
    model = tf.AutoModelForCausalLM.from_pretrained(made.section.model, dtype=torch.float32)
    tokenizer = tf.AutoTokenizer.from_pretrained(made.section.model)
    prompts = [torch.tensor([encode_example(tokenizer, each).token_ids]) for each in made.select]
    targets = [tokenizer.convert_tokens_to_ids(each.reply) for each in made.select]
    with torch.inference_mode():
        logits = [model(input_ids=prompt).logits[0, -1] for prompt in prompts]
    losses = [cross_entropy(each, torch.tensor(target)).item() for each, target in zip(logits, targets, strict=True)]
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    right = [int(each.argmax()) == target for each, target in zip(logits, targets, strict=True)]
    assert found.exact == sum(right) / len(right) > 0.5


def test_early_stopping_keeps_the_weights_with_the_lowest_loss(job: Callable[..., TrainingJob]) -> None:
    events = list(run_job(job(steps=60, learning_rate=0.5, eval_every=2, patience=2, warmup_steps=0)))
    found = [event.evaluation for event in events if isinstance(event, Evaluated)]
    ended = events[-1]
    assert isinstance(ended, TrainingEnded)
    best = min(found, key=lambda each: each.loss)
    assert ended.progress.ended == "patience"
    assert ended.progress.best_step == best.step
    assert [each.step for each in found][-1] == best.step + 4
    assert found[0].step == 0, "the model as it was takes part"


def test_the_best_weights_outlive_an_interruption_after_them(job: Callable[..., TrainingJob], tmp_path: Path) -> None:
    made = job(steps=500, learning_rate=0.02, eval_every=1, patience=5, warmup_steps=400, removed=(3, 1))
    undisturbed = list(run_job(replace(made, folder=tmp_path / "other", adapter=tmp_path / "whole")))[-1]
    assert isinstance(undisturbed, TrainingEnded)
    best = undisturbed.progress.best_step
    assert best > 0
    events = run_job(made)
    for event in events:
        if isinstance(event, StepDone) and event.step == best + 3:
            break
    events.close()  # type: ignore[attr-defined]  # a generator
    *_, resumed = run_job(made)
    assert isinstance(resumed, TrainingEnded)
    assert resumed.progress.best_step == best
    for name, weight in load_file(tmp_path / "whole" / "adapter_model.safetensors").items():
        assert torch.equal(weight, load_file(made.adapter / "adapter_model.safetensors")[name]), name


def test_a_loss_that_is_no_number_ends_the_training(
    job: Callable[..., TrainingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Trainer._loss_sum

    def broken(self: Trainer, batch: Any) -> Any:
        loss, exact = own(self, batch)
        return loss * float("nan") if loss.requires_grad else loss, exact

    monkeypatch.setattr(Trainer, "_loss_sum", broken)
    with pytest.raises(TaleRayError, match="the loss of step 1 is nan: training does not converge"):
        list(run_job(job(steps=4)))


# Interruptions.


def adapters(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


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


def drive(arguments: list[str]) -> None:
    """The command in a process of its own that ends at once after its fifth step, as kill -9 ends it."""
    own = Trainer._step

    def dies(self: Trainer) -> float:
        loss = own(self)
        if self.progress.step == 5:
            os.kill(os.getpid(), 9)
        return loss

    Trainer._step = dies  # type: ignore[method-assign]
    command(*arguments)


def test_killed_it_goes_on_from_its_checkpoint_with_the_same_weights(
    trained: Path, material: Material, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--model", material.model, "--task", material.task, "--splits", SPLITS, "--remove", "3,1"]
    arguments = ["finetune", *map(str, options), "--out", str(out), *map(str, FAST)]
    process = multiprocessing.get_context("spawn").Process(target=drive, args=(arguments,))
    process.start()
    process.join(120)
    assert process.exitcode == -9
    progress, _ = read_checkpoint(out / "state")
    assert progress is not None
    assert progress.step == 3, "the evaluation before the kill"
    outcome = command(*arguments)
    assert outcome.code == 0, outcome.err
    assert "training goes on after step 3 of 10" in outcome.err
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


@pytest.fixture(scope="module", name="run")
def run_fixture(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    assert material.search(run, "--splits", SPLITS).code == 0
    return run


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


# Refusals.


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


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(StoreError, match="is damaged"):
        read_checkpoint(tmp_path)


def test_names_that_no_layer_has_are_refused(material: Material, tmp_path: Path) -> None:
    outcome = tune(material, tmp_path / "out", "--target-modules", "nowhere_proj")
    assert outcome.code == 2
    assert "target modules nowhere_proj cannot be trained" in outcome.err
    outcome = tune(material, tmp_path / "other", "--target-modules", "lm_head")
    assert outcome.code == 2
    assert "target modules name the embedding or the head" in outcome.err


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    options = TuningOptions(learning_rate=0.1, warmup_steps=4)
    rates = [options.rate(step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[4] == 0.1
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.01
    with pytest.raises(ConfigError, match="rank '2' is not of the right kind"):
        TuningOptions(rank="2")  # type: ignore[arg-type]


# Together.


@pytest.mark.ray
@pytest.mark.timeout(600)  # Ray Train imports a lot, in four processes
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # Ray's own, in this process
def test_two_workers_of_ray_train_come_to_what_one_process_does(
    material: Material, tmp_path: Path, ray_address: str
) -> None:
    alone = tune(material, tmp_path / "alone", "--dropout", 0, "--json")
    assert alone.code == 0, alone.err
    arguments = ("--dropout", 0, "--json", "--workers", 2, "--address", ray_address)
    together = tune(material, tmp_path / "together", *arguments)
    assert together.code == 0, together.err
    assert together.json["digest"] == alone.json["digest"]
    assert together.json["workers"] == 2
    assert together.json["losses"] == pytest.approx(alone.json["losses"], abs=1e-4)
    assert together.json["kept_step"] == alone.json["kept_step"]
    one, other = adapters(tmp_path / "alone"), adapters(tmp_path / "together")
    for name, weight in one.items():
        assert torch.allclose(weight, other[name], atol=1e-3), name
    again = tune(material, tmp_path / "together", *arguments)
    assert again.json == together.json


def test_places_share_every_row_once() -> None:
    rows: Any = list(range(7))
    assert sorted(Place(0, 2).own(rows) + Place(1, 2).own(rows)) == rows
    assert Place().own(rows) == rows


def test_begun_tells_of_the_model(job: Callable[..., TrainingJob]) -> None:
    started = time.monotonic()
    begun = next(run_job(job(steps=2)))
    assert isinstance(begun, TrainingBegun)
    assert (begun.step, begun.steps) == (0, 2)
    assert begun.info.load_seconds < time.monotonic() - started
