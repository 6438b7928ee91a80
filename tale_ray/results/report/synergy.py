"""Pruning and fine-tuning side by side, as `tale-ray synergy` stores it in its runs: `results/synergy.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tale_ray.errors import StoreError
from tale_ray.results.report.accuracy import Accuracy, read_accuracy
from tale_ray.results.synergy import RESULT, TITLES
from tale_ray.store.documents import check_fields
from tale_ray.store.reader import RunReader

_REMEDY = "run the command `tale-ray synergy` of the study again, or delete it: no decision of the search depends on it"
_SCORE = {"seed": int, "num_layers": int, "trainable_parameters": int, "training_seconds": float}
_COMPARISON = {
    **{"first": str, "second": str, "seed": int, "difference": float, "difference_interval": list[float]},
    **{"wins": int, "losses": int, "p_value_holm": float},
}


@dataclass(frozen=True, slots=True)
class RegimeScore:
    """A regime with one seed, on test rows."""

    title: str
    seed: int
    num_layers: int
    accuracy: Accuracy
    trainable_parameters: int  # 0: nothing was trained
    training_seconds: float  # in steps, wall clock


@dataclass(frozen=True, slots=True)
class RegimePair:
    """Two regimes on the same test rows; `values` has the difference and its interval."""

    first: str
    second: str
    seed: int
    values: Mapping[str, Any]
    wins: int
    losses: int
    p_value_holm: float


@dataclass(frozen=True, slots=True)
class StoredSynergy:
    """What a study has found, regime by regime and seed by seed."""

    scores: tuple[RegimeScore, ...]
    pairs: tuple[RegimePair, ...]


def stored_synergy(reader: RunReader) -> StoredSynergy | None:
    """Return what the study of a run has found; None if it is of none, or that has not ended.

    Raises:
        StoreError: the file is damaged.
    """
    found = reader.result(RESULT)
    if found is None:
        return None
    path = f"{reader.uri}/results/{RESULT}.json"
    lists = {"regimes": list[Mapping[str, Any]], "comparisons": list[Mapping[str, Any]]}
    check_fields(found, lists, path, _REMEDY)
    scores: list[RegimeScore] = []
    for regime in found["regimes"]:
        check_fields(regime, {"regime": str, "seeds": list[Mapping[str, Any]]}, path, _REMEDY)
        title = _title(regime["regime"], path)
        scores += [_score(title, entry, path) for entry in regime["seeds"]]
    return StoredSynergy(tuple(scores), tuple(_pair(entry, path) for entry in found["comparisons"]))


def _title(name: str, path: str) -> str:
    if name not in TITLES:
        raise StoreError(f"{path} was changed: {name!r} is no regime; {_REMEDY}")
    return TITLES[name]


def _score(title: str, entry: Mapping[str, Any], path: str) -> RegimeScore:
    check_fields(entry, _SCORE, path, _REMEDY)
    accuracy = read_accuracy(entry, path, _REMEDY)
    trained = (entry["trainable_parameters"], entry["training_seconds"])
    return RegimeScore(title, entry["seed"], entry["num_layers"], accuracy, *trained)


def _pair(entry: Mapping[str, Any], path: str) -> RegimePair:
    check_fields(entry, _COMPARISON, path, _REMEDY)
    if len(entry["difference_interval"]) != 2:
        raise StoreError(f"{path} was changed: an interval has two ends; {_REMEDY}")
    return RegimePair(
        first=_title(entry["first"], path),
        second=_title(entry["second"], path),
        seed=entry["seed"],
        values={name: entry[name] for name in ("difference", "difference_interval")},
        wins=entry["wins"],
        losses=entry["losses"],
        p_value_holm=entry["p_value_holm"],
    )
