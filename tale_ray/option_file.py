"""The file of `--config`: flat YAML whose values are the defaults of a command's options."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import yaml

from tale_ray.annotations import fits
from tale_ray.errors import ConfigError
from tale_ray.option_texts import splits_text

_FILE_KINDS: Mapping[str, tuple[Any, str]] = {  # what YAML may write otherwise than the command line
    **dict.fromkeys(
        ("epsilon", "wait_resources", "gang_timeout", "time_limit", "batch_bytes"),
        (str | int | float, "a text or a number"),
    ),
    **dict.fromkeys(("remove", "keep_layers"), (str | int | list[Any], "a list of layers")),
    "seeds": (str | int | list[Any], "a list of seeds"),
    "splits": (str | Mapping[Any, Any], "a text or shares by name"),
}


def _file_kind(option: click.Parameter) -> tuple[Any, str]:
    """Return the type of an option's value in a file and its name: click itself reads 2.5 as 2 and true as a text."""
    if option.name in _FILE_KINDS:
        return _FILE_KINDS[option.name]
    if isinstance(option, click.Option) and option.is_flag:
        return bool, "true or false"
    if option.type is click.INT:
        return int | str, "a whole number"
    return str, "a text, which may need quotes"


def read_option_file(context: click.Context, _parameter: click.Parameter, path: str | None) -> None:
    """Take the values of a YAML file as defaults; the command line wins."""
    if path is None:
        return
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}; it is YAML in UTF-8") from error
    known = {option.name: option for option in context.command.params if option.name and option.name != "config"}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"config file {path} is not a mapping: write one `option: value` a line")
    if unknown := sorted(values.keys() - known.keys()):
        close = difflib.get_close_matches(unknown[0], known, n=1)
        raise ConfigError(
            f"config file {path}: option {unknown[0]!r} is not known{f' (did you mean {close[0]}?)' if close else ''}: "
            f"write one of {', '.join(sorted(known))}"
        )
    for key, value in values.items():
        kind, words = _file_kind(known[key])
        if value is not None and not fits(value, kind):
            raise ConfigError(f"config file {path}: option {key} is {value!r}: it is {words}; correct it")
    lists = {key: ",".join(map(str, value)) for key, value in values.items() if isinstance(value, list)}
    mappings = {key: splits_text(value) for key, value in values.items() if isinstance(value, dict)}
    context.default_map = {**values, **lists, **mappings}
