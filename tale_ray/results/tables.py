"""What a run has found, as tables for a person. Takes the summary, so it can show nothing that JSON does not have."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tale_ray.records import Score
from tale_ray.results.held_out import RESULTS, comparison_json
from tale_ray.results.statistics import PairedComparison, wilson_interval

_NEXT_STEPS = {
    "running": "look again with: tale-ray show {run}",
    "finished": "score a result on another task with: tale-ray evaluate --run {run} --pick {pick} --task T --split all",
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
    if summary["test"]:
        parts.append(_comparisons(summary))
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
    if summary["state"] == "finished" and summary["rows"]["select"] and summary["selected"] is None:
        return f"the select rows are not scored yet: tale-ray resume {run}"
    return _NEXT_STEPS[summary["state"]].format(run=run, pick="selected" if summary["selected"] else "best")


def removal_text(layer: int, removed: Sequence[int], before: Sequence[int] | None) -> str:
    """Return the layer that a round removed, or all of them where they do not go on from those removed before."""
    extends = before is None or [*removed[:-1]] == [*before]
    return str(layer) if extends else f"{layer} (of {layers_text(removed)})"


def _rounds(summary: Mapping[str, Any]) -> Table:
    table = Table(title="rounds, on the search rows")
    for name in ("round", "layer removed", "correct", "accuracy", "invalid"):
        table.add_column(name, justify="right")
    table.add_column("")
    baseline = summary["baseline"]
    table.add_row("0", "none", *_counts(baseline), str(baseline["invalid"]), "baseline")
    before: Sequence[int] | None = None
    for entry in summary["rounds"]:
        removal = removal_text(entry["removed_layer"], entry["removed"], before)
        table.add_row(str(entry["round"]), removal, *_counts(entry), str(entry["invalid"]), "committed")
        before = entry["removed"]
    if rejected := summary["rejected_round"]:
        table.add_row(
            str(rejected["round"]),
            removal_text(rejected["removed_layer"], rejected["removed"], before),
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
    for split in ("search", "select", "test"):
        table.add_column(f"{split} rows", justify="right")
    test = summary["test"] or {}
    searched = [{**summary["baseline"], "round": 0, "removed": []}, *summary["rounds"]]  # by number
    for name in RESULTS:
        entry = searched[0] if name == "baseline" else summary[name]
        if entry is not None:
            table.add_row(
                name,
                str(entry["round"]),
                layers_text(entry["removed"]),
                accuracy_text(searched[entry["round"]]),
                accuracy_text(entry) if name == "selected" else "-",
                accuracy_text(test[name]) if name in test else "-",
            )
    return table


def _comparisons(summary: Mapping[str, Any]) -> Table:
    table = Table(title="on the test rows, with 95% intervals, against the full model")
    table.add_column("")
    for name in ("accuracy", "difference", "wins", "losses", "p", "p (Holm)", "optimism"):
        table.add_column(name, justify="right")
    for name in RESULTS:
        if (entry := summary["test"].get(name)) is None:
            continue
        accuracy = f"{percent(entry['correct'] / entry['total'])} {interval_text(entry['interval'])}"
        if name == "baseline" or entry["p_value"] is None:
            table.add_row(name, accuracy, *["-"] * 6)
        else:
            table.add_row(
                name,
                accuracy,
                difference_text(entry),
                str(entry["wins"]),
                str(entry["losses"]),
                p_text(entry["p_value"]),
                p_text(entry["p_value_holm"]),
                points(summary["optimism"][name]),
            )
    return table


def count_text(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number of things as a person reads it: `1 attempt`, `2 attempts`."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or noun + 's'}"


def layers_text(layers: Sequence[int]) -> str:
    """Return layers as a person reads them, in the order of their removal."""
    return ", ".join(map(str, layers)) if layers else "none"


def accuracy_text(score: Mapping[str, int]) -> str:
    """Return a score as a person reads it: `152/200 = 76.0%`."""
    return f"{score['correct']}/{score['total']} = {percent(score['correct'] / score['total'])}"


def percent(share: float) -> str:
    """Return a share as a person reads it: `76.0%`."""
    return f"{100 * share:.1f}%"


def points(difference: float) -> str:
    """Return a difference of shares in points, with its sign: `+1.3`."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"  # no difference is +0.0, not -0.0


def interval_text(interval: Sequence[float]) -> str:
    """Return an interval of shares in percent: `[70.1, 81.2]`."""
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def difference_text(comparison: Mapping[str, Any]) -> str:
    """Return a difference and its interval in points: `-1.9 [-4.7, +0.8]`."""
    low, high = comparison["difference_interval"]
    return f"{points(comparison['difference'])} [{points(low)}, {points(high)}]"


def p_text(p_value: float) -> str:
    """Return a p-value as a person reads it: `0.021`, `<0.001`."""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _counts(score: Mapping[str, int]) -> tuple[str, str]:
    return f"{score['correct']}/{score['total']}", percent(score["correct"] / score["total"])


def evaluation_json(
    score: Score, comparison: PairedComparison | None, removed: Sequence[int], split: str
) -> dict[str, Any]:
    """Return the score of one configuration, and how it compares with the full model of its run, as JSON values."""
    interval = wilson_interval(score.correct, score.total)
    return {
        "split": split,
        "removed": list(removed),
        "correct": score.correct,
        "total": score.total,
        "invalid": score.invalid,
        "accuracy": score.accuracy,
        "interval": [interval.low, interval.high],
        **comparison_json(comparison),
    }


def evaluation_text(values: Mapping[str, Any]) -> str:
    """Return what `evaluation_json` returned, as a person reads it."""
    lines = [
        f"{values['split']} rows, layers removed: {layers_text(values['removed'])}: {accuracy_text(values)} "
        f"{interval_text(values['interval'])}, {values['invalid']} without a readable answer"
    ]
    if values["p_value"] is not None:
        lines.append(
            f"against the full model of the run on the same rows: {difference_text(values)} points, "
            f"{count_text(values['wins'], 'win')}, {count_text(values['losses'], 'loss', 'losses')}, "
            f"p = {p_text(values['p_value'])}"
        )
        if values["split"] != "test":
            lines.append("(these rows took part in choosing: they flatter the result; report the test rows)")
    return "\n".join(lines)


def output_console() -> Console:
    """Return the console of results: standard output, wide enough for a table where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)
