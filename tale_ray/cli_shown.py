"""Which options of a command were given, and the display of what it does on stderr."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from tale_ray.errors import TaleRayError
from tale_ray.log_lines import LogLines
from tale_ray.progress import Display


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


def changed(context: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were set for this call, by whatever means."""
    return {
        name: value
        for name, value in given(options).items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }


@contextlib.contextmanager
def shown(log_json: bool) -> Iterator[Display | LogLines]:
    """Show events on stderr, for people or for programs; an error that ends the block is among the latter's."""
    if not log_json:
        with Display(Console(stderr=True)) as display:
            yield display
        return
    try:
        with LogLines(sys.stderr) as lines:
            yield lines
    except TaleRayError as error:
        sys.exit(error.exit_code)
