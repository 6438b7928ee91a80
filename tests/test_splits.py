"""Digests and splits: known values, and properties that hold for all rows, shares and seeds."""

import hashlib
import json
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tale_ray.errors import TaskError
from tale_ray.records import SplitName
from tale_ray.tasks.splits import check_disjoint, digest_rows, row_digest, split_rows

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.fixed_dictionaries({"question": st.integers(0, 12)}), max_size=40)  # few values: many duplicates
NAMES: tuple[SplitName, ...] = ("search", "shots", "select", "test", "finetune")


@st.composite
def shares(draw: st.DrawFn) -> dict[SplitName, Fraction]:
    weights = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    total = sum(weights) + draw(st.integers(0, 3)) or 1
    return {name: Fraction(weight, total) for name, weight in zip(draw(st.permutations(NAMES)), weights, strict=False)}


def test_digest_is_the_sha256_of_canonical_json() -> None:
    expected = hashlib.sha256('{"a":[1,2.5,null,true],"é":{"x":"y","z":""}}'.encode()).hexdigest()
    assert row_digest({"é": {"z": "", "x": "y"}, "a": [1, 2.5, None, True]}) == expected


@given(row=st.dictionaries(st.text(max_size=5), VALUES, max_size=4))
def test_digest_ignores_the_order_of_columns(row: dict[str, Any]) -> None:
    assert row_digest(dict(reversed(row.items()))) == row_digest(row)


@given(row=st.dictionaries(st.text(max_size=5), VALUES, max_size=4), key=st.text(max_size=5), value=VALUES)
def test_digest_changes_with_the_content(row: dict[str, Any], key: str, value: Any) -> None:
    changed = {**row, key: value}
    same = json.dumps(changed, sort_keys=True) == json.dumps(row, sort_keys=True)
    assert (row_digest(changed) == row_digest(row)) == same


def test_digest_of_values_that_json_lacks() -> None:
    row = {"day": date(2024, 7, 26), "at": datetime(2024, 7, 26, 1, 2), "cost": Decimal("1.10"), "raw": b"\x01\xff"}
    assert row_digest(row) == row_digest(
        {"day": "2024-07-26", "at": "2024-07-26T01:02:00", "cost": "1.10", "raw": "01ff"}
    )
    assert row_digest({"x": float("nan")}) == row_digest({"x": float("nan")}) != row_digest({"x": float("inf")})
    assert len(row_digest({"x": "\ud800"})) == 64


@pytest.mark.parametrize("value", [object(), {1, 2}, {("a",): 1}, {1: "a", "b": 2}])
def test_digest_refuses_other_values_in_words(value: object) -> None:
    with pytest.raises(TaskError, match="a row with the columns text, other has no digest"):
        row_digest({"text": "x", "other": value})


def test_digest_of_rows_depends_on_their_order() -> None:
    assert digest_rows(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest() != digest_rows(["b", "a"])


def split_slowly(
    rows: list[dict[str, Any]], names: list[SplitName], given: dict[SplitName, Fraction], seed: int
) -> Any:
    """Oracle: place one group of equal rows after the other, looking for its split from the start each time."""
    digests = [row_digest(row) for row in rows]
    result: dict[SplitName, list[int]] = {name: [] for name in names}
    num_before = 0
    for digest in sorted(set(digests), key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).hexdigest()):
        group = [position for position, other in enumerate(digests) if other == digest]
        num_before += len(group)
        for index, name in enumerate(names):
            if num_before <= sum(given[earlier] for earlier in names[: index + 1]) * len(rows):
                result[name] += group
                break
    return {name: tuple(positions) for name, positions in result.items()}


@given(rows=ROWS, given_shares=shares(), seed=st.integers())
def test_splits_equal_the_oracle(
    rows: list[dict[str, Any]], given_shares: dict[SplitName, Fraction], seed: int
) -> None:
    names = [name for name in given_shares if name == "shots"] + [name for name in given_shares if name != "shots"]
    splits = split_rows(rows, given_shares, seed)
    assert splits == split_slowly(rows, names, given_shares, seed)
    assert list(splits) == names


@given(rows=ROWS, given_shares=shares(), seed=st.integers(), data=st.data())
def test_splits_depend_on_content_only(
    rows: list[dict[str, Any]], given_shares: dict[SplitName, Fraction], seed: int, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(rows))

    def contents(of: list[dict[str, Any]]) -> dict[SplitName, list[str]]:
        return {
            name: [row_digest(of[position]) for position in positions]
            for name, positions in split_rows(of, given_shares, seed).items()
        }

    assert contents(shuffled) == contents(rows)
    check_disjoint(contents(rows))


@given(num_rows=st.integers(0, 60), given_shares=shares(), seed=st.integers())
def test_sizes_of_distinct_rows(num_rows: int, given_shares: dict[SplitName, Fraction], seed: int) -> None:
    splits = split_rows([{"row": index} for index in range(num_rows)], given_shares, seed)
    cumulative, taken = Fraction(0), 0
    for name, positions in splits.items():
        cumulative += given_shares[name]
        taken += len(positions)
        assert taken == int(cumulative * num_rows)
    if sum(given_shares.values()) == 1:
        assert sorted(sum(splits.values(), ())) == list(range(num_rows))


def test_shares_are_exact_and_seeds_differ() -> None:
    rows = [{"row": index} for index in range(1200)]
    given_shares: dict[SplitName, Fraction] = {
        "search": Fraction("0.5"),
        "select": Fraction("0.2"),
        "test": Fraction("0.3"),
    }
    splits = split_rows(rows, given_shares, 0)
    assert {name: len(positions) for name, positions in splits.items()} == {"search": 600, "select": 240, "test": 360}
    tight: dict[SplitName, Fraction] = {"search": Fraction("0.29")}  # as floats, 0.29 * 100 is below 29
    assert len(split_rows(rows[:100], tight, 0)["search"]) == 29
    other = split_rows(rows, given_shares, 1)
    assert 200 < len(set(splits["search"]) & set(other["search"])) < 400


@pytest.mark.parametrize("bad", [{"search": Fraction(2, 3), "test": Fraction(1, 2)}, {"search": Fraction(-1, 2)}])
def test_shares_that_cannot_be_cut(bad: dict[SplitName, Fraction]) -> None:
    with pytest.raises(TaskError, match="at most 1"):
        split_rows([{"a": 1}], bad, 0)


def test_overlap_is_refused_with_names_and_rows() -> None:
    check_disjoint({"shots": ["a"], "search": ["b", "b"], "test": []})
    with pytest.raises(TaskError, match=r"1 rows are both in shots and in test.*digests feed"):
        check_disjoint({"shots": ["feed", "a"], "search": ["b"], "test": ["feed"]})
