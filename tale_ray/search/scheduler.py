"""Which worker does what: a pure state machine, events in, instructions out. No clock, no I/O, no threads.

One scheduler lives for one *scoring*: some candidates on the rows of one split. It cuts what is missing into units,
keeps every worker busy with a unit and one more in its queue, gives a failed unit to another worker, sums up the
answers, and leaves out candidates that cannot win any more. Sums over sets of (candidate, row) cells do not depend on
the order in which they arrive, so neither does any decision.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TypeAlias, TypeVar

from tale_ray.records import CandidateScore, RowAnswer, SplitName, UnitResult, Work, WorkUnit
from tale_ray.search.executor import UnitDone, UnitFailed, WorkerEvent, WorkerJoined, WorkerLost
from tale_ray.search.race import Standing, still_racing

_Item = TypeVar("_Item")

UNITS_PER_WORKER = 2  # one that runs and one that waits, so that no worker idles for a round trip
MAX_TRIES = 4


@dataclass(frozen=True, slots=True)
class Scoring:
    """What is to be known: how many of the rows each candidate answers correctly.

    With a `floor` the candidates race: only those that can win, or reach the floor, are scored to the end.
    """

    scope: str
    split: SplitName
    removed: tuple[int, ...]
    candidates: tuple[int | None, ...]
    num_rows: int
    floor: Fraction | None = None
    row_order: tuple[int, ...] | None = None  # the rows that tell most come first; None: as they are


@dataclass(frozen=True, slots=True)
class UnitShape:
    """How large a unit is at most."""

    rows: int
    candidates: int


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


Instruction: TypeAlias = Submit | Keep | Retry | GiveUp


@dataclass(slots=True)
class _Pending:
    unit: WorkUnit
    tries: int = 0
    last_worker: str | None = None


@dataclass(slots=True)
class _Tally:
    answers: dict[int, RowAnswer] = field(default_factory=dict)  # by row
    correct: int = 0
    invalid: int = 0
    seconds: float = 0.0

    def add(self, row: int, answer: RowAnswer) -> bool:
        """Count the answer; return whether it is new."""
        if row in self.answers:
            return False
        self.answers[row] = answer
        self.correct += answer.correct
        self.invalid += answer.prediction is None
        return True


class Scheduler:
    """The state of one scoring.

    `known` are results of an earlier attempt; they need not have the shape that units have now.
    """

    def __init__(
        self, scoring: Scoring, shape: UnitShape, known: Iterable[UnitResult] = (), workers: Iterable[str] = ()
    ) -> None:
        self.scoring = scoring
        self._tallies = {candidate: _Tally() for candidate in scoring.candidates}
        self._done = 0
        self.work = Work()  # durable units, those of earlier attempts included
        self.retries = 0
        self.wasted_rows = 0
        self._shape = shape
        self._next_number = 0
        self._busy: dict[str, dict[int, _Pending]] = {worker: {} for worker in workers}  # in order of submission
        for result in known:
            self._count(result)
        self._racing = self._still_racing()
        self._pending = deque(_Pending(unit) for unit in self._cut())

    # What is known.

    @property
    def total_cells(self) -> int:
        """Number of (candidate, row) pairs of the scoring."""
        return len(self.scoring.candidates) * self.scoring.num_rows

    @property
    def done_cells(self) -> int:
        """Number of (candidate, row) pairs that are known, or need not be known any more."""
        out = (tally for candidate, tally in self._tallies.items() if candidate not in self._racing)
        return self._done + sum(self.scoring.num_rows - len(tally.answers) for tally in out)

    @property
    def finished(self) -> bool:
        """Every candidate is scored on every row, or cannot win any more, and no unit is under way."""
        return self.done_cells == self.total_cells and not any(self._busy.values())

    def scores(self) -> tuple[CandidateScore, ...]:
        """Return the candidates' scores so far, in the scoring's order."""
        return tuple(self._score(candidate, tally) for candidate, tally in self._tallies.items())

    def answers(self, candidate: int | None) -> tuple[RowAnswer, ...]:
        """Return the answers of a candidate that is scored on all rows, in the order of the split."""
        return tuple(self._tallies[candidate].answers[row] for row in range(self.scoring.num_rows))

    def _score(self, candidate: int | None, tally: _Tally) -> CandidateScore:
        return CandidateScore(
            layer=candidate,
            correct=tally.correct,
            seen=len(tally.answers),
            invalid=tally.invalid,
            status="exact" if len(tally.answers) == self.scoring.num_rows else "bounded_out",
            seconds=tally.seconds,
        )

    # What happens.

    def start(self) -> list[Instruction]:
        """Return the first instructions, for the workers that were there from the beginning."""
        return list(self._fill())

    def handle(self, event: WorkerEvent) -> list[Instruction]:
        """Return what is to be done about an event."""
        match event:
            case WorkerJoined(worker):
                self._busy.setdefault(worker, {})
                return list(self._fill())
            case WorkerLost(worker, reason):
                return [*self._lose(worker, reason), *self._fill()]
            case UnitFailed(worker, unit, error):
                pending = self._busy.get(worker, {}).pop(unit.number, None)
                return [] if pending is None else [*self._again(pending, worker, error), *self._fill()]
            case UnitDone(worker, result):
                pending = self._busy.get(worker, {}).pop(result.unit.number, None)
                if pending is None:  # given to another worker in the meantime
                    self.wasted_rows += result.unit.candidate_rows
                    return []
                self._count(result)
                self._race()
                return [Keep(result), *self._fill()]

    def _count(self, result: UnitResult) -> None:
        unit = result.unit
        for candidate in result.candidates:
            tally = self._tallies.get(candidate.layer)
            if tally is None:
                raise ValueError(f"{unit.scope} has no candidate {candidate.layer}")
            new_cells = sum(map(tally.add, unit.rows, candidate.answers))
            tally.seconds += candidate.seconds
            self._done += new_cells
            self.wasted_rows += len(unit.rows) - new_cells
        self.work += Work(units=1, candidate_rows=unit.candidate_rows, layer_applications=result.layer_applications)

    def _still_racing(self) -> frozenset[int | None]:
        """Return the candidates that must be scored to the end."""
        if self.scoring.floor is None:
            return frozenset(self._tallies)
        standings = (
            Standing(candidate, tally.correct, len(tally.answers))
            for candidate, tally in self._tallies.items()
            if candidate is not None
        )
        return frozenset(still_racing(standings, self.scoring.num_rows, self.scoring.floor))

    def _race(self) -> None:
        """Leave out candidates that cannot win any more; take back those that may, once nobody reaches the floor."""
        racing = self._still_racing()
        returned = racing - self._racing
        self._racing = racing
        if returned:
            tried = {pending.unit.rows: pending for pending in self._pending if pending.tries}
            self._pending = deque(
                replace(tried[unit.rows], unit=unit) if unit.rows in tried else _Pending(unit) for unit in self._cut()
            )

    def _lose(self, worker: str, reason: str) -> Iterator[Instruction]:
        """Requeue all units of a worker. Only the oldest was running, so only that one is suspected and charged."""
        units = list(self._busy.pop(worker, {}).values())
        for pending in reversed(units[1:]):
            self._pending.appendleft(pending)
        for pending in units[:1]:
            yield from self._again(pending, worker, reason)

    def _again(self, pending: _Pending, worker: str, reason: str) -> Iterator[Instruction]:
        tried = replace(pending, tries=pending.tries + 1, last_worker=worker)
        self.wasted_rows += tried.unit.candidate_rows
        if tried.tries >= MAX_TRIES:
            yield GiveUp(tried.unit, reason)
            return
        self.retries += 1
        self._pending.appendleft(tried)
        yield Retry(tried.unit, reason)

    def _fill(self) -> Iterator[Instruction]:
        """Give every worker its units, the emptiest first; never two to one worker while another has none."""
        for load in range(UNITS_PER_WORKER):
            for worker, busy in self._busy.items():
                if len(busy) <= load and (pending := self._take(worker)) is not None:
                    busy[pending.unit.number] = pending
                    yield Submit(worker, pending.unit)

    def _take(self, worker: str) -> _Pending | None:
        """Return the next unit for a worker: not one that just failed there, unless there is no other worker."""
        for pending in list(self._pending):
            if pending.last_worker == worker and len(self._busy) > 1:
                continue
            self._pending.remove(pending)
            if candidates := tuple(each for each in pending.unit.candidates if each in self._racing):
                return replace(pending, unit=replace(pending.unit, candidates=candidates))
        return None

    # How work is cut.

    def _cut(self) -> Iterator[WorkUnit]:
        """Cut the missing cells into units; candidates that miss the same rows of a block share a unit."""
        units = [pending.unit for busy in self._busy.values() for pending in busy.values()]
        under_way = {(candidate, row) for unit in units for candidate in unit.candidates for row in unit.rows}
        order = self.scoring.row_order or range(self.scoring.num_rows)
        for block in _blocks(order, self._shape.rows):
            groups: dict[tuple[int, ...], list[int | None]] = {}
            for candidate, tally in self._tallies.items():
                if candidate in self._racing and (
                    missing := tuple(
                        row for row in block if row not in tally.answers and (candidate, row) not in under_way
                    )
                ):
                    groups.setdefault(missing, []).append(candidate)
            for rows, candidates in groups.items():
                for chunk in _blocks(candidates, self._shape.candidates):
                    yield WorkUnit(
                        number=self._next_number,
                        scope=self.scoring.scope,
                        split=self.scoring.split,
                        removed=self.scoring.removed,
                        candidates=tuple(chunk),
                        rows=rows,
                    )
                    self._next_number += 1


def _blocks(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
