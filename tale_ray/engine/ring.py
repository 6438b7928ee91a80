"""Which rows of a batch run which layer, when each candidate leaves one layer out. Pure; knows no tensors.

Rows are ordered by the layer that their candidate removes and go round in a ring. Before layer k the rows that skip it
come first; those behind them run, and the skipping ones are appended after them. Rows that run are thus one stretch of
the ring: masks and positions, written twice one after the other, only need to be cut, and nothing is picked row by row.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from tale_ray.engine.streams import Node


@dataclass(frozen=True, slots=True)
class Stretch:
    """The rows that run a layer, as a stretch of the ring written twice."""

    start: int
    end: int
    skipping: int  # rows before it


@dataclass
class Ring:
    """Which layers run on which rows. A row is (position in `finals`, example)."""

    finals: Sequence[Node]  # ordered by the layer that only they remove; the one that removes none is the last
    rows: list[tuple[int, int]]
    num_layers: int
    stretches: dict[int, Stretch] = field(init=False)  # by layer, of those that run at all
    turned: int = field(init=False)  # by how many rows the ring has turned after all layers

    def __post_init__(self) -> None:
        common = set.intersection(*map(set, self.finals))
        self.stretches, self.turned = {}, 0
        for layer in sorted(set(range(self.num_layers)) - common):
            skipping = sum(layer in self.finals[final] for final, _ in self.rows)
            if skipping < len(self.rows):
                self.stretches[layer] = Stretch(self.turned + skipping, self.turned + len(self.rows), skipping)
            self.turned += skipping

    def running(self, layer: int) -> list[tuple[int, int]]:
        """Return the rows that run a layer, in the order of its cache."""
        stretch = self.stretches[layer]
        return [*self.rows, *self.rows][stretch.start : stretch.end]


def ring_order(finals: Collection[Node]) -> list[Node]:
    """Return different nodes, no two of which differ in more than one layer each, ordered for a ring."""
    common = set.intersection(*map(set, finals))
    own = {final: sorted(set(final) - common) for final in finals}
    assert all(len(layers) <= 1 for layers in own.values()), "candidates remove one layer more than the current model"
    return sorted(own, key=lambda final: (not own[final], own[final]))
