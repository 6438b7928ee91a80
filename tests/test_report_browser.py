"""The report as a browser shows it: quiet, on a phone, in the dark, with a keyboard, without scripts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Scheme, screenshots, started_browser, visit
from folders import command
from report_runs import write_report_run

FIGURES = ("layers", "trajectory", "heat-map", "information")
# What axe-core leaves to people, looked at: it does not compute the contrast of text in SVG.
UNDECIDED = {"color-contrast"}


@pytest.fixture(scope="module", name="browser")
def browser_fixture() -> Iterator[Any]:
    with started_browser() as browser:
        yield browser


@pytest.fixture(scope="module", name="page")
def page_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    write_report_run(folder / "run")
    assert command("report", folder / "run", "-o", folder / "report.html").code == 0
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_is_shown(browser: Any, page: Path, width: int, scheme: Scheme, tmp_path: Path) -> None:
    with visit(browser, page, width=width, scheme=scheme) as shown:
        for name in FIGURES:
            box = shown.page.locator(f"#{name}").bounding_box()
            assert box["width"] > 100, name
            assert box["height"] > 30, name
        assert shown.width <= width, "the page scrolls sideways"
        shown.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert shown.width <= width, "the page scrolls sideways with everything open"
        assert shown.page.title() == "boolean_synthetic on bundled: layers removed"
        background = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
        assert shown.requests == [page.as_uri()]
        assert shown.console == []
        shown.page.reload()
        shown.page.screenshot(path=screenshots(tmp_path) / f"report-{width}-{scheme}.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_can_be_read_by_everybody(browser: Any, page: Path, width: int, scheme: Scheme) -> None:
    with visit(browser, page, width=width, scheme=scheme) as shown:
        shown.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        violations, incomplete = shown.violations()
        print(*incomplete, sep="\n")
        assert violations == []
        assert {each.split()[0] for each in incomplete} <= UNDECIDED


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_in_figures_has_contrast(browser: Any, page: Path, scheme: Scheme) -> None:
    """What axe-core does not decide: every text of a figure against the last box that is drawn under it."""
    with visit(browser, page, width=1400, scheme=scheme) as shown:
        texts = shown.page.evaluate(TEXTS_AND_GROUNDS)
        assert len(texts) > 100
        bad = {(text["fill"], text["ground"]) for text in texts if contrast(text["fill"], text["ground"]) < 4.5}
        assert bad == set()


TEXTS_AND_GROUNDS = """() => {
  const page = getComputedStyle(document.body).backgroundColor;
  return [...document.querySelectorAll('svg[role=img] text')].filter(text => text.textContent).map(text => {
    const box = text.parentNode.querySelector(':scope > rect');
    const fill = box ? getComputedStyle(box).fill : 'none';
    return {fill: getComputedStyle(text).fill, ground: fill === 'none' ? page : fill};
  });
}"""


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours (WCAG 2.2, 1.4.3)."""

    def luminance(colour: str) -> float:
        shares = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_it_needs_no_script(browser: Any, page: Path, tmp_path: Path) -> None:
    with visit(browser, page, width=390, scripts=False) as shown:
        for name in FIGURES:
            assert shown.page.locator(f"#{name}").is_visible(), name
        assert shown.page.locator("#verdict").is_visible()
        summary = shown.page.locator("summary", has_text="All candidates in numbers")
        summary.focus()
        shown.page.keyboard.press("Enter")
        assert shown.page.locator("td[data-layer]").first.is_visible(), "details open with the keyboard"
        assert shown.requests == [page.as_uri()]


def test_a_keyboard_is_enough(browser: Any, page: Path) -> None:
    with visit(browser, page, width=390) as shown:
        shown.page.keyboard.press("Tab")
        skip = shown.page.locator(".skip")
        assert skip.evaluate("each => each === document.activeElement")
        assert skip.bounding_box()["x"] >= 0, "the link to skip is seen while it has the focus"
        shown.page.keyboard.press("Enter")
        assert shown.page.evaluate("document.activeElement.id") == "main"
        shown.page.keyboard.press("Tab")
        outline = shown.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", "what has the focus is seen"


def test_figures_are_told_apart_without_colour(browser: Any, page: Path) -> None:
    with visit(browser, page, width=1400) as shown:
        shapes = shown.page.evaluate(
            "[...document.querySelectorAll('#trajectory .series')].map(each => each.querySelector('.mark').tagName)"
        )
        assert shapes == ["circle", "rect", "path"]
        shapes = shown.page.evaluate(
            "[...document.querySelectorAll('#information .series')].map(each => each.querySelector('.mark').tagName)"
        )
        assert shapes == ["circle", "rect"]
        out = shown.page.locator("#heat-map .bounded_out text").all_text_contents()
        assert out
        assert all(text.endswith("*") for text in out)
