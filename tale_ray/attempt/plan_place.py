"""How a model would lie in a worker's memory, from its configuration alone: on as few GPUs as hold it, or streamed.

What fits is asked of the functions that a worker asks when it loads a model and before it scores a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tale_ray.attempt.plan_rows import PlannedRows, plan_rows
from tale_ray.config import SearchConfig
from tale_ray.engine.budget import Budget, RowCost, cpu_budget, gpu_budget, row_cost
from tale_ray.engine.choices import key_tokens, prompt_groups
from tale_ray.engine.demand import Demand
from tale_ray.errors import ConfigError, InfeasibleError, ModelError, UsageError
from tale_ray.model.configuration import read_configuration
from tale_ray.model.load import max_positions
from tale_ray.model.outline import Outline, configured_dtype, hollow_model, outline
from tale_ray.model.stages import check_fits
from tale_ray.model.streaming import check_streamable, is_too_large
from tale_ray.records import ModelInfo

MOST_GPUS = 8  # of a worker: they are in one machine, and most machines have no more
_BUFFERED_LAYERS = 2  # of a model that is streamed: one computes while the next one comes


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A search before anything is loaded: its model without storage, and its rows."""

    config: SearchConfig
    model: Any  # a transformers PreTrainedModel on the meta device
    weights: Outline
    cost: RowCost
    rows: PlannedRows
    max_new_tokens: int  # 1 where choices are compared

    @property
    def num_layers(self) -> int:
        """Number of layers of the full model."""
        return len(self.weights.layer_bytes)

    @property
    def candidates(self) -> tuple[int, ...]:
        """Layers that the first round proposes to remove."""
        strategy = self.config.strategy
        return tuple(sorted(set(range(self.num_layers)) - {*strategy.remove, *strategy.keep_layers}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """How a model lies, and what is left to work in."""

    gpus_per_worker: int  # 0: a CPU
    is_streamed: bool
    layers: tuple[tuple[int, int], ...]  # the first and the last of each stage
    held_bytes: tuple[int, ...]  # weights of each stage
    budget: Budget

    def demand(self, subject: Subject) -> Demand:
        """Return what scoring takes there."""
        return Demand(cost=subject.cost, budget=self.budget, num_layers=subject.num_layers, num_stages=len(self.layers))


def make_subject(
    config: SearchConfig, *, on_cpu: bool, tokens_per_row: int | None, max_new_tokens: int | None
) -> Subject:
    """Return what is known of a search from its configurations and rows.

    Args:
        config: of the search.
        on_cpu: `--dtype auto` is float32 there, and the checkpoint's on GPUs.
        tokens_per_row: None: rows are counted, or estimated.
        max_new_tokens: None: the task's.

    Raises:
        UsageError: the model's configuration or the rows cannot be read, or the search would be refused whatever the
            memory.
    """
    configuration = read_configuration(config.model)
    if getattr(configuration, "quantization_config", None) is not None and config.model.gguf is None:
        raise ModelError(
            f"model {config.model.model} is quantised (quantization_config in config.json), and only the code of its "
            "format knows how large its weights are: plan with the configuration of the model that it was made from"
        )
    named = config.model.dtype if config.model.dtype != "auto" else "float32" if on_cpu else "checkpoint"
    dtype = configured_dtype(configuration, named) or torch.float32
    model = hollow_model(configuration, dtype, trust_remote_code=config.model.trust_remote_code)
    rows = plan_rows(config.model, config.task, tokens_per_row)
    new_tokens = rows.spec.max_new_tokens if max_new_tokens is None else max_new_tokens
    if new_tokens < 1:
        raise ConfigError(f"max new tokens {new_tokens} is too small: it is at least 1; leave it out for the task's")
    subject = Subject(
        config=config,
        model=model,
        weights=outline(model),
        cost=row_cost(model),
        rows=rows,
        max_new_tokens=1 if rows.spec.answer.type == "likelihood" else new_tokens,
    )
    config.strategy.check_layers(subject.num_layers)
    limits = ModelInfo(subject.num_layers, "", "", "", "", 0.0, max_positions=max_positions(model))
    limits.check_lengths(rows.rows, subject.max_new_tokens)
    return subject


def place(subject: Subject, gpus_per_worker: int | None, free_bytes: int) -> Placed:
    """Return how the model would lie: as asked for, or on as few GPUs as hold it; streamed where it has to be.

    Args:
        subject: the search.
        gpus_per_worker: None: to be found; 0: a CPU.
        free_bytes: of each GPU before anything is loaded, or of RAM.

    Raises:
        UsageError: it does not fit and is not, or cannot be, streamed: as a search would say.
    """
    mode = subject.config.resources.stream
    if mode == "always":
        return _streamed(subject, 1 if gpus_per_worker is None else gpus_per_worker, free_bytes)
    if gpus_per_worker is not None:
        free = max(1, gpus_per_worker) * free_bytes
        if mode == "auto" and is_too_large(subject.weights.total_bytes, free, gpus_per_worker):
            return _streamed(subject, gpus_per_worker, free_bytes)
        return _whole(subject, gpus_per_worker, free_bytes)
    refusal = UsageError()
    most = min(MOST_GPUS, subject.num_layers)
    for gpus in range(1, most + 1):
        try:
            return _whole(subject, gpus, free_bytes)
        except UsageError as error:
            refusal = error
    if mode == "never":
        raise refusal
    try:
        return _streamed(subject, 1, free_bytes)
    except UsageError as error:
        raise InfeasibleError(
            f"a worker has {most} GPUs at most, and with {free_bytes / 2**30:.1f} GiB free on each they are too few: "
            f"{refusal}. Nor can it be streamed: {error}"
        ) from error


def cannot_stream(subject: Subject) -> str | None:
    """Return why the model cannot be streamed; None: it can."""
    try:
        check_streamable(subject.config.model, subject.model)
    except ModelError as error:
        return str(error)
    return None


def _whole(subject: Subject, gpus: int, free_bytes: int) -> Placed:
    """Return the model on so many GPUs, or in RAM.

    Raises:
        ModelError: weights do not fit.
        ConfigError: there are more GPUs than layers, or rows do not fit beside the weights.
    """
    stages = subject.weights.deal(max(1, gpus))
    held = subject.weights.stage_bytes(stages)
    for gpu, weights in enumerate(held if gpus else ()):
        check_fits(weights, f"cuda:{gpu}", gpus, free_bytes)
    batch_bytes = subject.config.resources.batch_bytes
    budget = gpu_budget(free_bytes - max(held), batch_bytes) if gpus else cpu_budget(free_bytes, batch_bytes)
    layers = [[layer for layer, of in enumerate(stages) if of == stage] for stage in range(len(held))]
    ends = tuple((own[0], own[-1]) for own in layers)
    return _checked(
        subject,
        Placed(gpus_per_worker=gpus, is_streamed=False, layers=ends, held_bytes=held, budget=budget),
    )


def _streamed(subject: Subject, gpus: int, free_bytes: int) -> Placed:
    """Return the model with its layers in their files, on the first GPU if there is one.

    Raises:
        ModelError: it cannot be streamed, or not even what stays fits.
        ConfigError: rows do not fit.
    """
    check_streamable(subject.config.model, subject.model)
    weights, batch_bytes = subject.weights, subject.config.resources.batch_bytes
    held = weights.first_bytes + weights.last_bytes + sum(sorted(weights.layer_bytes)[-_BUFFERED_LAYERS:])
    if gpus:
        check_fits(held, "cuda:0", 1, free_bytes)
        budget = gpu_budget(free_bytes - held, batch_bytes)
    else:
        budget = cpu_budget(free_bytes, batch_bytes, is_streamed=True)
    ends = ((0, subject.num_layers - 1),)
    return _checked(
        subject, Placed(gpus_per_worker=gpus, is_streamed=True, layers=ends, held_bytes=(held,), budget=budget)
    )


def _checked(subject: Subject, placed: Placed) -> Placed:
    """Refuse rows that do not fit beside the weights, as a worker does before it scores any."""
    demand = placed.demand(subject)
    removed: Sequence[int] = subject.config.strategy.remove
    for prefix, keys in prompt_groups(subject.rows.rows):
        longest = max(len(key_tokens(subject.rows.rows, key)) for key in keys)
        demand.cut(removed, (None,), longest, len(prefix), subject.max_new_tokens)
    return placed
