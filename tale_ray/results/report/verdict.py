"""The one sentence that a report begins with. It claims no more than the test rows show."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from tale_ray.results.report.data import ReportData
from tale_ray.results.tables import accuracy_text, count_text, p_text, percent, points

ALPHA = 0.05  # of a significant difference, after correction for the number of results compared
Finding: TypeAlias = Literal["better", "worse", "not_shown", "full_model", "unknown"]

_STATES = {
    "running": "The search is still running: ",
    "interrupted": "The search was interrupted and can go on: ",
    "failed": "The search failed: ",
    "finished": "",
}


def verdict(data: ReportData) -> tuple[Finding, str]:
    """Return what was found, and the sentence that says it."""
    finding, sentence = _finding(data)
    prefix = _STATES[data.summary["state"]]
    return finding, prefix + (sentence[0].lower() + sentence[1:] if prefix else sentence)


def _finding(data: ReportData) -> tuple[Finding, str]:
    summary, pick = data.summary, data.pick
    if pick is None:
        return "unknown", "Nothing is known yet, not even what the full model scores."
    if summary["stop_reason"] == "baseline_zero":
        return "unknown", "The full model answers no search row correctly, so there is nothing that could be kept."
    if summary["test"] is None:
        return "unknown", _without_test_rows(summary, pick)
    entry = summary["test"][pick]
    if not entry["removed"]:
        return "full_model", (
            f"The full model is to be kept: no removal is recommended; it scores {accuracy_text(entry)} on the "
            "test rows."
        )
    return _compared(entry, summary)


def _without_test_rows(summary: Mapping[str, Any], pick: str) -> str:
    """Return what can be said where nothing but the rows that chose speaks."""
    scores = [summary["baseline"], *summary["rounds"]]
    score, removed = scores[summary[pick]["round"]], summary[pick]["removed"]
    why = "the test rows are not scored yet" if summary["rows"]["test"] else "this run has no test rows"
    if not removed:
        return (
            f"So far nothing is better than the full model, which scores {accuracy_text(scores[0])} on the search "
            f"rows; {why}."
        )
    return (
        f"Without {_layers(removed, summary)} the model scores {accuracy_text(score)} on the search rows, the full "
        f"model {percent(scores[0]['correct'] / scores[0]['total'])}; as the same rows chose these layers and {why}, "
        "that does not show that the removal is harmless."
    )


def _compared(entry: Mapping[str, Any], summary: Mapping[str, Any]) -> tuple[Finding, str]:
    layers, rows = _layers(entry["removed"], summary), count_text(entry["total"], "test row")
    if entry["p_value_holm"] is None:
        return "unknown", (
            f"Without {layers} the model scores {accuracy_text(entry)} on the test rows, the full model "
            f"{accuracy_text(summary['test']['baseline'])}; the answers are not stored, so they cannot be compared row "
            "by row."
        )
    low, high = entry["difference_interval"]
    numbers = (
        f"{points(entry['difference'])} points, 95% interval {points(low)} to {points(high)}, "
        f"p = {p_text(entry['p_value_holm'])}"
    )
    if entry["p_value_holm"] < ALPHA:
        better = entry["difference"] > 0
        word = "more" if better else "less"
        return ("better" if better else "worse"), f"Without {layers} the model is {word} accurate on {rows}: {numbers}."
    doubt = f"; a loss of up to {abs(100 * low):.1f} points is not ruled out" if round(100 * low, 1) < 0 else ""
    return "not_shown", (
        f"{rows[0].upper()}{rows[1:]} show no significant difference between the model without {layers} and the full "
        f"model: {numbers}{doubt}."
    )


def _layers(removed: list[int], summary: Mapping[str, Any]) -> str:
    """Return `layer 7 (1 of 12)` or `layers 2, 9 and 5 (3 of 12)`; long lists as their number alone."""
    total = summary["num_layers"]
    if len(removed) == 1:
        return f"layer {removed[0]} (1 of {total})"
    if len(removed) > 8:
        return f"{len(removed)} of its {total} layers"
    return f"layers {', '.join(map(str, removed[:-1]))} and {removed[-1]} ({len(removed)} of {total})"
