"""What the runs of a study come to together: the fields of `tale-ray show STUDY --json`, read from storage alone.

The runs split the same rows anew and search anew: their spread is that of the whole procedure. Their test rows overlap,
so they are not independent samples of a task.
"""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from tale_ray.config import SearchConfig
from tale_ray.results.held_out import RESULTS
from tale_ray.results.statistics import adjust_holm
from tale_ray.results.summary import summarize
from tale_ray.store.reader import RunReader
from tale_ray.store.study import StudyFolder

COUNTED = ("selected", "final")  # results of which it is counted how often they remove each layer


def summarize_study(folder: StudyFolder) -> dict[str, Any]:
    """Return the summary of a study, at any time of its life, as JSON values.

    Raises:
        StoreError: there is no study, or a file of it or of a run is damaged.
    """
    manifest = folder.manifest()
    asked = _decisive(manifest.config)
    runs: list[dict[str, Any] | None] = []
    is_complete = []
    for seed in manifest.seeds:
        reader = RunReader(folder.run(seed))
        begun_here = reader.exists()
        runs.append(summarize(reader) if begun_here or reader.lease() is not None else None)
        same = begun_here and _decisive(reader.manifest().config) == asked
        is_complete.append(same and _is_reported(runs[-1]))
    begun = [run for run in runs if run is not None]
    finished = [run for run, is_whole in zip(runs, is_complete, strict=True) if run is not None and is_whole]
    return {
        "study": folder.uri,
        "state": _state(runs, is_complete),
        "model": manifest.config["model"]["model"],
        "task": next((run["task"] for run in begun), None),
        "num_layers": next((run["num_layers"] for run in begun), None),
        "seeds": manifest.seeds,
        "runs": [
            None if run is None else {"seed": seed, **run} for seed, run in zip(manifest.seeds, runs, strict=True)
        ],
        "test": _test([run["test"] for run in finished if run["test"]], finished),
        "removed": _removed(finished),
    }


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a configuration that all runs of a study have in common and that decide something."""
    options = SearchConfig.from_json(config).decision_options()
    return {name: value for name, value in options.items() if name != "seed"}


def _is_reported(run: Mapping[str, Any] | None) -> bool:
    """Return whether a search has ended and its results are scored on all rows that it has for that."""
    if run is None or run["state"] != "finished":
        return False
    missing = [split for split, found in (("select", run["selected"]), ("test", run["test"])) if found is None]
    return not any(run["rows"][split] for split in missing)


def _state(runs: Sequence[Mapping[str, Any] | None], is_complete: Sequence[bool]) -> str:
    """Return finished if all are, else what the one is that is not.

    A run is not that is to go on: its select or test rows are not scored, or the study asks for other options by now.
    """
    states = ["interrupted" if run is None else run["state"] for run in runs]
    states = [
        "interrupted" if state == "finished" and not is_whole else state
        for state, is_whole in zip(states, is_complete, strict=True)
    ]
    return next((state for state in ("running", "interrupted", "failed") if state in states), "finished")


def _test(tests: Sequence[Mapping[str, Any]], finished: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return how each result does on test rows over the finished runs, or None if none has scored any."""
    if not tests:
        return None
    optimism = [run["optimism"] for run in finished if run["test"]]
    return {name: _spread_of_result(name, tests, optimism) for name in RESULTS if all(name in test for test in tests)}


def _spread_of_result(
    name: str, tests: Sequence[Mapping[str, Any]], optimism: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    entries = [test[name] for test in tests]
    accuracies = [entry["correct"] / entry["total"] for entry in entries]
    if name == "baseline":
        return {"accuracy": spread(accuracies)}
    baselines = [test["baseline"]["correct"] / test["baseline"]["total"] for test in tests]
    p_values = [entry["p_value"] for entry in entries]
    return {
        "accuracy": spread(accuracies),
        "difference": spread([one - other for one, other in zip(accuracies, baselines, strict=True)]),
        "optimism": spread([each[name] for each in optimism]),
        "num_removed": spread([len(entry["removed"]) for entry in entries]),
        "p_values": p_values,
        "p_values_holm": None if None in p_values else list(adjust_holm(p_values)),
    }


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean and standard deviation (of a sample: n - 1) as JSON values; of one value there is no deviation."""
    return {"mean": mean(values), "standard_deviation": stdev(values) if len(values) > 1 else None}


def _removed(finished: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return in how many of the finished runs each layer is removed, by result, for each layer in order."""
    counts: dict[str, Any] = {"runs": len(finished)}
    for name in COUNTED:
        picks = [run[name]["removed"] for run in finished if run[name] is not None]
        layers = range(finished[0]["num_layers"] if picks else 0)
        counts[name] = [sum(layer in removed for removed in picks) for layer in layers]
    return counts
