"""How many rows run at once: micro-batches within a budget of bytes. Knows nothing of candidates or answers."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tale_ray.errors import ConfigError
from tale_ray.model.capacity import free_memory_bytes

_CPU_BATCH_BYTES = 32 * 2**20  # larger ones leave the CPU's caches, and their memory is mapped anew for every product
_CPU_SHARE = 8  # of the memory that is free
_LEAST_PACK_TOKENS, _MOST_PACK_TOKENS = 32, 512
_LOGIT_BYTES = 4  # soft-caps and argmax work in float32 in most families


@dataclass(frozen=True, slots=True)
class RowCost:
    """What a row needs while a model runs it: an estimate from above of activations, KV cache and logits."""

    hidden_size: int
    widest: int  # of a layer's inner products: MLP, experts of one token, or queries, keys and values
    layer_cache_values: int  # keys and values of one token in one layer
    num_layers: int
    score_heads: int  # attention heads whose T x T scores exist at once; 0 with fused attention
    vocabulary: int
    value_bytes: int  # of one number
    query_values: int = 0  # of one token's queries in one layer: what meets each key, and each value

    def row_bytes(self, num_tokens: int, new_tokens: int) -> int:
        """Return the bytes of one row of `num_tokens` prompt tokens that gets `new_tokens` new ones.

        Activations: num_tokens x (4 hidden sizes + 3 widest + heads x num_tokens) numbers. From the second new token
        on: keys and values of all tokens, twice, as growing a cache copies it. One row of logits.
        """
        cached_tokens = num_tokens + new_tokens if new_tokens > 1 else 0
        cache_values = cached_tokens * self.layer_cache_values * self.num_layers
        numbers = num_tokens * self._per_token(num_tokens) + 2 * cache_values
        return numbers * self.value_bytes + self.logit_bytes

    def work_bytes(self, num_tokens: int, prefix_tokens: int) -> int:
        """Return the bytes that a layer works in on one line of one node: activations, keys and values, and a mask."""
        seen = prefix_tokens + num_tokens
        numbers = num_tokens * (self._per_token(seen) + seen) + 2 * seen * self.layer_cache_values
        return numbers * self.value_bytes

    def sweep_bytes(self, num_tokens: int, prefix_tokens: int, nodes: int) -> int:
        """Return the bytes of one line of a sweep: the states of all nodes, and a layer at work on one of them.

        The states below the layer, those above it, and a copy where they do not lie together.
        """
        states = 3 * nodes * num_tokens * self.state_bytes
        return states + self.work_bytes(num_tokens, prefix_tokens) + self.logit_bytes

    def prefix_bytes(self, prefix_tokens: int, places: int) -> int:
        """Return the bytes of a prefix's keys and values at so many (layer, node) places."""
        return places * prefix_tokens * self.layer_cache_values * self.value_bytes

    def decode_bytes(self, num_tokens: int, before: int, new_tokens: int, rows: int) -> int:
        """Return the bytes of rows that are decoded together a token at a time.

        Each has `before` + `num_tokens` prompt tokens. Keys and values of all layers, and twice those of one: a copy
        at work, and one while rows leave.
        """
        seen = before + num_tokens + new_tokens
        cache_values = seen * self.layer_cache_values * (self.num_layers + 2)
        return rows * ((cache_values + self._per_token(seen)) * self.value_bytes + self.logit_bytes)

    @property
    def state_bytes(self) -> int:
        """Bytes of one token's hidden state."""
        return self.hidden_size * self.value_bytes

    @property
    def pack_tokens(self) -> int:
        """Tokens on a line that several rows share, so that attention within it adds a tenth to a layer's products.

        A token meets 2 hidden_size + 3 widest columns of weights, and twice each key of its line, seen or not.
        """
        return min(_MOST_PACK_TOKENS, max(_LEAST_PACK_TOKENS, (2 * self.hidden_size + 3 * self.widest) // 20))

    @property
    def logit_bytes(self) -> int:
        """Bytes of one row of logits, with a copy."""
        return 2 * self.vocabulary * _LOGIT_BYTES

    def _per_token(self, seen_tokens: int) -> int:
        return 4 * self.hidden_size + 3 * self.widest + self.score_heads * seen_tokens


def row_cost(model: Any) -> RowCost:
    """Return the cost of a row on a transformers model, from its configuration as it is now."""
    config = model.config.get_text_config(decoder=True)

    def size(*names: str, default: int = 0) -> int:
        for name in names:
            value = getattr(config, name, None)
            if isinstance(value, list | tuple) and value:
                value = max(value)
            if isinstance(value, int):
                return value
        return default

    hidden = size("hidden_size", default=1)
    nope_dim = size("qk_nope_head_dim")  # latent attention: keys and values are cached as they are multiplied
    heads = size("num_attention_heads", default=1)
    head_dim = size("head_dim", default=hidden // heads)
    key_heads = size("num_key_value_heads", default=heads)
    dense = size("intermediate_size", "ffn_dim", "n_inner", default=4 * hidden)
    routed = size("moe_intermediate_size", default=dense) * size("num_experts_per_tok")
    return RowCost(
        hidden_size=hidden,
        widest=max(dense, routed, (heads + 2 * key_heads) * head_dim),
        layer_cache_values=key_heads * (nope_dim + size("qk_rope_head_dim") + size("v_head_dim"))
        if nope_dim
        else 2 * key_heads * head_dim,
        num_layers=config.num_hidden_layers,
        score_heads=heads if getattr(config, "_attn_implementation", None) == "eager" else 0,
        vocabulary=config.vocab_size,
        value_bytes=model.dtype.itemsize,
        query_values=heads
        * ((nope_dim + size("qk_rope_head_dim") + size("v_head_dim")) // 2 if nope_dim else head_dim),
    )


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of working memory: in all, and of one micro-batch."""

    total: int
    batch: int

    def after(self, held_bytes: int) -> int:
        """Return what a micro-batch may take while so much is held."""
        return min(self.batch, self.total - held_bytes)


def make_budget(devices: Collection[torch.device], batch_bytes: int | None, *, is_streamed: bool = False) -> Budget:
    """Return the budget asked for, or one that suits the devices of a model's layers.

    Half of the free memory of the GPU that has least; an eighth of a CPU's free memory, in micro-batches of 32 MiB. Of
    a model that is streamed every micro-batch reads all weights: there it takes the whole budget.
    """
    if gpus := [device for device in devices if device.type == "cuda"]:
        return gpu_budget(min(int(torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus), batch_bytes)
    return cpu_budget(free_memory_bytes(), batch_bytes, is_streamed=is_streamed)


def gpu_budget(free_bytes: int, batch_bytes: int | None) -> Budget:
    """Return the budget asked for, or one for GPUs of which the fullest has so much left beside the weights."""
    total = free_bytes // 2 if batch_bytes is None else batch_bytes
    return Budget(total, total)


def cpu_budget(free_bytes: int, batch_bytes: int | None, *, is_streamed: bool = False) -> Budget:
    """Return the budget asked for, or one for a CPU with so much free memory."""
    if batch_bytes is not None:
        return Budget(batch_bytes, batch_bytes)
    total = max(_CPU_BATCH_BYTES, free_bytes // _CPU_SHARE)
    return Budget(total, total if is_streamed else _CPU_BATCH_BYTES)


def batches(
    lengths: Sequence[int], budget_bytes: int, row_bytes: Callable[[int], int], least_batches: int = 1
) -> list[list[int]]:
    """Return micro-batches as lists of positions in `lengths`, together a permutation of them.

    Rows of similar length share a batch, the longest come first, so that memory that does not suffice shows at once.
    A batch of b rows whose longest has T tokens costs b x row_bytes(T), which is within the budget.

    Args:
        lengths: tokens of each row.
        budget_bytes: of one micro-batch.
        row_bytes: tokens -> bytes of one row, growing with the tokens.
        least_batches: so many at least, where there are as many rows.

    Raises:
        ConfigError: the longest row alone does not fit.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    if order and (needed := row_bytes(lengths[order[0]])) > budget_bytes:
        raise ConfigError(
            f"batch bytes {budget_bytes} are too few: the longest row ({lengths[order[0]]} tokens) needs {needed}; "
            "raise --batch-bytes to at least that, or leave it out"
        )
    found: list[list[int]] = []
    start, most = 0, max(1, len(order) // least_batches)
    while start < len(order):
        room = min(most, budget_bytes // max(1, row_bytes(lengths[order[start]])))
        found.append(order[start : start + room])
        start += room
    return found
