"""How large units are: predicted from what layers of this model took so far. Pure arithmetic on results; no clock."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from tale_ray.records import UnitResult, WorkUnit

UNIT_SECONDS = 2.0  # at most, as far as can be told: what a kill may cost is about this much work per worker
STREAMED_UNIT_SECONDS = 300.0  # and where every unit reads the weights from the disk: few of them, with many rows
STEPS = 16  # so many new tokens, one after another, make it once longer: steps with few rows in them waste their time
LEAST_UNIT_SECONDS = 0.1  # less is not worth a file
WRITE_SECONDS = 0.01  # that a file takes the driver at least, which writes those of all workers one after another
MOST_WRITE_SECONDS = 0.5  # more is an outage, and tells nothing of the next one
LEFT_UNITS = 2  # into which what is left for each of several workers is cut at least, so that all finish together
RACE_UNITS = 3  # and where candidates may be out soon
MOST_UNITS = 8  # that a worker would need for a whole scoring
FIXED_SHARE = 6  # a unit takes at least so many times as long as one without rows would
RACE_SHARE = 12  # and what is left of a race: its units cost some of those, and have saved a third at most
FIRST_ROWS = 4  # of a unit before anything is known of the speed
FIRST_STREAMED_ROWS = 16
FIRST_REPLIES = 32  # candidates times rows, where many tokens are decoded
LEAST_SLOPE = 0.5  # of the mean time per layer application: no more than half of a usual unit's time is fixed
LEAST_STREAMED_SLOPE = 0.1
LEAST_REST = 0.5  # of a unit's rows: fewer that would be left over are taken as well
QUEUED_SECONDS = 0.5  # a unit that takes longer does not wait behind another one,
SCARCE_UNITS = 3  # once less than so many of its kind are left for each worker: all are to finish together
FADING = 0.95  # of what was learned of the speed, with every unit: a line through a few noisy ones leads astray
WRITE_FADING = 0.8  # of what was learned of writing


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

    def pays(self, removed: Collection[int], candidates: Sequence[int | None], rows: int) -> bool:  # noqa: ARG002
        """Return that it always does."""
        return True

    def seconds(self, unit: WorkUnit) -> float | None:  # noqa: ARG002
        """Return that it does not know."""
        return None

    def is_scarce(self, unit: WorkUnit, candidates: Sequence[int | None], rows: int, workers: int) -> bool:  # noqa: ARG002
        """Return that no unit ever is."""
        return False

    def note(self, result: UnitResult) -> None:
        """Learn nothing."""


class Pacer(Protocol):
    """What says how large the next unit is."""

    def shape(self, removed: Collection[int], candidates: Sequence[int | None], left: Left) -> UnitShape:
        """Return how large the next unit of these candidates is."""
        ...

    def pays(self, removed: Collection[int], candidates: Sequence[int | None], rows: int) -> bool:
        """Return whether so much is left that leaving candidates out early is worth more units."""
        ...

    def seconds(self, unit: WorkUnit) -> float | None:
        """Return how long a unit should take; None: not known yet."""
        ...

    def is_scarce(self, unit: WorkUnit, candidates: Sequence[int | None], rows: int, workers: int) -> bool:
        """Return whether a unit is to be kept for a worker that has nothing to do.

        Args:
            unit: the next one.
            candidates: that are still to be scored,
            rows: on so many rows at most, the unit's among them.
            workers: among whom that is divided.
        """
        ...

    def note(self, result: UnitResult) -> None:
        """Learn from a unit."""
        ...


def row_applications(num_layers: int, removed: Collection[int], candidates: Collection[int | None]) -> int:
    """Return how many layers are applied to a row to score the candidates together, each state computed once.

    The current model's layers below the highest candidate (all of them for candidate None), and for each candidate the
    surviving layers above it: (S - 1) + S (S - 1) / 2 for all S surviving layers.
    """
    return _row_applications(num_layers, frozenset(removed), frozenset(candidates))


@lru_cache(maxsize=4096)  # asked for every unit under way, again and again
def _row_applications(num_layers: int, removed: frozenset[int], candidates: frozenset[int | None]) -> int:
    surviving = [layer for layer in range(num_layers) if layer not in removed]
    layers = [layer for layer in candidates if layer is not None]
    stem = [layer for layer in surviving if None in candidates or layer < max(layers, default=0)]
    return len(stem) + sum(above > layer for layer in layers for above in surviving)


class Pace:
    """Units of up to `UNIT_SECONDS`, smaller towards the end of a scoring; its speed is that of the latest units.

    A unit takes a fixed time (weights are read, new tokens come one after another) and a time per layer application:
    a line through the latest units, by least squares.
    """

    def __init__(self, num_layers: int, max_new_tokens: int = 1, *, is_streamed: bool = False) -> None:
        self.num_layers = num_layers
        self._decodes = max_new_tokens > 1
        self._is_streamed = is_streamed
        unit_seconds = STREAMED_UNIT_SECONDS if is_streamed else UNIT_SECONDS
        self._most_seconds = unit_seconds * (1 + (max_new_tokens - 1) / STEPS)
        self._least_slope = LEAST_STREAMED_SLOPE if is_streamed else LEAST_SLOPE
        self._write_seconds = WRITE_SECONDS
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of 1, x, y, x x and x y; x applications, y seconds; older ones fade

    @property
    def speed(self) -> tuple[float, float] | None:
        """Seconds of a unit as such, and of each layer application in it; None: not known yet."""
        count, x, y, xx, xy = self._sums
        if not x:
            return None
        mean, spread = y / x, count * xx - x * x
        unknown = self._least_slope * mean if self._decodes else mean  # of units of one size
        slope = (count * xy - x * y) / spread if spread > 1e-3 * x * x else unknown
        slope = min(max(slope, self._least_slope * mean), mean)  # units at the start are slow for reasons of their own
        return (y - slope * x) / count, slope

    def shape(self, removed: Collection[int], candidates: Sequence[int | None], left: Left) -> UnitShape:
        """Return how large the next unit is: whole rows while there are enough of them for all workers."""
        workers = max(1, left.workers)
        if self.speed is None:
            if self._decodes:
                most = max(1, FIRST_REPLIES // len(candidates))
                return UnitShape(min(most, math.ceil(left.rows / workers)), min(len(candidates), FIRST_REPLIES))
            first = FIRST_STREAMED_ROWS if self._is_streamed else FIRST_ROWS
            return UnitShape(max(1, min(first, math.ceil(left.rows / (2 * workers)))), len(candidates))
        fixed, application = self.speed
        row = application * row_applications(self.num_layers, removed, candidates)
        whole = application * row_applications(self.num_layers, removed, left.all_candidates)
        units = RACE_UNITS if left.racing else LEFT_UNITS if workers > 1 else 1
        wanted = max(row * left.rows / units, whole * left.all_rows / MOST_UNITS) / workers
        if self._is_streamed:
            wanted += fixed  # no row is left over for a pass of its own
        least = max(LEAST_UNIT_SECONDS, self._write_seconds * workers)
        seconds = max(min(wanted, self._most_seconds), least, FIXED_SHARE * fixed)
        share = math.ceil(left.rows / workers)  # of a worker
        rows = max(1, min(int((seconds - fixed) / row), share))
        if self._decodes and share - rows < LEAST_REST * rows:
            rows = share
        if row + fixed <= seconds or workers == 1:
            seconds = max(seconds, 2 * self._most_seconds)
        return UnitShape(rows, self._fitting(removed, candidates, (seconds - fixed) / application))

    def _fitting(self, removed: Collection[int], candidates: Sequence[int | None], applications: float) -> int:
        """Return how many of the first candidates take about so many layer applications on a row, one at least."""
        whole = row_applications(self.num_layers, removed, candidates)
        parts = max(1, round(whole / max(1.0, applications)))
        if parts == 1:
            return len(candidates)
        part = whole / parts
        return next(
            (
                count
                for count in range(1, len(candidates))
                if row_applications(self.num_layers, removed, candidates[:count]) >= part
            ),
            len(candidates),
        )

    def pays(self, removed: Collection[int], candidates: Sequence[int | None], rows: int) -> bool:
        """Return whether what is left would take several units."""
        if self.speed is None:
            return True
        fixed, application = self.speed
        left = application * row_applications(self.num_layers, removed, candidates) * rows
        return left > max(2 * LEAST_UNIT_SECONDS, RACE_SHARE * fixed)

    def seconds(self, unit: WorkUnit) -> float | None:
        """Return how long a unit should take, by the speed of the latest ones."""
        return self._seconds(unit.removed, unit.candidates, len(unit.rows))

    def _seconds(self, removed: Collection[int], candidates: Sequence[int | None], rows: int) -> float | None:
        if self.speed is None:
            return None
        fixed, application = self.speed
        return fixed + application * row_applications(self.num_layers, removed, candidates) * rows

    def is_scarce(self, unit: WorkUnit, candidates: Sequence[int | None], rows: int, workers: int) -> bool:
        """Return whether little is left of units that take long; before their speed is known, any may."""
        seconds = self.seconds(unit)
        left = self._seconds(unit.removed, candidates, rows)
        if seconds is None or left is None:
            return True
        return seconds > QUEUED_SECONDS and left < SCARCE_UNITS * seconds * workers

    def note(self, result: UnitResult) -> None:
        """Learn the speed from a unit."""
        unit = result.unit
        x, y = row_applications(self.num_layers, unit.removed, unit.candidates) * len(unit.rows), result.seconds
        if x and y > 0:
            latest = (1.0, x, y, x * x, x * y)
            self._sums = tuple(FADING * old + new for old, new in zip(self._sums, latest, strict=True))  # type: ignore[assignment]

    def note_write(self, seconds: float) -> None:
        """Learn how long the file of a unit takes: units of many workers are no smaller than can be written."""
        latest = min(seconds, MOST_WRITE_SECONDS)
        self._write_seconds = WRITE_FADING * self._write_seconds + (1 - WRITE_FADING) * latest
