"""How large units are: predicted from what layers of this model took so far. Pure arithmetic on results; no clock."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from tale_ray.records import UnitResult

UNIT_SECONDS = 2.0  # at most, as far as can be told: what a kill may cost is about this much work per worker
LEAST_UNIT_SECONDS = 0.1  # less is not worth a file
ROUND_SHARE = 3  # a unit takes at most this part of what is left for each worker, so that all finish together
FIRST_UNITS = 16  # into which rows are cut before anything is known of the speed


@dataclass(frozen=True, slots=True)
class UnitShape:
    """How large a unit is at most. As a pacer: always so large."""

    rows: int
    candidates: int

    def shape(self, removed: Collection[int], candidates: Sequence[int | None], rows: int, workers: int) -> "UnitShape":  # noqa: ARG002
        """Return itself."""
        return self

    def note(self, result: UnitResult) -> None:
        """Learn nothing."""


class Pacer(Protocol):
    """What says how large the next unit is."""

    def shape(self, removed: Collection[int], candidates: Sequence[int | None], rows: int, workers: int) -> UnitShape:
        """Return how large the next unit is, if that many rows are left for the candidates and for so many workers."""
        ...

    def note(self, result: UnitResult) -> None:
        """Learn from a unit."""
        ...


def row_applications(num_layers: int, removed: Collection[int], candidates: Collection[int | None]) -> int:
    """Return how many layers are applied to a row to score the candidates together, each state computed once.

    The current model's layers below the highest candidate (all of them for candidate None), and for each candidate the
    surviving layers above it: (S - 1) + S (S - 1) / 2 for all S surviving layers.
    """
    surviving = [layer for layer in range(num_layers) if layer not in set(removed)]
    layers = [layer for layer in candidates if layer is not None]
    stem = [layer for layer in surviving if None in candidates or layer < max(layers, default=0)]
    return len(stem) + sum(above > layer for layer in layers for above in surviving)


class Pace:
    """Units of up to `UNIT_SECONDS`, smaller towards the end of a scoring; its speed is that of the latest units."""

    def __init__(self, num_layers: int, application_seconds: float | None = None) -> None:
        self.num_layers = num_layers
        self.application_seconds = application_seconds  # of one layer on one row; None: not known yet

    def shape(self, removed: Collection[int], candidates: Sequence[int | None], rows: int, workers: int) -> UnitShape:
        """Return how large the next unit is: whole rows while there are enough of them for all workers."""
        workers = max(1, workers)
        if self.application_seconds is None:
            return UnitShape(math.ceil(rows / min(rows, FIRST_UNITS * workers)), len(candidates))
        row_seconds = self.application_seconds * row_applications(self.num_layers, removed, candidates)
        left = rows * row_seconds / workers
        seconds = min(max(left / ROUND_SHARE, LEAST_UNIT_SECONDS), UNIT_SECONDS)
        fitting = max(1, min(int(seconds / row_seconds), math.ceil(rows / workers)))
        shares = max(row_seconds / (2 * UNIT_SECONDS), workers / rows if row_seconds > LEAST_UNIT_SECONDS else 1)
        return UnitShape(fitting, max(1, math.ceil(len(candidates) / max(1, math.ceil(shares)))))

    def note(self, result: UnitResult) -> None:
        """Learn the speed from a unit: half from it, half from those before."""
        unit = result.unit
        cost = row_applications(self.num_layers, unit.removed, unit.candidates) * len(unit.rows)
        if not cost or result.seconds <= 0:
            return
        latest = result.seconds / cost
        known = self.application_seconds
        self.application_seconds = latest if known is None else (known + latest) / 2
