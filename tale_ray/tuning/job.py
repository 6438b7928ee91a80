"""A training, whole: what it needs travels as plain values, so it can run in this process or in several elsewhere."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tale_ray.config import ModelSection
from tale_ray.errors import ConfigError, TaskError
from tale_ray.model.load import LoadedModel, load_model
from tale_ray.model.placement import worker_placement
from tale_ray.records import Example
from tale_ray.tasks.prompts import chat_notes
from tale_ray.tasks.replies import TrainingRow, encode_training
from tale_ray.tuning.adapter import adapted_layers, add_adapter
from tale_ray.tuning.loop import Place, Trainer
from tale_ray.tuning.options import TuningOptions
from tale_ray.tuning.records import Progress, TrainingBegun, TrainingEnded, TrainingEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingJob:
    """What is trained, on what, and where it is kept. Every process that takes part reaches `folder`."""

    digest: str  # of all that can change the weights, but for how many processes draw the dropout
    section: ModelSection
    dtype: str
    removed: tuple[int, ...]
    model_digest: str | None  # None: of a hub's model, which is not known before it is loaded
    base: str  # what the adapter says that it is trained on
    examples: tuple[Example, ...]
    select: tuple[Example, ...]
    max_new_tokens: int  # of a reply that is scored
    options: TuningOptions
    folder: Path  # of the checkpoint
    adapter: Path  # folder that gets the adapter at the end
    gpus_per_worker: int = 0


def run_job(job: TrainingJob, place: Place | None = None) -> Iterator[TrainingEvent]:
    """Train from wherever the checkpoint is, save the adapter with the best weights, and end with `TrainingEnded`.

    Raises:
        UsageError: model or rows cannot be trained.
        TaleRayError: training does not converge.
    """
    place = place or Place()
    loaded = load_model(job.section, job.dtype, worker_placement(job.gpus_per_worker, is_alone=place.size == 1))
    if job.model_digest is not None and loaded.info.digest != job.model_digest:
        raise ConfigError(
            f"the model {job.section.model} is not the one that was to be trained (SHA-256 {job.model_digest[:12]}, "
            f"now {loaded.info.digest[:12]}): restore its files, or name it with --model"
        )
    rows = _encode(loaded, job.examples)
    select = [
        _scored_part(row, each, job.max_new_tokens)
        for row, each in zip(_encode(loaded, job.select), job.select, strict=True)
    ]
    with loaded.layers.without(job.removed):
        num_parameters = loaded.model.num_parameters()
        tuned = add_adapter(loaded.model, job.options, job.base)
        facts = _facts(loaded, rows, tuned.num_trainable, num_parameters) | {
            "adapted": adapted_layers([*tuned.parameters])
        }
        start = Progress(digest=job.digest, facts=facts)
        trainer = Trainer(tuned, rows, select, job.options, job.folder, start, place)
        yield TrainingBegun(
            loaded.info,
            trainer.progress.step,
            job.options.num_steps(len(rows)),
            tuned.num_trainable,
            num_parameters,
        )
        with contextlib.closing(trainer.run()) as events:  # type: ignore[type-var]  # a generator: closing it stores
            for event in events:
                if isinstance(event, TrainingEnded) and place.rank == 0:
                    tuned.save(job.adapter)
                yield event


def _encode(loaded: LoadedModel, examples: Sequence[Example]) -> tuple[TrainingRow, ...]:
    """Return rows as the loaded model learns them.

    Raises:
        TaskError: a row is longer than the model allows, or has nothing to learn.
        ModelError: a row has a token that the model has no embedding for.
    """
    ends = loaded.model.generation_config.eos_token_id
    end_ids = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    rows = tuple(encode_training(loaded.tokenizer, example, end_ids) for example in examples)
    for row in rows:
        loaded.info.check_tokens((*row.prompt_ids, *row.reply_ids))
        if loaded.info.max_positions is not None and len(row) > loaded.info.max_positions:
            raise TaskError(
                f"a row has {len(row)} tokens with its reply, and the model has {loaded.info.max_positions} positions: "
                "use shorter prompts, fewer demonstrations, or a model with a longer context"
            )
    return rows


def _scored_part(row: TrainingRow, example: Example, max_new_tokens: int) -> TrainingRow:
    """Return a select row with the tokens of its reply that scoring would decode, so that no other one decides."""
    return row if example.choices else TrainingRow(row.prompt_ids, row.reply_ids[:max_new_tokens])


def _facts(loaded: LoadedModel, rows: Sequence[TrainingRow], num_trainable: int, num_parameters: int) -> dict[str, Any]:
    """Return what is to be told of model and machine, as JSON values."""
    info = loaded.info
    return {
        "family": info.family,
        "num_layers": info.num_layers,
        "model_digest": info.digest,
        "dtype": info.dtype,
        "device": info.device,
        "threads": torch.get_num_threads(),
        "load_seconds": info.load_seconds,
        "trainable_parameters": num_trainable,
        "parameters": num_parameters,
        "tokens": sum(map(len, rows)),
        "reply_tokens": sum(len(row.reply_ids) for row in rows),
        "notes": [*info.notes, *chat_notes(loaded.tokenizer)],
    }
