"""The figures of a report as files, PNG and SVG, for papers and slides; drawn with matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tale_ray.errors import ConfigError
from tale_ray.results.report.data import HeatMap, ReportData, Series
from tale_ray.results.report.figures import cell_bin, cell_text

_COLOURS = {"search": "#0b5fa5", "select": "#8a4b00", "test": "#7b2d8b"}
_MARKERS = {"search": "o-", "select": "s--", "test": "D:"}
_SHADES = ("#7f2704", "#b34a0a", "#e08a45", "#f4b982", "#fbdfc4", "#eceff2", "#b9d6ee", "#2a6da8")
_DPI = 160


def check_matplotlib() -> None:
    """Refuse to draw where matplotlib is missing.

    Raises:
        ConfigError: says how to install it.
    """
    try:
        import matplotlib  # noqa: F401 (only whether it is there)
    except ImportError as error:
        raise ConfigError(
            "figures as files are drawn with matplotlib, which is not installed: pip install 'tale-ray[plots]', or "
            "leave the option out"
        ) from error


def write_plots(data: ReportData, folder: Path) -> tuple[Path, ...]:
    """Draw what there is of accuracy by removed layers and of layers by rounds; return the files.

    Raises:
        ConfigError: the folder cannot be written, or matplotlib is missing.
    """
    drawn: dict[str, Any] = {}
    if len(data.trajectory) and len(data.trajectory[0].points) > 1:
        drawn["trajectory"] = trajectory(data.trajectory)
    if data.heat_map is not None:
        drawn["heatmap"] = heat_map(data.heat_map)
    paths = []
    for name, figure in drawn.items():
        for ending in ("png", "svg"):
            paths.append(folder / f"{name}.{ending}")
            save_figure(figure, paths[-1])
    return tuple(paths)


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, in inches; text stays text in SVG, and the same numbers give the same file."""
    check_matplotlib()
    import matplotlib as mpl  # an extra, and slow to import
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tale-ray", "font.size": 9})
    mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure; the name's ending says in which format.

    Raises:
        ConfigError: it cannot be written.
    """
    is_svg = path.suffix == ".svg"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DPI, metadata={"Date": None} if is_svg else None)
    except (OSError, ValueError) as error:  # the latter from an ending that matplotlib does not know
        raise ConfigError(
            f"figure {path} cannot be written ({error}): name a .png or .svg in a folder of yours"
        ) from error


def trajectory(series: Sequence[Series]) -> Any:
    """Return accuracy over the number of removed layers, with 95% intervals."""
    figure = new_figure(6.5, 3.6)
    axes = figure.subplots()
    for number, each in enumerate(series):
        removed = [point.num_removed + 0.12 * (number - 1) for point in each.points]
        shares = [100 * point.score.accuracy for point in each.points]
        below = [100 * (point.score.accuracy - point.interval.low) for point in each.points]
        above = [100 * (point.interval.high - point.score.accuracy) for point in each.points]
        axes.errorbar(
            removed,
            shares,
            yerr=[below, above],
            fmt=_MARKERS[each.split],
            color=_COLOURS[each.split],
            label=f"{each.split} rows",
            markersize=4,
            elinewidth=0.8,
        )
    axes.set_xlabel("layers removed")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def heat_map(found: HeatMap) -> Any:
    """Return layers by rounds, with the percentages in the cells."""
    from matplotlib.patches import Rectangle

    num_rounds, num_layers = len(found.rounds), len(found.cells)
    figure = new_figure(max(3.2, 1.2 + 0.42 * num_rounds), 1.4 + 0.24 * num_layers)
    axes = figure.subplots()
    for layer, cells in enumerate(found.cells):
        for column, cell in enumerate(cells):
            shade = cell_bin(cell, found.baseline)
            if shade is not None:
                axes.add_patch(Rectangle((column, layer), 1, 1, facecolor=_SHADES[shade], edgecolor="white"))
            colour = "white" if shade in (0, 1, 7) else "black"
            axes.text(column + 0.5, layer + 0.5, cell_text(cell), ha="center", va="center", fontsize=7, color=colour)
            if cell.is_winner:
                style = "--" if cell.round == found.rejected else "-"
                axes.add_patch(Rectangle((column + 0.06, layer + 0.06), 0.88, 0.88, fill=False, lw=1.5, ls=style))
    axes.set_xlim(0, num_rounds)
    axes.set_ylim(num_layers, 0)
    axes.set_xticks([column + 0.5 for column in range(num_rounds)], [str(number) for number in found.rounds])
    axes.set_yticks([layer + 0.5 for layer in range(num_layers)], [str(layer) for layer in range(num_layers)])
    axes.set_xlabel("round\nboxed: the winner; *: bounded out;\n×: removed before; –: no candidate")
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    return figure
