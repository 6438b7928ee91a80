"""The loop of a search: propose, score, decide, store, again. A generator of frozen events.

Everything that a run is lies in the store before the next step is taken: a finished unit before the unit after it is
scored, a finished round before the next is proposed. The driver keeps nothing that the store does not have, so
going on after a kill is the same loop with another history.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

from tale_ray.errors import BaselineZero
from tale_ray.records import (
    Branch,
    CandidateScore,
    Example,
    Measurement,
    Probe,
    Round,
    Score,
    SplitName,
    StopReason,
    Work,
)
from tale_ray.search.history import History
from tale_ray.search.instructions import Keep
from tale_ray.search.pace import Pace
from tale_ray.search.pool import Pool, PoolEvent
from tale_ray.search.scheduler import Race, Scheduler, Scoring
from tale_ray.search.strategy import Strategy
from tale_ray.store.layout import round_scope
from tale_ray.store.run import RunWriter
from tale_ray.store.tables import AnswerSheet

DIFFICULTY_STEPS = 10  # in which rows count as equally hard, so that similar ones stay together
COMMITTED_WEIGHT = 3  # that the current model and those before it have, beside candidates, in how hard a row is


@dataclass(frozen=True, slots=True)
class ScoringStarted:
    """Candidates are being scored; `done_cells` of the (candidate, row) pairs are known from an earlier attempt."""

    scoring: Scoring
    history: History
    done_cells: int
    total_cells: int


@dataclass(frozen=True, slots=True)
class UnitStored:
    """A unit is in the store."""

    unit: int
    scope: str
    worker: str
    candidate_rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ModelMeasured:
    """What the strategy asked to be measured before it decides the round is in the store."""

    round: int
    measurement: Measurement


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
class RoundSelected:
    """The select rows recommend a round; `score` is its score on them."""

    round: Round
    score: Score


@dataclass(frozen=True, slots=True)
class HeldOutScored:
    """A result of the search was scored on the test rows."""

    name: str
    score: Score


SearchEvent: TypeAlias = (
    ScoringStarted
    | PoolEvent
    | UnitStored
    | ModelMeasured
    | RoundFinished
    | SearchEnded
    | RoundSelected
    | HeldOutScored
)
Recommend: TypeAlias = Callable[
    [Sequence[Score]], int
]  # from the scores of all rounds on the select rows: which to use


def held_out_scope(split: SplitName, number: int) -> str:
    """Return the scope of the select or test rows scored without the layers of a round."""
    return f"{split}-{number:04d}"


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
        recommend: Recommend,
        loaded_at: float,
        similar: Mapping[SplitName, Sequence[int]] = MappingProxyType({}),
        calibration: Sequence[tuple[int, ...]] = (),
        exhaustive: bool = False,
        max_new_tokens: int = 1,
        is_streamed: bool = False,
    ) -> None:
        self.history = history
        self._strategy = strategy
        self._examples = examples
        self._digests = {split: [example.digest for example in rows] for split, rows in examples.items()}
        self._pool = pool
        self._writer = writer
        self._recommend = recommend
        self._loaded_at = loaded_at  # time.monotonic() when the first worker had loaded the model
        self._exhaustive = exhaustive
        self._similar = similar
        self._calibration = calibration  # rows of tokens that strategies measure the model on
        self._pace = Pace(history.num_layers, max_new_tokens, is_streamed=is_streamed)
        self._homes: dict[SplitName, Mapping[int, str]] = {}
        self._sheets: dict[int, AnswerSheet | None] = {}  # read once, by round
        self._digest_by_round: dict[int, str] = {}
        self.retries = 0
        self.wasted_rows = 0

    def run(self) -> Iterator[SearchEvent]:
        """Go on to the end of the search, then score its rounds on the select rows and its results on the test rows.

        Raises:
            Interrupted: asked to stop, lease lost, or storage away; what is finished is stored.
            BaselineZero: the full model answers no row correctly; round 0 is stored.
            PoisonUnit: a unit failed on every try.
        """
        self._writer.clean()
        if not self.history.rounds:
            yield from self._baseline()
        while not isinstance(proposal := self._strategy.propose(self.history), StopReason):
            if isinstance(proposal, Probe):
                yield self._measure(proposal)
            else:
                yield from self._round(proposal)
        yield SearchEnded(proposal, self.history)
        if proposal is StopReason.BASELINE_ZERO:
            raise BaselineZero(why_zero(self.history.baseline))
        selected = yield from self._select()
        yield from self._test(self.history.picks | ({} if selected is None else {"selected": selected}))

    # Rounds.

    def _measure(self, probe: Probe) -> ModelMeasured:
        """Measure the model and store what was found, before anything is decided by it."""
        number = len(self.history.rounds)
        measurement = self._pool.measure(probe, self._calibration)
        self._writer.write_measurement(number, measurement)
        self.history = self.history.with_measurement(measurement)
        return ModelMeasured(number, measurement)

    def _baseline(self) -> Iterator[SearchEvent]:
        num_rows = len(self._examples["search"])
        scoring = Scoring(round_scope(0), "search", (), (None,), num_rows, row_order=self._order_of("search"))
        scheduler = yield from self._score(scoring)
        (whole,) = scheduler.scores()
        finished = Round(0, None, (), _score_of(whole), (whole,), committed=True)
        yield self._finish(finished, (scheduler,), scheduler)

    def _round(self, branches: Sequence[Branch]) -> Iterator[SearchEvent]:
        """Score the candidates of all branches, one branch after another, and decide between them."""
        number = len(self.history.rounds)
        schedulers: dict[tuple[int, ...], Scheduler] = {}  # by the layers that the branch does without
        for at, branch in enumerate(branches):
            schedulers[branch.removed] = yield from self._score(self._scoring(round_scope(number, at), branch))
        scores = tuple(
            replace(score, without=removed) if len(branches) > 1 else score
            for removed, scheduler in schedulers.items()
            for score in scheduler.scores()
        )
        decision = self._strategy.decide(self.history, scores)
        winner = decision.winner
        assert winner.layer is not None, "no strategy proposes to remove nothing"
        removed = branches[0].removed if winner.without is None else winner.without
        finished = Round(
            number, winner.layer, (*removed, winner.layer), _score_of(winner), scores, committed=decision.accepted
        )
        yield self._finish(finished, tuple(schedulers.values()), schedulers[removed])

    def _scoring(self, scope: str, branch: Branch) -> Scoring:
        race = None if self._exhaustive else self._race(branch.candidates)
        return Scoring(
            scope=scope,
            split="search",
            removed=branch.removed,
            candidates=branch.candidates,
            num_rows=len(self._examples["search"]),
            race=race,
            row_order=self._order_of("search") if race is None else self._hardest_first(),
        )

    def _race(self, candidates: tuple[int | None, ...]) -> Race | None:
        """Return how candidates race: the favourite is who might have got most rows right in the last round."""
        if (floor := self._strategy.race_floor(self.history)) is None:
            return None
        latest = self.history.rounds[-1]
        sheet = self._answers_of(latest.number)
        num_rows = len(self._examples["search"])
        right = tuple(answer.correct for answer in sheet.answers) if sheet else (True,) * num_rows
        known = [each for each in latest.candidates if each.layer is not None and each.layer in candidates]
        favourite = max(known, key=lambda each: (each.correct - each.seen, -(each.layer or 0)), default=None)
        return Race(floor, right, None if favourite is None else favourite.layer)

    def _order_of(self, split: SplitName) -> tuple[int, ...]:
        """Return the rows of a split with similar prompts side by side."""
        rank = self._similar.get(split) or range(len(self._examples[split]))
        return tuple(sorted(range(len(rank)), key=lambda row: rank[row]))

    def _hardest_first(self) -> tuple[int, ...]:
        """Return the search rows, those first that most models of this run so far got wrong.

        Those that all get wrong tell nothing apart, but they use up what a candidate may miss, so that the first row
        that only a bad one misses puts it out.
        """
        sheets = [self._answers_of(entry.number) for entry in self.history.rounds]
        num_rows = len(self._examples["search"])
        seen, missed = [0] * num_rows, [0] * num_rows
        for sheet in sheets:
            for row, answer in enumerate(sheet.answers if sheet else ()):
                seen[row] += COMMITTED_WEIGHT
                missed[row] += COMMITTED_WEIGHT * (not answer.correct)
            for row, (others, wrong) in enumerate(sheet.candidates if sheet else ()):
                seen[row] += others
                missed[row] += wrong
        steps = [round(DIFFICULTY_STEPS * wrong / max(1, count)) for wrong, count in zip(missed, seen, strict=True)]
        return tuple(sorted(self._order_of("search"), key=lambda row: -steps[row]))

    def _answers_of(self, number: int) -> AnswerSheet | None:
        """Return the answers of a committed round on the search rows; None if they are not stored."""
        if number not in self._sheets:
            self._sheets[number] = self._writer.reader.answers(round_scope(number))
        return self._sheets[number]

    def _finish(self, finished: Round, schedulers: Sequence[Scheduler], winning: Scheduler) -> RoundFinished:
        """Store the round; its units are kept only if it is rejected, for a later attempt with a larger epsilon."""
        if finished.number and finished.number - 1 not in self._digest_by_round:
            stored = self._writer.reader.rounds()
            self._digest_by_round = {item.round.number: item.digest for item in stored}
        parent = self._digest_by_round[finished.number - 1] if finished.number else ""
        if finished.committed:
            sheet = replace(
                self._sheet(winning, finished.removed_layer, winning.misses()), scope=round_scope(finished.number)
            )
            self._writer.write_answers(sheet)
            self._sheets[finished.number] = sheet
        work = sum((scheduler.work for scheduler in schedulers), Work())
        work = work if finished.number else replace(work, candidate_rows=0)
        self._digest_by_round[finished.number] = self._writer.write_round(finished, work, parent).digest
        if finished.committed:
            for scheduler in schedulers:
                self._writer.drop_partials(scheduler.scoring.scope)
        self._record_attempt(search_seconds=time.monotonic() - self._loaded_at)
        self.history = self.history.with_round(finished)
        return RoundFinished(finished, self.history)

    # Rows that the search has not seen.

    def _select(self) -> Generator[SearchEvent, None, Round | None]:
        """Score every round on the select rows, store which of them is recommended, and return it."""
        if not self._examples.get("select"):
            return None
        scores = []
        for entry in self.history.rounds:
            scores.append((yield from self._held_out("select", entry)))
        selected = self._recommend(scores)
        chosen = self.history.rounds[selected]
        yield RoundSelected(chosen, scores[selected])
        by_round = [_result(entry, score) for entry, score in zip(self.history.rounds, scores, strict=True)]
        self._writer.write_result("selected", {**by_round[selected], "rounds": by_round})
        return chosen

    def _test(self, picks: Mapping[str, Round]) -> Iterator[SearchEvent]:
        """Score the results of the search on the test rows, and store all scores together."""
        if not self._examples.get("test"):
            return
        scores: dict[int, Score] = {}
        for entry in sorted(picks.values(), key=lambda entry: entry.number):
            if entry.number not in scores:
                scores[entry.number] = yield from self._held_out("test", entry)
        for name, entry in picks.items():
            yield HeldOutScored(name, scores[entry.number])
        self._writer.write_result("test", {name: _result(entry, scores[entry.number]) for name, entry in picks.items()})

    def _held_out(self, split: SplitName, entry: Round) -> Generator[SearchEvent, None, Score]:
        """Score a round on the rows of a split and store the answers, unless an earlier attempt did."""
        scope = held_out_scope(split, entry.number)
        sheet = self._writer.reader.answers(scope)
        if sheet is None:
            num_rows = len(self._examples[split])
            scoring = Scoring(scope, split, entry.removed, (None,), num_rows, row_order=self._order_of(split))
            scheduler = yield from self._score(scoring)
            sheet = self._sheet(scheduler, None)
            self._writer.write_answers(sheet)
            self._writer.drop_partials(scope)
            self._record_attempt()
        return sheet.score

    # Scoring.

    def _score(self, scoring: Scoring) -> Generator[SearchEvent, None, Scheduler]:
        stored = self._writer.reader.unit_results(scoring.scope)
        known = [result for result in stored if result.unit.removed == scoring.removed]
        for result in known:  # as fast as an earlier attempt was
            self._pace.note(result)
        scheduler = self._pool.scheduler(scoring, self._pace, known, self._homes.get(scoring.split, {}))
        yield ScoringStarted(scoring, self.history, scheduler.done_cells, scheduler.total_cells)
        try:
            for step in self._pool.run(scheduler):
                if isinstance(step, Keep):
                    result, unit = step.result, step.result.unit
                    digests, started_at = self._digests[scoring.split], self._pool.now()
                    self._writer.write_unit(result, [digests[row] for row in unit.rows])
                    self._pace.note_write(self._pool.now() - started_at)
                    yield UnitStored(unit.number, unit.scope, result.worker, unit.candidate_rows, result.seconds)
                else:
                    yield step
        finally:
            self.retries += scheduler.retries
            self.wasted_rows += scheduler.wasted_rows
            self._homes[scoring.split] = scheduler.homes
        return scheduler

    def _sheet(
        self, scheduler: Scheduler, candidate: int | None, candidates: tuple[tuple[int, int], ...] = ()
    ) -> AnswerSheet:
        scoring = scheduler.scoring
        examples = self._examples[scoring.split]
        return AnswerSheet(
            scope=scoring.scope,
            split=scoring.split,
            row_digests=tuple(example.digest for example in examples),
            targets=tuple(example.target for example in examples),
            answers=scheduler.answers(candidate),
            candidates=candidates,
        )

    def _record_attempt(self, **changes: float) -> None:
        self._writer.update_attempt(retries=self.retries, wasted_rows=self.wasted_rows, **changes)


def _score_of(candidate: CandidateScore) -> Score:
    return Score(correct=candidate.correct, total=candidate.seen, invalid=candidate.invalid)


def _result(entry: Round, score: Score) -> dict[str, Any]:
    return {"round": entry.number, "removed": list(entry.removed), **asdict(score)}
