"""Statistics equal scipy and statsmodels on worked examples, hold in simulations, and see through luck."""

import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from tale_ray.records import Score
from tale_ray.results import statistics
from tale_ray.results.statistics import (
    Interval,
    adjust_holm,
    bootstrap_interval,
    compare,
    mcnemar,
    optimism,
    recommend,
    standard_error,
    wilson_interval,
)

COUNTS = [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (301, 360), (4999, 5000)]
CHANGES = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 200)).filter(any)


def score(correct: int, total: int = 100) -> Score:
    return Score(correct=correct, total=total, invalid=0)


# Worked examples.


@pytest.mark.parametrize(("correct", "total"), COUNTS)
def test_wilson_equals_statsmodels(correct: int, total: int) -> None:
    found = wilson_interval(correct, total)
    assert (found.low, found.high) == pytest.approx(proportion_confint(correct, total, method="wilson"), abs=1e-12)


def test_wilson_by_hand() -> None:
    """Of Brown, Cai and DasGupta 2001: the middle and half the width for 2 of 10, with z = 1.96."""
    middle, half = (2 + 1.92) / (10 + 3.84), math.sqrt(10) * 1.96 / (10 + 3.84) * math.sqrt(0.2 * 0.8 + 3.84 / 40)
    found = wilson_interval(2, 10)
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-3)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (0, 5), (3, 11), (59, 88), (7, 7), (121, 59)])
def test_mcnemar_equals_statsmodels(wins: int, losses: int) -> None:
    reference = statsmodels_mcnemar([[10, wins], [losses, 10]], exact=True).pvalue if wins + losses else 1.0
    assert mcnemar(wins, losses) == pytest.approx(min(1.0, reference), abs=1e-12)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(1, 4) == pytest.approx(2 * (1 + 5) / 32)


@pytest.mark.parametrize(
    "p_values", [[0.01, 0.04, 0.03, 0.005], [0.5], [1.0, 1.0, 0.9], [0.02, 0.02, 0.02], [0.04, 0.001, 0.2, 0.05, 0.011]]
)
def test_holm_equals_statsmodels(p_values: list[float]) -> None:
    assert adjust_holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


def test_holm_by_hand() -> None:
    assert adjust_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert adjust_holm([]) == ()


@pytest.mark.parametrize(("wins", "losses", "total"), [(30, 20, 360), (3, 0, 50), (50, 80, 200), (0, 1, 1)])
def test_the_bootstrap_of_counts_is_that_of_rows(wins: int, losses: int, total: int) -> None:
    """Up to one row at either end, as draws differ."""
    changes = np.array([1] * wins + [-1] * losses + [0] * (total - wins - losses))
    if total > 1:
        rows = bootstrap((changes,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1))
        reference = (rows.confidence_interval.low, rows.confidence_interval.high)
    else:
        reference = (-1.0, -1.0)
    found = bootstrap_interval(wins, losses, total)
    assert (found.low, found.high) == pytest.approx(reference, abs=1.01 / total if total > 1 else 0)


def test_a_comparison_counts_rows() -> None:
    found = compare([True, True, False, False, True], [False, True, True, False, False])
    assert (found.wins, found.losses, found.ties, found.total) == (2, 1, 2, 5)
    assert found.difference == pytest.approx(1 / 5)
    assert found.p_value == 1.0
    assert compare([True, False], [True, False]).interval == Interval(0.0, 0.0)


def test_answers_of_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="1 and 2 answers are not of the same rows"):
        compare([True], [True, False])
    with pytest.raises(ValueError, match="no rows"):
        compare([], [])


def test_a_standard_error() -> None:
    assert standard_error(80, 100) == pytest.approx(0.04)
    assert standard_error(100, 100) == 0


@pytest.mark.parametrize(
    ("correct", "recommended"),
    [
        ([80], 0),
        ([80, 84, 81, 79], 2),  # the best is 84, its standard error 3.67 rows: 81 is near, 79 is not
        ([80, 84, 79, 81], 3),  # one far from it does not hide what follows
        ([80, 76, 75], 1),  # exactly one standard error, 4 rows, is near
        ([100, 99, 100, 98], 2),  # without error only equals are near
        ([0, 0], 1),
    ],
)
def test_the_fewest_layers_within_one_standard_error(correct: list[int], recommended: int) -> None:
    assert recommend([score(count) for count in correct]) == recommended


def test_optimism_is_the_gain_that_test_rows_do_not_confirm() -> None:
    assert optimism((score(90), score(80)), (score(164, 200), score(150, 200))) == pytest.approx(0.10 - 0.07)


# Properties.


@given(CHANGES)
def test_mcnemar_is_symmetric_and_a_probability(changes: tuple[int, int, int]) -> None:
    wins, losses, _ = changes
    assert mcnemar(wins, losses) == mcnemar(losses, wins)
    assert 0 < mcnemar(wins, losses) <= 1


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_monotone_and_at_least_raw(p_values: list[float]) -> None:
    adjusted = adjust_holm(p_values)
    assert all(raw <= value <= 1 for raw, value in zip(p_values, adjusted, strict=True))
    by_raw = [value for _, value in sorted(zip(p_values, adjusted, strict=True))]
    assert by_raw == sorted(by_raw)


@given(CHANGES)
def test_intervals_contain_the_estimate(changes: tuple[int, int, int]) -> None:
    wins, losses, ties = changes
    total = sum(changes)
    accuracy = wilson_interval(wins, total)
    assert 0 <= accuracy.low <= wins / total <= accuracy.high <= 1
    difference = bootstrap_interval(wins, losses, total)
    assert difference.low - 1e-12 <= (wins - losses) / total <= difference.high + 1e-12
    if ties == total:
        assert difference == Interval(0.0, 0.0)


@given(CHANGES)
def test_a_comparison_the_other_way_round_is_its_mirror(changes: tuple[int, int, int]) -> None:
    wins, losses, ties = changes
    first = [True] * wins + [False] * (losses + ties)
    second = [False] * wins + [True] * losses + [False] * ties
    one, other = compare(first, second), compare(second, first)
    assert (one.wins, one.losses, one.ties) == (other.losses, other.wins, other.ties)
    assert one.difference == -other.difference
    assert one.p_value == other.p_value


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12))
def test_what_is_recommended_is_near_the_best_and_last(correct: list[int]) -> None:
    scores = [score(count, 50) for count in correct]
    chosen = recommend(scores)
    best = max(correct)
    shortfalls = [(best - count) / 50 - standard_error(best, 50) for count in correct]
    assert shortfalls[chosen] <= 1e-9
    assert all(shortfall > -1e-9 for shortfall in shortfalls[chosen + 1 :])


# Simulations.


def within(share: float, expected: float, number: int, errors: float = 3) -> bool:
    """Whether a share of `number` draws is as expected but for simulation error."""
    return abs(share - expected) <= errors * math.sqrt(expected * (1 - expected) / number)


@pytest.mark.parametrize(("accuracy", "num_rows"), [(0.5, 200), (0.8, 360), (0.85, 1000)])
def test_wilson_covers_at_the_nominal_rate(accuracy: float, num_rows: int) -> None:
    draws = np.random.default_rng(7).binomial(num_rows, accuracy, size=4000)
    interval = functools.cache(lambda correct: wilson_interval(correct, num_rows))
    found = [interval(int(correct)) for correct in draws]
    coverage = np.mean([each.low <= accuracy <= each.high for each in found])
    assert within(coverage, 0.95, 4000, errors=4), coverage


@pytest.mark.parametrize(("win", "loss", "num_rows"), [(0.08, 0.08, 300), (0.12, 0.06, 200)])
def test_the_bootstrap_covers_at_the_nominal_rate(win: float, loss: float, num_rows: int) -> None:
    """Differences are whole rows and the ends are in, so a little more is covered: up to 96% of so few rows."""
    draws = np.random.default_rng(9).multinomial(num_rows, [win, loss, 1 - win - loss], size=4000)
    interval = functools.cache(lambda wins, losses: bootstrap_interval(wins, losses, num_rows))
    found = [interval(int(wins), int(losses)) for wins, losses, _ in draws]
    coverage = np.mean([each.low - 1e-9 <= win - loss <= each.high + 1e-9 for each in found])
    error = 3 * math.sqrt(0.05 * 0.95 / 4000)
    assert 0.95 - error < coverage < 0.96 + error, coverage


def test_layers_that_do_nothing() -> None:
    """1000 searches among 30 layers that change nothing but luck.

    A tenth of the answers is drawn anew, so every candidate is exactly as good as the full model. On the rows that
    chose it the winner looks better and a test believes so; on fresh rows it does not.
    """
    random = np.random.default_rng(20)
    searches, layers, accuracy, changed = 1000, 30, 0.7, 0.1

    def candidates(baseline: np.ndarray, number: int) -> np.ndarray:
        shape = (len(baseline), number, baseline.shape[1])
        return np.where(random.random(shape) < changed, random.random(shape) < accuracy, baseline[:, None, :])

    search = random.random((searches, 200)) < accuracy
    found = candidates(search, layers)
    chosen = found[np.arange(searches), found.sum(axis=2).argmax(axis=1)]
    test = random.random((searches, 300)) < accuracy
    winner = candidates(test, 1)[:, 0, :]

    p_value = functools.cache(mcnemar)

    def rejected(answers: np.ndarray, baseline: np.ndarray) -> float:
        wins, losses = (answers & ~baseline).sum(axis=1), (~answers & baseline).sum(axis=1)
        return float(np.mean([p_value(int(w), int(x)) <= 0.05 for w, x in zip(wins, losses, strict=True)]))

    search_gain = (chosen.mean(axis=1) - search.mean(axis=1)).mean()
    test_gains = winner.mean(axis=1) - test.mean(axis=1)
    assert search_gain == pytest.approx(0.0285, abs=0.002), "2.9 points out of nothing"
    assert abs(test_gains.mean()) < 3 * test_gains.std() / math.sqrt(searches), "nothing is left of it on fresh rows"
    level = rejected(winner, test)
    assert 0.01 < level < 0.05 + 3 * math.sqrt(0.05 * 0.95 / searches), "calibrated, and on the safe side"
    assert rejected(chosen, search) > 4 * 0.05, "tested on the rows that chose it, luck is significant"


def test_intervals_of_the_same_answers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bootstrap_interval(9, 4, 77) == bootstrap_interval(9, 4, 77)
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    assert bootstrap_interval(30, 20, 360, seed=1) != bootstrap_interval(30, 20, 360, seed=2)
