"""The loop of a search: propose, score, decide, store, again. A generator of frozen events.

Everything that a run is lies in the store before the next step is taken: a finished unit before the unit after it is
scored, a finished round before the next is proposed. The driver keeps nothing that the store does not have, so
going on after a kill is the same loop with another history.
"""

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from tale_ray.errors import BaselineZero
from tale_ray.records import CandidateScore, Example, Round, Score, SplitName, StopReason, Work
from tale_ray.search.history import History
from tale_ray.search.pool import Pool, PoolEvent
from tale_ray.search.scheduler import Keep, Scheduler, Scoring, UnitShape
from tale_ray.search.strategy import Strategy
from tale_ray.store.layout import round_scope
from tale_ray.store.run import RunWriter
from tale_ray.store.tables import AnswerSheet

UNIT_SECONDS = 2.0  # at most, as far as can be told: what a kill may cost is about this much work per worker
LEAST_UNIT_SECONDS = 0.2  # less is not worth a file
UNITS_PER_ROUND = 16  # so that candidates that cannot win are left out early, and workers finish a round together
UNITS_PER_WORKER = 2  # at least, if need be by sharing out the candidates


@dataclass(frozen=True, slots=True)
class ScoringStarted:
    """Candidates are being scored; `done_cells` of the (candidate, row) pairs are known from an earlier attempt."""

    scoring: Scoring
    history: History
    done_cells: int
    total_cells: int


@dataclass(frozen=True, slots=True)
class RoundFinished:
    """A round is in the store."""

    round: Round
    history: History


@dataclass(frozen=True, slots=True)
class SearchEnded:
    """No round follows."""

    reason: StopReason
    history: History


@dataclass(frozen=True, slots=True)
class HeldOutScored:
    """A result of the search was scored on the test rows."""

    name: str
    score: Score


SearchEvent: TypeAlias = ScoringStarted | PoolEvent | RoundFinished | SearchEnded | HeldOutScored


def held_out_scope(number: int) -> str:
    """Return the scope of the test rows scored without the layers of a round."""
    return f"test-{number:04d}"


def unit_shape(scoring: Scoring, row_seconds: float | None, num_workers: int = 1) -> UnitShape:
    """Return how large units are, from the seconds that one row took in round 0 (None before that).

    A unit holds all candidates, as they share what they have in common, and about a sixteenth of the rows: more where
    that takes less than `LEAST_UNIT_SECONDS`, fewer where it takes more than `UNIT_SECONDS`, if all candidates take
    half of what they would alone. Where there are too few rows for all workers, the candidates are shared out.
    """
    rows = math.ceil(scoring.num_rows / UNITS_PER_ROUND)
    if row_seconds:
        sweep_seconds = row_seconds * max(1.0, len(scoring.candidates) / 2)
        rows = min(max(rows, int(LEAST_UNIT_SECONDS / sweep_seconds)), max(1, int(UNIT_SECONDS / sweep_seconds)))
    rows = min(rows, math.ceil(scoring.num_rows / min(num_workers * UNITS_PER_WORKER, scoring.num_rows)))
    shares = math.ceil(num_workers * UNITS_PER_WORKER / math.ceil(scoring.num_rows / rows))
    return UnitShape(rows=rows, candidates=math.ceil(len(scoring.candidates) / shares))


def picked_rounds(history: History) -> dict[int, Round]:
    """Return the distinct rounds among the results of a search, by number."""
    return {entry.number: entry for entry in sorted(history.picks.values(), key=lambda entry: entry.number)}


def why_zero(score: Score) -> str:
    """Return in words why a model that answers nothing correctly probably does so."""
    reason = (
        f"no answer could be read from {score.invalid} of its replies: look at the prompt, the chat template and the "
        "labels of the task (`tale-ray tasks show`), and at whether max_new_tokens leaves room for an answer"
        if score.invalid > score.total / 2
        else "its replies were readable but wrong: the task is too hard for it, or labels and targets do not match"
    )
    return f"the full model answers 0 of {score.total} search rows correctly, so there is nothing to protect; {reason}"


class Driver:
    """One attempt at one run. `examples` are the rows of every split, as the executor's workers know them."""

    def __init__(
        self,
        *,
        strategy: Strategy,
        history: History,
        examples: Mapping[SplitName, Sequence[Example]],
        pool: Pool,
        writer: RunWriter,
        loaded_at: float,
        exhaustive: bool = False,
    ) -> None:
        self.history = history
        self._strategy = strategy
        self._examples = examples
        self._digests = {split: [example.digest for example in rows] for split, rows in examples.items()}
        self._pool = pool
        self._writer = writer
        self._loaded_at = loaded_at  # time.monotonic() when the first worker had loaded the model
        self._exhaustive = exhaustive
        self.retries = 0
        self.wasted_rows = 0

    def run(self) -> Iterator[SearchEvent]:
        """Go on to the end of the search, then score its results on the test rows.

        Raises:
            Interrupted: asked to stop, lease lost, or storage away; what is finished is stored.
            BaselineZero: the full model answers no row correctly; round 0 is stored.
            PoisonUnit: a unit failed on every try.
        """
        self._writer.clean()
        if not self.history.rounds:
            yield from self._round(removed=(), candidates=(None,))
        while not isinstance(candidates := self._strategy.propose(self.history), StopReason):
            yield from self._round(removed=self.history.removed, candidates=candidates)
        yield SearchEnded(candidates, self.history)
        if candidates is StopReason.BASELINE_ZERO:
            raise BaselineZero(why_zero(self.history.baseline))
        yield from self._test()

    # Rounds.

    def _round(self, removed: tuple[int, ...], candidates: tuple[int | None, ...]) -> Iterator[SearchEvent]:
        number = len(self.history.rounds)
        floor = None if number == 0 or self._exhaustive else self._strategy.race_floor(self.history)
        scoring = Scoring(
            scope=round_scope(number),
            split="search",
            removed=removed,
            candidates=candidates,
            num_rows=len(self._examples["search"]),
            floor=floor,
            row_order=None if floor is None else self._row_order(),
        )
        scheduler = yield from self._score(scoring)
        finished = self._decide(number, removed, scheduler.scores())
        work = scheduler.work if number else replace(scheduler.work, candidate_rows=0)
        self._store_round(finished, work, scheduler)
        self.history = self.history.with_round(finished)
        yield RoundFinished(finished, self.history)

    def _row_order(self) -> tuple[int, ...]:
        """Return the search rows, those first that most of the committed models answered wrong.

        Those that all get wrong tell nothing apart, but they use up what a candidate may miss, so that the first row
        that only a bad one misses puts it out.
        """
        sheets = [self._writer.reader.answers(round_scope(entry.number)) for entry in self.history.rounds]
        wrong = [0] * len(self._examples["search"])
        for sheet in sheets:
            for row, answer in enumerate(sheet.answers if sheet else ()):
                wrong[row] += not answer.correct
        return tuple(sorted(range(len(wrong)), key=lambda row: (-wrong[row], row)))

    def _decide(self, number: int, removed: tuple[int, ...], scores: tuple[CandidateScore, ...]) -> Round:
        if number == 0:
            winner, accepted = scores[0], True
        else:
            decision = self._strategy.decide(self.history, scores)
            winner, accepted = decision.winner, decision.accepted
        return Round(
            number=number,
            removed_layer=winner.layer,
            removed=removed if winner.layer is None else (*removed, winner.layer),
            score=Score(correct=winner.correct, total=winner.seen, invalid=winner.invalid),
            candidates=scores,
            committed=accepted,
        )

    def _store_round(self, finished: Round, work: Work, scheduler: Scheduler) -> None:
        """Store the round; its units are kept only if it is rejected, for a later attempt with a larger epsilon."""
        stored = self._writer.reader.rounds()
        parent = stored[finished.number - 1].digest if finished.number else ""
        if finished.committed:
            self._writer.write_answers(self._sheet(scheduler, finished.removed_layer))
        self._writer.write_round(finished, work, parent)
        if finished.committed:
            self._writer.drop_partials(scheduler.scoring.scope)
        self._record_attempt(search_seconds=time.monotonic() - self._loaded_at)

    # Test rows.

    def _test(self) -> Iterator[SearchEvent]:
        """Score each result on the test rows, unless an earlier attempt did, and store all scores together."""
        rows = self._examples.get("test", ())
        if not rows:
            return
        scores: dict[int, Score] = {}
        for number, entry in picked_rounds(self.history).items():
            sheet = self._writer.reader.answers(held_out_scope(number))
            if sheet is None:
                scoring = Scoring(held_out_scope(number), "test", entry.removed, (None,), len(rows))
                scheduler = yield from self._score(scoring)
                sheet = self._sheet(scheduler, None)
                self._writer.write_answers(sheet)
                self._writer.drop_partials(scoring.scope)
                self._record_attempt()
            scores[number] = _score(sheet)
        for name, entry in self.history.picks.items():
            yield HeldOutScored(name, scores[entry.number])
        self._writer.write_result(
            "test",
            {
                name: {
                    "round": entry.number,
                    "removed": list(entry.removed),
                    "correct": scores[entry.number].correct,
                    "total": scores[entry.number].total,
                    "invalid": scores[entry.number].invalid,
                }
                for name, entry in self.history.picks.items()
            },
        )

    # Scoring.

    def _score(self, scoring: Scoring) -> Generator[SearchEvent, None, Scheduler]:
        known = self._writer.reader.unit_results(scoring.scope)
        shape = unit_shape(scoring, self._row_seconds(), max(1, len(self._pool.workers)))
        scheduler = Scheduler(scoring, shape, known, self._pool.workers)
        yield ScoringStarted(scoring, self.history, scheduler.done_cells, scheduler.total_cells)
        try:
            for step in self._pool.run(scheduler):
                if isinstance(step, Keep):
                    digests = self._digests[scoring.split]
                    self._writer.write_unit(step.result, [digests[row] for row in step.result.unit.rows])
                else:
                    yield step
        finally:
            self.retries += scheduler.retries
            self.wasted_rows += scheduler.wasted_rows
        return scheduler

    def _row_seconds(self) -> float | None:
        if not self.history.rounds:
            return None
        baseline = self.history.rounds[0].candidates[0]
        return baseline.seconds / baseline.seen

    def _sheet(self, scheduler: Scheduler, candidate: int | None) -> AnswerSheet:
        scoring = scheduler.scoring
        examples = self._examples[scoring.split]
        return AnswerSheet(
            scope=scoring.scope,
            split=scoring.split,
            row_digests=tuple(example.digest for example in examples),
            targets=tuple(example.target for example in examples),
            answers=scheduler.answers(candidate),
        )

    def _record_attempt(self, **changes: float) -> None:
        self._writer.update_attempt(retries=self.retries, wasted_rows=self.wasted_rows, **changes)


def _score(sheet: AnswerSheet) -> Score:
    return Score(
        correct=sum(answer.correct for answer in sheet.answers),
        total=len(sheet.answers),
        invalid=sum(answer.prediction is None for answer in sheet.answers),
    )
