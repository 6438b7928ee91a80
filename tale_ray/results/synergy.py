"""What a study of pruning and fine-tuning has found: regimes side by side on the same test rows, from storage alone.

Every accuracy has its Wilson interval, every comparison is the exact McNemar test on the same rows, corrected (Holm)
for all comparisons of the study. Seeds split the same rows anew: their test rows overlap, so nothing is pooled.
"""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tale_ray.errors import StoreError
from tale_ray.results.held_out import compare_sheets, comparison_json
from tale_ray.results.statistics import adjust_holm, wilson_interval
from tale_ray.results.study import spread
from tale_ray.results.summary import summarize
from tale_ray.search.driver import held_out_scope
from tale_ray.store.reader import RunReader
from tale_ray.store.tables import AnswerSheet

RESULT = "synergy"  # its name in the folders of the runs
SEARCHES = ("tale", "ft-tale", "tale-ft-tale")  # stages that are runs; what they recommend are regimes
TITLES: Mapping[str, str] = {
    "base": "base",
    "tale": "TALE",
    "ft": "FT",
    "tale-ft": "TALE then FT",
    "ft-tale": "FT then TALE",
    "tale-ft-tale": "(TALE then FT) then TALE",
}
_RUNS = {"base": "tale", "tale": "tale", "ft": "ft-tale", "ft-tale": "ft-tale"}
_RUNS |= {"tale-ft": "tale-ft-tale", "tale-ft-tale": "tale-ft-tale"}
_TRAININGS = {"ft": "ft", "ft-tale": "ft", "tale-ft": "tale-ft", "tale-ft-tale": "tale-ft"}
_PAIRS = (
    *((name, "base") for name in ("tale", "ft", "tale-ft", "ft-tale", "tale-ft-tale")),
    *(("tale-ft", "tale"), ("tale-ft", "ft"), ("ft-tale", "ft"), ("tale-ft", "ft-tale"), ("tale-ft-tale", "tale-ft")),
)


class StageNotDone(StoreError):
    """A stage of the study has not begun or not ended."""


@dataclass(frozen=True, slots=True)
class _Scored:
    """A regime with one seed."""

    values: dict[str, Any]
    sheet: AnswerSheet


def summarize_synergy(
    study: Mapping[str, Any],
    place: Callable[[int, str], str],
    record: Callable[[int, str], Mapping[str, Any]],
    asked: Collection[str],
) -> dict[str, Any]:
    """Return what a study has found, as JSON values.

    Args:
        study: what its folder says of it.
        place: where the run of a seed and a stage is.
        record: what is stored of the training of a seed and a stage.
        asked: the regimes that have to be done; others of the study are left out where they are not.

    Raises:
        StageNotDone: a stage that is asked for is not done.
        StoreError: a file is damaged, or a stage is of other rows than the others.
    """
    seeds = study["seeds"]
    scored: dict[tuple[str, int], _Scored] = {}
    for name in study["regimes"]:
        with contextlib.nullcontext() if name in asked else contextlib.suppress(StageNotDone):
            scored |= {(name, seed): _score(name, seed, study, place, record) for seed in seeds}
    regimes = [name for name in study["regimes"] if (name, seeds[0]) in scored]
    comparisons = []
    for one, other in _PAIRS:
        for seed in seeds:
            if one in regimes and other in regimes:
                found = compare_sheets(scored[one, seed].sheet, scored[other, seed].sheet)
                if found is None:
                    raise StoreError(
                        f"seed {seed}: {TITLES[one]} and {TITLES[other]} were not scored on the same test rows: a "
                        "stage of the study was replaced; delete its folder and run the command again"
                    )
                comparisons.append({"first": one, "second": other, "seed": seed, **comparison_json(found)})
    for entry, adjusted in zip(comparisons, adjust_holm([each["p_value"] for each in comparisons]), strict=True):
        entry["p_value_holm"] = adjusted
    reader = RunReader(place(seeds[0], "tale"))
    summary = summarize(reader)
    return {
        "model": study["config"]["model"]["model"],
        "task": summary["task"],
        "num_layers": summary["num_layers"],
        "seeds": seeds,
        "pick": study["pick"],
        "rows": {seed: summarize(RunReader(place(seed, "tale")))["rows"] for seed in seeds},
        "regimes": [_regime(name, [scored[name, seed].values for seed in seeds]) for name in regimes],
        "comparisons": comparisons,
        "training": [each for seed in seeds if (each := _training(seed, regimes, record)) is not None],
    }


def _score(
    name: str,
    seed: int,
    study: Mapping[str, Any],
    place: Callable[[int, str], str],
    record: Callable[[int, str], Mapping[str, Any]],
) -> _Scored:
    """Return how a regime does with a seed, from the run that has scored it."""
    uri = place(seed, _RUNS[name])
    reader = RunReader(uri)
    if not reader.exists():
        raise StageNotDone(f"{uri} has not begun: run the command again to go on")
    if name in SEARCHES and _most_removed(reader.manifest().config) != _most_removed(study["config"]):
        raise StageNotDone(f"{uri} has scored its model only: run the command again to go on")
    summary = summarize(reader)
    test = summary["test"]
    entry = test and test["baseline" if name not in SEARCHES else study["pick"]]
    if not entry:
        raise StageNotDone(f"{uri} has no test rows scored yet: run the command again to go on")
    sheet = reader.answers(held_out_scope("test", entry["round"]))
    if sheet is None:
        raise StoreError(f"{uri} lacks its answers to test rows: delete its folder and run the command again")
    trained = record(seed, _TRAININGS[name]) if name in _TRAININGS else None
    before = [] if trained is None else list(trained["removed"])
    total = summary["num_layers"] + len(before)
    left = [layer for layer in range(total) if layer not in before]
    removed = [*before, *(left[layer] for layer in entry.get("removed", []))]
    interval = wilson_interval(entry["correct"], entry["total"])
    values = {
        "seed": seed,
        "correct": entry["correct"],
        "total": entry["total"],
        "invalid": entry["invalid"],
        "accuracy": entry["correct"] / entry["total"],
        "interval": [interval.low, interval.high],
        "removed": removed,  # numbered as in the full model
        "num_layers": total - len(removed),
        "trainable_parameters": 0 if trained is None else trained["trainable_parameters"],
        "training_seconds": 0.0 if trained is None else trained["seconds"]["training"],
        "training_cpu_seconds": 0.0 if trained is None else trained["seconds"]["training_cpu"],
    }
    return _Scored(values, sheet)


def _most_removed(config: Mapping[str, Any]) -> Any:
    return config["strategy"]["max_removed"]


def _regime(name: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"regime": name, "accuracy": spread([each["accuracy"] for each in found]), "seeds": list(found)}


def _training(
    seed: int, regimes: Sequence[str], record: Callable[[int, str], Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Return what training the full model and the pruned one took, step by step, with one seed; None without both."""
    if not ({"ft", "ft-tale"} & {*regimes} and {"tale-ft", "tale-ft-tale"} & {*regimes}):
        return None
    full, pruned = (_pace(record(seed, stage)) for stage in ("ft", "tale-ft"))
    ratios = {f"{name}_ratio": pruned[name] / full[name] for name in ("seconds_per_step", "cpu_seconds_per_step")}
    return {"seed": seed, "full": full, "pruned": pruned, **ratios}


def _pace(record: Mapping[str, Any]) -> dict[str, Any]:
    seconds, steps = record["seconds"], record["steps_done"]
    return {
        "num_layers": record["num_layers"] - len(record["removed"]),
        "steps": steps,
        "kept_step": record["kept_step"],
        "trainable_parameters": record["trainable_parameters"],
        "seconds": seconds["training"],
        "seconds_per_step": seconds["training"] / steps,
        "cpu_seconds_per_step": seconds["training_cpu"] / steps,
    }
