"""What a run has found, as tables for a person. Takes the summary, so it can show nothing that JSON does not have."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tale_ray.records import Score

_NEXT_STEPS = {
    "running": "look again with: tale-ray show {run}",
    "finished": "score a result on other rows with: tale-ray evaluate --run {run} --pick best --split select",
    "interrupted": "go on with: tale-ray resume {run}",
    "failed": "see the error in {run}/attempts, then go on with: tale-ray resume {run}",
}


def run_table(summary: Mapping[str, Any]) -> RenderableType:
    """Return the rounds and the results of a run, where it lies, and what to do next."""
    if summary["task"] is None:
        return Text(f"{summary['run']}: loading the model, nothing is stored yet\n{_next_step(summary)}")
    layers = count_text(summary["num_layers"], "layer")
    facts = Text(f"{summary['task']} on {summary['model']}, {layers}: {summary['state']}")
    if summary["stop_reason"] not in (None, summary["state"]):
        facts.append(f" ({summary['stop_reason']})")
    parts: list[RenderableType] = [facts]
    if summary["baseline"]:
        parts += [_rounds(summary), _results(summary)]
    seconds, work = summary["seconds"], summary["work"]
    parts.append(
        Text(
            f"{count_text(summary['attempts'], 'attempt')}, {seconds['search']:.1f} s searching, "
            f"{seconds['load']:.1f} s loading; {count_text(work['candidate_rows'], 'candidate-row')} "
            f"in {count_text(work['units'], 'unit')}, {work['retries']} retried"
        )
    )
    parts.append(Text(f"run: {summary['run']}"))
    parts.append(Text(_next_step(summary)))
    return Group(*parts)


def _next_step(summary: Mapping[str, Any]) -> str:
    run = shlex.quote(summary["run"])
    if summary["stop_reason"] == "baseline_zero":
        return "the full model answers no search row correctly: look at the task with `tale-ray tasks show`"
    if summary["state"] == "finished" and summary["rows"]["test"] and summary["test"] is None:
        return f"the test rows are not scored yet: tale-ray resume {run}"
    return _NEXT_STEPS[summary["state"]].format(run=run)


def _rounds(summary: Mapping[str, Any]) -> Table:
    table = Table(title="rounds, on the search rows")
    for name in ("round", "layer removed", "correct", "accuracy", "invalid"):
        table.add_column(name, justify="right")
    table.add_column("")
    baseline = summary["baseline"]
    table.add_row("0", "none", *_counts(baseline), str(baseline["invalid"]), "baseline")
    for entry in summary["rounds"]:
        table.add_row(
            str(entry["round"]), str(entry["removed_layer"]), *_counts(entry), str(entry["invalid"]), "committed"
        )
    if rejected := summary["rejected_round"]:
        table.add_row(
            str(rejected["round"]),
            str(rejected["removed_layer"]),
            *_counts(rejected),
            str(rejected["invalid"]),
            "rejected: below the floor",
        )
    return table


def _results(summary: Mapping[str, Any]) -> Table:
    table = Table(title="results")
    table.add_column("")
    table.add_column("round", justify="right")
    table.add_column("layers removed")
    table.add_column("search rows", justify="right")
    table.add_column("test rows", justify="right")
    test = summary["test"] or {}
    baseline = {**summary["baseline"], "round": 0, "removed": []}
    for name, entry in (("baseline", baseline), *((name, summary[name]) for name in ("best", "bsba", "final"))):
        table.add_row(
            name,
            str(entry["round"]),
            layers_text(entry["removed"]),
            accuracy_text(entry),
            accuracy_text(test[name]) if name in test else "-",
        )
    return table


def count_text(number: int, noun: str) -> str:
    """Return a number of things as a person reads it: `1 attempt`, `2 attempts`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def layers_text(layers: Sequence[int]) -> str:
    """Return layers as a person reads them, in the order of their removal."""
    return ", ".join(map(str, layers)) if layers else "none"


def accuracy_text(score: Mapping[str, int]) -> str:
    """Return a score as a person reads it: `152/200 = 76.0%`."""
    return f"{score['correct']}/{score['total']} = {100 * score['correct'] / score['total']:.1f}%"


def _counts(score: Mapping[str, int]) -> tuple[str, str]:
    return f"{score['correct']}/{score['total']}", f"{100 * score['correct'] / score['total']:.1f}%"


def score_json(score: Score, removed: Sequence[int], split: str) -> dict[str, Any]:
    """Return the score of one configuration as JSON values."""
    return {
        "split": split,
        "removed": list(removed),
        "correct": score.correct,
        "total": score.total,
        "invalid": score.invalid,
        "accuracy": score.accuracy,
    }


def output_console() -> Console:
    """Return the console of results: standard output, wide enough for a table where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)
