"""What counts of correct rows can and cannot tell: intervals, paired comparisons, and the round to recommend.

Pure functions of counts and of paired answers: two models' correctness on the same rows, in the same order. Shares and
probabilities are in [0, 1]. Does not know of runs, files or tables.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tale_ray.records import Score

CONFIDENCE = 0.95  # of every interval
RESAMPLES = 10_000  # of a bootstrap
BOOTSTRAP_SEED = 0  # so that the same answers always have the same interval


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval, ends included."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """A model against another one on the same rows."""

    wins: int  # rows that only the model answers correctly
    losses: int  # rows that only the other one does
    ties: int
    difference: float  # of the accuracies: above 0, the model is better
    interval: Interval  # of the difference
    p_value: float  # two-sided, of no difference

    @property
    def total(self) -> int:
        """Number of rows."""
        return self.wins + self.losses + self.ties


# One accuracy. scipy.stats is imported where it is used: that takes a second, and most commands need none of it.


def wilson_interval(correct: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Return the score interval of an accuracy, without correction for continuity (Wilson 1927, JASA 22:209).

    Its coverage is the nominal one on average over accuracies, and nowhere far from it; 0 and all correct have
    intervals too.
    """
    from scipy.stats import binomtest

    found = binomtest(correct, total).proportion_ci(confidence, method="wilson")
    accuracy = correct / total  # rounding may leave an end of the interval on its wrong side
    return Interval(min(float(found.low), accuracy), max(float(found.high), accuracy))


def standard_error(correct: int, total: int) -> float:
    """Return the standard error of an accuracy p on n rows: sqrt(p (1 - p) / n)."""
    accuracy = correct / total
    return math.sqrt(accuracy * (1 - accuracy) / total)


# Two models on the same rows.


def compare(answers: Sequence[bool], others: Sequence[bool]) -> PairedComparison:
    """Return how a model compares with another one: `answers` and `others` say by row whether they are correct.

    Raises:
        ValueError: they are not answers to the same rows, or there are none.
    """
    if len(answers) != len(others):
        raise ValueError(f"{len(answers)} and {len(others)} answers are not of the same rows: pair them by row")
    if not answers:
        raise ValueError("no rows to compare on: give one at least")
    changes = np.asarray(answers, dtype=np.int8) - np.asarray(others, dtype=np.int8)
    wins, losses = int(np.count_nonzero(changes > 0)), int(np.count_nonzero(changes < 0))
    return PairedComparison(
        wins=wins,
        losses=losses,
        ties=len(changes) - wins - losses,
        difference=(wins - losses) / len(changes),
        interval=bootstrap_interval(wins, losses, len(changes)),
        p_value=mcnemar(wins, losses),
    )


def mcnemar(wins: int, losses: int) -> float:
    """Return the p-value of no difference, exact and two-sided (McNemar 1947, Psychometrika 12:153).

    Without a difference each row that only one of the two answers correctly is a win or a loss with probability 1/2;
    rows that both or neither do say nothing. 1 if there are no such rows.
    """
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def bootstrap_interval(
    wins: int, losses: int, total: int, *, confidence: float = CONFIDENCE, seed: int = BOOTSTRAP_SEED
) -> Interval:
    """Return the percentile interval of a paired bootstrap of the difference (Efron and Tibshirani 1993, ch. 13).

    A row says no more than that it is a win, a loss or a tie, so drawing `total` rows with replacement is drawing
    how many there are of each from a multinomial distribution: the same interval as from rows, whatever their number.
    Identical answers have the interval from 0 to 0.
    """
    shares = np.array([wins, losses, total - wins - losses]) / total
    draws = np.random.default_rng(seed).multinomial(total, shares, size=RESAMPLES)
    tail = (1 - confidence) / 2
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / total, [tail, 1 - tail])
    return Interval(float(low), float(high))


def adjust_holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return the p-values of several tests, corrected for being several (Holm 1979, Scand. J. Statist. 6:65).

    The smallest is multiplied by their number, the next by one less, and so on; none falls below one before it, none
    is above 1. Calling significant what is below 0.05 errs anywhere with a probability of at most 0.05.
    """
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return tuple(float(value) for value in adjusted)


# What a search is worth.


def recommend(scores: Sequence[Score]) -> int:
    """Return which of the rounds to use: the last within one standard error of the best, by their select rows.

    `scores` are those of round 0 and the committed rounds on the same select rows, in order: each has fewer layers
    than the one before. The standard error is that of the best accuracy p on n rows, sqrt(p (1 - p) / n): the rule of
    one standard error (Breiman, Friedman, Olshen and Stone 1984, section 3.4.3). It is decided on integers: with b
    correct rows of the best and c of a round, (b - c)^2 n <= b (n - b).
    """
    best, total = max(score.correct for score in scores), scores[0].total
    near = [(best - score.correct) ** 2 * total <= best * (total - best) for score in scores]
    return max(number for number, is_near in enumerate(near) if is_near)


def optimism(search: tuple[Score, Score], test: tuple[Score, Score]) -> float:
    """Return by how much a gain on search rows exceeds that on test rows, from (result, baseline) on each."""
    (found, start), (held_out, held_out_start) = search, test
    return (found.accuracy - start.accuracy) - (held_out.accuracy - held_out_start.accuracy)
