"""What every layer adds to what can be read of the label: curves along depth, and how they go with accuracy.

Pure functions of representations, labels and finished rounds. Information is in bits; what an estimate is: `probe`.
Axes in names: k boundaries (below the first surviving layer, below the second ..., above the last), n rows, d features.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np

from tale_ray.records import CandidateScore
from tale_ray.results.probe import (
    INNER_FOLDS,
    RESAMPLES,
    STRENGTHS,
    ProbeRule,
    entropy_bits,
    mean_intervals,
    random_states,
    read_labels,
    shuffled,
    surprisal_bits,
)
from tale_ray.results.statistics import CONFIDENCE, Interval
from tale_ray.results.tables import count_text
from tale_ray.search.history import History

RESULT = "information"  # its name in a run's folder
RANDOM_DRAWS = 5
LEAST_LAYERS = 4  # that a correlation is computed over
_PERMUTATIONS = 9_999


def curve_json(
    states_knd: np.ndarray, layers: Sequence[int], labels_n: np.ndarray, rule: ProbeRule, model: int
) -> list[dict[str, Any]]:
    """Return the information after the embedding and after each of `layers`, as JSON values.

    `gain` is what a layer adds to what was there below it, with an interval of its own: both are read from the same
    rows. `shuffled` is the control. `model` is a number that makes the controls of two models differ.
    """
    entropy, surprisal_n = entropy_bits(labels_n), surprisal_bits(labels_n)
    readings = [read_labels(states_nd, labels_n, rule) for states_nd in states_knd]
    values_kn = np.stack([surprisal_n - reading.losses_n for reading in readings])
    intervals = mean_intervals(values_kn, rule.seed)
    gains: list[Interval | None] = [None, *mean_intervals(np.diff(values_kn, axis=0), rule.seed)]
    numbers: list[int | None] = [None, *layers]
    bits = [reading.bits(entropy) for reading in readings]
    added: list[float | None] = [None, *(above - below for below, above in pairwise(bits))]
    return [
        {
            "layer": numbers[at],
            "bits": bits[at],
            "interval": _ends(intervals[at]),
            "gain": added[at],
            "gain_interval": _ends(gains[at]),
            "accuracy": reading.correct / len(labels_n),
            "shuffled": _control(states_knd[at], shuffled(labels_n, rule.seed, (model, at)), rule),
        }
        for at, reading in enumerate(readings)
    ]


def random_control(labels_n: np.ndarray, num_features: int, rule: ProbeRule) -> list[float]:
    """Return the information in some random representations of as many features: about 0."""
    size = (len(labels_n), num_features)
    return [_control(random_states(*size, rule.seed, at), labels_n, rule) for at in range(RANDOM_DRAWS)]


def _control(states_nd: np.ndarray, labels_n: np.ndarray, rule: ProbeRule) -> float:
    return read_labels(states_nd, labels_n, rule).bits(entropy_bits(labels_n))


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def rule_json(rule: ProbeRule) -> dict[str, Any]:
    """Return how the probes were fitted and the intervals made, as JSON values."""
    return {
        "kind": "logistic regression, L2, standardised features",
        **asdict(rule),
        "inner_folds": INNER_FOLDS,
        "strengths": list(STRENGTHS),
        "interval": "percentile bootstrap of rows",
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
    }


# Beside accuracy.


def correlation_json(history: History, full: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Return the rank correlation of a layer's gain with the change of accuracy when it alone is removed.

    The changes are those of round 1, of the candidates that were scored on all search rows: of those that were bounded
    out only a part is known. A correlation below 0: what adds information is missed. All null, with a `reason`, where
    there are too few. The p-value is that of random pairings (two-sided), the interval a bootstrap of the layers.
    """
    first = next((entry for entry in _scored(history) if entry.number == 1), None)
    candidates = () if first is None else first.candidates
    exact = {each.layer: each for each in candidates if each.layer is not None and each.status == "exact"}
    found: dict[str, Any] = {
        **dict.fromkeys(("spearman", "p_value", "interval", "reason")),
        "num_exact": len(exact),
        "num_bounded_out": len(candidates) - len(exact),
        "layers": [],
    }
    gains = {point["layer"]: point["gain"] for point in full}
    if first is None:
        return {**found, "reason": "round 1 is not finished"}
    if history.start:
        return {**found, "reason": "the search did not start from the full model, so that no layer was removed alone"}
    found["layers"] = [_pair(gains, candidate, history) for _, candidate in sorted(exact.items())]
    if len(exact) < LEAST_LAYERS:
        return {
            **found,
            "reason": f"round 1 scored {count_text(len(exact), 'candidate')} on all rows, and at least {LEAST_LAYERS} "
            "are needed: search with --strategy tale --exhaustive",
        }
    one, other = ([pair[name] for pair in found["layers"]] for name in ("gain", "change"))
    return {**found, **spearman(np.array(one), np.array(other), seed)}


def _scored(history: History) -> Iterable[Any]:
    return (*history.rounds, *((history.rejected,) if history.rejected else ()))


def _pair(gains: Mapping[Any, Any], candidate: CandidateScore, history: History) -> dict[str, Any]:
    change = candidate.correct / candidate.seen - history.baseline.accuracy
    return {"layer": candidate.layer, "gain": gains[candidate.layer], "change": change}


def spearman(one_n: np.ndarray, other_n: np.ndarray, seed: int) -> dict[str, Any]:
    """Return Spearman's rank correlation, the p-value of random pairings, and a bootstrap interval; null if constant.

    Resamples in which one side is constant have no correlation and are left out.
    """
    from scipy.stats import rankdata, spearmanr

    if np.ptp(one_n) == 0 or np.ptp(other_n) == 0:
        return {"reason": "all layers are alike on one side, so that they have no order"}
    value = float(spearmanr(one_n, other_n).statistic)
    generator = np.random.default_rng(seed)
    pairings = generator.permuted(np.tile(rankdata(other_n), (_PERMUTATIONS, 1)), axis=1)
    as_far = np.abs(_products(rankdata(one_n)[None], pairings)) >= abs(value) - 1e-9
    drawn = generator.integers(len(one_n), size=(RESAMPLES, len(one_n)))
    resampled = _products(rankdata(one_n[drawn], axis=1), rankdata(other_n[drawn], axis=1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    p_value = (1 + int(as_far.sum())) / (1 + _PERMUTATIONS)
    return {"spearman": value, "p_value": p_value, "interval": [float(low), float(high)]}


def _products(one_rn: np.ndarray, other_rn: np.ndarray) -> np.ndarray:
    """Return the correlation of each pair of rows; not a number where one is constant."""
    one_rn, other_rn = (each - each.mean(axis=1, keepdims=True) for each in (one_rn, other_rn))
    sizes_r = np.sqrt((one_rn**2).sum(axis=1) * (other_rn**2).sum(axis=1))
    with np.errstate(invalid="ignore"):
        found: np.ndarray = (one_rn * other_rn).sum(axis=1) / sizes_r
    return found
