"""What a strategy is shown, and what a run has come to: frozen views of the finished rounds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from tale_ray.records import CandidateScore, Measurement, Probe, Round, Score


def best_first(scores: Iterable[CandidateScore]) -> Sequence[CandidateScore]:
    """Return the candidates that were scored in full, most correct rows first, equals in the order given."""
    exact = [score for score in scores if score.status == "exact" and score.layer is not None]
    return sorted(exact, key=lambda score: -score.correct)


@dataclass(frozen=True)
class History:
    """The finished rounds of a run, round 0 (the full model) first.

    `start` are the layers that the search does without from round 1 on. `rejected` is the last round if its winner
    fell below the floor: it removed nothing. `measurements` are those of the model that strategies have asked for.
    """

    num_layers: int
    start: tuple[int, ...] = ()
    rounds: tuple[Round, ...] = ()  # committed
    rejected: Round | None = None
    measurements: tuple[Measurement, ...] = ()

    def __post_init__(self) -> None:
        assert [entry.number for entry in self.rounds] == list(range(len(self.rounds)))
        assert all(len(late.removed) > len(early.removed) for early, late in pairwise(self.rounds))

    @staticmethod
    def of(
        finished: Iterable[Round],
        *,
        num_layers: int,
        start: tuple[int, ...],
        measurements: tuple[Measurement, ...] = (),
    ) -> "History":
        """Return the history of finished rounds, given in order."""
        history = History(num_layers=num_layers, start=start, measurements=measurements)
        for entry in finished:
            history = history.with_round(entry)
        return history

    @property
    def baseline(self) -> Score:
        """The score of the full model. Only a history with a round 0 has one."""
        return self.rounds[0].score

    @property
    def removed(self) -> tuple[int, ...]:
        """Layers that the next round starts without, in order of removal."""
        return self.rounds[-1].removed if len(self.rounds) > 1 else self.start

    def best_sets(self, width: int) -> tuple[tuple[int, ...], ...]:
        """Return the best sets of removed layers that the last round scored in full, at most `width`, the best first.

        Each in order of removal. Before round 1 it is what the search starts without.
        """
        if len(self.rounds) == 1:
            return (self.start,)
        before = self.rounds[-2].removed if len(self.rounds) > 2 else self.start
        return tuple(
            (*(before if score.without is None else score.without), score.layer)
            for score in best_first(self.rounds[-1].candidates)[:width]
            if score.layer is not None
        )

    @cached_property
    def surviving(self) -> tuple[int, ...]:
        """Layers that are still there, in order."""
        return tuple(layer for layer in range(self.num_layers) if layer not in set(self.removed))

    def with_round(self, entry: Round) -> "History":
        """Return the history with one more finished round."""
        if entry.committed:
            return replace(self, rounds=(*self.rounds, entry), rejected=None)
        return replace(self, rejected=entry)

    def with_measurement(self, entry: Measurement) -> "History":
        """Return the history with one more measurement of the model."""
        return replace(self, measurements=(*self.measurements, entry))

    def measurement(self, probe: Probe) -> Measurement | None:
        """Return what a probe came to; None: it was not measured yet."""
        return next((entry for entry in self.measurements if entry.probe == probe), None)

    # The three results of a search (TALE, arXiv 2510.22767).

    @property
    def best(self) -> Round:
        """The first round with the highest accuracy; round 0 counts."""
        return max(self.rounds, key=lambda entry: (entry.score.correct, -entry.number))

    @property
    def bsba(self) -> Round:
        """Best speed-up, at least baseline accuracy: the last round that answers as many rows as the full model."""
        return [entry for entry in self.rounds if entry.score.correct >= self.baseline.correct][-1]

    @property
    def final(self) -> Round:
        """The last committed round."""
        return self.rounds[-1]

    @property
    def picks(self) -> dict[str, Round]:
        """The rounds that a user may pick by name."""
        return {"baseline": self.rounds[0], "best": self.best, "bsba": self.bsba, "final": self.final}
