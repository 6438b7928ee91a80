"""What a scoring runs on a device, pass by pass: matrix products, bytes read, memory. Knows a model by its sizes.

A pass is one micro-batch through the layers. What racing leaves out and what a later round already knows is not taken
off: the numbers are from above, but for what a device does beside matrix products.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tale_ray.engine.budget import RowCost, batches
from tale_ray.engine.choices import PromptKeys, key_choice, key_tokens, row_keys
from tale_ray.engine.demand import Block, Demand
from tale_ray.engine.layout import Layout, lay_lines
from tale_ray.engine.room import Room
from tale_ray.engine.streams import Step
from tale_ray.engine.sweep import Portions
from tale_ray.model.outline import token_products
from tale_ray.records import PromptRow, WorkUnit


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """The sizes of a model that its matrix products, and what they read, depend on."""

    layer_weights: tuple[int, ...]  # that a token is multiplied with, by layer
    head_weights: int
    query_values: int  # of one token in one layer
    weight_bytes: int  # of all layers, and the head

    def layer_flops(self, layer: int, tokens: int, pairs: int) -> int:
        """Return the FLOPs of a layer on some tokens, of which so many pairs attend to each other."""
        return 2 * tokens * self.layer_weights[layer] + 4 * pairs * self.query_values


def products(model: Any, cost: RowCost, weight_bytes: int) -> Products:
    """Return the sizes of a transformers model, with or without storage."""
    head = model.get_output_embeddings()
    return Products(
        layer_weights=token_products(model),
        head_weights=head.weight.numel() if head is not None else 0,
        query_values=cost.query_values,
        weight_bytes=weight_bytes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One micro-batch, or one step of decoding, on one device."""

    kind: str  # prefix, prompts or replies
    rows: int  # that lie on its lines; of replies: candidates times rows
    lines: int
    tokens: int  # of a line, padding included
    flops: int
    read_bytes: int  # weights, and keys and values
    applications: int  # of layers to rows, as a unit's result counts them
    working_bytes: int  # at once, beside what is held from pass to pass
    cache_bytes: int = 0  # of it, keys and values of replies
    nodes_at_once: int = 1  # that a layer is applied to
    layer_calls: int = 0  # of a layer's forward
    count: int = 1  # so many like it


@dataclass(slots=True)
class Held:
    """Bytes that stay from pass to pass, at most."""

    prefix_bytes: int = 0
    state_bytes: int = 0  # for later rounds


def unit_passes(
    demand: Demand,
    sizes: Products,
    rows: Sequence[PromptRow],
    groups: Sequence[PromptKeys],
    unit: WorkUnit,
    max_new_tokens: int,
    held: Held,
) -> Iterator[Pass]:
    """Yield the passes of a unit of which nothing is known before; `held` learns what stays between them.

    Args:
        demand: of the model where it lies.
        sizes: of the model.
        rows: of the split.
        groups: the prefixes that all rows of the split share.
        unit: which of them, and which candidates.
        max_new_tokens: of every reply.
        held: empty at first.

    Raises:
        ConfigError: not even one row fits into the budget.
    """
    states = 0
    removed, candidates = unit.removed, unit.candidates
    own_keys = set(row_keys(rows, unit.rows))
    for prefix, group_keys in groups:
        if not (keys := [key for key in group_keys if key in own_keys]):
            continue
        prompts = [key_tokens(rows, key) for key in keys]
        asked = [len(key_choice(rows, key).continuation_ids) if isinstance(key, tuple) else 1 for key in keys]
        cut = demand.cut(removed, candidates, max(map(len, prompts)), len(prefix), max_new_tokens)
        suffixes = [prompt[cut.shared_tokens :] for prompt in prompts]
        kept = demand.kept_bytes(cut)
        for block in cut.blocks:
            own = demand.prefix_bytes(block.steps, cut.shared_tokens)
            free = min(demand.budget.total - kept - demand.at_work_bytes(cut, block), demand.budget.total // 2)
            held.prefix_bytes = held.prefix_bytes + own if held.prefix_bytes + own <= free else own
            room = demand.room(cut, block, held.prefix_bytes + kept)
            made = []
            if cut.shared_tokens:
                layout, over = lay_lines([[0] * cut.shared_tokens]), demand.prefix_room(block.steps)
                made.append(_sweep("prefix", sizes, block, layout, over, over.portions(layout), 0))
            if max_new_tokens == 1:
                for batch, layout in demand.layouts(suffixes, room):
                    heads = sum(asked[at] for at in batch)
                    made.append(_sweep("prompts", sizes, block, layout, room, room.portions(layout), heads))
            else:
                made += _replies(demand, sizes, block, suffixes, removed, max_new_tokens, room)
            for each in made:
                if each.kind == "prefix" or max_new_tokens == 1:
                    states += each.lines * each.tokens * _states_per_token(block.steps) * demand.cost.state_bytes
                yield each
        held.state_bytes = max(held.state_bytes, min(kept, states))


def _sweep(
    kind: str, sizes: Products, block: Block, layout: Layout, room: Room, portions: Portions, heads: int
) -> Pass:
    """Return the pass of some lines; for each final node the head runs at `heads` places, none of a prefix."""
    lines, slots, before = layout.num_lines, layout.num_slots, room.prefix_tokens
    whole = lines * slots, lines * (slots * before + slots * (slots + 1) // 2)  # tokens, and pairs of them
    last = heads, heads * (before + slots)
    flops = sum(
        len(step.runs) * sizes.layer_flops(at, *(last if step.last_only and heads else whole))
        for at, step in enumerate(block.steps)
    )
    logits = heads * len(block.candidates)
    nodes = min(portions.nodes or block.nodes, block.nodes)
    return Pass(
        kind=kind,
        rows=len(layout.slots),
        lines=lines,
        tokens=slots,
        flops=flops + 2 * sizes.head_weights * logits,
        read_bytes=math.ceil(block.nodes / nodes) * sizes.weight_bytes,
        applications=block.places * len(layout.slots),
        working_bytes=room.working_bytes(layout, replace(portions, nodes=nodes), logits),
        nodes_at_once=nodes,
        layer_calls=sum(math.ceil(len(step.runs) / nodes) for step in block.steps),
    )


def _replies(
    demand: Demand,
    sizes: Products,
    block: Block,
    suffixes: Sequence[Sequence[int]],
    removed: Sequence[int],
    max_new_tokens: int,
    room: Room,
) -> Iterator[Pass]:
    """Yield the passes over prompts and the steps of decoding of all candidates of a block together."""
    lengths = list(map(len, suffixes))
    skipped = Counter(block.candidates)
    running = {  # how many candidates run a layer
        layer: count
        for layer in sorted(set(range(demand.num_layers)) - {*removed})
        if (count := len(block.candidates) - skipped[layer])
    }
    for batch, left in demand.reply_batches(lengths, room, len(block.candidates), max_new_tokens):
        own = [suffixes[at] for at in batch]
        longest = max(map(len, own))
        cache = len(batch) * demand.cost.decode_bytes(
            longest, room.prefix_tokens, max_new_tokens, len(block.candidates)
        )
        for some in batches(list(map(len, own)), left.total, left.line_bytes):
            layout = lay_lines([own[at] for at in some])
            portions = replace(left.portions(layout), nodes=None)  # keys and values of all nodes are kept together
            found = _sweep("prompts", sizes, block, layout, left, portions, len(some))
            yield replace(found, working_bytes=found.working_bytes + cache, cache_bytes=cache)
        seen = room.prefix_tokens + longest + max_new_tokens // 2  # of a reply's tokens, on average
        logits = len(batch) * len(block.candidates)
        yield Pass(
            kind="replies",
            rows=logits,
            lines=logits,
            tokens=1,
            flops=len(batch) * sum(count * sizes.layer_flops(layer, 1, seen) for layer, count in running.items())
            + 2 * sizes.head_weights * logits,
            read_bytes=sizes.weight_bytes + cache,
            applications=len(batch) * sum(running.values()),
            working_bytes=cache,
            cache_bytes=cache,
            nodes_at_once=len(block.candidates),
            layer_calls=len(running),
            count=max_new_tokens - 1,
        )


def _states_per_token(steps: Sequence[Step]) -> int:
    """Return how many hidden states of a token a later round could go on from."""
    return sum(len(step.runs) for step in steps if not step.last_only)
