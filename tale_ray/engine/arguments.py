"""What a decoder hands to its layers: learned by watching, as every family has arguments of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from tale_ray.model.layers import LayerStack

Place: TypeAlias = tuple[Any, ...]  # position or name of an argument, then positions in tuples


@dataclass(frozen=True, slots=True)
class LayerArguments:
    """Which arguments of a layer grow with the rows, by how much a row; which are masks; what layers return."""

    per_row: dict[Place, int]  # entries of axis 0 that belong to one row (ALiBi: the heads)
    masks: frozenset[Place]  # (rows, heads or 1, tokens, keys)
    returns_tuple: bool


@torch.inference_mode()
def learn_arguments(layers: LayerStack, run: Callable[[int], Any]) -> LayerArguments:
    """Return what layers are handed when `run` puts two rows, then three, through the decoder.

    There are masks among it if the rows that `run` takes have padding, and say so. Of a model that is streamed only the
    first layer is run: what layers are handed beside hidden states does not depend on these.
    """
    sizes: dict[Place, dict[int, int]] = {}
    masks: set[Place] = set()
    outputs: set[type] = set()
    num_rows = 0

    def note(value: Any, place: Place) -> None:
        if isinstance(value, tuple | list):
            for at, item in enumerate(value):
                note(item, (*place, at))
        elif isinstance(value, torch.Tensor) and value.ndim > 1:
            sizes.setdefault(place, {})[num_rows] = value.shape[0]
            if value.ndim == 4:
                masks.add(place)

    def noting(number: int, own: Any) -> Any:
        def forward(hidden_btd: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            for at, value in enumerate(args):
                note(value, (at,))
            for name, value in kwargs.items():
                note(value, (name,))
            if layers.is_streamed and number:
                return (hidden_btd,) if outputs == {tuple} else hidden_btd
            found = own(hidden_btd, *args, **kwargs)
            outputs.add(type(found))
            return found

        return forward

    with layers.forwarding([noting(number, layer.forward) for number, layer in enumerate(layers.full)]):
        for num_rows in (2, 3):
            run(num_rows)
    per_row = {place: found[3] - found[2] for place, found in sizes.items() if len({*found.values()}) > 1}
    return LayerArguments(per_row, frozenset(masks), outputs == {tuple})
