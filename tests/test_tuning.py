"""What a model learns from, and the loop that teaches it: the loss is that of plain transformers and peft."""

import math
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
from folders import Material
from folders import material_fixture as material_fixture
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from tuned import SPLITS

from tale_ray.attempt.rows import prepare_rows
from tale_ray.config import ModelSection, TaskSection
from tale_ray.errors import ConfigError, StoreError, TaleRayError, TaskError
from tale_ray.records import Example
from tale_ray.tasks.prompts import encode_example
from tale_ray.tasks.replies import TrainingRow, encode_training
from tale_ray.tuning import loop
from tale_ray.tuning.adapter import merge_adapter
from tale_ray.tuning.batches import IGNORED, make_batch, step_rows
from tale_ray.tuning.checkpoint import read_checkpoint, save_checkpoint
from tale_ray.tuning.job import TrainingJob, run_job
from tale_ray.tuning.loop import Place, Trainer
from tale_ray.tuning.options import TuningOptions
from tale_ray.tuning.records import Evaluated, Progress, StepDone, TrainingBegun, TrainingEnded

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
    fresh, tokens = tiny_loaded(family), torch.arange(3, 30).reshape(1, -1)

    def logits(found: Any) -> torch.Tensor:
        with torch.inference_mode():
            return found.model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]

    with loaded.layers.without([1]), fresh.layers.without([1]):
        plain = logits(fresh)
        merge_adapter(fresh.model, made.adapter)
        torch.testing.assert_close(logits(fresh), logits(loaded), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(logits(fresh), plain, atol=1e-3)


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


@pytest.mark.parametrize(("pause", "steps"), [(math.inf, [0, 3, 6]), (0.0, [0, 1, 2, 3, 3, 4, 5, 6, 6])])
def test_checkpoints_are_written_between_looks_where_they_take_little_time(
    job: Callable[..., TrainingJob], monkeypatch: pytest.MonkeyPatch, pause: float, steps: list[int]
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(loop, "PAUSE", pause)
    monkeypatch.setattr(loop, "save_checkpoint", lambda _folder, progress, _tensors: saved.append(progress.step))
    list(run_job(job(steps=6, eval_every=3, patience=None)))
    assert saved == steps


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


def test_a_gradient_that_is_not_finite_ends_the_training(
    job: Callable[..., TrainingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Trainer._loss_sum

    def overflowing(self: Trainer, batch: Any) -> Any:
        loss, exact = own(self, batch)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss, exact

    monkeypatch.setattr(Trainer, "_loss_sum", overflowing)
    with pytest.raises(TaleRayError, match=r"the gradient's norm of step 1 is (inf|nan): training does not converge"):
        list(run_job(job(steps=1)))


def test_select_rows_whose_loss_is_no_number_end_the_training(
    job: Callable[..., TrainingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Trainer._loss_sum

    def broken(self: Trainer, batch: Any) -> Any:
        loss, exact = own(self, batch)
        return (loss if loss.requires_grad or self.progress.step == 0 else loss * math.nan), exact

    monkeypatch.setattr(Trainer, "_loss_sum", broken)
    with pytest.raises(TaleRayError, match="the loss on select rows after step 1 is nan: training does not converge"):
        list(run_job(job(steps=1)))


def test_weights_that_are_no_numbers_end_a_training_without_select_rows(
    job: Callable[..., TrainingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Trainer._step

    def broken(self: Trainer) -> float:
        loss = own(self)
        next(iter(self._tuned.parameters.values())).data.fill_(float("nan"))
        return loss

    monkeypatch.setattr(Trainer, "_step", broken)
    with pytest.raises(TaleRayError, match="a weight after step 1 is no finite number"):
        list(run_job(replace(job(steps=1), select=())))


def test_a_checkpoint_that_lacks_a_weight_is_named(job: Callable[..., TrainingJob]) -> None:
    events = run_job(job(steps=4))
    while not isinstance(next(events), StepDone):
        pass
    events.close()  # type: ignore[attr-defined]  # a generator
    progress, tensors = read_checkpoint(job().folder)
    assert progress is not None
    save_checkpoint(job().folder, progress, {name: each for name, each in tensors.items() if "best/" not in name})
    with pytest.raises(StoreError, match=r"the checkpoint in .* was changed"):
        list(run_job(job(steps=4)))


def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(TaleRayError, match=r"cannot be written .*: make room, and run the same command again"):
        save_checkpoint(tmp_path / "state", Progress(digest=""), {})


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(StoreError, match="is damaged"):
        read_checkpoint(tmp_path)


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    options = TuningOptions(learning_rate=0.1, warmup_steps=4)
    rates = [options.rate(step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[4] == 0.1
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.01
    with pytest.raises(ConfigError, match="rank '2' is not of the right kind"):
        TuningOptions(rank="2")  # type: ignore[arg-type]


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
