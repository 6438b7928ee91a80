"""The templates of a task file: jinja2, strict, sandboxed and the same on every machine.

This module does not know what a task is, nor what a template is for.
"""

import re
import reprlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tale_ray.errors import TaskError


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
    # What draws at random would render one row in two ways.
    del environment.globals["lipsum"], environment.filters["random"]
    return environment


_ENVIRONMENT = _environment()
_SURROGATE = re.compile("[\ud800-\udfff]")


@lru_cache(maxsize=256)
def compile_template(text: str) -> Template:
    """Return the compiled template.

    Raises:
        TaskError: the syntax is wrong, a filter or test does not exist, or it is too much for jinja2 or Python.
    """
    try:
        return _ENVIRONMENT.from_string(text)
    except TemplateSyntaxError as error:
        raise TaskError(f"line {error.lineno} of the template is not valid jinja2: {error.message}") from error
    except Exception as error:  # jinja2 writes Python, and what Python refuses comes out as it is
        raise TaskError(f"jinja2 cannot compile it ({type(error).__name__}: {error}): write it simpler") from error


@lru_cache(maxsize=256)
def compile_expression(text: str) -> Any:
    """Return the compiled expression: a function of a row's columns.

    Raises:
        TaskError: as `compile_template`.
    """
    try:
        return _ENVIRONMENT.compile_expression(text, undefined_to_none=False)
    except TemplateSyntaxError as error:
        raise TaskError(f"the expression is not valid jinja2: {error.message}") from error
    except Exception as error:  # as above
        raise TaskError(f"jinja2 cannot compile it ({type(error).__name__}: {error}): write it simpler") from error


def list_texts(expression: str, row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the texts that an expression gives for a row; `name` is what errors call it.

    Raises:
        TaskError: it fails, or gives no list of at least two texts.
    """
    columns = ", ".join(sorted(map(str, row))) or "none"
    try:
        found = compile_expression(expression)(row)
        values = None if isinstance(found, str | Mapping) else list(found)
    except Exception as error:  # whatever a row's values make of it
        raise TaskError(
            f"expression `{name}` {expression!r} fails on a row with the columns {columns}: "
            f"{type(error).__name__}: {error}. Correct the expression, or the row"
        ) from error
    if not values or len(values) < 2 or not all(isinstance(value, str) and value.strip() for value in values):
        raise TaskError(
            f"expression `{name}` {expression!r} gives {reprlib.repr(values if values is not None else found)}: it "
            "gives a list of at least two texts, none of them empty; correct the expression, or the row (numbers "
            "become texts with `| map('string')`)"
        )
    if half := next(filter(None, map(half_character, values)), None):
        raise TaskError(f"expression `{name}` {expression!r} gives {half}, half a character; correct the row")
    return tuple(values)


def half_character(text: str) -> str | None:
    """Return the escape of the first lone surrogate in a text, which no tokenizer or file takes; None: there is none.

    Broken data has them where a text was cut in the middle of an emoji.
    """
    found = _SURROGATE.search(text)
    return None if found is None else f"\\u{ord(found[0]):04x}"


def render_template(text: str, row: Mapping[str, Any], name: str) -> str:
    """Return the template filled with the columns of `row`; `name` is what errors call it.

    Raises:
        TaskError: the template uses a name that is no column, fails on this row, or writes what is no text.
    """
    template = compile_template(text)
    columns = ", ".join(sorted(map(str, row))) or "none"
    try:
        rendered = template.render(row)
    except UndefinedError as error:
        raise TaskError(
            f"template `{name}` {text!r}: {error.message}; the columns of the row are: {columns}. "
            "Use one of these, or test a name with `is defined`"
        ) from error
    except Exception as error:
        raise TaskError(
            f"template `{name}` {text!r} fails on a row with the columns {columns}: "
            f"{type(error).__name__}: {error}. Correct the template, or the row"
        ) from error
    if half := half_character(rendered):
        raise TaskError(
            f"template `{name}` {text!r} writes {half} on a row with the columns {columns}: "
            "that is half a character, which no model can be asked; correct the row"
        )
    return rendered
