"""A report as a tree that is checked while it is read, with its tables as rows of texts."""

from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """The page as a tree of (tag, attributes, text), with all its text; refuses what is not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.cells: dict[tuple[int, int], str] = {}
        self._cell: tuple[int, int] | None = None
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            layer, number = found.get("data-layer"), found.get("data-round")
            self._cell = (int(layer), int(number)) if layer is not None and number is not None else None

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes what is not open"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th") and self.rows:
            self.rows[-1][-1] += data
            if self._cell is not None:
                self.cells[self._cell] = self.cells.get(self._cell, "") + data

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def row_of(page: Page, *begin: str) -> list[str]:
    return next(row for row in page.rows if row[: len(begin)] == list(begin))
