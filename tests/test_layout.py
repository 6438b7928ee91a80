"""Rows in a batch: every token once where rows begin alike, and each sees its own ancestors only."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tale_ray.engine.layout import Layout, lay_lines, lay_packs, pack_rows

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=10)


def spelled(layout: Layout, slots: tuple[int, ...]) -> tuple[int, ...]:
    tokens = [token for line in layout.tokens for token in line]
    return tuple(tokens[slot] for slot in slots)


@given(ROWS, st.integers(1, 40))
def test_packs_hold_every_row_once_within_their_size(rows: list[tuple[int, ...]], most_tokens: int) -> None:
    packs = pack_rows(rows, most_tokens)
    assert sorted(row for pack in packs for row in pack.rows) == list(range(len(rows)))
    assert all(len(pack.tokens) <= max(most_tokens, max(map(len, rows))) for pack in packs)
    layout = lay_packs(packs)
    order = [row for pack in packs for row in pack.rows]
    assert [spelled(layout, slots) for slots in layout.slots] == [rows[row] for row in order]


@given(ROWS)
def test_one_pack_holds_every_beginning_once(rows: list[tuple[int, ...]]) -> None:
    (pack,) = pack_rows(rows, 1000)
    beginnings = {row[: at + 1] for row in rows for at in range(len(row))}
    assert len(pack.tokens) == len(beginnings)


@given(ROWS, st.integers(1, 40), st.integers(0, 3), st.one_of(st.none(), st.integers(1, 6)), st.booleans())
def test_tokens_see_what_comes_before_them_in_their_row(
    rows: list[tuple[int, ...]], most_tokens: int, prefix: int, window: int | None, packed: bool
) -> None:
    layout = lay_packs(pack_rows(rows, most_tokens)) if packed else lay_lines(rows)
    sees = layout.sees(prefix, window).flatten(0, 1)
    positions = layout.positions(prefix).flatten()
    for slots in layout.slots:
        line = slots[0] // layout.num_slots
        keys = [*range(prefix), *(prefix + slot - line * layout.num_slots for slot in slots)]
        for at, slot in enumerate(slots):
            assert positions[slot] == prefix + at
            expected = torch.zeros(prefix + layout.num_slots, dtype=torch.bool)
            expected[
                [key for back, key in enumerate(reversed(keys[: prefix + at + 1])) if window is None or back < window]
            ] = True
            assert torch.equal(sees[slot], expected)


def test_packs_are_of_similar_size() -> None:
    rows = [(number, *range(9)) for number in range(12)]
    assert [len(pack.tokens) for pack in pack_rows(rows, 70)] == [60, 60]
    assert [len(pack.tokens) for pack in pack_rows(rows, 5)] == [10] * 12
