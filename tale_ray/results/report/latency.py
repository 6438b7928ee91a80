"""How fast a model is with and without the removed layers, as it is stored in a run: `results/latency.json`.

    {"base": {NAME: NUMBER, ...}, "pruned": {NAME: NUMBER, ...}, ...}

Names carry their units (`first_token_seconds`, `tokens_per_second`); of what else the file holds, texts and numbers are
shown as notes. Does not know how anything is measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tale_ray.store.documents import check_fields
from tale_ray.store.reader import RunReader


@dataclass(frozen=True, slots=True)
class Latency:
    """Measured values of both models by name, and what else was noted. A value that one lacks is None."""

    rows: tuple[tuple[str, float | None, float | None], ...]  # name, full model, without the layers
    notes: tuple[tuple[str, str], ...]


def stored_latency(reader: RunReader) -> Latency | None:
    """Return what was measured; None if nothing was.

    Raises:
        StoreError: the file is damaged.
    """
    found = reader.result("latency")
    if found is None:
        return None
    place = (f"{reader.uri}/results/latency.json", "delete it, and measure again")
    check_fields(found, {"base": Mapping[str, Any], "pruned": Mapping[str, Any]}, *place)
    base, pruned = _numbers(found["base"]), _numbers(found["pruned"])
    notes = {name: value for name, value in found.items() if name not in ("base", "pruned")}
    return Latency(
        tuple((name, base.get(name), pruned.get(name)) for name in {**base, **pruned}),
        tuple((name, str(value)) for name, value in notes.items() if isinstance(value, (str, int, float))),
    )


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of an object, those of objects in it by `outer inner`."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            numbers |= _numbers(value, f"{prefix}{name} ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[f"{prefix}{name}"] = float(value)
    return numbers
