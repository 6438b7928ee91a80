"""Which worker does what: a pure state machine, events in, instructions out. No clock, no I/O, no threads.

One scheduler lives for one *scoring*: some candidates on the rows of one split. It cuts what is missing into units,
keeps every worker busy, gives a failed unit to another worker, sums up the answers, and leaves out candidates that
cannot win any more. Sums over sets of (candidate, row) cells do not depend on
the order in which they arrive, so neither does any decision.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import islice
from types import MappingProxyType
from typing import TypeAlias

from tale_ray.records import CandidateScore, RowAnswer, SplitName, UnitResult, Work, WorkUnit
from tale_ray.search.cells import OpenCells
from tale_ray.search.executor import UnitDone, UnitFailed, WorkerEvent, WorkerJoined, WorkerLost
from tale_ray.search.pace import Left, Pacer
from tale_ray.search.race import Standing, expected_correct, probe_rows, still_racing

UNITS_PER_WORKER = 2
MAX_TRIES = 4


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

    Args:
        scoring: what is to be known.
        pacer: how large units are.
        known: results of an earlier attempt; they need not have the shape that units have now.
        workers: that are there already.
        homes: which worker has scored a row before, and remembers what it computed for it.
        units_per_worker: one that runs, and those that wait so that no worker idles for a round trip.
    """

    def __init__(
        self,
        scoring: Scoring,
        pacer: Pacer,
        known: Iterable[UnitResult] = (),
        workers: Iterable[str] = (),
        homes: Mapping[int, str] = MappingProxyType({}),
        units_per_worker: int = UNITS_PER_WORKER,
    ) -> None:
        self.scoring = scoring
        self.homes = dict(homes)
        self.work = Work()  # durable units, those of earlier attempts included
        self.retries = 0
        self.wasted_rows = 0
        self._pacer = pacer
        self._units_per_worker = units_per_worker
        self._tallies = {candidate: _Tally() for candidate in scoring.candidates}
        self._done = 0
        self._next_number = 0
        self._busy: dict[str, dict[int, _Pending]] = {worker: {} for worker in workers}  # in order of submission
        self._lost: deque[_Pending] = deque()  # units to be tried again
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
        """Every candidate is scored on every row, or cannot win any more, and no unit is under way."""
        return self.done_cells == self.total_cells and not any(self._busy.values())

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

    def _lose(self, worker: str, reason: str) -> Iterator[Instruction]:
        """Requeue all units of a worker. Only the oldest was running, so only that one is suspected and charged."""
        units = list(self._busy.pop(worker, {}).values())
        for pending in reversed(units[1:]):
            self._lost.appendleft(pending)
        for pending in units[:1]:
            yield from self._again(pending, worker, reason)

    def _again(self, pending: _Pending, worker: str, reason: str) -> Iterator[Instruction]:
        tried = replace(pending, tries=pending.tries + 1, last_worker=worker)
        self.wasted_rows += tried.unit.candidate_rows
        if tried.tries >= MAX_TRIES:
            yield GiveUp(tried.unit, reason)
            return
        self.retries += 1
        self._lost.appendleft(tried)
        yield Retry(tried.unit, reason)

    def _fill(self) -> Iterator[Instruction]:
        """Give every worker its units, the emptiest first; never two to one worker while another has none."""
        for load in range(self._units_per_worker):
            for worker, busy in self._busy.items():
                if len(busy) > load:
                    continue
                if (pending := self._take(worker)) is not None:
                    busy[pending.unit.number] = pending
                    yield Submit(worker, pending.unit)
                elif not self._lost:  # what is open is open to every worker: there is nothing for the others
                    return

    def _take(self, worker: str) -> _Pending | None:
        """Return the next unit for a worker: a lost one, unless it just failed there and there is another worker."""
        for pending in list(self._lost):
            if pending.last_worker == worker and len(self._busy) > 1:
                continue
            self._lost.remove(pending)
            unit = pending.unit
            for candidate in unit.candidates:
                if candidate not in self._racing:
                    self._cells.open(candidate, unit.rows)  # it may come back, once nobody reaches the floor
            if candidates := tuple(each for each in unit.candidates if each in self._racing):
                return replace(pending, unit=replace(unit, candidates=candidates))
        chosen = self._choose(worker)
        return None if chosen is None else _Pending(chosen)

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
            return self.homes.get(row, worker) == worker or self.homes[row] not in self._busy

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
            workers=len(self._busy),
            racing=racing,
        )
        shape = self._pacer.shape(self.scoring.removed, chosen, left)
        unit = WorkUnit(
            number=self._next_number,
            scope=self.scoring.scope,
            split=self.scoring.split,
            removed=self.scoring.removed,
            candidates=chosen[: shape.candidates],
            rows=(row, *(other for _, other in islice(found, shape.rows - 1))),
        )
        self._next_number += 1
        self._cells.close(unit.candidates, unit.rows)
        return unit
