"""Files that a command writes for people: where they may lie, and how they are written."""

import os
from pathlib import Path

from tale_ray.errors import ConfigError
from tale_ray.results.report.plots import check_matplotlib
from tale_ray.store.documents import MANIFEST


def local_folder(text: str | os.PathLike[str], option: str) -> Path:
    """Return the absolute path of a local folder that is there, or can be made.

    Raises:
        ConfigError: it is an address, no folder can be there, or it is in a run folder.
    """
    name = os.fspath(text)
    if ":/" in name:  # of an address that was made a path, one slash is left
        raise ConfigError(f"{option} {name} is no local folder, and models are loaded from those: give one, and copy")
    try:
        place = Path(name).expanduser().absolute()
        place.exists()  # fails on what can be no name
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: the ~ of nobody
        raise ConfigError(f"{option} {name} cannot be a folder ({error}): give another one") from None
    check_place(place, option)
    return place


def check_place(path: Path, option: str) -> None:
    """Refuse a path that cannot be written, or is in a run folder, which holds only what the run's writer wrote.

    Raises:
        ConfigError: says which, and what to do.
    """
    parents = path.absolute().parents
    try:
        made_in = None if path.exists() else next(folder for folder in parents if folder.is_dir())
    except (OSError, ValueError) as error:  # of what can be no name
        raise ConfigError(f"{option} {path} cannot be written ({error}): name another place") from None
    if made_in is not None and not os.access(made_in, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {path}: {made_in} cannot be written to; name another place")
    for folder in parents:
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
