"""Which worker does what: a pure state machine, events in, instructions out. No clock, no I/O, no threads.

One scheduler lives for one *scoring*: some candidates on the rows of one split. It cuts what is missing into units,
keeps every worker busy, gives a failed unit to another worker, and one that takes far too long to a second one, sums up
the answers, and leaves out candidates that cannot win any more. Sums over sets of (candidate, row) cells do not depend
on the order in which they arrive, so neither does any decision.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import islice
from types import MappingProxyType

from tale_ray.records import CandidateScore, RowAnswer, SplitName, UnitResult, Work, WorkUnit
from tale_ray.search.assignments import UNITS_PER_WORKER, Assignment, Assignments
from tale_ray.search.cells import OpenCells
from tale_ray.search.executor import UnitDone, UnitFailed, WorkerEvent, WorkerJoined, WorkerLeaving, WorkerLost
from tale_ray.search.instructions import Double, GiveUp, Instruction, Keep, Retry, Submit, Tick
from tale_ray.search.pace import Left, Pacer
from tale_ray.search.race import Standing, expected_correct, probe_rows, still_racing

MAX_TRIES = 4
LATE_FACTOR = 4  # a unit is late after so many times the seconds that were to be expected
LATE_SECONDS = 10.0  # but not before
LOOK_SECONDS = 1.0  # between two looks for late units


@dataclass(frozen=True, slots=True)
class Race:
    """What lets candidates be left out. Only `floor` has a part in who is; the rest makes it happen early."""

    floor: Fraction  # correct rows below which no candidate wins
    right: tuple[bool, ...]  # by row: whether the current model answers it correctly
    favourite: int | None = None  # the candidate that probably wins; None: whoever does best on a few rows


@dataclass(frozen=True, slots=True)
class Scoring:
    """What is to be known: how many of the rows each candidate answers correctly.

    In a `race` only those that can win, or reach the floor, are scored to the end.
    """

    scope: str
    split: SplitName
    removed: tuple[int, ...]
    candidates: tuple[int | None, ...]
    num_rows: int
    race: Race | None = None
    row_order: tuple[int, ...] | None = None  # the rows that tell most come first; None: as they are


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

    Args:
        scoring: what is to be known.
        pacer: how large units are.
        known: results of an earlier attempt; they need not have the shape that units have now.
        workers: that are there already.
        homes: which worker has scored a row before, and remembers what it computed for it.
        units_per_worker: one that runs, and those that wait so that no worker idles for a round trip.
        left_over: units of earlier scorings that workers still compute.
        now: seconds on the clock that `Tick` tells.
    """

    def __init__(
        self,
        scoring: Scoring,
        pacer: Pacer,
        known: Iterable[UnitResult] = (),
        workers: Iterable[str] = (),
        homes: Mapping[int, str] = MappingProxyType({}),
        units_per_worker: int = UNITS_PER_WORKER,
        left_over: Mapping[str, Sequence[WorkUnit]] = MappingProxyType({}),
        now: float = 0.0,
    ) -> None:
        self.scoring = scoring
        self.homes = dict(homes)
        self.work = Work()  # durable units, those of earlier attempts included
        self.retries = 0
        self.wasted_rows = 0
        self._pacer = pacer
        self._now = now
        self._next_look = now
        self._tallies = {candidate: _Tally() for candidate in scoring.candidates}
        self._done = 0
        self._next_number = 0
        self._assigned = Assignments(workers, units_per_worker, left_over)
        self._doubled: set[int] = set()  # numbers of units
        self._lost: deque[Assignment] = deque()  # units to be tried again
        self._order = scoring.row_order or tuple(range(scoring.num_rows))
        self._cells = OpenCells(scoring.candidates, self._order)
        race = scoring.race
        self._probe = probe_rows(race.right, self._order) if race else ()
        self._favourite = race.favourite if race else None
        for result in known:
            self._count(result)
            self._cells.close(result.unit.candidates, result.unit.rows)
        self._racing = self._still_racing()

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
        """Every candidate is scored on every row, or cannot win any more, and no unit is awaited."""
        return self.done_cells == self.total_cells and not self._assigned.under_way

    @property
    def left_over(self) -> dict[str, tuple[WorkUnit, ...]]:
        """Units that are still computed although nobody waits for them, by worker."""
        return self._assigned.left_over

    def scores(self) -> tuple[CandidateScore, ...]:
        """Return the candidates' scores so far, in the scoring's order."""
        return tuple(self._score(candidate, tally) for candidate, tally in self._tallies.items())

    def answers(self, candidate: int | None) -> tuple[RowAnswer, ...]:
        """Return the answers of a candidate that is scored on all rows, in the order of the split."""
        return tuple(self._tallies[candidate].answers[row] for row in range(self.scoring.num_rows))

    def misses(self) -> tuple[tuple[int, int], ...]:
        """Return, by row, how many candidates were scored on it, and how many of them got it wrong."""
        counts = [[0, 0] for _ in range(self.scoring.num_rows)]
        for tally in self._tallies.values():
            for row, answer in tally.answers.items():
                counts[row][0] += 1
                counts[row][1] += not answer.correct
        return tuple((seen, missed) for seen, missed in counts)

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

    def handle(self, event: WorkerEvent | Tick) -> list[Instruction]:
        """Return what is to be done about an event."""
        match event:
            case Tick(now):
                self._now = now
                return list(self._double_late())
            case WorkerJoined(worker):
                self._assigned.join(worker)
                return list(self._fill())
            case WorkerLeaving(worker):
                self._assigned.leave(worker)
                return []
            case WorkerLost(worker, reason, is_suspect):
                return [*self._lose(worker, reason, is_suspect), *self._fill()]
            case UnitFailed(worker, unit, error):
                failed = self._assigned.take_back(worker, unit, self._now)
                again = () if failed is None or failed.settled else self._again(failed, worker, error)
                return [*again, *self._fill()] if failed is not None else []
            case UnitDone(worker, result):
                done = self._assigned.take_back(worker, result.unit, self._now)
                if done is None or done.settled:  # given to another worker in the meantime
                    self.wasted_rows += result.unit.candidate_rows
                    return [] if done is None else list(self._fill())
                if done.unit.number in self._doubled:
                    self._assigned.settle(done.key)
                self._count(result)
                self._pacer.note(result)
                self.homes.update(dict.fromkeys(result.unit.rows, worker))
                self._racing = self._still_racing()
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
        if self.scoring.race is None:
            return frozenset(self._tallies)
        standings = (
            Standing(candidate, tally.correct, len(tally.answers))
            for candidate, tally in self._tallies.items()
            if candidate is not None
        )
        return frozenset(still_racing(standings, self.scoring.num_rows, self.scoring.race.floor))

    def _lose(self, worker: str, reason: str, is_suspect: bool) -> Iterator[Instruction]:
        """Requeue all units of a worker; none but the one that it was computing is charged with a try."""
        units = self._assigned.lose(worker)
        for each in reversed(units[1:]):
            if not each.settled and self._assigned.copy_of(each.key) is None:
                self._lost.appendleft(each)
        if units and not units[0].settled:
            yield from self._again(units[0], worker, reason, is_charged=is_suspect)

    def _again(self, failed: Assignment, worker: str, reason: str, *, is_charged: bool = True) -> Iterator[Instruction]:
        tried = replace(failed, tries=failed.tries + is_charged, last_worker=worker)
        self.wasted_rows += tried.unit.candidate_rows
        if tried.tries >= MAX_TRIES:
            yield GiveUp(tried.unit, reason)
            return
        self.retries += 1
        yield Retry(tried.unit, reason)
        if (copy := self._assigned.copy_of(tried.key)) is not None:
            copy.tries = max(copy.tries, tried.tries)
        else:
            self._lost.appendleft(tried)

    def _fill(self) -> Iterator[Instruction]:
        """Give every worker its units, the emptiest first; never two to one worker while another has none."""
        for worker in self._assigned.free():
            if (taken := self._take(worker)) is not None:
                self._assigned.give(worker, taken, self._now)
                yield Submit(worker, taken.unit)
            elif not self._lost:
                return  # there is nothing for any other either

    def _take(self, worker: str) -> Assignment | None:
        """Return the next unit for a worker: a lost one, unless it just failed there and there is another worker."""
        for lost in list(self._lost):
            if lost.last_worker == worker and len(self._assigned) > 1:
                continue
            self._lost.remove(lost)
            unit = lost.unit
            for candidate in unit.candidates:
                if candidate not in self._racing:
                    self._cells.open(candidate, unit.rows)  # it may come back, once nobody reaches the floor
            if candidates := tuple(each for each in unit.candidates if each in self._racing):
                return replace(lost, unit=replace(unit, candidates=candidates))
        chosen = self._choose(worker)
        if chosen is None:
            return None
        if self._assigned.is_busy(worker) and self._pacer.is_scarce(
            chosen, tuple(self._racing), self._cells.rows_open(self._racing), len(self._assigned)
        ):
            return None  # for whoever is done first
        self._next_number += 1
        self._cells.close(chosen.candidates, chosen.rows)
        return Assignment(chosen)

    def _double_late(self) -> Iterator[Instruction]:
        """Give the units of workers that take far too long to idle ones, too; await those no more that nobody needs."""
        if self._now < self._next_look or not (idle := self._assigned.idle()):
            return
        self._next_look = self._now + LOOK_SECONDS
        late = [
            (now_late, worker, each)
            for worker, units in self._assigned.running()
            if (now_late := self._now - units[0].running_since) > self._patience(units[0].unit)
            for each in units
            if not each.settled and each.unit.number not in self._doubled
        ]
        for seconds, worker, each in sorted(late, key=lambda found: -found[0]):
            if self._racing.isdisjoint(each.unit.candidates):
                each.settled = True
            elif idle:
                self._doubled.add(each.unit.number)
                self._assigned.give(idle[0], replace(each, last_worker=worker), self._now)
                yield Double(each.unit, worker, seconds)
                yield Submit(idle.pop(0), each.unit)

    def _patience(self, unit: WorkUnit) -> float:
        """Return the seconds after which a unit is late."""
        expected = self._pacer.seconds(unit)
        return math.inf if expected is None else max(LATE_SECONDS, LATE_FACTOR * expected)

    # Which cells come next.

    def _choose(self, worker: str) -> WorkUnit | None:
        """Return a unit of open cells, or None if there are none: where a race stands, those that end it soonest.

        First all candidates on a few rows, if it is not known who is the favourite; then the favourite on all rows, as
        against its count the others are soon out; then the others, on the rows that most candidates have missed.
        """
        racing = self.scoring.race is not None and len(self._racing) > 1
        racing = racing and self._pacer.pays(
            self.scoring.removed, tuple(self._racing), self._cells.rows_open(self._racing)
        )
        if racing:
            if self._favourite is None:
                if unit := self._cut(worker, self._racing, self._probe, racing=False):
                    return unit
                self._favourite = self._probable_winner()
            leader = self._racing & {self._favourite}
            if leader and (unit := self._cut(worker, leader, racing=False)):
                return unit
        return self._cut(worker, self._racing, racing=racing)

    def _probable_winner(self) -> int | None:
        """Return the favourite, once all candidates have seen the rows of the probe."""
        race = self.scoring.race
        assert race is not None, "only races have a favourite"
        racing = {layer: self._tallies[layer] for layer in sorted(layer for layer in self._racing if layer is not None)}
        if any(row not in tally.answers for tally in racing.values() for row in self._probe):
            return None

        def expected(layer: int) -> float:
            answers = racing[layer].answers
            return expected_correct({row: answers[row].correct for row in answers}, race.right)

        return max(racing, key=lambda layer: (expected(layer), -layer))

    def _cut(
        self, worker: str, candidates: frozenset[int | None], rows: Sequence[int] | None = None, *, racing: bool
    ) -> WorkUnit | None:
        """Return a unit of open cells of some candidates on some rows, those first that the worker remembers."""

        def is_at_home(row: int) -> bool:
            return self.homes.get(row, worker) == worker or self.homes[row] not in self._assigned

        found = self._cells.find(candidates, is_at_home, rows)
        first = next(found, None)
        if first is None:
            return None
        chosen, row = first
        open_rows = self._cells.rows_open(chosen)
        left = Left(
            rows=open_rows if rows is None else min(open_rows, len(rows)),
            all_rows=self.scoring.num_rows,
            all_candidates=self.scoring.candidates,
            workers=len(self._assigned),
            racing=racing,
        )
        shape = self._pacer.shape(self.scoring.removed, chosen, left)
        return WorkUnit(
            number=self._next_number,
            scope=self.scoring.scope,
            split=self.scoring.split,
            removed=self.scoring.removed,
            candidates=chosen[: shape.candidates],
            rows=(row, *(other for _, other in islice(found, shape.rows - 1))),
        )
