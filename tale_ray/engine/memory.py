"""Hidden states that a later round can go on from, within a budget of bytes.

After layer m is removed, whatever lies below m is as it was, and the state without m is the new current model's. States
are remembered by row, boundary and node (see `streams`), so that it does not matter how rows are batched next time.
Axes in tensor names: n nodes, b rows of a micro-batch, t tokens, d hidden size.
"""

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from tale_ray.engine.streams import Node

_Place: TypeAlias = tuple[int, Node]  # boundary, node
_Found: TypeAlias = tuple[torch.Tensor, int, int]  # block (n b t d), position among nodes, position among rows


class StateMemory:
    """States of any rows, until `limit` bytes are held; what comes later is not remembered."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.held = 0
        self._states: dict[_Place, dict[Hashable, _Found]] = {}
        self._removed: frozenset[int] = frozenset()

    def allow(self, limit: int) -> None:
        """Hold at most so many bytes from now on."""
        self.limit = limit
        if self.held > limit:
            self._states.clear()
            self.held = 0

    def start(self, removed: Collection[int]) -> None:
        """Forget what a round that starts without the layers `removed`, and later ones, cannot use."""
        if frozenset(removed) == self._removed:
            return
        self._removed = frozenset(removed)
        self._states = {place: rows for place, rows in self._states.items() if self._is_useful(*place)}
        blocks = {id(found[0]): found[0] for rows in self._states.values() for found in rows.values()}
        self.held = sum(block.nbytes for block in blocks.values())

    def _is_useful(self, boundary: int, node: Node) -> bool:
        below = {layer for layer in self._removed if layer < boundary}
        return below <= set(node) and len(set(node) - below) <= 1

    def of(self, rows: Sequence[Hashable], lengths: Sequence[int]) -> "BatchMemory":
        """Return the memory of some rows, each of so many tokens."""
        return BatchMemory(self, tuple(rows), tuple(lengths))

    def has(self, rows: Sequence[Hashable], boundary: int, node: Node) -> bool:
        """Return whether the state is known for all of the rows."""
        known = self._states.get((boundary, node))
        return known is not None and all(row in known for row in rows)

    def get(self, row: Hashable, boundary: int, node: Node) -> _Found:
        """Return where a known state is."""
        return self._states[boundary, node][row]

    def add(self, rows: Sequence[Hashable], boundary: int, nodes: Sequence[Node], block_nbtd: torch.Tensor) -> None:
        """Remember a block of states, if there is room."""
        if self.held + block_nbtd.nbytes > self.limit:
            return
        self.held += block_nbtd.nbytes
        for at, node in enumerate(nodes):
            known = self._states.setdefault((boundary, node), {})
            known.update((row, (block_nbtd, at, position)) for position, row in enumerate(rows))


@dataclass(frozen=True, slots=True)
class BatchMemory:
    """What is remembered of the rows of one micro-batch."""

    memory: StateMemory
    rows: tuple[Hashable, ...]
    lengths: tuple[int, ...]

    def knows(self, boundary: int, node: Node) -> bool:
        """Return whether the state need not be computed for any of the rows."""
        return self.memory.has(self.rows, boundary, node)

    def load(self, boundary: int, node: Node) -> torch.Tensor:
        """Return a known state (1, rows, tokens, hidden size), padded on the right."""
        found = [self.memory.get(row, boundary, node) for row in self.rows]
        block, at, first = found[0]
        longest = max(self.lengths)
        is_one = all(each[0] is block and each[1] == at and each[2] == first + step for step, each in enumerate(found))
        if is_one and block.shape[2] == longest:
            return block[at : at + 1, first : first + len(found)]
        loaded = block.new_zeros(1, len(found), longest, block.shape[3])
        for position, (block_nbtd, node_at, row_at) in enumerate(found):
            length = self.lengths[position]
            loaded[0, position, :length] = block_nbtd[node_at, row_at, :length]
        return loaded

    def add(self, boundary: int, nodes: Sequence[Node], block_nbtd: torch.Tensor) -> None:
        """Remember what a layer has computed for the rows."""
        self.memory.add(self.rows, boundary, nodes, block_nbtd)
