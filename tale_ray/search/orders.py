"""Orders in which layers are removed, one a round: pure functions of history, beside TALE's own choice.

Each names the next of the layers that may be removed, or asks for a measurement of the model that the history does not
have yet. Values are compared as they are stored; ties go to the lowest layer.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeAlias

from tale_ray.config import removable_blocks
from tale_ray.records import Measurement, Probe
from tale_ray.search.history import History

Order: TypeAlias = Callable[[History, tuple[int, ...]], int | Probe]  # candidates in ascending order -> the next one


def deepest_first(_history: History, candidates: tuple[int, ...]) -> int:
    """Return the deepest layer: "reverse order", the simple baseline of Lu et al. (arXiv 2411.15558) and others."""
    return candidates[-1]


def in_random_order(seed: int) -> Order:
    """Return an order that a hash of the seed and each layer's number decides."""

    def order(_history: History, candidates: tuple[int, ...]) -> int:
        return min(candidates, key=lambda layer: hashlib.sha256(f"{seed}:{layer}".encode()).digest())

    return order


def least_influential_first(history: History, candidates: tuple[int, ...]) -> int | Probe:
    """Return the layer with the least block influence (ShortGPT, arXiv 2403.03853), measured once, before round 1."""
    probe = Probe("block_influence", history.start, _surviving_at_start(history))
    found = history.measurement(probe)
    return probe if found is None else _least(found, candidates)


def least_perplexity_first(history: History, candidates: tuple[int, ...]) -> int | Probe:
    """Return the layer without which the model has the least perplexity (SLEB, arXiv 2402.09025), measured a round."""
    probe = Probe("log_perplexity", history.removed, candidates)
    found = history.measurement(probe)
    return probe if found is None else _least(found, candidates)


def of_nearest_block(max_removed: int, keep_layers: frozenset[int]) -> Order:
    """Return the order in which the layers of one block are removed, the deepest first (Gromov, arXiv 2403.17887).

    It is the block of so many consecutive surviving layers, none of them to be kept, whose last token is turned by the
    least angle between below it and above it.

    Args:
        max_removed: layers that are removed in the end, those that the search starts without included.
        keep_layers: never removed.
    """

    def order(history: History, candidates: tuple[int, ...]) -> int | Probe:
        surviving, span = _surviving_at_start(history), max_removed - len(history.start)
        blocks = {block[0]: block for block in removable_blocks(surviving, span, keep_layers)}
        assert blocks, "the configuration was checked against the model"
        probe = Probe("angular_distance", history.start, surviving[: len(surviving) - span + 1], span)
        found = history.measurement(probe)
        if found is None:
            return probe
        block = blocks[_least(found, blocks)]
        return max(layer for layer in block if layer in candidates)

    return order


def _surviving_at_start(history: History) -> tuple[int, ...]:
    return tuple(layer for layer in range(history.num_layers) if layer not in history.start)


def _least(found: Measurement, layers: Iterable[int]) -> int:
    """Return the layer with the least value; those whose value is no number come last, ties go to the lowest layer."""
    values = dict(zip(found.probe.layers, found.values, strict=True))

    def rank(layer: int) -> tuple[bool, float, int]:
        value = values[layer]
        return value is None, 0.0 if value is None else value, layer

    return min(layers, key=rank)
