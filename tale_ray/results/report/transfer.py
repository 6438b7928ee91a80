"""Layers found on one task, tested on another, as they are stored in a run: `results/transfer.json`.

    {"scores": [{"searched_on": TEXT, "tested_on": TEXT, "baseline": {"correct", "total"}, "pruned": {...}}, ...]}

Does not know who scored them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tale_ray.errors import StoreError
from tale_ray.store.documents import check_fields
from tale_ray.store.reader import RunReader


@dataclass(frozen=True, slots=True)
class Transfer:
    """Accuracies by (task searched on, task tested on): of the full model, and without the layers found."""

    searched_on: tuple[str, ...]
    tested_on: tuple[str, ...]
    scores: Mapping[tuple[str, str], tuple[float, float]]  # in [0, 1]: full model, without the layers


def stored_transfer(reader: RunReader) -> Transfer | None:
    """Return the matrix; None if there is none.

    Raises:
        StoreError: the file is damaged.
    """
    found = reader.result("transfer")
    if found is None:
        return None
    path, remedy = f"{reader.uri}/results/transfer.json", "delete it: no decision of the search depends on it"
    check_fields(found, {"scores": list[Mapping[str, Any]]}, path, remedy)
    scores = {}
    for entry in found["scores"]:
        kinds = {"searched_on": str, "tested_on": str, "baseline": Mapping[str, Any], "pruned": Mapping[str, Any]}
        check_fields(entry, kinds, path, remedy)
        for score in (entry["baseline"], entry["pruned"]):
            check_fields(score, {"correct": int, "total": int}, path, remedy)
            if not 0 <= score["correct"] <= score["total"] or not score["total"]:
                raise StoreError(
                    f"{path} was changed: {score['correct']} of {score['total']} rows are no score; {remedy}"
                )
        shares = [entry[name]["correct"] / entry[name]["total"] for name in ("baseline", "pruned")]
        scores[entry["searched_on"], entry["tested_on"]] = (shares[0], shares[1])
    return Transfer(
        searched_on=tuple(dict.fromkeys(searched for searched, _ in scores)),
        tested_on=tuple(dict.fromkeys(tested for _, tested in scores)),
        scores=scores,
    )
