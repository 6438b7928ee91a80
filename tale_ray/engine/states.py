"""What a model holds of a prompt at its last token, after every layer: the place whose logits choose the reply.

Knows nothing of labels or probes. Axes in names: b rows of a micro-batch, n all rows, t tokens, d hidden size, k
boundaries: below the first surviving layer, below the second ..., above the last.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch

from tale_ray.engine.boundaries import See, see_boundaries
from tale_ray.engine.score import Scorer
from tale_ray.model.load import LoadedModel

_REMEDY = "representations of this family cannot be gathered; choose a model of another family"
_FLOAT_BYTES = 4


def last_states(
    loaded: LoadedModel, scorer: Scorer, removed: Collection[int], rows: Sequence[Sequence[int]]
) -> np.ndarray:
    """Return the hidden states (k, n, d) of every row's last token, as float32, from one forward over the rows.

    The first is what enters the first surviving layer (the embedding), the last what leaves the last one, before the
    final norm: transformers' own `hidden_states[-1]` has been through that norm. They take k x n x d x 4 bytes.

    Args:
        loaded: the model; whole again afterwards, whatever happens.
        scorer: of that model; its budget of memory holds here, too.
        removed: layers to do without.
        rows: prompts as token ids, at least one.

    Raises:
        ConfigError: not even one row fits into the budget.
        ModelError: a layer cannot be removed, or the family hides its hidden states.
    """
    parts: list[list[np.ndarray]] = []  # (b, d) by boundary, then by micro-batch

    def watch(lengths: Sequence[int]) -> See:
        def see(boundary: int, hidden_btd: torch.Tensor) -> None:
            row_b = torch.arange(len(lengths), device=hidden_btd.device)
            last_bd = hidden_btd[row_b, torch.tensor(lengths, device=hidden_btd.device) - 1]
            if boundary == len(parts):
                parts.append([])
            parts[boundary].append(last_bd.float().cpu().numpy())

        return see

    order = see_boundaries(loaded, scorer, removed, rows, watch, value_bytes=_FLOAT_BYTES, remedy=_REMEDY)
    states_knd = np.stack([np.concatenate(part) for part in parts])
    return states_knd[:, np.argsort(order)]
