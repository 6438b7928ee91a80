"""Which hidden states a sweep computes: a plan over sets of layers passed by. Pure; knows neither tensors nor rows.

A *node* is a hidden state at a *boundary* between two layers, named by the layers below the boundary that it has passed
by (not run), ascending. Models that differ only in layers still to come share the node: at boundary b there is
the current model's node and, for each candidate below b, one more. What two candidates share is computed once.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Node: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What happens at one layer."""

    runs: tuple[Node, ...]  # nodes below the layer that it is applied to; they keep their names
    passes: tuple[Node, ...]  # nodes above the layer that have passed it by
    loads: tuple[Node, ...]  # nodes above the layer that are known already
    kept: frozenset[Node]  # nodes above the layer that something above still needs
    last_only: bool  # of what the layer computes, only the last position of each row is needed


def final_node(removed: Collection[int], candidate: int | None) -> Node:
    """Return the node above all layers of the model without `removed` and without the candidate."""
    return tuple(sorted({*removed} if candidate is None else {*removed, candidate}))


def plan_sweep(
    num_layers: int,
    finals: Collection[Node],
    wanted: Collection[tuple[int, Node]] = (),
    known: Callable[[int, Node], bool] = lambda _boundary, _node: False,
) -> list[Step]:
    """Return the fewest steps, one per layer from the bottom, that compute what is asked for.

    Args:
        num_layers: of the full model.
        finals: nodes above all layers of which the last position is needed.
        wanted: (layer, node below it): applications of a layer that must happen, whatever comes of them (their keys
            and values are needed).
        known: (boundary, node) -> whether the node need not be computed. Boundary b lies below layer b.
    """
    steps: list[Step] = []
    needed = dict.fromkeys(finals, False)  # nodes above the layer -> whether all positions are needed
    for layer in reversed(range(num_layers)):
        below: dict[Node, bool] = {}
        loads = [node for node in needed if known(layer + 1, node)]
        computed = [node for node in needed if node not in loads]
        passes = [node for node in computed if node[-1:] == (layer,)]
        applied = [node for node in computed if node[-1:] != (layer,)]
        runs = {*applied, *(node for at, node in wanted if at == layer)}
        for node in passes:
            below[node[:-1]] = below.get(node[:-1], False) or needed[node]
        for node in runs:
            below[node] = True
        steps.append(
            Step(
                runs=tuple(sorted(runs)),
                passes=tuple(sorted(passes)),
                loads=tuple(sorted(loads)),
                kept=frozenset(needed),
                last_only=not any(needed[node] for node in applied),
            )
        )
        needed = below
    return steps[::-1]


def applications(steps: Sequence[Step]) -> int:
    """Return how many layers are applied to every row."""
    return sum(len(step.runs) for step in steps)


def most_nodes(steps: Sequence[Step]) -> int:
    """Return how many hidden states exist at once, at most."""
    return max((len(step.kept) for step in steps), default=1)
