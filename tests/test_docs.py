"""Pages lead where they say, and every command of the tutorial runs and prints what is shown, but for the numbers."""

import doctest
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from tale_ray.cli import cli

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
_CHECKER = doctest.OutputChecker()


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    ):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        leads_to = (page.parent / path).resolve() if path else page
        assert leads_to.exists(), target
        assert not anchor or anchor in headings(leads_to), target


def test_every_page_is_in_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"- {page.name}\n" in navigation, page.name


def examples(page: str) -> list[tuple[str, str]]:
    """The commands of the console blocks, and what is to be printed."""
    found: list[tuple[str, str]] = []
    for block in re.findall(r"^```console\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            found.append((command, expected))
    return found


def without_numbers(text: str) -> str:
    """A text whose numbers, and the space around them in tables, may be others."""
    return re.sub(r"[ \t]+", " ", re.sub(r"\d+([.,]\d+)*", "#", text))


def agrees(expected: str, printed: str) -> bool:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return _CHECKER.check_output(without_numbers(expected), without_numbers(printed), flags)


def test_the_comparison_sees_other_words_and_not_other_numbers() -> None:
    assert agrees("a  1 of 20\n...\nend\n", "a 17 of 3\nwhatever\nend\n")
    assert not agrees("a 1 of 20\n...\nend\n", "a 1 of 20\nwhatever\nfin\n")
    assert not agrees("a 1 of 20\n", "b 1 of 20\n")


@pytest.mark.slow
def test_every_command_runs_and_prints_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    commands = examples(TUTORIAL.read_text(encoding="utf-8"))
    assert len(commands) >= 8
    for command, expected in commands:
        line, _, written_to = command.partition(" > ")
        name, *arguments = shlex.split(line)
        assert name == "tale-ray"
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, f"{command}\n{done.stderr[-2000:]}"
        if written_to:
            Path(written_to).write_text(done.stdout, encoding="utf-8")
        else:
            assert agrees(expected, done.stdout), f"{command}\nprints\n{done.stdout}\nand not\n{expected}"
