"""The figure of information along depth: the full model's curve, the pruned one's, H(Y), controls, removed layers.

It says without colour what it says with it: by shapes, dashes and signs.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

from markupsafe import Markup

from tale_ray.results.report.information import Place, StoredInformation
from tale_ray.results.report.markup import Element, element, figure, percentage, svg
from tale_ray.results.tables import count_text, layers_text

Side: TypeAlias = Literal["full", "pruned"]
_HEIGHT, _TOP = 240, 12  # of the plot, in pixels
_MOST_TICKS = 12
_OFFSETS = {"full": -3, "pruned": 3}  # pixels that keep intervals apart
_NAMES = {"full": "full model", "pruned": "pruned model"}


def depth(found: StoredInformation) -> Markup:
    """Return the information after the embedding (E) and after every layer, with 95% intervals."""
    places = (*found.full, *found.pruned)
    top = max(found.entropy, *(place.high for place in places))
    bottom = min(0.0, found.controls[0], *(place.low for place in places))
    num_places = len(found.full)

    def x(layer: int | None) -> str:
        return percentage(((-1 if layer is None else layer) + 1.5) / num_places)

    def y(bits: float) -> float:
        return _TOP + (_HEIGHT - _TOP) * (top - bits) / (top - bottom)

    band_top, band_bottom = y(found.controls[1]), y(found.controls[0])
    band = element("rect", class_="controls", x="0", width="100%", y=band_top, height=max(2.0, band_bottom - band_top))
    content = [
        element("g", band),
        *_grid(found.entropy, y),
        *_axis(found, x),
        *(_curve(side, points, x, y) for side, points in _sides(found)),
    ]
    last = found.full[-1].bits
    pruned = f", {found.pruned[-1].bits:.2f} without layers {layers_text(found.removed)}" if found.pruned else ""
    return figure(
        "information",
        "Information about the label by depth",
        f"In bits, of {found.entropy:.2f} that there are: {found.full[0].bits:.2f} in the embedding, {last:.2f} after "
        f"the last of {count_text(num_places - 1, 'layer')}{pruned}. All numbers are in the table below.",
        content,
        height=_HEIGHT + 66,
        class_="plot",
    )


def _sides(found: StoredInformation) -> list[tuple[Side, Sequence[Place]]]:
    return [("full", found.full), *([("pruned", found.pruned)] if found.pruned else [])]  # type: ignore[list-item]


def _grid(entropy: float, y: Callable[[float], float]) -> list[Element]:
    step = next(step for step in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0) if entropy / step <= 6 or step == 2.0)
    content = []
    for number in range(int(entropy / step + 1e-9) + 1):
        bits = number * step
        content.append(element("line", class_="grid", x1="0", x2="100%", y1=y(bits), y2=y(bits)))
        content.append(element("text", f"{bits:.2g}", x=-8, y=y(bits) + 4, text_anchor="end"))
    content.append(element("line", class_="floor", x1="0", x2="100%", y1=y(entropy), y2=y(entropy)))
    content.append(element("text", f"H(Y) = {entropy:.3f} bits", class_="note", x="0", y=y(entropy) + 14))
    return content


def _axis(found: StoredInformation, x: Callable[[int | None], str]) -> list[Element]:
    step = -(-len(found.full) // _MOST_TICKS)
    content = [element("text", "E", x=x(None), y=_HEIGHT + 18, text_anchor="middle")]
    for place in found.full[1:]:
        layer = place.layer or 0
        if layer % step == 0:
            content.append(element("text", str(layer), x=x(layer), y=_HEIGHT + 18, text_anchor="middle"))
        if layer in found.removed:
            content.append(element("text", "\u00d7", x=x(layer), y=_HEIGHT + 34, text_anchor="middle"))
    return [*content, element("text", "after layer", x="50%", y=_HEIGHT + 58, text_anchor="middle")]


def _curve(side: Side, places: Sequence[Place], x: Callable[[int | None], str], y: Callable[[float], float]) -> Element:
    content = [
        element("line", class_="curve", x1=x(one.layer), x2=x(other.layer), y1=y(one.bits), y2=y(other.bits))
        for one, other in pairwise(places)
    ]
    for place in places:
        at = x(place.layer)
        content.append(element("line", class_="interval", x1=at, x2=at, y1=y(place.low), y2=y(place.high)))
        content.append(
            element("svg", element("title", _told(side, place)), _mark(side), x=at, y=y(place.bits), overflow="visible")
        )
    return element("g", *content, class_=f"series {side}", transform=f"translate({_OFFSETS[side]} 0)")


def _mark(side: Side) -> Element:
    if side == "full":
        return element("circle", class_="mark", r=4)
    return element("rect", class_="mark", x=-4, y=-4, width=8, height=8)


def _told(side: Side, place: Place) -> str:
    where = "the embedding" if place.layer is None else f"after layer {place.layer}"
    return f"{_NAMES[side]}, {where}: {place.bits:.3f} bits [{place.low:.3f}, {place.high:.3f}]"


def depth_mark(side: Side) -> Markup:
    """Return the mark of a curve for a legend; its name stands beside it."""
    drawn = element("g", _mark(side), class_=f"series {side}", transform="translate(8 8)")
    return svg(element("svg", drawn, width=16, height=16, aria_hidden="true"))
