"""Whether a plain value is of an annotated type: for what comes from files and from callers. Knows nothing of ours."""

from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def fits(value: object, annotation: Any) -> bool:
    """Return whether a value, with all that is in it, is of a type.

    That is a class, `Any`, a union, a `Literal`, a `Mapping`, a `list` or a `tuple[X, ...]`. A whole number is a float
    too, and a truth value is no number.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is Mapping:
        key, item = arguments
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if origin in (list, tuple):
        return isinstance(value, origin) and all(fits(item, arguments[0]) for item in value)
    if annotation in (int, float):
        return isinstance(value, int | annotation) and not isinstance(value, bool)
    return isinstance(value, annotation)
