"""How large units are: predicted from what layers of this model took so far. Pure arithmetic on results; no clock."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from tale_ray.records import UnitResult

UNIT_SECONDS = 2.0  # at most, as far as can be told: what a kill may cost is about this much work per worker
LEAST_UNIT_SECONDS = 0.1  # less is not worth a file
LEFT_UNITS = 2  # into which what is left for each of several workers is cut at least, so that all finish together
RACE_UNITS = 3  # and where candidates may be out soon
MOST_UNITS = 8  # that a worker would need for a whole scoring, as each unit reads all weights


@dataclass(frozen=True, slots=True)
class Left:
    """What a unit is a part of."""

    rows: int  # that are still open, and come next
    all_rows: int  # of the scoring
    all_candidates: Sequence[int | None]
    workers: int
    racing: bool  # candidates may be out before they have seen all of the rows


@dataclass(frozen=True, slots=True)
class UnitShape:
    """How large a unit is at most. As a pacer: always so large."""

    rows: int
    candidates: int

    def shape(self, removed: Collection[int], candidates: Sequence[int | None], left: Left) -> "UnitShape":  # noqa: ARG002
        """Return itself."""
        return self

    def note(self, result: UnitResult) -> None:
        """Learn nothing."""


class Pacer(Protocol):
    """What says how large the next unit is."""

    def shape(self, removed: Collection[int], candidates: Sequence[int | None], left: Left) -> UnitShape:
        """Return how large the next unit of these candidates is."""
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

    def shape(self, removed: Collection[int], candidates: Sequence[int | None], left: Left) -> UnitShape:
        """Return how large the next unit is: whole rows while there are enough of them for all workers."""
        workers = max(1, left.workers)
        if self.application_seconds is None:
            return UnitShape(math.ceil(left.rows / min(left.rows, MOST_UNITS * workers)), len(candidates))
        row_seconds = self.application_seconds * row_applications(self.num_layers, removed, candidates)
        whole = self.application_seconds * row_applications(self.num_layers, removed, left.all_candidates)
        units = RACE_UNITS if left.racing else LEFT_UNITS if workers > 1 else 1
        wanted = max(row_seconds * left.rows / units, whole * left.all_rows / MOST_UNITS) / workers
        seconds = min(max(wanted, LEAST_UNIT_SECONDS), UNIT_SECONDS)
        rows = max(1, min(int(seconds / row_seconds), math.ceil(left.rows / workers)))
        shares = max(row_seconds / (2 * UNIT_SECONDS), workers / left.rows if row_seconds > LEAST_UNIT_SECONDS else 1)
        return UnitShape(rows, max(1, math.ceil(len(candidates) / max(1, math.ceil(shares)))))

    def note(self, result: UnitResult) -> None:
        """Learn the speed from a unit: half from it, half from those before."""
        unit = result.unit
        cost = row_applications(self.num_layers, unit.removed, unit.candidates) * len(unit.rows)
        if not cost or result.seconds <= 0:
            return
        latest = result.seconds / cost
        known = self.application_seconds
        self.application_seconds = latest if known is None else (known + latest) / 2
