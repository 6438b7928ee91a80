"""What can be read of the label at every layer, as it is stored in a run: `results/information.json`.

Read are `entropy`, `rows`, `labels`, `pick`, `round`, `removed`, `full`, `pruned`, `controls` and `correlation`; the
rest is passed over. Information is in bits. Does not know how anything is measured or drawn.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tale_ray.errors import StoreError
from tale_ray.results.information import RESULT
from tale_ray.results.information_table import correlation_text
from tale_ray.store.documents import check_fields
from tale_ray.store.reader import RunReader


@dataclass(frozen=True, slots=True)
class Place:
    """The information after a layer, with its 95% interval, and what the layer adds."""

    layer: int | None  # None: the embedding
    bits: float
    low: float
    high: float
    gain: float | None  # None: the embedding
    shuffled: float


@dataclass(frozen=True, slots=True)
class StoredInformation:
    """Curves along depth, of the full model and, if layers were removed, of the one without them."""

    entropy: float
    rows: str  # how many of which split
    num_labels: int
    pick: str
    round: int
    removed: tuple[int, ...]
    full: tuple[Place, ...]
    pruned: tuple[Place, ...]
    controls: tuple[float, float]  # lowest and highest
    correlation: str | None  # in words

    def beside(self) -> tuple[tuple[Place, Place | None], ...]:
        """Return every place of the full model with that of the pruned one, if its layer is there."""
        by_layer = {place.layer: place for place in self.pruned}
        return tuple((place, by_layer.get(place.layer)) for place in self.full)


_KINDS: Mapping[str, Any] = {
    "entropy": float,
    "rows": Mapping[str, Any],
    "labels": Mapping[str, int],
    "pick": str,
    "round": int,
    "removed": list[int],
    "full": list[Mapping[str, Any]],
    "pruned": list[Mapping[str, Any]] | None,
    "controls": Mapping[str, list[float]],
}
_POINT: Mapping[str, Any] = {
    "layer": int | None,
    "bits": float,
    "interval": list[float],
    "gain": float | None,
    "shuffled": float,
}
_CORRELATION: Mapping[str, Any] = {
    "spearman": float | None,
    "p_value": float | None,
    "interval": list[float] | None,
    "reason": str | None,
    "num_exact": int,
    "num_bounded_out": int,
}


def stored_information(reader: RunReader) -> StoredInformation | None:
    """Return what was measured; None if nothing was.

    Raises:
        StoreError: the file is damaged.
    """
    found = reader.result(RESULT)
    if found is None:
        return None
    path = f"{reader.uri}/results/{RESULT}.json"
    remedy = "delete it, and measure again with `tale-ray information --store`"
    check_fields(found, _KINDS, path, remedy)
    check_fields(found["rows"], {"count": int, "splits": Mapping[str, int]}, path, remedy)
    check_fields(found["controls"], {"shuffled": list[float], "random": list[float]}, path, remedy)
    for point in (*found["full"], *(found["pruned"] or ())):
        check_fields(point, _POINT, path, remedy)
        _check_ends(point["interval"], path, remedy)
    correlation: Any = found.get("correlation")
    if correlation is not None:
        check_fields({"correlation": correlation}, {"correlation": Mapping[str, Any]}, path, remedy)
        check_fields(correlation, _CORRELATION, path, remedy)
        if correlation["spearman"] is not None:
            check_fields(correlation, {"p_value": float, "interval": list[float]}, path, remedy)
            _check_ends(correlation["interval"], path, remedy)
    full, pruned = (tuple(map(_place, found[side] or ())) for side in ("full", "pruned"))
    controls = [value for values in (found["controls"]["shuffled"], found["controls"]["random"]) for value in values]
    numbers = [found["entropy"], *controls, *(end for each in (*full, *pruned) for end in (each.low, each.high))]
    if len(full) < 2 or not controls or not all(map(math.isfinite, numbers)) or found["entropy"] <= 0:
        raise StoreError(f"{path} was changed: it has no curve with finite numbers; {remedy}")
    return StoredInformation(
        entropy=found["entropy"],
        rows=", ".join(f"{count} {split}" for split, count in found["rows"]["splits"].items()),
        num_labels=len(found["labels"]),
        pick=found["pick"],
        round=found["round"],
        removed=tuple(found["removed"]),
        full=full,
        pruned=pruned,
        controls=(min(controls), max(controls)),
        correlation=None if correlation is None else correlation_text(correlation),
    )


def _check_ends(interval: list[float], path: str, remedy: str) -> None:
    if len(interval) != 2:
        raise StoreError(f"{path} was changed: an interval has two ends; {remedy}")


def _place(point: Mapping[str, Any]) -> Place:
    low, high = point["interval"]
    return Place(point["layer"], point["bits"], low, high, point["gain"], point["shuffled"])
