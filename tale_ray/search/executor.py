"""The seam between deciding and computing: what a driver asks of the place where units are run.

Workers are named by texts. Everything that comes back from them is one of the events below; nothing is called back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from tale_ray.errors import TaleRayError
from tale_ray.records import Example, Measurement, ModelInfo, Probe, PromptRow, SplitName, UnitResult, WorkUnit
from tale_ray.tasks.spec import AnswerSpec


@dataclass(frozen=True, slots=True)
class Questions:
    """All that workers need to score units: the rows of every split and how replies are read."""

    rows: Mapping[SplitName, Sequence[PromptRow]]
    answer: AnswerSpec
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker has loaded the model and takes units."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerLeaving:
    """A worker will be gone soon: it takes no more units, and those that it has may still be finished."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is gone, and with it every unit that it had.

    `is_suspect`: the unit that it was computing may be the cause; not so if the node under it was taken away.
    """

    worker: str
    reason: str
    is_suspect: bool = True


@dataclass(frozen=True, slots=True)
class UnitDone:
    """A unit is finished."""

    worker: str
    result: UnitResult


@dataclass(frozen=True, slots=True)
class UnitFailed:
    """A unit raised an error on a worker that lives on. A `refusal` would be the same anywhere and is not retried."""

    worker: str
    unit: WorkUnit
    error: str
    refusal: TaleRayError | None = None


WorkerEvent: TypeAlias = WorkerJoined | WorkerLeaving | WorkerLost | UnitDone | UnitFailed


class Executor(Protocol):
    """Where units are run. Used in this order: connect, load, encode, share, submit and poll; close in any case.

    Measuring is possible at any time after loading, between units, too.
    """

    units_per_worker: int  # that a worker is given at once: what waits is chosen before the result that may decide it

    def connect(self) -> None:
        """Reach the place, loading nothing.

        Raises:
            InfeasibleError: it cannot be reached, or can never give what a worker needs.
        """
        ...

    def load(self) -> ModelInfo:
        """Return what the first worker says of the model, once it has loaded it; others may join later.

        Raises:
            InfeasibleError: no node gave what a worker needs in time.
            ModelError: the model cannot be loaded or searched.
        """
        ...

    def encode(self, examples: Sequence[Example]) -> tuple[PromptRow, ...]:
        """Return the examples as token ids under the model's own chat template.

        Raises:
            TaskError: the template rejects a prompt.
        """
        ...

    def measure(self, probe: Probe, rows: Sequence[tuple[int, ...]]) -> Measurement:
        """Return what a probe of the model comes to on rows of tokens, by the first worker that has loaded it.

        Raises:
            ConfigError: there is nothing to measure on, or not even one row fits into the batch budget.
            ModelError: the model cannot be measured so.
            TaskError: a row is too long for the model.
        """
        ...

    def share(self, questions: Questions) -> None:
        """Give the questions to every worker, now and when it joins; units submitted from now on refer to them."""
        ...

    def submit(self, worker: str, unit: WorkUnit) -> None:
        """Start a unit on a worker that has joined. What becomes of it is told by `poll`."""
        ...

    def poll(self, timeout_seconds: float) -> tuple[WorkerEvent, ...]:
        """Return what has happened, in order; an empty tuple if nothing did in time."""
        ...

    def close(self) -> None:
        """End every worker. Safe to call twice."""
        ...
