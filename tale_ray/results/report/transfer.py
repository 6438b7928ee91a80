"""Layers found on one task, tested on another, as they are stored in a run: `results/transfer.json`.

    {"scores": [{"searched_on": TEXT, "tested_on": TEXT, "baseline": {"correct", "total"}, "pruned": {...}}, ...]}

is enough; what `tale-ray transfer` writes beside it is shown, too. Does not know who scored them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tale_ray.errors import StoreError
from tale_ray.results.report.accuracy import Accuracy, read_accuracy
from tale_ray.results.transfer import RESULT
from tale_ray.store.documents import check_fields
from tale_ray.store.reader import RunReader

_REMEDY = "delete it: no decision of the search depends on it"


@dataclass(frozen=True, slots=True)
class Tested:
    """Layers found on one task, tested on another; None: not stored."""

    baseline: Accuracy
    pruned: Accuracy
    is_own: bool  # it is the task that they were searched on
    difference_interval: tuple[float, float] | None
    p_value_holm: float | None

    @property
    def difference(self) -> float:
        """Accuracy without the layers minus the full model's."""
        return self.pruned.share - self.baseline.share


@dataclass(frozen=True, slots=True)
class Transfer:
    """The matrix, by (task searched on, task tested on)."""

    searched_on: tuple[str, ...]
    tested_on: tuple[str, ...]
    scores: Mapping[tuple[str, str], Tested]
    removed: Mapping[str, tuple[int, ...]]  # by task searched on; empty: not stored
    left_out: Mapping[str, int]  # by task tested on: test rows that a run was searched on
    num_tests: int | None  # that p-values are corrected for

    def baseline(self, tested_on: str) -> Accuracy:
        """Return what the full model scored on a task."""
        return next(found.baseline for (_, task), found in self.scores.items() if task == tested_on)


def stored_transfer(reader: RunReader) -> Transfer | None:
    """Return the matrix; None if there is none.

    Raises:
        StoreError: the file is damaged.
    """
    found = reader.result(RESULT)
    if found is None:
        return None
    path = f"{reader.uri}/results/{RESULT}.json"
    check_fields(found, {"scores": list[Mapping[str, Any]]}, path, _REMEDY)
    optional = {
        "searched_on": list[Mapping[str, Any]],
        "tested_on": list[Mapping[str, Any]],
        "num_tests": int,
    }
    check_fields(found, {name: kind for name, kind in optional.items() if name in found}, path, _REMEDY)
    searched, tested = found.get("searched_on", []), found.get("tested_on", [])
    for entries, kinds in ((searched, {"name": str, "removed": list[int]}), (tested, {"name": str, "left_out": int})):
        for entry in entries:
            check_fields(entry, kinds, path, _REMEDY)
    scores = dict(_tested(entry, path) for entry in found["scores"])
    return Transfer(
        searched_on=tuple(dict.fromkeys(name for name, _ in scores)),
        tested_on=tuple(dict.fromkeys(name for _, name in scores)),
        scores=scores,
        removed={entry["name"]: tuple(entry["removed"]) for entry in searched},
        left_out={entry["name"]: entry["left_out"] for entry in tested if entry["left_out"]},
        num_tests=found.get("num_tests"),
    )


def _tested(entry: Mapping[str, Any], path: str) -> tuple[tuple[str, str], Tested]:
    kinds: dict[str, Any] = {"searched_on": str, "tested_on": str, "baseline": Mapping[str, Any]}
    optional = {"is_own": bool, "difference_interval": list[float], "p_value_holm": float}
    kinds |= {"pruned": Mapping[str, Any], **{name: kind for name, kind in optional.items() if name in entry}}
    check_fields(entry, kinds, path, _REMEDY)
    ends = entry.get("difference_interval")
    if ends is not None and len(ends) != 2:
        raise StoreError(f"{path} was changed: an interval of {len(ends)} numbers has no two ends; {_REMEDY}")
    return (entry["searched_on"], entry["tested_on"]), Tested(
        baseline=read_accuracy(entry["baseline"], path, _REMEDY),
        pruned=read_accuracy(entry["pruned"], path, _REMEDY),
        is_own=entry.get("is_own", entry["searched_on"] == entry["tested_on"]),
        difference_interval=None if ends is None else (ends[0], ends[1]),
        p_value_holm=entry.get("p_value_holm"),
    )
