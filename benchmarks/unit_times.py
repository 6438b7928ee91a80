"""How long a unit takes: a few times that add up, and noise. Fitted to units of a real run, or written down.

Knows units and nothing else: no workers, no scheduling, no storage.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from tale_ray.records import UnitResult, WorkUnit
from tale_ray.search.pace import row_applications

LEAST_UNITS = 8  # that say something about four times


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitTimes:
    """Seconds of a unit. Its layers are those that `row_applications` counts for its candidates."""

    num_layers: int
    fixed_seconds: float = 0.0  # of every unit
    layer_seconds: float = 0.0  # of every layer of a unit, however many rows: its weights are read
    application_seconds: float  # of a layer on a row
    reply_seconds: float = 0.0  # of a candidate on a row, after the first new token
    opening_seconds: float = 0.0  # of every layer of the first unit that a worker has of a scoring: prefix and streams
    noise: float = 0.0  # standard deviation of the logarithm

    def seconds(self, unit: WorkUnit, *, is_first: bool, draw: random.Random | None = None) -> float:
        """Return how long a unit takes a worker, `is_first` if it is its first of the scoring; None: without noise."""
        layers = row_applications(self.num_layers, unit.removed, unit.candidates)
        rows = len(unit.rows)
        seconds = (
            self.fixed_seconds
            + self.layer_seconds * layers
            + self.application_seconds * layers * rows
            + self.reply_seconds * unit.candidate_rows
            + self.opening_seconds * layers * is_first
        )
        if draw is None or not self.noise:
            return seconds
        return seconds * draw.lognormvariate(-(self.noise**2) / 2, self.noise)  # the mean stays what it was


def first_units(results: Sequence[UnitResult]) -> list[bool]:
    """Return of each unit whether it was its worker's first of the scoring; units in the order of their ends."""
    seen: set[tuple[str, str]] = set()
    found = []
    for result in results:
        key = (result.worker, result.unit.scope)
        found.append(key not in seen)
        seen.add(key)
    return found


def fit_unit_times(results: Sequence[UnitResult], num_layers: int) -> UnitTimes:
    """Return the times that explain units best: weighted least squares, none below zero.

    Raises:
        ValueError: there are too few units.
    """
    if len(results) < LEAST_UNITS:
        raise ValueError(f"{len(results)} units are too few to fit times to: at least {LEAST_UNITS}; search more rows")
    lines, took = [], []
    for result, is_first in zip(results, first_units(results), strict=True):
        layers = row_applications(num_layers, result.unit.removed, result.unit.candidates)
        lines.append((1.0, layers, layers * len(result.unit.rows), layers * is_first))
        took.append(result.seconds)
    terms, seconds = np.array(lines, dtype=float), np.array(took)
    weights = 1 / np.sqrt(np.maximum(seconds, 1e-9))  # between absolute errors and relative ones
    (fixed, layer, application, opening), _ = nnls(terms * weights[:, None], seconds * weights)
    predicted = terms @ np.array([fixed, layer, application, opening])
    logarithms = np.log(np.maximum(seconds, 1e-9) / np.maximum(predicted, 1e-9))
    return UnitTimes(
        num_layers=num_layers,
        fixed_seconds=float(fixed),
        layer_seconds=float(layer),
        application_seconds=float(application),
        opening_seconds=float(opening),
        noise=float(min(1.0, math.sqrt(np.mean((logarithms - np.median(logarithms)) ** 2)))),
    )
