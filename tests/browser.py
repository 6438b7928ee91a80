"""Pages in a real browser: headless Chromium of the system, driven by Playwright, and axe-core to judge them.

`make browser` installs all three. Screenshots are kept in the folder that TALE_RAY_SCREENSHOTS names.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

AXE = Path(os.environ.get("TALE_RAY_AXE", Path(__file__).parent.parent / ".cache" / "axe-core" / "axe.min.js"))
Scheme = Literal["light", "dark"]


@dataclass
class Visit:
    """A page that is open, and what it said and asked for since."""

    page: Any
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def violations(self) -> tuple[list[str], list[str]]:
        """What axe-core finds wrong, and what it cannot decide; each as rule, reason and first place."""
        self.page.evaluate(AXE.read_text(encoding="utf-8"))
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations', 'incomplete']})")
        return _told(found["violations"]), _told(found["incomplete"])

    @property
    def width(self) -> int:
        """How wide the content is, in pixels: more than the window is a page that scrolls sideways."""
        return int(self.page.evaluate("document.scrollingElement.scrollWidth"))


def _told(results: list[dict[str, Any]]) -> list[str]:
    return [
        f"{rule['id']} ({len(rule['nodes'])} nodes): {rule['nodes'][0].get('failureSummary') or rule['help']} "
        f"at {rule['nodes'][0]['target']}".replace("\n", " ")
        for rule in results
    ]


@contextmanager
def started_browser() -> Iterator[Any]:
    """Start the browser; a test that asks for it is skipped where it is not installed."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("chromium is not installed: make browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
    if not AXE.is_file():
        pytest.skip(f"{AXE} is not there: make browser")
    with sync_api.sync_playwright() as playwright:
        # As root, as in CI, Chromium does not start with its sandbox; it opens our own files only.
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def visit(browser: Any, path: Path, *, width: int, scheme: Scheme = "light", scripts: bool = True) -> Iterator[Visit]:
    """Open a file in a window of this width, as somebody would who has never seen it."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts, bypass_csp=False
    )
    page = context.new_page()
    found = Visit(page)
    page.on("console", lambda message: found.console.append(message.text))
    page.on("pageerror", lambda error: found.console.append(str(error)))
    page.on("request", lambda request: found.requests.append(request.url))
    page.goto(path.absolute().as_uri())
    yield found
    context.close()


def screenshots(tmp_path: Path) -> Path:
    """Return the folder where pictures are kept."""
    folder = Path(os.environ.get("TALE_RAY_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
