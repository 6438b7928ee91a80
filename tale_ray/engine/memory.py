"""Hidden states that a later round can go on from, within a budget of bytes.

After layer m is removed, whatever lies below m is as it was, and the state without m is the new current model's. States
are remembered by row, boundary and node (see `streams`), so that it does not matter how rows are batched next time.
Axes in tensor names: n nodes, b lines of a layout, t slots of a line, s slots of all lines, d hidden size.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from tale_ray.engine.layout import Layout
from tale_ray.engine.streams import Node

_Place: TypeAlias = tuple[int, Node]  # boundary, node


@dataclass(frozen=True, slots=True, eq=False)
class _Laid:
    """Rows as they lay in a pass."""

    layout: Layout
    at: Mapping[Hashable, int]  # position in the layout, by row


_Found: TypeAlias = tuple[torch.Tensor, int, _Laid]  # block (n b t d), position among nodes, how the rows lie in it


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

    def of(self, rows: Sequence[Hashable], layout: Layout) -> "BatchMemory":
        """Return the memory of the rows of a layout, named in its order."""
        return BatchMemory(self, _Laid(layout, {row: at for at, row in enumerate(rows)}))

    def has(self, rows: Collection[Hashable], boundary: int, node: Node) -> bool:
        """Return whether the state is known for all of the rows."""
        known = self._states.get((boundary, node))
        return known is not None and all(map(known.__contains__, rows))

    def get(self, row: Hashable, boundary: int, node: Node) -> _Found:
        """Return where a known state is."""
        return self._states[boundary, node][row]

    def add(self, laid: _Laid, boundary: int, nodes: Sequence[Node], block_nbtd: torch.Tensor) -> None:
        """Remember a block of states, if there is room."""
        if self.held + block_nbtd.nbytes > self.limit:
            return
        self.held += block_nbtd.nbytes
        for at, node in enumerate(nodes):
            found = (block_nbtd, at, laid)
            self._states.setdefault((boundary, node), {}).update(dict.fromkeys(laid.at, found))


@dataclass(slots=True)
class BatchMemory:
    """What is remembered of the rows of one layout."""

    memory: StateMemory
    laid: _Laid
    _moves: dict[tuple[int, tuple[Hashable, ...]], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def knows(self, boundary: int, node: Node) -> bool:
        """Return whether the state need not be computed for any of the rows."""
        return self.memory.has(self.laid.at, boundary, node)

    def load(self, boundary: int, node: Node) -> torch.Tensor:
        """Return a known state (1, lines, slots, hidden size); zeros where no row has a token."""
        sources: dict[int, tuple[_Found, list[Hashable]]] = {}
        for row in self.laid.at:
            found = self.memory.get(row, boundary, node)
            sources.setdefault(id(found), (found, []))[1].append(row)
        (block_nbtd, at, laid), _ = next(iter(sources.values()))
        if len(sources) == 1 and laid.layout == self.laid.layout and laid.at == self.laid.at:
            return block_nbtd[at : at + 1]
        layout = self.laid.layout
        loaded_sd = block_nbtd.new_zeros(layout.num_lines * layout.num_slots, block_nbtd.shape[-1])
        for (block_nbtd, at, laid), rows in sources.values():
            source_s, target_s = self._move(laid, tuple(rows), block_nbtd.device)
            loaded_sd.index_copy_(0, target_s, block_nbtd[at].flatten(0, 1).index_select(0, source_s))
        return loaded_sd.view(1, layout.num_lines, layout.num_slots, -1)

    def _move(self, laid: _Laid, rows: tuple[Hashable, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the slots of rows in the layout that they were in, and in this one."""
        if (known := self._moves.get((id(laid), rows))) is None:
            moves = {
                target: source
                for row in rows
                for source, target in zip(
                    laid.layout.slots[laid.at[row]], self.laid.layout.slots[self.laid.at[row]], strict=True
                )
            }
            known = (torch.tensor([*moves.values()], device=device), torch.tensor([*moves], device=device))
            self._moves[id(laid), rows] = known
        return known

    def add(self, boundary: int, nodes: Sequence[Node], block_nbtd: torch.Tensor) -> None:
        """Remember what a layer has computed for the rows."""
        self.memory.add(self.laid, boundary, nodes, block_nbtd)
