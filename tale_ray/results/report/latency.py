"""How fast a model is with and without the removed layers, as it is stored in a run: `results/latency.json`.

Wherever the file has an object with `base` and `pruned`, both sides are shown, at any depth: numbers by name, or a
`median` with `low` and `high`. Names carry their units (`first_token_seconds`). Texts, numbers and lists of numbers at
the top are shown as notes. Does not know how anything is measured.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tale_ray.errors import StoreError
from tale_ray.store.reader import RunReader


@dataclass(frozen=True, slots=True)
class Measured:
    """A measured value, with its quartiles where they are known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Latency:
    """Measured values of both models by name, and what else was noted. A value that one lacks is None."""

    rows: tuple[tuple[str, Measured | None, Measured | None], ...]  # name, full model, without the layers
    notes: tuple[tuple[str, str], ...]


def stored_latency(reader: RunReader) -> Latency | None:
    """Return what was measured; None if nothing was.

    Raises:
        StoreError: the file is damaged.
    """
    found = reader.result("latency")
    if found is None:
        return None
    rows = tuple(_rows(found, ()))
    if not rows:
        raise StoreError(
            f"{reader.uri}/results/latency.json was changed: it holds no numbers of `base` and `pruned`; delete it, "
            "and measure again"
        )
    notes = {name: _note(value) for name, value in found.items()}
    return Latency(rows, tuple((name, note) for name, note in notes.items() if note is not None))


def _rows(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Measured | None, Measured | None]]:
    """Yield what was measured of both models in a value and in all that is in it."""
    if isinstance(value, list):
        for at, part in enumerate(value):
            size = part.get("batch_size") if isinstance(part, Mapping) else None
            yield from _rows(part, (*path, f"batch of {size}" if _is_number(size) else str(at)))
    elif isinstance(value, Mapping):
        if {"base", "pruned"} <= value.keys():
            base, pruned = _numbers(value["base"]), _numbers(value["pruned"])
            for name in {**base, **pruned}:
                yield _name((*path, name)), base.get(name), pruned.get(name)
        for name, part in value.items():
            if name not in ("base", "pruned"):
                yield from _rows(part, (*path, name))


def _numbers(value: Any) -> dict[str, Measured]:
    """Return the numbers of one side by name; those that have none by an empty one."""
    if _is_number(value):
        return {"": Measured(float(value))}
    if not isinstance(value, Mapping):
        return {}
    if _is_number(value.get("median")):
        ends = [float(value[name]) if _is_number(value.get(name)) else None for name in ("low", "high")]
        return {"": Measured(float(value["median"]), *ends)}
    return {_name((name, inner)): found for name, part in value.items() for inner, found in _numbers(part).items()}


def _name(path: tuple[str, ...]) -> str:
    """Return a name without the level that only groups: `batch of 8, first token, seconds`."""
    return ", ".join(part.replace("_", " ") for part in path if part not in ("", "batches"))


def _note(value: Any) -> str | None:
    if isinstance(value, list) and value and all(_is_number(part) for part in value):
        return ", ".join(map(str, value))
    return str(value) if isinstance(value, (str, int, float)) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
