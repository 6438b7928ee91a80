"""Files that a command writes for people: where they may lie, and how they are written."""

from pathlib import Path

from tale_ray.errors import ConfigError
from tale_ray.results.report.plots import check_matplotlib
from tale_ray.store.documents import MANIFEST


def check_place(path: Path, option: str) -> None:
    """Refuse a path that cannot be written, or is in a run folder, which holds only what the run's writer wrote.

    Raises:
        ConfigError: says which, and what to do.
    """
    for folder in path.absolute().parents:
        if (folder / MANIFEST).is_file():
            raise ConfigError(
                f"{option} {path} is in the run folder {folder}, which would then be refused as changed: name a place "
                "outside"
            )
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{option} {path}: {folder} is not a folder; name another place")


def check_file(path: Path, option: str) -> None:
    """Refuse what `check_place` refuses, and a folder.

    Raises:
        ConfigError: says which, and what to do.
    """
    check_place(path, option)
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder: name a file in it")


def check_figure(path: Path, option: str) -> None:
    """Refuse what `check_file` refuses, and a figure that is neither PNG nor SVG or cannot be drawn.

    Raises:
        ConfigError: says which, and what to do.
    """
    check_file(path, option)
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"{option} {path} has no known ending: name a .png or .svg file")
    check_matplotlib()


def write_text(path: Path, text: str, option: str) -> None:
    """Write a text file, and its folder if there is none.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written ({error}): name another place") from error
