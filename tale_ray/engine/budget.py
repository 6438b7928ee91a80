"""How many rows run at once: micro-batches within a budget of bytes. Knows nothing of candidates or answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tale_ray.errors import ConfigError

_CPU_BUDGET_BYTES = 256 * 2**20
_LOGIT_BYTES = 4  # soft-caps and argmax work in float32 in most families


@dataclass(frozen=True, slots=True)
class RowCost:
    """What a row needs while a model runs it: an estimate from above of activations, KV cache and logits."""

    hidden_size: int
    widest: int  # of a layer's inner products: MLP, experts of one token, or queries, keys and values
    cache_values: int  # keys and values of one token in all layers
    score_heads: int  # attention heads whose T x T scores exist at once; 0 with fused attention
    vocabulary: int
    value_bytes: int  # of one number

    def row_bytes(self, num_tokens: int, new_tokens: int) -> int:
        """Return the bytes of one row of `num_tokens` prompt tokens that gets `new_tokens` new ones.

        Activations: num_tokens x (4 hidden sizes + 3 widest + heads x num_tokens) numbers. From the second new token
        on: keys and values of all tokens, twice, as growing a cache copies it. One row of logits.
        """
        per_token = 4 * self.hidden_size + 3 * self.widest + self.score_heads * num_tokens
        cached_tokens = num_tokens + new_tokens if new_tokens > 1 else 0
        numbers = num_tokens * per_token + 2 * cached_tokens * self.cache_values
        return numbers * self.value_bytes + 2 * self.vocabulary * _LOGIT_BYTES


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
    heads = size("num_attention_heads", default=1)
    head_dim = size("head_dim", default=hidden // heads)
    key_heads = size("num_key_value_heads", default=heads)
    dense = size("intermediate_size", "ffn_dim", "n_inner", default=4 * hidden)
    routed = size("moe_intermediate_size", default=dense) * size("num_experts_per_tok")
    return RowCost(
        hidden_size=hidden,
        widest=max(dense, routed, (heads + 2 * key_heads) * head_dim),
        cache_values=2 * key_heads * head_dim * config.num_hidden_layers,
        score_heads=heads if getattr(config, "_attn_implementation", None) == "eager" else 0,
        vocabulary=config.vocab_size,
        value_bytes=model.dtype.itemsize,
    )


def default_budget(device: torch.device) -> int:
    """Return the bytes that one micro-batch may take: half of a GPU's free memory; 256 MiB on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return _CPU_BUDGET_BYTES


def batches(
    lengths: Sequence[int], new_tokens: int, budget_bytes: int, row_bytes: Callable[[int, int], int]
) -> list[list[int]]:
    """Return micro-batches as lists of positions in `lengths`, together a permutation of them.

    Rows of similar length share a batch, the longest come first, so that memory that does not suffice shows at once.
    A batch of b rows whose longest has T tokens costs b x row_bytes(T, new_tokens), which is within the budget.

    Args:
        lengths: prompt tokens of each row.
        new_tokens: at most so many are decoded per row.
        budget_bytes: of one micro-batch.
        row_bytes: (prompt tokens, new tokens) -> bytes of one row, growing with the tokens; `RowCost.row_bytes`.

    Raises:
        ConfigError: the longest row alone does not fit.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    if order and (needed := row_bytes(lengths[order[0]], new_tokens)) > budget_bytes:
        raise ConfigError(
            f"batch bytes {budget_bytes} are too few: the longest row ({lengths[order[0]]} prompt tokens, "
            f"{new_tokens} new) needs {needed}; raise --batch-bytes to at least that, or leave it out"
        )
    found: list[list[int]] = []
    start = 0
    while start < len(order):
        room = budget_bytes // max(1, row_bytes(lengths[order[start]], new_tokens))
        found.append(order[start : start + room])
        start += room
    return found
