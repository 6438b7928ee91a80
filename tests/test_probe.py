"""Probes on representations whose information is known: never too much, nearly all, and nothing where there is nothing.

The truth comes from numeric quadrature. What estimates fall short of it is bounded by what is documented: about
(d + 1)(c - 1) / 2n ln 2 bits of a probe of d features and c labels that is fitted on n rows, and what the penalty and
its choice cost beside; twice that is allowed.
"""

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_information import Source, draw, estimate, truth
from scipy.stats import bootstrap, entropy, norm, permutation_test, spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tale_ray.errors import ConfigError
from tale_ray.results import probe
from tale_ray.results.information import curve_json, random_control, spearman
from tale_ray.results.probe import (
    ProbeRule,
    entropy_bits,
    mean_intervals,
    random_states,
    read_labels,
    shuffled,
    surprisal_bits,
)
from tale_ray.results.statistics import Interval

SEEDS = range(20)
SOURCES = {
    "two": Source((0.0, 2.0), (0.5, 0.5), rows=600, features=8),
    "uneven": Source((0.0, 1.0), (0.3, 0.7), rows=800, features=4),
    "three": Source((0.0, 1.5, 4.0), (0.2, 0.3, 0.5), rows=600, features=4),
}


@cache
def estimates(source: str) -> list[tuple[float, Interval]]:
    return [estimate(SOURCES[source], seed) for seed in SEEDS]


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_estimates_are_lower_bounds_near_the_truth(source: str) -> None:
    bits = np.array([each for each, _ in estimates(source)])
    error = bits.std(ddof=1) / math.sqrt(len(bits))
    known, shortfall = truth(SOURCES[source].means, SOURCES[source].shares), SOURCES[source].shortfall
    print(f"{source}: truth {known:.4f}, mean {bits.mean():.4f} +- {error:.4f}, shortfall {shortfall:.4f}")
    assert bits.mean() - 2 * error <= known
    assert bits.mean() + 2 * error >= known - 2 * shortfall


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_intervals_hold_the_truth_but_for_what_is_documented(source: str) -> None:
    known, shortfall = truth(SOURCES[source].means, SOURCES[source].shares), SOURCES[source].shortfall
    intervals = [interval for _, interval in estimates(source)]
    above = [interval.low <= known for interval in intervals]
    held = [interval.low <= known <= interval.high + 2 * shortfall for interval in intervals]
    print(f"{source}: {sum(above)} below the truth, {sum(held)} hold it, of {len(intervals)}")
    assert sum(above) >= 0.95 * len(intervals)
    assert sum(held) >= 0.9 * len(intervals)


def test_the_quadrature_is_that_of_a_simulation() -> None:
    means, shares = np.array([0.0, 1.5, 4.0]), np.array([0.2, 0.3, 0.5])
    generator = np.random.default_rng(0)
    labels = generator.choice(3, 400_000, p=shares)
    joint = norm.pdf(generator.normal(size=400_000)[:, None] + means[labels, None], means) * shares
    pointwise = np.log2(joint[np.arange(400_000), labels] / joint.sum(axis=1) / shares[labels])
    assert truth(means, shares) == pytest.approx(pointwise.mean(), abs=0.005)


@pytest.mark.parametrize("num_labels", [2, 3])
def test_what_is_told_apart_for_certain_has_all_the_bits(num_labels: int) -> None:
    labels = np.repeat(np.arange(num_labels), 100)
    states = np.random.default_rng(0).normal(size=(len(labels), 4))
    states[np.arange(len(labels)), labels] += 50
    reading = read_labels(states, labels, ProbeRule())
    assert 0.99 * math.log2(num_labels) < reading.bits(entropy_bits(labels)) <= math.log2(num_labels)
    assert reading.correct == len(labels)


@pytest.mark.parametrize(("rows", "features"), [(300, 8), (100, 300), (60, 1)])
def test_controls_are_about_nothing(rows: int, features: int) -> None:
    """Also with more features than rows, where a probe knows the rows that it is fitted on by heart."""
    labels = np.random.default_rng(0).integers(0, 2, rows)
    states = np.random.default_rng(1).normal(size=(rows, features)) + 5 * labels[:, None]
    entropy_ = entropy_bits(labels)
    assert read_labels(states, labels, ProbeRule()).bits(entropy_) > 0.9
    found = [read_labels(states, shuffled(labels, 0, (0, at)), ProbeRule()).bits(entropy_) for at in range(5)]
    found += random_control(labels, features, ProbeRule())
    print(rows, features, [round(each, 4) for each in found])
    assert max(found) < 0.05
    assert min(found) > -0.1
    assert abs(np.mean(found)) < 0.03


@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(1, 90), st.sampled_from([0.0, 0.3, 3.0, 1e4]))
@settings(max_examples=15)
def test_never_more_than_the_entropy(seed: int, num_labels: int, features: int, strength: float) -> None:
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(num_labels).repeat(5), generator.integers(0, num_labels, 40)])
    states = generator.normal(size=(len(labels), features)) + strength * (labels == 0)[:, None]
    reading, most = read_labels(states, labels, ProbeRule(seed=seed % 100)), entropy_bits(labels)
    assert (reading.losses_n >= 0).all()
    assert reading.bits(most) <= most <= math.log2(num_labels) + 1e-12
    (interval,) = mean_intervals((surprisal_bits(labels) - reading.losses_n)[None], seed % 100)
    assert interval.low <= reading.bits(most) <= interval.high


@pytest.mark.parametrize("features", [6, 120])
def test_probes_are_those_of_a_pipeline_of_scikit_learn(features: int) -> None:
    """Nested cross-validation written with its own classes; the turn to fewer features changes nothing."""
    generator = np.random.default_rng(3)
    labels = generator.choice(["a", "b", "c"], 90)
    states = generator.normal(size=(90, features)) + 1.5 * (labels == "a")[:, None]
    losses = np.empty(90)
    for fitted, tested in StratifiedKFold(5, shuffle=True, random_state=7).split(states, labels):
        inner = StratifiedKFold(probe.INNER_FOLDS, shuffle=True, random_state=7)
        scaler = StandardScaler().fit(states[fitted])
        search = GridSearchCV(
            LogisticRegression(max_iter=2_000, tol=1e-6), {"C": probe.STRENGTHS}, scoring="neg_log_loss", cv=inner
        ).fit(scaler.transform(states[fitted]), labels[fitted])
        log_probabilities = search.predict_log_proba(scaler.transform(states[tested]))
        losses[tested] = -log_probabilities[np.arange(len(tested)), np.searchsorted(search.classes_, labels[tested])]
    found = read_labels(states, labels, ProbeRule(seed=7))
    np.testing.assert_allclose(found.losses_n, losses / math.log(2), atol=0.02)
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2_000, tol=1e-8))
    few, other = probe._standardised(states[:60], states[60:])
    assert few.shape[1] == min(features, 60)
    *_, log_nc = probe._path(few, np.unique(labels[:60], return_inverse=True)[1], other, probe.STRENGTHS[:4])
    np.testing.assert_allclose(log_nc, plain.fit(states[:60], labels[:60]).predict_log_proba(states[60:]), atol=2e-3)


def test_the_same_seed_says_the_same() -> None:
    states, labels = draw(SOURCES["two"], 0)
    one, other = (read_labels(states, labels, ProbeRule(seed=5)).losses_n for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert not np.array_equal(one, read_labels(states, labels, ProbeRule(seed=6)).losses_n)
    orders = [tuple(shuffled(labels, 0, (model, at))) for model in range(2) for at in range(13)]
    assert len(set(orders)) == len(orders)
    assert not np.array_equal(random_states(4, 3, 0, 1), random_states(4, 3, 0, 2))


def test_entropy_is_scipys() -> None:
    labels = np.array(["a"] * 3 + ["b"] * 5 + ["c"])
    assert entropy_bits(labels) == pytest.approx(entropy([3, 5, 1], base=2))
    assert surprisal_bits(labels)[0] == pytest.approx(math.log2(9 / 3))


def test_intervals_are_those_of_scipys_bootstrap() -> None:
    values = np.random.default_rng(0).gamma(1.0, size=(3, 200))
    for row, found in zip(values, mean_intervals(values, seed=0), strict=True):
        expected = bootstrap((row,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_curves_tell_what_each_layer_adds() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 300)
    signal = np.stack([np.zeros(300), labels * 1.0, labels * 3.0])
    states = generator.normal(size=(3, 300, 4))
    states[:, :, 0] += signal
    found = curve_json(states, (0, 5), labels, ProbeRule(), model=0)
    assert [point["layer"] for point in found] == [None, 0, 5]
    assert found[0]["bits"] < 0.02 < found[1]["bits"] < found[2]["bits"]
    assert found[0]["gain"] is None is found[0]["gain_interval"]
    for below, above in pairwise(found):
        assert above["gain"] == pytest.approx(above["bits"] - below["bits"])
        assert above["gain_interval"][0] < above["gain"] < above["gain_interval"][1]
        assert above["gain_interval"][0] > 0, "both are read from the same rows"
        assert above["interval"][0] < above["bits"] < above["interval"][1]
    assert all(abs(point["shuffled"]) < 0.05 for point in found)
    other = curve_json(states, (0, 5), labels, ProbeRule(), model=1)
    assert [point["bits"] for point in other] == [point["bits"] for point in found]
    assert [point["shuffled"] for point in other] != [point["shuffled"] for point in found]


def test_rank_correlation_is_scipys() -> None:
    generator = np.random.default_rng(0)
    one = generator.normal(size=12)
    other = -one + generator.normal(size=12)
    other[3] = other[4]  # a tie
    found = spearman(one, other, seed=0)
    assert found["spearman"] == pytest.approx(spearmanr(one, other).statistic)
    expected = permutation_test(
        (one,), lambda each: spearmanr(each, other).statistic, permutation_type="pairings", n_resamples=2_000, rng=1
    )
    assert found["p_value"] == pytest.approx(expected.pvalue, abs=0.03)
    assert found["interval"][0] < found["spearman"] < found["interval"][1]
    assert spearman(one, np.zeros(12), seed=0).keys() == {"reason"}


@pytest.mark.parametrize(
    ("labels", "rule", "words"),
    [
        (["a", "b"] * 24, {}, "48 rows are too few for a probe: it needs at least 50"),
        (["a"] * 60, {}, "all 60 rows have the label 'a'"),
        (["a"] * 60 + ["b"] * 4, {}, "label 'b' is too rare: it has 4 of 64 rows, and 5 folds need at least 5"),
        (["a"] * 60 + ["b"] * 9, {"folds": 10}, "label 'b' is too rare: it has 9 of 69 rows, and 10 folds need"),
        ([str(number) for number in range(60)], {}, "as are 59 more of 60 labels"),
    ],
)
def test_labels_that_cannot_be_probed(labels: list[str], rule: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ProbeRule(**rule).check_labels(labels)
    assert words in str(refused.value)


def test_the_fewest_rows_that_are_allowed_are_enough() -> None:
    for folds in (3, 4, 5, 8):
        rule = ProbeRule(folds=folds)
        labels = np.array(["a"] * 45 + ["b"] * rule.least_of_a_label + ["c"] * rule.least_of_a_label)
        rule.check_labels(labels.tolist())
        assert len(read_labels(np.random.default_rng(0).normal(size=(len(labels), 3)), labels, rule).losses_n)


def test_rules_and_numbers_that_are_refused() -> None:
    with pytest.raises(ConfigError, match="folds 2 are too few"):
        ProbeRule(folds=2)
    with pytest.raises(ConfigError, match="probe seed -1 is negative"):
        ProbeRule(seed=-1)
    states = np.zeros((60, 2))
    states[3, 1] = np.inf
    with pytest.raises(ConfigError, match="no finite number: the model overflows"):
        read_labels(states, np.array(["a", "b"] * 30), ProbeRule())
