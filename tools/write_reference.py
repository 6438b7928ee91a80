"""Write docs/commands.md from the command line's own help, so that the two cannot differ.

python tools/write_reference.py            write it
python tools/write_reference.py --check    exit 1 if what is there is out of date
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from tale_ray.cli import cli

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"


def sections(command: click.Command, name: str) -> Iterator[str]:
    """Yield the help of a command and of all commands below it."""
    context = click.Context(command, info_name=name, max_content_width=100, terminal_width=100)
    yield f"## {name}\n\n```\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for child in command.commands.values():
            yield from sections(child, f"{name} {child.name}")


def reference() -> str:
    """Return the whole page."""
    head = "# Commands\n\nWritten by `make docs` from the help of the commands themselves.\n"
    return "\n".join([head, *sections(cli, "tale-ray")])


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail if the page is out of date.")
def main(check: bool) -> None:
    """Write docs/commands.md."""
    if not check:
        REFERENCE.write_text(reference(), encoding="utf-8")
    elif REFERENCE.read_text(encoding="utf-8") != reference():
        click.echo(f"{REFERENCE.name} is out of date: run `make docs`", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
