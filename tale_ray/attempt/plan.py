"""What a search will take, from a configuration alone: bytes, GPUs per worker, micro-batches, work, a guess of time.

Nothing is loaded and nothing is downloaded. Time is an estimate from data sheets; no plan has been checked on a GPU.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tale_ray.attempt.gpus import Gpu
from tale_ray.attempt.plan_effort import Effort, Estimator
from tale_ray.attempt.plan_place import MOST_GPUS, Placed, Subject, cannot_stream, make_subject, place
from tale_ray.config import SearchConfig
from tale_ray.engine.demand import Demand
from tale_ray.engine.passes import Pass
from tale_ray.model.outline import Outline


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a worker would compute on."""

    gpu: Gpu | None = None  # None: a CPU, or a GPU of which only the memory is known
    free_bytes: int  # of each GPU before anything is loaded, or of RAM
    gpus_per_worker: int | None = None  # None: to be recommended; 0: a CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One GPU of a worker, or its RAM."""

    layers: tuple[int, int]  # the first and the last
    weight_bytes: int  # that lie there at once
    peak_bytes: int  # with all that is held and at work, as if all of it were there


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes beside the weights when most are taken."""

    budget_bytes: int
    prefix_cache_bytes: int  # keys and values of the beginnings that rows share
    reply_cache_bytes: int  # keys and values of replies
    state_bytes: int  # hidden states that a later round goes on from
    activation_bytes: int  # streams, and a layer or the head, at work on a micro-batch
    spare_bytes: int  # what the allocator keeps of all these, and what is copied in passing


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The largest one of the largest unit of the first round; where no speed is known, the round is one unit."""

    rows: int
    lines: int
    tokens: int  # of a line
    nodes_at_once: int  # hidden states of a row that a layer is applied to at once
    count: int  # so many micro-batches has the unit
    replies: int  # candidates times rows that are decoded together; 0 if nothing is decoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """More GPUs per worker than the fewest, which may be cheaper: there is more room to work in."""

    gpus_per_worker: int
    first_round_seconds: float
    first_round_gpu_hours: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a search will take."""

    model: str
    family: str
    dtype: str
    num_layers: int
    weights: Outline
    task: str
    rows: int
    tokens: int  # of all rows
    longest_row: int
    max_new_tokens: int
    tokens_counted: str  # how, in words
    tokens_estimated: bool
    gpu: str | None
    free_bytes: int
    gpus_per_worker: int
    is_recommended: bool
    workers: int
    is_streamed: bool
    cannot_stream: str | None  # why
    stages: tuple[Stage, ...]
    memory: Memory
    micro_batch: MicroBatch
    baseline: Effort
    first_round: Effort
    rounds: int  # at most
    search: Effort  # the baseline and so many rounds
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...]

    @property
    def first_round_gpu_hours(self) -> float | None:
        """Of all GPUs together; None: the speed is not known."""
        seconds = self.first_round.seconds
        return None if seconds is None else seconds * self.workers * self.gpus_per_worker / 3600

    @property
    def peak_bytes(self) -> int:
        """Of the GPU, or the RAM, that takes most."""
        return max(stage.peak_bytes for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        weights = {
            "total_bytes": self.weights.total_bytes,
            "first_bytes": self.weights.first_bytes,
            "layer_bytes": list(self.weights.layer_bytes),
            "last_bytes": self.weights.last_bytes,
        }
        return {
            **asdict(self),
            "weights": weights,
            "peak_bytes": self.peak_bytes,
            "first_round_gpu_hours": self.first_round_gpu_hours,
        }


def make_plan(
    config: SearchConfig, device: Device, tokens_per_row: int | None = None, max_new_tokens: int | None = None
) -> Plan:
    """Return what a search will take.

    Args:
        config: of the search.
        device: of its workers.
        tokens_per_row: None: counted with the model's tokenizer, or estimated without one.
        max_new_tokens: of a reply; None: the task's.

    Raises:
        UsageError: rows or configuration cannot be read, or the search would be refused for want of memory.
    """
    on_cpu = device.gpus_per_worker == 0
    subject = make_subject(config, on_cpu=on_cpu, tokens_per_row=tokens_per_row, max_new_tokens=max_new_tokens)
    placed = place(subject, device.gpus_per_worker, device.free_bytes)
    estimator = Estimator(subject, placed, None if on_cpu else device.gpu)
    baseline, first = estimator.scoring((None,)), estimator.scoring(subject.candidates)
    largest = max((*baseline.unit_passes, *first.unit_passes), key=lambda each: each.working_bytes)
    prefix_bytes = max(each.held.prefix_bytes for each in (baseline, first))
    state_bytes = max(each.held.state_bytes for each in (baseline, first))
    spare_bytes = Demand.spare_bytes(prefix_bytes + state_bytes + largest.working_bytes)
    working = prefix_bytes + state_bytes + largest.working_bytes + spare_bytes
    rounds = _num_rounds(subject)
    lengths = [sum(map(len, row.sequences)) for row in subject.rows.rows]
    return Plan(
        model=config.model.model,
        family=str(subject.model.config.model_type),
        dtype=str(subject.model.dtype).removeprefix("torch."),
        num_layers=subject.num_layers,
        weights=subject.weights,
        task=subject.rows.spec.name,
        rows=len(lengths),
        tokens=sum(lengths),
        longest_row=max(lengths),
        max_new_tokens=subject.max_new_tokens,
        tokens_counted=subject.rows.counted,
        tokens_estimated=subject.rows.is_estimated,
        gpu=None if on_cpu or device.gpu is None else device.gpu.name,
        free_bytes=device.free_bytes,
        gpus_per_worker=placed.gpus_per_worker,
        is_recommended=device.gpus_per_worker is None,
        workers=config.resources.workers or 1,
        is_streamed=placed.is_streamed,
        cannot_stream=cannot_stream(subject),
        stages=tuple(
            Stage(layers=layers, weight_bytes=weights, peak_bytes=weights + working)
            for layers, weights in zip(placed.layers, placed.held_bytes, strict=True)
        ),
        memory=Memory(
            budget_bytes=placed.budget.total,
            prefix_cache_bytes=prefix_bytes,
            reply_cache_bytes=largest.cache_bytes,
            state_bytes=state_bytes,
            activation_bytes=largest.working_bytes - largest.cache_bytes,
            spare_bytes=spare_bytes,
        ),
        micro_batch=_micro_batch(first.unit_passes or baseline.unit_passes),
        baseline=baseline.effort,
        first_round=first.effort,
        rounds=rounds,
        search=estimator.search(baseline.effort, first.effort, rounds),
        alternatives=_alternatives(subject, placed, device),
        notes=subject.rows.notes,
    )


def _alternatives(subject: Subject, placed: Placed, device: Device) -> tuple[Alternative, ...]:
    """Return what the first round takes with one GPU more, and with twice as many, where the fewest were looked for."""
    if device.gpus_per_worker is not None or device.gpu is None or placed.is_streamed or not subject.candidates:
        return ()
    found = []
    for gpus in sorted({placed.gpus_per_worker + 1, 2 * placed.gpus_per_worker}):
        if gpus <= min(MOST_GPUS, subject.num_layers):
            other = Estimator(subject, place(subject, gpus, device.free_bytes), device.gpu)
            seconds = other.scoring(subject.candidates).effort.seconds or 0.0
            hours = seconds * (subject.config.resources.workers or 1) * gpus / 3600
            found.append(Alternative(gpus_per_worker=gpus, first_round_seconds=seconds, first_round_gpu_hours=hours))
    return tuple(found)


def _micro_batch(passes: Sequence[Pass]) -> MicroBatch:
    prompts = [each for each in passes if each.kind == "prompts"]
    largest = max(prompts, key=lambda each: each.lines * each.tokens)
    return MicroBatch(
        rows=largest.rows,
        lines=largest.lines,
        tokens=largest.tokens,
        nodes_at_once=largest.nodes_at_once,
        count=len(prompts),
        replies=max((each.rows for each in passes if each.kind == "replies"), default=0),
    )


def _num_rounds(subject: Subject) -> int:
    strategy = subject.config.strategy
    most = min(len(subject.candidates), subject.num_layers - len(strategy.remove) - 1)
    return most if strategy.max_removed is None else min(most, strategy.max_removed - len(strategy.remove))
