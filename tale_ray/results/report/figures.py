"""The figures of the page: accuracy by removed layers, layers by rounds, which layers went, and the test rows.

Each says without colour what it says with it: by shapes, dashes, signs and numbers.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from markupsafe import Markup

from tale_ray.results.report.data import Cell, HeatMap, Point, RowByRow, Series
from tale_ray.results.report.markup import Element, element, figure, percentage, svg
from tale_ray.results.tables import count_text, layers_text, percent

BIN_EDGES = (-0.30, -0.15, -0.08, -0.04, -0.01, 0.01, 0.04)  # of a cell's colour: accuracy minus the baseline's
_PLOT_HEIGHT = 260
_COLUMN, _LINE, _LEFT, _TOP = 40, 22, 34, 40  # of the heat map, in pixels
_PER_LINE, _LAYER_HEIGHT = 12, 46  # of the strip of layers
_ROWS_PER_LINE, _ROW_HEIGHT = 30, 14  # of the test rows
_OFFSETS = {"search": -5, "select": 0, "test": 5}  # pixels that keep intervals of one round apart


def trajectory(series: Sequence[Series], floor: float | None, num_layers: int) -> Markup:
    """Return accuracy over the number of removed layers, with intervals; `floor` is what ends a search, in [0, 1]."""
    points = [point for each in series for point in each.points]
    low = min([*(point.interval.low for point in points), *([floor] if floor is not None else [])])
    high = max(point.interval.high for point in points)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / step <= 7 or step == 0.2)
    bottom, top = int(low / step) * step, min(1.0, (int(high / step - 1e-9) + 1) * step)
    most = max(point.num_removed for point in points)

    def x(number: int) -> str:
        return percentage((number + 0.5) / (most + 1))

    def y(share: float) -> float:
        return 12 + (_PLOT_HEIGHT - 12) * (top - share) / max(top - bottom, step)

    content = _grid(bottom, top, step, y) + _number_axis(most, x)
    if floor is not None:
        content.append(element("line", class_="floor", x1="0", x2="100%", y1=y(floor), y2=y(floor)))
        content.append(element("text", "floor", class_="note", x="0", y=y(floor) - 4))
    for each in series:
        content.append(_curve(each, x, y))
    last = {each.split: each.points[-1] for each in series}
    told = ", ".join(
        f"{split} rows: {percent(each.points[0].score.accuracy)} with {each.points[0].num_removed} removed, "
        f"{percent(last[split].score.accuracy)} with {last[split].num_removed}"
        for each in series
        if (split := each.split)
    )
    return figure(
        "trajectory",
        "Accuracy by number of removed layers",
        f"Of {num_layers} layers up to {most} are removed. With 95% intervals; {told}. All numbers are in the table "
        "below.",
        content,
        height=_PLOT_HEIGHT + 48,
        class_="plot",
    )


def _grid(bottom: float, top: float, step: float, y: Callable[[float], float]) -> list[Element]:
    content = []
    for number in range(round((top - bottom) / step) + 1):
        share = bottom + number * step
        content.append(element("line", class_="grid", x1="0", x2="100%", y1=y(share), y2=y(share)))
        content.append(element("text", f"{100 * share:.0f}%", x=-8, y=y(share) + 4, text_anchor="end"))
    return content


def _number_axis(most: int, x: Callable[[int], str]) -> list[Element]:
    step = max(1, -(-(most + 1) // 12))
    ticks = [
        element("text", str(number), x=x(number), y=_PLOT_HEIGHT + 18, text_anchor="middle")
        for number in range(0, most + 1, step)
    ]
    return [*ticks, element("text", "layers removed", x="50%", y=_PLOT_HEIGHT + 40, text_anchor="middle")]


def _curve(series: Series, x: Callable[[int], str], y: Callable[[float], float]) -> Element:
    points = series.points
    content = []
    for one, other in pairwise(points):
        ends = {"x1": x(one.num_removed), "x2": x(other.num_removed)}
        heights = {"y1": y(one.score.accuracy), "y2": y(other.score.accuracy)}
        content.append(element("line", class_="curve", **ends, **heights))
    for point in points:
        at = x(point.num_removed)
        content.append(
            element("line", class_="interval", x1=at, x2=at, y1=y(point.interval.low), y2=y(point.interval.high))
        )
        content.append(
            element(
                "svg",
                element("title", _told(series, point)),
                marker(series.split),
                x=at,
                y=y(point.score.accuracy),
                overflow="visible",
            )
        )
    offset = f"translate({_OFFSETS[series.split]} 0)"
    return element("g", *content, class_=f"series {series.split}", transform=offset)


def marker(split: str) -> Element:
    """Return the mark of a split, around 0, 0: each has a shape of its own."""
    if split == "search":
        return element("circle", class_="mark", r=4.5)
    if split == "select":
        return element("rect", class_="mark", x=-4, y=-4, width=8, height=8)
    return element("path", class_="mark", d="M0 -6 L6 0 L0 6 L-6 0 Z")


def _told(series: Series, point: Point) -> str:
    low, high = percent(point.interval.low), percent(point.interval.high)
    return (
        f"round {point.round}, {count_text(point.num_removed, 'layer')} removed, {series.split} rows: "
        f"{point.score.correct}/{point.score.total} = {percent(point.score.accuracy)} [{low}, {high}]"
    )


# Layers by rounds.


def cell_text(cell: Cell) -> str:
    """Return what stands in a cell: percent of the rows seen, `*` behind it where not all were."""
    if cell.kind == "removed":
        return "\u00d7"
    if cell.kind == "not_scored":
        return "\u2013"
    return f"{100 * cell.share:.0f}{'*' if cell.kind == 'bounded_out' else ''}"


def cell_bin(cell: Cell, baseline: float) -> int | None:
    """Return the number of a candidate's colour, by its accuracy minus the baseline's: 0 is the lowest.

    Only what was scored on all rows has one: a share of some rows, the hard ones first, is no accuracy.
    """
    return shade(cell.share - baseline) if cell.kind == "exact" else None


def shade(difference: float) -> int:
    """Return the number of the colour of a difference of accuracies: 0 is the lowest."""
    return sum(round(difference, 9) >= edge for edge in BIN_EDGES)  # a float's own error is no difference


def cell_title(cell: Cell) -> str:
    """Return what a cell says in words."""
    where = f"round {cell.round}, layer {cell.layer}"
    if cell.kind == "removed":
        return f"{where}: removed before"
    if cell.kind == "not_scored":
        return f"{where}: no candidate"
    counts = f"{where}: {cell.correct} of {cell.seen} rows correct"
    if cell.kind == "bounded_out":
        return f"{counts}, then bounded out"
    return f"{counts}, the winner" if cell.is_winner else counts


def heat_map(found: HeatMap) -> Markup:
    """Return layers by rounds: the percentage in every cell, with its colour; its marks are told in the legend."""
    content = [
        element("text", "round", class_="note", x=0, y=12),
        element("text", "layer", class_="note", x=0, y=_TOP - 8),
    ]
    for column, number in enumerate(found.rounds):
        shown = f"({number})" if number == found.rejected else str(number)
        content.append(element("text", shown, x=_LEFT + (column + 0.5) * _COLUMN, y=_TOP - 8, text_anchor="middle"))
    for layer, cells in enumerate(found.cells):
        middle = _TOP + (layer + 0.5) * _LINE
        content.append(element("text", str(layer), x=_LEFT - 8, y=middle + 4, text_anchor="end"))
        content += [_heat_cell(cell, column, layer, found) for column, cell in enumerate(cells)]
    return figure(
        "heat-map",
        "Accuracy without each layer, round by round",
        f"{len(found.cells)} layers (rows) by {count_text(len(found.rounds), 'round')} (columns). In each cell the "
        "percentage of the rows seen that the model answers correctly without this layer. All numbers are in the table "
        "below.",
        content,
        height=_TOP + _LINE * len(found.cells) + 4,
        width=_LEFT + _COLUMN * len(found.rounds) + 4,
        class_="heat",
    )


def _heat_cell(cell: Cell, column: int, layer: int, found: HeatMap) -> Element:
    left, top = _LEFT + column * _COLUMN, _TOP + layer * _LINE
    shade = cell_bin(cell, found.baseline)
    name = cell.kind if shade is None else f"h{shade}"
    content = [
        element("title", cell_title(cell)),
        element("rect", x=left + 1, y=top + 1, width=_COLUMN - 2, height=_LINE - 2),
        element("text", cell_text(cell), x=left + _COLUMN / 2, y=top + _LINE / 2 + 4, text_anchor="middle"),
    ]
    if cell.is_winner:
        dashes = "4 3" if cell.round == found.rejected else None
        box = {"x": left + 2, "y": top + 2, "width": _COLUMN - 4, "height": _LINE - 4}
        content.append(element("rect", class_="winner", stroke_dasharray=dashes, **box))
    return element("g", *content, class_=f"cell {name}")


# Which layers went.


def layer_strip(num_layers: int, removed: Sequence[int], later: Sequence[int], kept: Sequence[int]) -> Markup:
    """Return all layers, in order: removed ones with their place in the order, and those that the search took later."""
    order = {layer: number for number, layer in enumerate([*removed, *later], start=1)}
    content = []
    for layer in range(num_layers):
        line, column = divmod(layer, _PER_LINE)
        name = "gone" if layer in removed else "later" if layer in later else "kept" if layer in kept else "stays"
        below = {"gone": f"\u2212{order.get(layer)}", "later": f"({order.get(layer)})", "kept": "keep"}.get(name, "")
        place = {"x": percentage(column / _PER_LINE), "y": line * _LAYER_HEIGHT}
        size = {"width": percentage(1 / _PER_LINE), "height": _LAYER_HEIGHT}
        box = [
            element("title", f"layer {layer}: {_FATES[name].format(order.get(layer))}"),
            element("rect", x="4%", y=2, width="92%", height=_LAYER_HEIGHT - 6, rx=3),
            element("text", str(layer), x="50%", y=18, text_anchor="middle"),
            element("text", below, class_="note", x="50%", y=34, text_anchor="middle"),
        ]
        content.append(element("svg", element("g", *box, class_=f"layer {name}"), **place, **size))
    lines = -(-num_layers // _PER_LINE)
    return figure(
        "layers",
        "Which layers are removed",
        f"Of {num_layers} layers, numbered from 0, these are removed, in this order: {layers_text(removed)}. "
        f"Removed by the search after that: {layers_text(later)}.",
        content,
        height=lines * _LAYER_HEIGHT,
        class_="strip",
    )


_FATES = {
    "gone": "removed, number {} in order",
    "later": "stays; the search removed it later, number {} in order",
    "kept": "stays, it was to be kept",
    "stays": "stays",
}

# The test rows, one by one.

_SIGNS = {"win": "+", "loss": "\u2212", "both_right": "", "both_wrong": "\u00b7"}
_ROW_TEXTS = {
    "win": "only the pruned model is right",
    "loss": "only the full model is right",
    "both_right": "both are right",
    "both_wrong": "both are wrong",
}


def row_strip(found: RowByRow) -> Markup:
    """Return every test row: a win, a loss, or answered alike."""
    content = []
    for number, fate in enumerate(found.fates):
        line, column = divmod(number, _ROWS_PER_LINE)
        sign = element("text", _SIGNS[fate], x="50%", y=11, text_anchor="middle")
        box = element("rect", x="6%", y=1, width="88%", height=_ROW_HEIGHT - 2)
        content.append(
            element(
                "svg",
                element(
                    "g", element("title", f"test row {number}: {_ROW_TEXTS[fate]}"), box, sign, class_=f"row {fate}"
                ),
                x=percentage(column / _ROWS_PER_LINE),
                y=line * _ROW_HEIGHT,
                width=percentage(1 / _ROWS_PER_LINE),
                height=_ROW_HEIGHT,
            )
        )
    counts = {fate: sum(each == fate for each in found.fates) for fate in _SIGNS}
    told = ", ".join(f"{counts[fate]} where {_ROW_TEXTS[fate]}" for fate in _SIGNS)
    return figure(
        f"rows-{found.round}",
        f"Test rows one by one, round {found.round} beside the full model",
        f"{count_text(len(found.fates), 'row')}: {told}.",
        content,
        height=-(-len(found.fates) // _ROWS_PER_LINE) * _ROW_HEIGHT,
        class_="strip",
    )


def legend_mark(split: str) -> Markup:
    """Return the mark of a split for a legend; its name stands beside it."""
    drawn = element("g", marker(split), class_=f"series {split}", transform="translate(8 8)")
    return svg(element("svg", drawn, width=16, height=16, aria_hidden="true"))
