"""What a search has to multiply, and how fast this machine multiplies.

Required FLOPs are those of the matrix products (a multiplication and an addition are 2) that no exact search by
sweeps can do without:

- the prompt prefix that rows share, once per place (layer and node, see `tale_ray.engine.streams`) in the whole search;
- every row's own tokens, without padding, once per unit at every place of the unit's plan: the candidates actually
  scored, as the units of the search say; what a search carries over from one round to the next is not taken off;
- the last position only in the last layer and in the head; of a prefix's last layer keys and values only;
- attention for causal pairs only;
- of later new tokens one step each in every surviving layer, and the head.

For Llama and its like: gated feed-forward parts, a head without bias. Norms, rotary embedding and softmax do not count.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tale_ray.engine.groups import group_prompts
from tale_ray.engine.streams import Node, Step, applications, final_node, plan_sweep
from tale_ray.records import WorkUnit

GEMM_SIZES = (1024, 2048, 4096)
_GEMM_REPEATS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes of a model that its matrix products depend on."""

    num_layers: int
    hidden_size: int
    heads: int
    key_heads: int
    head_size: int
    intermediate_size: int
    vocabulary: int

    @staticmethod
    def of(config: Any) -> "Shape":
        """Return the sizes of a Llama-like configuration."""
        return Shape(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            head_size=config.head_dim,
            intermediate_size=config.intermediate_size,
            vocabulary=config.vocab_size,
        )

    @property
    def head(self) -> int:
        """FLOPs of the logits of one position."""
        return 2 * self.hidden_size * self.vocabulary

    def keys(self, tokens: int) -> int:
        """FLOPs of the keys and values of some tokens in one layer."""
        return tokens * 2 * 2 * self.hidden_size * self.key_heads * self.head_size

    def layer(self, tokens: int, before: int = 0) -> int:
        """FLOPs of one layer on some tokens that attend to each other and to `before` tokens."""
        return self.keys(tokens) + self._others(tokens, tokens * before + tokens * (tokens + 1) // 2)

    def last(self, tokens: int, before: int = 0) -> int:
        """FLOPs of one layer of which only the last of some tokens is needed."""
        return self.keys(tokens) + self._others(1, before + tokens)

    def _others(self, tokens: int, pairs: int) -> int:
        """FLOPs of queries, attention over `pairs`, its output and the feed-forward part."""
        size = self.heads * self.head_size
        linear = 2 * self.hidden_size * size + 3 * self.hidden_size * self.intermediate_size
        return 2 * tokens * linear + 2 * 2 * size * pairs


@dataclass(frozen=True, slots=True)
class Required:
    """Required FLOPs by what they are for, and the layer applications that go with them."""

    prefix: int
    prompts: int
    replies: int  # steps after the first new token
    head: int
    applications: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.prefix + self.prompts + self.replies + self.head


def required(
    shape: Shape, units: Iterable[WorkUnit], prompts: Sequence[Sequence[int]], new_tokens: int = 1
) -> Required:
    """Return the required FLOPs of units over the rows of one split.

    Args:
        shape: of the model.
        units: that were scored.
        prompts: tokens of all rows of the split.
        new_tokens: of every reply; there is no end token where there is more than one.
    """
    groups = group_prompts(prompts, range(len(prompts)))
    group_of = {row: number for number, group in enumerate(groups) for row in group.rows}
    places: list[set[tuple[int, Node]]] = [set() for _ in groups]
    own = replies = head = applied = 0
    for unit in units:
        finals = [final_node(unit.removed, layer) for layer in unit.candidates]
        steps = plan_sweep(shape.num_layers, finals)
        at_layers = sum(shape.num_layers - len(final) for final in finals)
        for row in unit.rows:
            before = len(groups[group_of[row]].prefix)
            own += _sweep(shape, steps, len(prompts[row]) - before, before)
            places[group_of[row]].update((layer, node) for layer, step in enumerate(steps) for node in step.runs)
            applied += applications(steps) + (new_tokens - 1) * at_layers
            replies += sum(at_layers * shape.layer(1, len(prompts[row]) + step) for step in range(new_tokens - 1))
            head += new_tokens * len(finals) * shape.head
    prefix = 0
    for group, wanted in zip(groups, places, strict=True):
        if group.prefix:
            steps = plan_sweep(shape.num_layers, (), wanted)
            prefix += _prefix(shape, steps, len(group.prefix))
            applied += applications(steps)
    return Required(prefix, own, replies, head, applied)


def _sweep(shape: Shape, steps: Sequence[Step], tokens: int, before: int) -> int:
    """Return the FLOPs of a sweep over one row's own tokens."""
    full, last = shape.layer(tokens, before), shape.last(tokens, before)
    return sum(len(step.runs) * (last if step.last_only else full) for step in steps)


def _prefix(shape: Shape, steps: Sequence[Step], tokens: int) -> int:
    """Return the FLOPs of a sweep of which keys and values are wanted."""
    goes_on = [(layer, node in step.kept) for layer, step in enumerate(steps) for node in step.runs]
    return sum(shape.layer(tokens) if going else shape.keys(tokens) for _, going in goes_on)


def gemm_rate() -> float:
    """Return the FLOPs per second of the best float32 `torch.mm` of `GEMM_SIZES`, with the threads torch has now."""
    best = 0.0
    for size in GEMM_SIZES:
        one, other = torch.randn(size, size), torch.randn(size, size)
        torch.mm(one, other)
        for _ in range(_GEMM_REPEATS):
            started = time.perf_counter()
            torch.mm(one, other)
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
