"""The workers of one attempt, and the loop that passes their events to a scheduler and its units to them."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

from tale_ray.errors import PoisonUnit
from tale_ray.records import CandidateScore, Measurement, Probe, UnitResult, WorkUnit
from tale_ray.search.executor import Executor, UnitFailed, WorkerEvent, WorkerJoined, WorkerLeaving, WorkerLost
from tale_ray.search.instructions import Double, GiveUp, Instruction, Keep, Retry, Submit, Tick
from tale_ray.search.interruption import Interruption
from tale_ray.search.pace import Pacer
from tale_ray.search.scheduler import Scheduler, Scoring

POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ScoringAdvanced:
    """Some time has passed, or units are finished."""

    scoring: Scoring
    done_cells: int
    total_cells: int
    leader: CandidateScore | None  # of those scored on all rows
    num_workers: int


@dataclass(frozen=True, slots=True)
class UnitRetried:
    """A unit was lost, with its worker or by an error, and goes to another worker."""

    unit: int
    scope: str
    reason: str


@dataclass(frozen=True, slots=True)
class WorkersChanged:
    """A worker has joined or is gone."""

    worker: str
    num_workers: int
    lost_because: str | None


@dataclass(frozen=True, slots=True)
class UnitDoubled:
    """A unit takes far too long on a worker, and was given to a second one, too."""

    unit: int
    scope: str
    late: str
    seconds: float


PoolEvent: TypeAlias = ScoringAdvanced | UnitRetried | UnitDoubled | WorkersChanged


class Pool:
    """An executor and the workers that take units of it now, in order of joining."""

    def __init__(
        self, executor: Executor, interruption: Interruption, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.workers: dict[str, None] = {}
        self._units_per_worker = executor.units_per_worker
        self._left_over: dict[str, tuple[WorkUnit, ...]] = {}  # units of finished scorings that workers still compute
        self._executor = executor
        self._interruption = interruption
        self._clock = clock

    def now(self) -> float:
        """Return the seconds on the clock that schedulers are told."""
        return self._clock()

    def measure(self, probe: Probe, rows: Sequence[tuple[int, ...]]) -> Measurement:
        """Return what a probe of the model comes to on rows of tokens.

        Raises:
            Interrupted: asked to stop.
            TaleRayError: the model cannot be measured so.
        """
        with self._interruption.breakable():
            return self._executor.measure(probe, rows)

    def scheduler(
        self,
        scoring: Scoring,
        pacer: Pacer,
        known: Iterable[UnitResult] = (),
        homes: Mapping[int, str] = MappingProxyType({}),
    ) -> Scheduler:
        """Return a scheduler of the workers as they are now."""
        return Scheduler(
            scoring, pacer, known, self.workers, homes, self._units_per_worker, self._left_over, self._clock()
        )

    def run(self, scheduler: Scheduler) -> Iterator[Keep | PoolEvent]:
        """Work until the scheduler is finished. A `Keep` is to be stored before the next step is asked for.

        Raises:
            Interrupted: asked to stop.
            PoisonUnit: a unit failed on every try.
            TaleRayError: a worker refused a unit for a reason that would be the same anywhere.
        """
        yield from self._obey(scheduler.start())
        while not scheduler.finished:
            with self._interruption.breakable():
                events = self._executor.poll(POLL_SECONDS)
            for event in events:
                yield from self._note(event)
                yield from self._obey(scheduler.handle(event))
            yield from self._obey(scheduler.handle(Tick(self._clock())))
            yield ScoringAdvanced(
                scheduler.scoring, scheduler.done_cells, scheduler.total_cells, _leader(scheduler), len(self.workers)
            )
            self._interruption.check()
        self._left_over = scheduler.left_over

    def _note(self, event: WorkerEvent) -> Iterator[PoolEvent]:
        match event:
            case WorkerJoined(worker) if worker not in self.workers:  # else it was given other questions
                self.workers[worker] = None
                yield WorkersChanged(worker, len(self.workers), None)
            case WorkerLeaving(worker):
                self.workers.pop(worker, None)
            case WorkerLost(worker, reason):
                self.workers.pop(worker, None)
                yield WorkersChanged(worker, len(self.workers), reason)
            case UnitFailed(refusal=refusal) if refusal is not None:
                raise refusal

    def _obey(self, instructions: Sequence[Instruction]) -> Iterator[Keep | PoolEvent]:
        for instruction in instructions:
            match instruction:
                case Submit(worker, unit):
                    self._executor.submit(worker, unit)
                case Keep():
                    yield instruction
                case Retry(unit, reason):
                    yield UnitRetried(unit.number, unit.scope, reason)
                case Double(unit, late, seconds):
                    yield UnitDoubled(unit.number, unit.scope, late, seconds)
                case GiveUp(unit, reason):
                    raise PoisonUnit(
                        f"unit {unit.number} of {unit.scope} (candidates {unit.candidates}, rows {unit.rows}) failed "
                        f"on every try; the last error was: {reason}. Everything else that was finished is kept"
                    )


def _leader(scheduler: Scheduler) -> CandidateScore | None:
    exact = (score for score in scheduler.scores() if score.status == "exact")
    return max(exact, key=lambda score: (score.correct, -(score.layer or 0)), default=None)
