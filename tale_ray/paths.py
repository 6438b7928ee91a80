"""Paths as users write them."""

from collections.abc import Callable
from pathlib import Path


def existing(text: str, is_meant: Callable[[Path], bool]) -> Path | None:
    """Return the path that a text names, its `~` expanded, if `is_meant` says so (`Path.is_dir`, `Path.is_file`).

    None if there is none, or if no path can be of that name: too long, the `~` of nobody, a folder out of reach.
    """
    try:
        path = Path(text).expanduser()
        return path if is_meant(path) else None
    except (OSError, RuntimeError, ValueError):
        return None
