"""How the texts of options are read: shares in exact decimals, layers, seeds, splits, durations, sizes."""

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import get_args

from tale_ray.annotations import fits
from tale_ray.errors import ConfigError
from tale_ray.records import SplitName

_MAX_DECIMALS = 100
MAX_BYTES = 2**60


def parse_epsilon(text: str) -> Fraction:
    """Return epsilon exactly as its decimal text says.

    Raises:
        ConfigError: not a decimal number in [0, 1].
    """
    return share(text, "epsilon")


def share(text: str, name: str) -> Fraction:
    """Return a share exactly as its decimal text says; `name` is what it is a share of, for errors.

    Raises:
        ConfigError: not a decimal number in [0, 1].
    """
    return Fraction(_decimal_share(text, name))


def _decimal_share(text: str, name: str) -> Decimal:
    if not isinstance(text, str):
        raise ConfigError(f"{name} {text!r} is not a text: write it in quotes, for its decimals are read as they stand")
    try:
        value = Decimal(text.strip())
    except InvalidOperation:
        raise ConfigError(f"{name} {text!r} is not a number: write a decimal from 0 to 1, such as 0.08") from None
    if value.is_finite() and value.as_tuple().exponent < -_MAX_DECIMALS:  # type: ignore[operator]  # finite: a number
        raise ConfigError(f"{name} {text!r} has too many decimals: at most {_MAX_DECIMALS} are read")
    if not value.is_finite() or not 0 <= value <= 1:
        raise ConfigError(f"{name} {text!r} is out of range: it is a share of the rows, from 0 to 1, such as 0.08")
    return value


def epsilon_text(text: str) -> str:
    """Return the one decimal text of all that mean the same epsilon: 0.08 for 0.080 and 8e-2.

    Raises:
        ConfigError: not a decimal number in [0, 1].
    """
    plain = format(_decimal_share(text, "epsilon").copy_abs(), "f")  # not `normalize`: it rounds to 28 digits
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def parse_layers(text: str, name: str) -> tuple[int, ...]:
    """Return the layer numbers of a comma-separated list; an empty text is an empty list.

    Raises:
        ConfigError: not whole numbers.
    """
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise ConfigError(f"{name} {text!r} is not a list of layers: write numbers such as 3,7") from None


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of a comma-separated list.

    Raises:
        ConfigError: not whole numbers, none, or one given twice.
    """
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"seeds {text!r} is not a list of seeds: write numbers such as 0,1,2") from None
    return check_seeds(seeds)


def read_seeds(seeds: str | int | Iterable[int]) -> tuple[int, ...]:
    """Return seeds that are given as a text, as one number, or as several.

    Raises:
        ConfigError: not whole numbers, none, or one given twice.
    """
    if isinstance(seeds, str):
        return parse_seeds(seeds)
    return check_seeds(tuple(seeds) if isinstance(seeds, Iterable) else (seeds,))


def check_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    """Return the seeds of a study.

    Raises:
        ConfigError: not whole numbers, none, or one given twice.
    """
    if not seeds:
        raise ConfigError("seeds is empty: name one at least, such as 0,1,2")
    if wrong := [seed for seed in seeds if not fits(seed, int)]:
        raise ConfigError(f"seeds: {wrong[0]!r} is not a whole number: write one")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds {','.join(map(str, seeds))}: a seed is given twice; give each once")
    return seeds


def parse_splits(text: str) -> dict[SplitName, str]:
    """Return the shares of `search=0.5,select=0.2,test=0.3` as decimal texts by split name.

    Raises:
        ConfigError: not of that form, or a split named twice.
    """
    shares: dict[SplitName, str] = {}
    for part in text.split(","):
        name, equals, share = part.partition("=")
        name = name.strip()
        if not equals or name not in get_args(SplitName):
            raise ConfigError(
                f"splits {text!r}: {part.strip()!r} is not NAME=SHARE with a name out of "
                f"{', '.join(get_args(SplitName))}; write it like search=0.5,select=0.2,test=0.3"
            )
        if name in shares:
            raise ConfigError(f"splits {text!r}: {name} is given twice; give each split one share")
        shares[name] = share.strip()  # type: ignore[index]  # membership was checked above
    return shares


def parse_duration(text: str) -> float:
    """Return the seconds of a duration: `90`, `90s`, `30m`, `1h30m`.

    Raises:
        ConfigError: not of that form.
    """
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    if not match or not any(match.groups()):
        raise ConfigError(f"duration {text!r} is not understood: give seconds, or like 30m, 2h, 1h30m")
    days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def parse_bytes(text: str) -> int:
    """Return the bytes of a size: `1048576`, `256MiB`, `8GiB`, `2GB`.

    Raises:
        ConfigError: not of that form, or more than any machine has.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise ConfigError(f"size {text!r} is not understood: give bytes, or like 256MiB, 8GiB")
    number, prefix, binary = match.groups()
    power = " KMGT".index(prefix.upper()) if prefix else 0
    size = Decimal(number) * (1024 if binary else 1000) ** power
    if size > MAX_BYTES:
        raise ConfigError(f"size {text!r} is too large: it is at most {MAX_BYTES} bytes; give less")
    return int(size)


def splits_text(splits: Mapping[SplitName, str]) -> str:
    """Return the shares of splits as on the command line."""
    return ",".join(f"{name}={share}" for name, share in splits.items())
