"""Write docs/commands.md and docs/python.md from the command line's own help and from docstrings.

python tools/write_reference.py            write them
python tools/write_reference.py --check    exit 1 if what is there is out of date
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import tale_ray
from tale_ray.api import Run, Study
from tale_ray.cli import cli

DOCS = Path(__file__).resolve().parent.parent / "docs"


def sections(command: click.Command, name: str) -> Iterator[str]:
    """Yield the help of a command and of all commands below it."""
    context = click.Context(command, info_name=name, max_content_width=100, terminal_width=100)
    yield f"## {name}\n\n```\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for child in command.commands.values():
            yield from sections(child, f"{name} {child.name}")


def commands() -> str:
    """Return the page of all commands."""
    head = "# Commands\n\nWritten by `make docs` from the help of the commands themselves.\n"
    return "\n".join([head, *sections(cli, "tale-ray")])


def members(owner: type) -> Iterator[str]:
    """Yield the public properties and methods of a class."""
    for name, member in vars(owner).items():
        if name.startswith("_") or not (isinstance(member, property) or inspect.isfunction(member)):
            continue
        title = name if isinstance(member, property) else f"{name}{_signature(member)}"
        yield f"### {owner.__name__}.{title}\n\n{_text(member)}\n"


def python() -> str:
    """Return the page of the package."""
    functions = [getattr(tale_ray, name) for name in tale_ray.__all__]
    parts = [f"## tale_ray.{each.__name__}{_signature(each)}\n\n{_text(each)}\n" for each in functions]
    for owner in (Run, Study):
        parts += [f"## {owner.__name__}\n\n{_text(owner)}\n", *members(owner)]
    head = "# The package\n\nWritten by `make docs` from the docstrings.\n\n"
    return "\n".join([f"{head}{_text(tale_ray)}\n", *parts])


def _signature(function: Any) -> str:
    """Return names and defaults; how types are written differs from one Python to the next."""
    found = inspect.signature(function)
    bare = [
        each.replace(annotation=inspect.Parameter.empty) for each in found.parameters.values() if each.name != "self"
    ]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _text(documented: Any) -> str:
    """Return a docstring, what is indented in it as it stands."""
    lines = (inspect.getdoc(documented) or "").splitlines()
    sections = ("Args:", "Raises:", "Attributes:")
    return "\n".join(f"**{line}**\n" if line in sections else _item(line) for line in lines)


def _item(line: str) -> str:
    """Return an argument's line as an item of a list, code and what follows an argument as they stand."""
    name, colon, rest = line.strip().partition(": ")
    is_item = line.startswith("    ") and line[4:5] != " " and colon and name.replace(".", "").isidentifier()
    return f"- `{name}`: {rest}" if is_item else line


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail if a page is out of date.")
def main(check: bool) -> None:
    """Write the reference."""
    for name, page in (("commands.md", commands()), ("python.md", python())):
        path = DOCS / name
        if not check:
            path.write_text(page, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != page:
            click.echo(f"{name} is out of date: run `make docs`", err=True)
            sys.exit(1)


if __name__ == "__main__":
    main()
