"""What a study has found, as tables for a person. Takes the summary, so it can show nothing that JSON does not have."""

import shlex
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tale_ray.results.study import COUNTED
from tale_ray.results.tables import accuracy_text, count_text, interval_text, p_text, percent, points
from tale_ray.store.study import seed_uri


def study_table(summary: Mapping[str, Any]) -> RenderableType:
    """Return the runs of a study side by side, what they have in common, where it lies, and what to do next."""
    seeds = ", ".join(map(str, summary["seeds"]))
    layers = f", {count_text(summary['num_layers'], 'layer')}" if summary["num_layers"] else ""
    task = summary["task"] or "nothing is stored yet"
    parts: list[RenderableType] = [Text(f"{task} on {summary['model']}{layers}, seeds {seeds}: {summary['state']}")]
    if summary["test"]:
        parts += [_runs(summary), _results(summary)]
    if any(any(summary["removed"][name]) for name in COUNTED):
        parts.append(_layers(summary))
    if not summary["test"] or summary["state"] != "finished":
        parts.append(_progress(summary))
    parts.append(Text(f"study: {summary['study']}"))
    parts.append(Text(_next_step(summary)))
    return Group(*parts)


def _next_step(summary: Mapping[str, Any]) -> str:
    study = shlex.quote(summary["study"])
    states = [None if run is None else run["state"] for run in summary["runs"]]
    failed = "failed" in states
    shown = summary["seeds"][states.index("failed") if failed else 0]
    run = shlex.quote(seed_uri(summary["study"], shown))
    match summary["state"]:
        case "finished":
            return f"see one of its runs with: tale-ray show {run}"
        case "running":
            return f"look again with: tale-ray show {study}"
        case "failed":
            return f"see what failed with: tale-ray show {run}"
        case _:
            return f"go on with: tale-ray resume {study}"


def _progress(summary: Mapping[str, Any]) -> Table:
    table = Table(title="how far its runs are")
    table.add_column("seed", justify="right")
    table.add_column("")
    for name in ("rounds", "baseline", "final"):
        table.add_column(name, justify="right")
    for seed, run in zip(summary["seeds"], summary["runs"], strict=True):
        if run is None or run["baseline"] is None:
            table.add_row(str(seed), "not begun" if run is None else run["state"], "-", "-", "-")
        else:
            scores = accuracy_text(run["baseline"]), accuracy_text(run["final"])
            table.add_row(str(seed), run["state"], str(len(run["rounds"])), *scores)
    return table


def _runs(summary: Mapping[str, Any]) -> Table:
    table = Table(title="accuracy on the test rows of each seed, with 95% intervals")
    table.add_column("seed", justify="right")
    for name in summary["test"]:
        table.add_column(name, justify="right")
    for seed, run in zip(summary["seeds"], summary["runs"], strict=True):
        test = (run and run["test"]) or {}
        table.add_row(str(seed), *(_accuracy(test[name]) if name in test else "-" for name in summary["test"]))
    spreads = [entry["accuracy"] for entry in summary["test"].values()]
    table.add_section()
    table.add_row("mean", *(percent(each["mean"]) for each in spreads))
    table.add_row("deviation", *(_deviation(each) for each in spreads))
    return table


def _results(summary: Mapping[str, Any]) -> Table:
    table = Table(title="against the full model on test rows, mean and standard deviation over the seeds")
    table.add_column("")
    for name in ("layers removed", "difference", "optimism", "p (Holm over seeds)"):
        table.add_column(name, justify="right")
    for name, entry in summary["test"].items():
        if name != "baseline":
            number = entry["num_removed"]
            deviation = "" if number["standard_deviation"] is None else f" ± {number['standard_deviation']:.1f}"
            table.add_row(
                name,
                f"{number['mean']:.1f}{deviation}",
                _points(entry["difference"]),
                _points(entry["optimism"]),
                ", ".join(map(p_text, entry["p_values_holm"])) if entry["p_values_holm"] else "-",
            )
    return table


def _layers(summary: Mapping[str, Any]) -> Table:
    removed = summary["removed"]
    table = Table(title=f"in how many of {count_text(removed['runs'], 'run')} a layer is removed")
    for name in ("layer", *COUNTED):
        table.add_column(name, justify="right")
    for layer in range(summary["num_layers"]):
        counts = [removed[name][layer] if removed[name] else 0 for name in COUNTED]
        if any(counts):
            table.add_row(str(layer), *(str(count or "") for count in counts))
    return table


def _accuracy(entry: Mapping[str, Any]) -> str:
    return f"{percent(entry['correct'] / entry['total'])} {interval_text(entry['interval'])}"


def _deviation(spread: Mapping[str, float | None]) -> str:
    deviation = spread["standard_deviation"]
    return "-" if deviation is None else f"{100 * deviation:.1f}"


def _points(spread: Mapping[str, Any]) -> str:
    return (
        f"{points(spread['mean'])} ± {_deviation(spread)}"
        if spread["standard_deviation"] is not None
        else points(spread["mean"])
    )
