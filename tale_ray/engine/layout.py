"""How the tokens of some rows lie in a batch: each row on a line of its own, or several rows on one line as a tree.

Rows that begin alike (after the prefix that all share) need not compute their beginning twice: on a packed line every
token stands once, and sees its ancestors only. Pure; knows no model. A *slot* is a place in the batch, counted line by
line. Axes in tensor names: b lines, t slots of a line, p tokens of the prefix, k = p + t.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows in a batch."""

    tokens: tuple[tuple[int, ...], ...]  # of each line, all of one length
    slots: tuple[tuple[int, ...], ...]  # of each row's tokens, in the row's order
    is_tree: bool  # rows share lines: masks and positions are ours

    @property
    def num_lines(self) -> int:
        """Lines of the batch."""
        return len(self.tokens)

    @property
    def num_slots(self) -> int:
        """Slots of a line."""
        return len(self.tokens[0])

    @property
    def last_slots(self) -> tuple[int, ...]:
        """Slot of each row's last token."""
        return tuple(slots[-1] for slots in self.slots)

    def positions(self, prefix_tokens: int) -> torch.Tensor:
        """Return the position (lines, slots) of every token in its row; 0 for padding."""
        positions = [0] * (self.num_lines * self.num_slots)
        for slots in self.slots:
            for position, slot in enumerate(slots, start=prefix_tokens):
                positions[slot] = position
        return torch.tensor(positions).view(self.num_lines, self.num_slots)

    def sees(self, prefix_tokens: int, window: int | None) -> torch.Tensor:
        """Return which key each token sees (lines, slots, prefix and slots): the prefix, its ancestors and itself.

        Only those fewer than `window` positions away; None: all of them. Padding sees itself.
        """
        own_btt = torch.from_numpy(self._sees_own())
        positions_bt = self.positions(prefix_tokens)
        if window is not None:
            own_btt &= positions_bt[:, :, None] - positions_bt[:, None, :] < window
        before_btp = torch.ones(self.num_lines, self.num_slots, prefix_tokens, dtype=torch.bool)
        if window is not None:
            before_btp &= positions_bt[:, :, None] - torch.arange(prefix_tokens) < window
        return torch.cat((before_btp, own_btt), dim=2)

    def _sees_own(self) -> np.ndarray:
        """Return which slot of its line each slot sees (lines, slots, slots): what its parent sees, and itself."""
        lines, length = self.num_lines, self.num_slots
        parents_bt = np.tile(np.arange(length), (lines, 1))  # a first token, or padding, is its own
        for slots in self.slots:
            for parent, child in pairwise(slots):
                parents_bt[child // length, child % length] = parent % length
        sees_btt = np.zeros((lines, length, length), dtype=bool)
        every = np.arange(lines)
        for slot in range(length):  # parents come before their children
            sees_btt[:, slot] = sees_btt[every, parents_bt[:, slot]]
            sees_btt[:, slot, slot] = True
        return sees_btt


def lay_lines(rows: Sequence[Sequence[int]]) -> Layout:
    """Return rows on lines of their own, padded on the right: with causal attention no token of a row sees padding."""
    longest = max(map(len, rows))
    return Layout(
        tokens=tuple((*row, *[row[-1]] * (longest - len(row))) for row in rows),
        slots=tuple(tuple(range(at * longest, at * longest + len(row))) for at, row in enumerate(rows)),
        is_tree=False,
    )


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows that share a line."""

    rows: tuple[int, ...]  # positions in what was packed
    tokens: tuple[int, ...]  # each beginning once
    paths: tuple[tuple[int, ...], ...]  # places in `tokens` of each row's tokens


def pack_rows(rows: Sequence[Sequence[int]], most_tokens: int) -> list[Pack]:
    """Return the rows in packs of at most so many tokens, unless a row alone is longer; rows that begin alike together.

    The packs are of similar size, so that lines of one batch need little padding.
    """
    order = sorted(range(len(rows)), key=lambda row: (tuple(rows[row]), row))
    shared = {row: _same(rows[before], rows[row]) for before, row in pairwise(order)}
    fewest = len(_cut(rows, order, shared, most_tokens))
    size = sum(len(rows[row]) - shared.get(row, 0) for row in order) // fewest
    while size < most_tokens and len(_cut(rows, order, shared, size)) > fewest:
        size += max(1, size // 16)
    return [_pack(rows, members) for members in _cut(rows, order, shared, min(size, most_tokens))]


def lay_packs(packs: Sequence[Pack]) -> Layout:
    """Return packs on a line each; the layout's rows are the packs' rows, pack by pack."""
    longest = max(len(pack.tokens) for pack in packs)
    return Layout(
        tokens=tuple((*pack.tokens, *[pack.tokens[-1]] * (longest - len(pack.tokens))) for pack in packs),
        slots=tuple(
            tuple(line * longest + place for place in path) for line, pack in enumerate(packs) for path in pack.paths
        ),
        is_tree=True,
    )


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    """Return with how many tokens both begin."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _cut(
    rows: Sequence[Sequence[int]], order: Sequence[int], shared: Mapping[int, int], most_tokens: int
) -> list[list[int]]:
    """Return the rows, in order, in lists that hold at most so many tokens, unless a row alone is longer."""
    found: list[list[int]] = []
    filled = 0
    for row in order:
        fresh = len(rows[row]) - shared.get(row, 0)
        if found and filled + fresh <= most_tokens:
            found[-1].append(row)
            filled += fresh
        else:
            found.append([row])
            filled = len(rows[row])
    return found


def _pack(rows: Sequence[Sequence[int]], members: Sequence[int]) -> Pack:
    """Return neighbours in lexicographic order as one pack."""
    tokens: list[int] = []
    paths: list[tuple[int, ...]] = []
    for at, row in enumerate(members):
        same = _same(rows[members[at - 1]], rows[row]) if at else 0
        known = paths[-1][:same] if at else ()
        paths.append((*known, *range(len(tokens), len(tokens) + len(rows[row]) - same)))
        tokens += rows[row][same:]
    return Pack(tuple(members), tuple(tokens), tuple(paths))
