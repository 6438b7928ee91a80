"""Which row belongs to which split: decided by content and seed, never by the order of a file.

This module does not know where rows come from, nor how many a split needs.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from fractions import Fraction
from itertools import combinations
from math import floor
from typing import Any

from tale_ray.errors import TaskError
from tale_ray.records import SplitName


def row_digest(row: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of the canonical JSON of all columns: sorted keys, no spaces, UTF-8.

    Numbers that are not finite are written as NaN, Infinity and -Infinity, dates and times in ISO 8601, decimals as
    text, bytes in hex. The order of the columns does not matter; the order in a list does.

    Raises:
        TaskError: a column holds something that has no such form.
    """
    return hashlib.sha256(_canonical_json(row)).hexdigest()


def _canonical_json(row: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise TaskError(
            f"a row with the columns {', '.join(map(str, row))} has no digest: {error}; "
            "columns hold text, numbers, booleans, null, and lists and mappings (with text keys) of these"
        ) from error
    # A lone surrogate is not valid UTF-8, but a broken data set can hold one and it still needs one digest.
    return text.encode("utf-8", errors="surrogatepass")


def _plain(value: object) -> str:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} is not a value of a data set")


def digest_rows(digests: Sequence[str]) -> str:
    """Return one SHA-256, in hex, of the digests of some rows in their order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def split_rows(
    rows: Sequence[Mapping[str, Any]], shares: Mapping[SplitName, Fraction], seed: int
) -> dict[SplitName, tuple[int, ...]]:
    """Return, by split, the positions in `rows` of its rows, in the order of the split: those of their digests.

    Raises:
        TaskError: as `split_digests`, or a row has no digest.
    """
    return split_digests([row_digest(row) for row in rows], shares, seed)


def split_digests(
    digests: Sequence[str], shares: Mapping[SplitName, Fraction], seed: int
) -> dict[SplitName, tuple[int, ...]]:
    """Return, by split, the positions of its rows among all, which are given by their digests, in the split's order.

    Rows of equal content stay together and are all kept. Groups of equal rows are sorted by the SHA-256 of
    `seed:digest` and cut at the cumulative shares of the rows, `shots` first and then as `shares` is ordered; a group
    that a cut would divide goes to what follows the cut. What the shares leave over is in no split.

    Raises:
        TaskError: a share is outside [0, 1], or the shares sum to more than 1.
    """
    if min(shares.values(), default=0) < 0 or sum(shares.values()) > 1:
        given = ", ".join(f"{name}={share}" for name, share in shares.items())
        raise TaskError(f"the shares {given} cannot be cut: each is from 0 to 1 and they sum to at most 1; lower one")
    groups: dict[str, list[int]] = {}
    for position, digest in enumerate(digests):
        groups.setdefault(digest, []).append(position)
    ordered = [groups[digest] for digest in sorted(groups, key=lambda digest: rank(seed, digest))]

    names = sorted(shares, key=lambda name: name != "shots")  # a stable sort: the others keep their order
    splits: dict[SplitName, tuple[int, ...]] = {}
    next_group, num_before, cumulative = 0, 0, Fraction(0)
    for name in names:
        cumulative += shares[name]
        end = floor(cumulative * len(digests))
        positions: list[int] = []
        while next_group < len(ordered) and num_before + len(ordered[next_group]) <= end:
            positions += ordered[next_group]
            num_before += len(ordered[next_group])
            next_group += 1
        splits[name] = tuple(positions)
    return splits


def rank(seed: int, digest: str) -> bytes:
    """Return what rows are sorted by: the SHA-256 of `seed:digest`."""
    return hashlib.sha256(f"{seed}:{digest}".encode()).digest()


def check_disjoint(splits: Mapping[SplitName, Sequence[str]], shown: Mapping[str, str] | None = None) -> None:
    """Refuse splits, given as the digests of their rows, that share a row. `shown` is how rows are named.

    Raises:
        TaskError: a digest is in two splits; the message names both and the first of the rows.
    """
    for (one, ones), (other, others) in combinations(splits.items(), 2):
        if common := sorted(set(ones) & set(others)):
            some = ", ".join((shown or {}).get(digest, digest[:12]) for digest in common[:5])
            raise TaskError(
                f"{len(common)} rows are both in {one} and in {other}: splits share no row; "
                f"take them out of one (digests {some}{' ...' if len(common) > 5 else ''})"
            )
