"""The figures of the document, drawn from what was measured."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_OURS, _PUBLISHED, _TARGET = "#1f6fb2", "#8a8a8a", "#c4432b"
_PANELS = {
    "rows": "rows",
    "layers": "layers",
    "prompt_tokens": "prompt tokens of a row",
    "shots": "demonstrations (64 tokens each)",
    "new_tokens": "new tokens",
}
# Text stays text, and the same numbers give the same file.
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tale-ray", "font.size": 9, "axes.grid": True})
mpl.rcParams.update({"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})


def draw_ratios(workloads: Mapping[str, Any], path: Path) -> None:
    """Draw how many times as fast as published each workload was, its spread and its target."""
    shown = [(name, each) for name, each in workloads.items() if "pairs" in each][::-1]
    figure = Figure(figsize=(7, 0.6 + 0.55 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for height, (_, each) in enumerate(shown):
        ratios = [pair["ratio"] for pair in each["pairs"]]
        middle = statistics.median(ratios)
        error = [[middle - min(ratios)], [max(ratios) - middle]]
        axes.barh(height, middle, xerr=error, color=_OURS, height=0.55, capsize=3)
        axes.plot([each["least_ratio"]] * 2, [height - 0.4, height + 0.4], color=_TARGET, linewidth=2)
        axes.annotate(f"  {middle:.1f}x", (max(ratios), height), va="center")
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_xlabel("times as fast as the published procedure (red: at least)")
    axes.margins(x=0.15)
    _save(figure, path)


def draw_scaling(axes_measured: Mapping[str, Any], path: Path) -> None:
    """Draw seconds of a round along every axis: measured, as published, and as the required FLOPs would have it."""
    figure = Figure(figsize=(3.1 * len(axes_measured), 3.2), layout="constrained")
    panels = figure.subplots(1, len(axes_measured), squeeze=False)[0]
    for panel, (axis, points) in zip(panels, axes_measured.items(), strict=True):
        _draw_axis(panel, axis, points)
    panels[0].set_ylabel("seconds of one exhaustive round")
    panels[0].legend(frameon=False)
    _save(figure, path)


def draw_efficiency(curves: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the efficiency of simulated searches over numbers of workers."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for curve, style in zip(curves, ("o-", "s--", "^-", "d:"), strict=False):
        workers = [point["workers"] for point in curve["points"]]
        axes.plot(workers, [point["efficiency"] for point in curve["points"]], style, label=curve["name"], markersize=4)
    axes.set_xscale("log", base=2)
    ticks = [point["workers"] for point in curves[0]["points"]]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("workers")
    axes.set_ylabel("efficiency")
    axes.legend(frameon=False)
    _save(figure, path)


def _draw_axis(panel: Axes, axis: str, points: list[dict[str, Any]]) -> None:
    values = [point[axis] for point in points]
    seconds = [point["seconds"] for point in points]
    below = [point["seconds"] - point["least_seconds"] for point in points]
    above = [point["most_seconds"] - point["seconds"] for point in points]
    last = points[-1]
    by_flops = [last["seconds"] * point["required_flops"] / last["required_flops"] for point in points]
    panel.plot(values, [point["published_seconds"] for point in points], "s-", color=_PUBLISHED, label="published")
    panel.plot(values, by_flops, "--", color=_TARGET, label="required FLOPs at the last point's rate")
    panel.errorbar(values, seconds, yerr=[below, above], fmt="o-", color=_OURS, capsize=3, label="ours")
    panel.set_yscale("log")
    if axis != "shots":
        panel.set_xscale("log", base=2)
        panel.set_xticks(values, [str(value) for value in values])
    panel.set_xlabel(_PANELS[axis])


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    text = path.read_text(encoding="utf-8")
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")
