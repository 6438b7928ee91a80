"""Keys and values of the prompt prefix that rows share, for every layer and node of a sweep."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import Cache

from tale_ray.engine.streams import Node

# Called with layer, nodes, and the keys and values (nodes x rows, heads, tokens, size) of the rows' own tokens.
Record: TypeAlias = Callable[[int, tuple[Node, ...], torch.Tensor, torch.Tensor], None]

Place: TypeAlias = tuple[int, Node]  # a layer, and the node below it

_Slices = list[tuple[torch.Tensor, int]]  # (stacked along axis 0, position)


def stack(slices: _Slices) -> torch.Tensor:
    """Return the slices stacked along axis 0; without a copy where they lie side by side in one tensor."""
    runs: list[tuple[torch.Tensor, int, int]] = []
    for tensor, position in slices:
        if runs and runs[-1][0] is tensor and runs[-1][2] == position:
            runs[-1] = (tensor, runs[-1][1], position + 1)
        else:
            runs.append((tensor, position, position + 1))
    parts = [tensor[start:end] for tensor, start, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts])


class PrefixStates:
    """The keys and values (k heads, p tokens, h head size) of one prefix, by layer and node."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._found: dict[Place, tuple[torch.Tensor, torch.Tensor, int]] = {}

    def __contains__(self, place: Place) -> bool:
        return place in self._found

    def __len__(self) -> int:
        return len(self._found)

    def add(self, layer: int, nodes: Sequence[Node], keys_nkph: torch.Tensor, values_nkph: torch.Tensor) -> None:
        """Remember what a layer computed for some nodes."""
        for position, node in enumerate(nodes):
            self._found[layer, node] = (keys_nkph, values_nkph, position)

    def get(self, layer: int, nodes: tuple[Node, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of some nodes, stacked in their order; from now on they lie together."""
        found = [self._found[layer, node] for node in nodes]
        keys = stack([(keys, position) for keys, _, position in found])
        values = stack([(values, position) for _, values, position in found])
        if keys.untyped_storage().data_ptr() != found[0][0].untyped_storage().data_ptr():  # a copy
            self.add(layer, nodes, keys, values)
        return keys, values

    @property
    def num_bytes(self) -> int:
        """What is held, by whole tensors."""
        storages = {
            storage.data_ptr(): storage.nbytes()
            for keys, values, _ in self._found.values()
            for storage in (keys.untyped_storage(), values.untyped_storage())
        }
        return sum(storages.values())

    def use(self, places: Collection[Place], removed: Collection[int], most_places: int) -> None:
        """Get ready for a sweep that reads some places; forget what no sweep of the round can read.

        A round's sweeps go without the removed layers and at most one more. Beyond `most_places` only those of this
        sweep are kept.
        """
        before = len(self._found)
        self._found = {place: found for place, found in self._found.items() if _may_follow(*place, removed)}
        if len(self._found.keys() | places) > most_places:
            self._found = {place: found for place, found in self._found.items() if place in places}
        if len(self._found) < before:
            self._let_go()

    def _let_go(self) -> None:
        """Copy what is left of tensors of which most is not needed any more, so that these can go."""
        left = Counter(id(keys) for keys, _, _ in self._found.values())
        for place, (keys, values, position) in self._found.items():
            if 2 * left[id(keys)] < len(keys):
                own = slice(position, position + 1)
                self._found[place] = (keys[own].clone(), values[own].clone(), 0)


def _may_follow(layer: int, node: Node, removed: Collection[int]) -> bool:
    """Return whether a node below a layer lacks the removed layers there and at most one more."""
    below = {each for each in removed if each < layer}
    return below <= set(node) and len(node) <= len(below) + 1


class OneLengthCache(Cache):  # type: ignore[misc]  # transformers has no types
    """A cache that reports the same length for every layer, as layers that are removed never tell theirs."""

    def __init__(self, length: int) -> None:
        super().__init__(layers=[])
        self.length = length
        self.layer = 0  # that runs

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens before the rows' own."""
        del layer_idx
        return self.length

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Return how many keys there are, and the position of the first."""
        del layer_idx
        return self.length + int(query_length), 0

    @property
    def is_sliding(self) -> list[bool]:
        """Nothing is ever dropped: windows are the mask's."""
        return [False]

    @property
    def is_compileable(self) -> bool:
        """Shapes change from call to call."""
        return False


class SweepCache(OneLengthCache):
    """What attention sees as its cache during a sweep: it writes the prefix's states, or reads them for every row."""

    def __init__(self, prefix: PrefixStates | None, *, writes: bool, record: Record | None = None) -> None:
        super().__init__(0 if writes or prefix is None else prefix.num_tokens)
        self._prefix = prefix
        self._writes = writes
        self._record = record
        self.nodes: tuple[Node, ...] = ()  # that the layer runs on

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values (nodes x rows, heads, tokens, size) with the prefix's before them."""
        del layer_idx
        if self._record is not None:
            self._record(self.layer, self.nodes, key_states, value_states)
        if self._prefix is None:
            return key_states, value_states
        if self._writes:
            self._prefix.add(self.layer, self.nodes, key_states, value_states)
            return key_states, value_states
        keys, values = self._prefix.get(self.layer, self.nodes)
        return self._after(keys, key_states), self._after(values, value_states)

    def _after(self, prefix_nkph: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        num_nodes, num_tokens = len(self.nodes), prefix_nkph.shape[2]
        joined = own.new_empty(own.shape[0], own.shape[1], num_tokens + own.shape[2], own.shape[3])
        by_node = joined.view(num_nodes, -1, *joined.shape[1:])
        by_node[:, :, :, :num_tokens] = prefix_nkph.unsqueeze(1)
        joined[:, :, num_tokens:] = own
        return joined
