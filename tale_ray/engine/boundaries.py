"""One forward over some rows that shows the hidden states between layers, micro-batch by micro-batch.

Knows nothing of what is made of them. Axes in tensor names: b rows of a micro-batch, t tokens, d hidden size.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import torch

from tale_ray.engine.budget import batches, row_cost
from tale_ray.engine.score import Scorer
from tale_ray.errors import ModelError
from tale_ray.model.load import LoadedModel

See: TypeAlias = Callable[[int, torch.Tensor], None]  # boundary (0: below all layers), hidden states (b, t, d)


def surviving_layers(loaded: LoadedModel, removed: Collection[int]) -> list[int]:
    """Return the layers that are left, in order."""
    return [layer for layer in range(loaded.layers.num_layers) if layer not in removed]


@torch.inference_mode()
def see_boundaries(
    loaded: LoadedModel,
    scorer: Scorer,
    removed: Collection[int],
    rows: Sequence[Sequence[int]],
    watch: Callable[[Sequence[int]], See],
    *,
    value_bytes: int,
    remedy: str,
) -> list[int]:
    """Run the decoder without `removed` over all rows, and return their positions in the order in which they ran.

    Each micro-batch is watched: `watch`, given the lengths of its rows, returns what sees the states below the first
    surviving layer, below the second ... and above the last, before the final norm. Padding is on the right and there
    is no mask: with causal attention no token of a row sees it. The model is whole again afterwards, whatever happens.

    Args:
        loaded: the model.
        scorer: of that model; its budget of memory holds here, too.
        removed: layers to do without.
        rows: token ids.
        watch: what is made of a micro-batch.
        value_bytes: of what is at work at once beside the pass, for each number of a hidden state.
        remedy: what a user can do where a family hides its hidden states.

    Raises:
        ConfigError: not even one row fits into the budget.
        ModelError: a layer cannot be removed, or the family hides its hidden states.
    """
    cost = row_cost(loaded.model)

    def row_bytes(num_tokens: int) -> int:
        return cost.row_bytes(num_tokens, 1) + value_bytes * num_tokens * cost.hidden_size

    lengths = [len(row) for row in rows]
    most = max(scorer.budget.batch, min(row_bytes(max(lengths)), scorer.budget.total))
    surviving = [loaded.layers.full[layer] for layer in surviving_layers(loaded, removed)]
    order: list[int] = []
    try:
        with loaded.layers.without(removed):
            for batch in batches(lengths, most, row_bytes):
                own = [rows[at] for at in batch]
                longest = max(map(len, own))
                padded = [[*row, *[row[-1]] * (longest - len(row))] for row in own]
                boundaries = _Boundaries(watch([len(row) for row in own]), remedy)
                _free(surviving)
                for layer in surviving:
                    layer.register_forward_pre_hook(boundaries.below)
                surviving[-1].register_forward_hook(boundaries.above)
                decoder: Any = loaded.model.get_decoder()
                decoder(input_ids=torch.tensor(padded, device=loaded.model.device), use_cache=False)
                if boundaries.seen != len(surviving) + 1:
                    raise ModelError(
                        f"{type(loaded.model).__name__} ran {boundaries.seen - 1} of {len(surviving)} layers one after "
                        f"another: its hidden states cannot be measured; {remedy}"
                    )
                order += batch
    finally:  # once more: a signal may have interrupted the tidying up itself
        _free(loaded.layers.full)
        loaded.layers.restore()
    return order


class _Boundaries:
    """Hooks of the layers of one pass, which see the states below each layer, in order, and above the last."""

    def __init__(self, see: See, remedy: str) -> None:
        self.seen = 0
        self._see = see
        self._remedy = remedy

    def below(self, _layer: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self._note(inputs[0] if inputs else None)

    def above(self, _layer: torch.nn.Module, _inputs: Any, output: Any) -> None:
        self._note(output[0] if isinstance(output, tuple) else output)

    def _note(self, hidden: Any) -> None:
        if not isinstance(hidden, torch.Tensor):
            raise ModelError(
                "the layers of this family do not take hidden states first, so that they cannot be measured; "
                f"{self._remedy}"
            )
        self._see(self.seen, hidden)
        self.seen += 1


def _free(layers: Any) -> None:
    """Take our hooks off; not by their handle, which an exception from a signal could have kept us from getting."""
    for layer in layers:
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Boundaries)]:
                del hooks[key]
