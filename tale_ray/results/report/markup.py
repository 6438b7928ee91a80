"""Elements of a figure in a page: SVG that is as wide as there is room, with text of a constant size.

Horizontal positions are percentages of the plot, vertical ones pixels. Colours are classes, set in the page's style
sheet for light and dark. ElementTree escapes all text.
"""

from collections.abc import Iterable
from xml.etree import ElementTree

from markupsafe import Markup

Element = ElementTree.Element


def element(tag: str, *content: "Element | str", **attributes: object) -> Element:
    """Return an element; `class_` is the attribute class, and `_` in names of attributes is a hyphen."""
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    found = Element(tag, {names[name]: _text(value) for name, value in attributes.items() if value is not None})
    for part in content:
        if isinstance(part, str):
            assert len(found) == 0, "text comes first"
            found.text = part
        else:
            found.append(part)
    return found


def figure(
    name: str,
    title: str,
    description: str,
    content: Iterable[Element],
    *,
    height: int,
    class_: str,
    width: int | None = None,
) -> Markup:
    """Return a figure for the page; title and description are read out where it is not seen.

    Height and width are in pixels; without a width it is as wide as there is room.
    """
    ids = f"{name}-title", f"{name}-description"
    drawn = element(
        "svg",
        element("title", title, id=ids[0]),
        element("desc", description, id=ids[1]),
        *content,
        id=name,
        class_=class_,
        role="img",
        aria_labelledby=" ".join(ids),
        width="100%" if width is None else width,
        height=height,
    )
    return svg(drawn)


def svg(drawn: Element) -> Markup:
    """Return an element as it stands in a page."""
    return Markup(ElementTree.tostring(drawn, encoding="unicode"))  # ElementTree has escaped all texts


def percentage(share: float) -> str:
    """Return a horizontal position, from a share of the width in [0, 1]."""
    return f"{100 * share:.3f}%"


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
