"""The published procedure timed on a workload: in full, or on some of its cells where that would take too long."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import published
from recording import Recorded
from workloads import EPSILON

from tale_ray.engine.streams import Node
from tale_ray.search.executor import Questions

SAMPLED_ROWS = 4
_LEAST_CANDIDATES = 4
_SEED = 0


class Disagreement(Exception):
    """Engine and published procedure do not say the same: the times mean nothing."""


@dataclass(frozen=True, slots=True)
class Timed:
    """What the published procedure took."""

    seconds: float  # of baseline and all rounds; scaled where it is sampled
    forwards: int  # that were run
    method: str  # in words
    rows: Sequence[int]  # positions
    answers: Mapping[Node, Sequence[bool]]  # by removed layers: which of the rows were answered correctly

    def compare(self, recorded: Recorded) -> int:
        """Return how many (model, row) answers are known from both sides; none may differ.

        Raises:
            Disagreement: one does.
        """
        ours = recorded.cells
        known = 0
        for removed, answers in self.answers.items():
            for row, correct in zip(self.rows, answers, strict=True):
                if (removed, row) not in ours:
                    continue  # left out by racing
                known += 1
                if ours[removed, row] != correct:
                    raise Disagreement(
                        f"without the layers {list(removed)} row {row} is {'right' if correct else 'wrong'} as "
                        "published, and not so by the engine"
                    )
        return known


@dataclass(frozen=True, slots=True)
class Yardstick:
    """The published procedure on one workload's model and questions."""

    model: Any
    tokenizer: Any
    questions: Questions
    max_rounds: int | None

    def estimate(self, recorded: Recorded) -> float:
        """Return about how many seconds the whole search takes, from one reply of the full model."""
        procedure = self._procedure()
        procedure.count((), [0])  # the first forward is slower
        before = procedure.seconds
        procedure.count((), [0])
        models = 1 + sum(len(candidates) for _, candidates in recorded.rounds)
        return (procedure.seconds - before) * models * self._num_rows

    def full(self, recorded: Recorded) -> Timed:
        """Search as published, and compare every decision.

        Raises:
            Disagreement: one of them differs.
        """
        procedure = self._procedure()
        decisions = published.search(procedure, EPSILON, self.max_rounds)
        ours = engine_decisions(recorded)
        if ours != decisions:
            raise Disagreement(f"the engine decided {ours}, the published procedure {decisions}")
        return Timed(procedure.seconds, procedure.forwards, "in full", range(self._num_rows), procedure.answers)

    def sampled(self, recorded: Recorded, limit_seconds: float) -> Timed:
        """Time some rows of every round that the engine decided on.

        Where that would still take more than `limit_seconds`, only some of the candidates are timed, too.
        """
        choose = random.Random(_SEED)
        rows = sorted(choose.sample(range(self._num_rows), min(SAMPLED_ROWS, self._num_rows)))
        share = min(1.0, limit_seconds / (self.estimate(recorded) * len(rows) / self._num_rows))
        procedure = self._procedure()
        procedure.count((), rows)
        seconds = procedure.seconds
        for removed, candidates in recorded.rounds:
            size = max(min(_LEAST_CANDIDATES, len(candidates)), int(share * len(candidates)))
            chosen = sorted(choose.sample(candidates, size))
            before = procedure.seconds
            for layer in chosen:
                procedure.count((*removed, layer), rows)
            seconds += (procedure.seconds - before) * len(candidates) / size
        which = "all candidates" if share == 1 else f"{share:.0%} of the candidates, at random"
        return Timed(
            seconds * self._num_rows / len(rows),
            procedure.forwards,
            f"{len(rows)} of {self._num_rows} rows, {which}, scaled",
            rows,
            procedure.answers,
        )

    @property
    def _num_rows(self) -> int:
        return len(self.questions.rows["search"])

    def _procedure(self) -> published.Published:
        return published.Published(
            model=self.model,
            tokenizer=self.tokenizer,
            questions=[published.Question(row.token_ids, row.target) for row in self.questions.rows["search"]],
            answer=self.questions.answer,
            max_new_tokens=self.questions.max_new_tokens,
        )


def engine_decisions(recorded: Recorded) -> published.Decisions:
    """Return what the engine's search decided, in the yardstick's form."""
    summary = recorded.summary
    rejected = summary["rejected_round"]
    return published.Decisions(
        baseline=summary["baseline"]["correct"],
        rounds=tuple((each["removed_layer"], each["correct"]) for each in summary["rounds"]),
        rejected=(rejected["removed_layer"], rejected["correct"]) if rejected else None,
    )
