"""What a scheduler tells whoever runs it to do, and the one thing beside events of workers that it is told."""

from dataclasses import dataclass
from typing import TypeAlias

from tale_ray.records import UnitResult, WorkUnit


@dataclass(frozen=True, slots=True)
class Submit:
    """Send the unit to the worker."""

    worker: str
    unit: WorkUnit


@dataclass(frozen=True, slots=True)
class Keep:
    """The result is new: store it."""

    result: UnitResult


@dataclass(frozen=True, slots=True)
class Retry:
    """The unit was lost and will be tried again."""

    unit: WorkUnit
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The unit failed on every try."""

    unit: WorkUnit
    reason: str


@dataclass(frozen=True, slots=True)
class Double:
    """The unit takes far too long on a worker, and goes to a second one, too: whoever is first counts."""

    unit: WorkUnit
    late: str  # the worker that has it
    seconds: float  # for which it has had it


@dataclass(frozen=True, slots=True)
class Tick:
    """It is `now`, in seconds on some clock: the only time that a scheduler knows of."""

    now: float


Instruction: TypeAlias = Submit | Keep | Retry | GiveUp | Double
