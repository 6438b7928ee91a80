"""The information along depth as a figure in a file, drawn with matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tale_ray.results.report.plots import new_figure, save_figure
from tale_ray.results.tables import layers_text

_FULL, _PRUNED = ("o-", "#0b5fa5"), ("s--", "#b34a0a")
_MOST_NAMED = 8


def write_information_figure(values: Mapping[str, Any], path: Path) -> None:
    """Draw information along depth, full and pruned, between the controls and H(Y); PNG or SVG by the ending.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(6.5, 3.8)
    axes = figure.subplots()
    controls = [*values["controls"]["shuffled"], *values["controls"]["random"]]
    axes.axhspan(min(controls), max(controls), color="#c9ced6", alpha=0.7, label="controls", linewidth=0)
    axes.axhline(values["entropy"], color="#51585f", linestyle=":", label="H(Y)")
    for layer in values["removed"]:
        axes.axvline(layer, color="#b34a0a", alpha=0.15, linewidth=7)
    _draw(axes, values["full"], _FULL, "full model")
    if values["pruned"] is not None:
        removed = values["removed"]
        which = layers_text(removed) if len(removed) <= _MOST_NAMED else f"{len(removed)} layers"
        _draw(axes, values["pruned"], _PRUNED, f"without {which}")
    axes.set_xlabel("after layer (-1: embedding)" + ("; shaded: removed" if values["removed"] else ""))
    axes.set_ylabel("bits about the label, 95%")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _draw(axes: Any, points: Sequence[Mapping[str, Any]], style: tuple[str, str], label: str) -> None:
    places = [-1 if point["layer"] is None else point["layer"] for point in points]
    bits = [point["bits"] for point in points]
    errors = [
        [max(0.0, value - point["interval"][0]) for value, point in zip(bits, points, strict=True)],
        [max(0.0, point["interval"][1] - value) for value, point in zip(bits, points, strict=True)],
    ]
    axes.errorbar(places, bits, yerr=errors, fmt=style[0], color=style[1], label=label, markersize=4, elinewidth=0.8)
