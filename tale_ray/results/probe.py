"""How many bits about a label a linear probe reads from representations: cross-validated, with controls.

Pure functions of numbers: knows nothing of models, runs or files. Information and losses are in bits. Axes in names: n
rows, d features, c labels. scikit-learn is an extra and imported where it is used.

The estimate is H(Y) - CE: the entropy of the labels, minus the cross-entropy of a probe's predictions on rows that it
was not fitted on. For any probe CE is at least H(Y|X) in expectation, so the estimate is a lower bound on the mutual
information I(X; Y) in expectation (Barber and Agakov 2003; Xu et al. 2020, arXiv 2002.10689).
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tale_ray.annotations import fits
from tale_ray.errors import ConfigError
from tale_ray.results.statistics import CONFIDENCE, Interval

FOLDS = 5
INNER_FOLDS = 3
LEAST_FOLDS = 3
LEAST_OF_A_LABEL = 5  # rows: with 3 folds of it, 3 at least are left to choose the penalty with
LEAST_ROWS = 50
STRENGTHS = tuple(10.0**power for power in range(-5, 2))  # scikit-learn's C; a small one is a strong penalty
RESAMPLES = 2_000  # of a bootstrap
_MOST_ITERATIONS = 200
_CHUNK = 100  # resamples drawn at once


def check_scikit_learn() -> None:
    """Refuse to probe where scikit-learn is missing.

    Raises:
        ConfigError: says how to install it.
    """
    try:
        import sklearn  # noqa: F401 (only whether it is there)
    except ImportError as error:
        raise ConfigError(
            "information is read by probes of scikit-learn, which is not installed: pip install 'tale-ray[information]'"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRule:
    """How probes are fitted and tested: stratified folds, drawn with a seed."""

    folds: int = FOLDS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("folds", "seed"):
            if not fits(getattr(self, name), int):
                raise ConfigError(f"{name} {getattr(self, name)!r} is not a whole number: write one")
        if self.folds < LEAST_FOLDS:
            raise ConfigError(f"folds {self.folds} are too few: there are at least {LEAST_FOLDS}; {FOLDS} are usual")
        if self.seed < 0:
            raise ConfigError(f"probe seed {self.seed} is negative: it is at least 0")
        if self.seed >= 2**32:
            raise ConfigError(f"probe seed {self.seed} is too large: scikit-learn takes seeds of 32 bits; lower it")

    @property
    def least_of_a_label(self) -> int:
        """Rows that every label needs: one in every fold, and enough to choose the penalty with."""
        return max(self.folds, LEAST_OF_A_LABEL)

    def rare_labels(self, labels: Sequence[str]) -> dict[str, int]:
        """Return the labels that have too few rows, with how many they have."""
        return {label: count for label, count in sorted(Counter(labels).items()) if count < self.least_of_a_label}

    def check_labels(self, labels: Sequence[str]) -> None:
        """Refuse labels that no probe can be tested on.

        Raises:
            ConfigError: too few rows, one label only, or a label with too few rows.
        """
        counts = Counter(labels)
        if len(labels) < LEAST_ROWS:
            raise ConfigError(
                f"{len(labels)} rows are too few for a probe: it needs at least {LEAST_ROWS}; take more rows or splits "
                "(--rows, --split), or a task with more"
            )
        if len(counts) == 1:
            raise ConfigError(
                f"all {len(labels)} rows have the label {labels[0]!r}, about which there is nothing to know: take rows "
                "with two labels at least"
            )
        if rare := self.rare_labels(labels):
            label, count = min(rare.items(), key=lambda each: each[1])
            others = f", as are {len(rare) - 1} more of {len(counts)} labels" if len(rare) > 1 else ""
            raise ConfigError(
                f"label {label!r} is too rare{others}: it has {count} of {len(labels)} rows, and {self.folds} folds "
                f"need at least {self.least_of_a_label} of every label; take more rows, fewer --folds, leave such rows "
                "out with --drop-rare-labels, or take a task with few labels (answer type choice or word)"
            )


@dataclass(frozen=True, slots=True)
class Reading:
    """What a probe read from one representation of every row, always from rows that it was not fitted on."""

    losses_n: np.ndarray  # bits: -log2 of the probability that it gave the row's own label; 0 or more
    correct: int  # rows whose own label it found most probable

    def bits(self, entropy: float) -> float:
        """Return the information: at most the entropy, and below 0 for a probe worse than the labels' frequencies."""
        return entropy - float(self.losses_n.mean())


def entropy_bits(labels_n: np.ndarray) -> float:
    """Return the entropy of the labels' frequencies. It falls short of their source's by about (c - 1) / 2n ln 2."""
    return float(surprisal_bits(labels_n).mean())


def surprisal_bits(labels_n: np.ndarray) -> np.ndarray:
    """Return -log2 of the frequency of every row's label; their mean is the entropy."""
    _, place_n, counts_c = np.unique(labels_n, return_inverse=True, return_counts=True)
    found: np.ndarray = -np.log2(counts_c / len(labels_n))[place_n]
    return found


def read_labels(states_nd: np.ndarray, labels_n: np.ndarray, rule: ProbeRule) -> Reading:
    """Return what L2-regularised logistic regressions on standardised features read, each tested on the other folds.

    The penalty is chosen anew for every fold, by cross-validation within the rows that the probe is fitted on: the
    lowest cross-entropy, ties to the stronger penalty. Nothing of a tested row is used before it is tested.

    Raises:
        ConfigError: a feature is not a finite number.
    """
    from sklearn.model_selection import StratifiedKFold

    if not np.isfinite(states_nd).all():
        raise ConfigError(
            "a representation holds what is no finite number: the model overflows; ask for --dtype float32"
        )
    place_n = np.unique(labels_n, return_inverse=True)[1]
    losses_n, correct = np.empty(len(place_n)), 0
    folds = StratifiedKFold(rule.folds, shuffle=True, random_state=rule.seed)
    for fitted, tested in folds.split(states_nd, place_n):
        fitted_nd, tested_nd = _standardised(states_nd[fitted], states_nd[tested])
        strengths = _strengths(fitted_nd, place_n[fitted], rule.seed)
        *_, log_nc = _path(fitted_nd, place_n[fitted], tested_nd, strengths)
        losses_n[tested] = _losses(log_nc, place_n[tested])
        correct += int((log_nc.argmax(axis=1) == place_n[tested]).sum())
    return Reading(losses_n, correct)


def _standardised(fitted_nd: np.ndarray, tested_nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both with mean 0 and deviation 1 of the fitted rows, turned to as few features as these span.

    A penalty on the length of the weights does not see the turn: the same predictions for less work.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(fitted_nd.astype(float))
    fitted_nd, tested_nd = scaler.transform(fitted_nd.astype(float)), scaler.transform(tested_nd.astype(float))
    if fitted_nd.shape[1] <= fitted_nd.shape[0]:
        return fitted_nd, tested_nd
    left, sizes, right = np.linalg.svd(fitted_nd, full_matrices=False)
    return left * sizes, tested_nd @ right.T


def _strengths(fitted_nd: np.ndarray, place_n: np.ndarray, seed: int) -> tuple[float, ...]:
    """Return the strengths up to the best one, which folds of these rows choose."""
    from sklearn.model_selection import StratifiedKFold

    sums = np.zeros(len(STRENGTHS))
    for fitted, tested in StratifiedKFold(INNER_FOLDS, shuffle=True, random_state=seed).split(fitted_nd, place_n):
        path = _path(fitted_nd[fitted], place_n[fitted], fitted_nd[tested], STRENGTHS)
        sums += [_losses(log_nc, place_n[tested]).sum() for log_nc in path]
    return STRENGTHS[: int(sums.argmin()) + 1]


def _path(
    fitted_nd: np.ndarray, place_n: np.ndarray, tested_nd: np.ndarray, strengths: Sequence[float]
) -> Iterator[np.ndarray]:
    """Yield log-probabilities (n, c), in nats, at each strength; each fit begins with the one before."""
    from scipy.special import log_softmax
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    probe: Any = LogisticRegression(warm_start=True, max_iter=_MOST_ITERATIONS)
    for strength in strengths:
        with warnings.catch_warnings():  # a fit that stopped early is a probe as well: its cross-entropy bounds, too
            warnings.simplefilter("ignore", ConvergenceWarning)
            probe.set_params(C=strength).fit(fitted_nd, place_n)
        scores = probe.decision_function(tested_nd)  # finite where a probability would be rounded to 0
        yield log_softmax(scores if scores.ndim == 2 else np.stack([np.zeros_like(scores), scores], axis=1), axis=1)


def _losses(log_nc: np.ndarray, place_n: np.ndarray) -> np.ndarray:
    found: np.ndarray = -log_nc[np.arange(len(place_n)), place_n] / math.log(2)
    return found


# Controls: what must come to about 0 bits.


def shuffled(labels_n: np.ndarray, seed: int, place: tuple[int, int]) -> np.ndarray:
    """Return the labels in an order that knows nothing of the rows, another one for every place: model, boundary."""
    return np.random.default_rng([seed, *place, 0]).permutation(labels_n)


def random_states(num_rows: int, num_features: int, seed: int, number: int) -> np.ndarray:
    """Return representations (n, d) drawn from a standard normal distribution, others for every number."""
    return np.random.default_rng([seed, number, 0, 1]).standard_normal((num_rows, num_features), dtype=np.float32)


# Intervals.


def mean_intervals(values_kn: np.ndarray, seed: int, confidence: float = CONFIDENCE) -> list[Interval]:
    """Return percentile intervals of the means of some values over rows: a bootstrap of the rows, the same for all.

    Rows are drawn as they are: that the probes of two folds share rows they were fitted on is not in the intervals.
    """
    num_rows = values_kn.shape[1]
    generator, even = np.random.default_rng(seed), np.full(num_rows, 1 / num_rows)
    means = [
        generator.multinomial(num_rows, even, size=_CHUNK) @ values_kn.T / num_rows for _ in range(RESAMPLES // _CHUNK)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    return [Interval(float(one), float(other)) for one, other in zip(low, high, strict=True)]
