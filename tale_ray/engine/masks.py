"""Which earlier tokens a layer sees: what its own masks say, and the masks of trees made after it.

Axes in tensor names: b lines, t slots of a line, k keys (of the prefix, then of the slots).
"""

from typing import Any

import torch

from tale_ray.engine.arguments import LayerArguments, Place
from tale_ray.engine.devices import sent
from tale_ray.engine.layout import Layout
from tale_ray.model.load import LoadedModel

_LONGEST_WINDOW = 8192  # tokens: masks grow with its square


class Unfit(Exception):  # no error of the user's: the caller goes another way
    """The model's forward does something that a sweep does not know."""


class TreeMasks:
    """The masks of one layout of trees, by window, as numbers to add; positions that go with them."""

    def __init__(
        self, layout: Layout, prefix_tokens: int, num_nodes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.positions_bt = sent(layout.positions(prefix_tokens), device)
        self._layout = layout
        self._prefix_tokens = prefix_tokens
        self._repeats = num_nodes if layout.num_lines > 1 else 1  # one line broadcasts over all nodes
        self._dtype = dtype
        self._masks: dict[tuple[int | None, torch.device], torch.Tensor] = {}  # (nodes x lines, 1, slots, keys)

    def mask(self, window: int | None, num_nodes: int, device: torch.device) -> torch.Tensor:
        """Return the mask (num_nodes x lines, 1, slots, keys), or (1, 1, slots, keys) if it is the same for all."""
        key = (window, device)
        if key not in self._masks:
            sees_btk = sent(self._layout.sees(self._prefix_tokens, window), device)
            added_btk = torch.zeros(sees_btk.shape, dtype=self._dtype, device=device)
            added_btk.masked_fill_(~sees_btk, torch.finfo(self._dtype).min)
            self._masks[key] = added_btk[:, None].repeat(self._repeats, 1, 1, 1)
        return self._masks[key][: num_nodes * self._layout.num_lines]


@torch.inference_mode()
def learn_windows(loaded: LoadedModel, arguments: LayerArguments) -> tuple[int | None, ...]:
    """Return how many tokens, its own one included, each layer sees back; None: all.

    The decoder runs with layers that do nothing, on a row that is longer than any window, and makes its masks.

    Raises:
        Unfit: a layer sees other tokens than the latest ones.
    """
    config = loaded.model.config.get_text_config(decoder=True)
    longest = getattr(config, "sliding_window", None) or 0
    if longest > _LONGEST_WINDOW:
        raise Unfit(f"a window of {longest} tokens is too long to be looked at")
    windows: dict[int, int | None] = {}

    def looking(layer: int) -> Any:
        def forward(hidden_btd: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            for place in arguments.masks:
                windows[layer] = _window(_argument(args, kwargs, place), hidden_btd.shape[1])
            return (hidden_btd,) if arguments.returns_tuple else hidden_btd

        return forward

    tokens_bt = torch.zeros((1, longest + 3), dtype=torch.long, device=loaded.model.device)
    with loaded.layers.forwarding([looking(layer) for layer in range(loaded.layers.num_layers)]):
        loaded.model.get_decoder()(input_ids=tokens_bt, use_cache=False)
    return tuple(windows[layer] for layer in range(loaded.layers.num_layers))


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: Place) -> Any:
    found: Any = args[place[0]] if isinstance(place[0], int) else kwargs.get(place[0])
    for at in place[1:]:
        found = found[at]
    return found


def _window(mask: Any, num_tokens: int) -> int | None:
    """Return the window of a layer's mask; no mask means that attention is causal."""
    if mask is None:
        return None
    sees_tk = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] > torch.finfo(mask.dtype).min / 2
    window = int(sees_tk[-1].sum())
    at_t = torch.arange(num_tokens, device=sees_tk.device)
    back_tk = at_t[:, None] - at_t[None, :]
    if sees_tk.shape != back_tk.shape or not torch.equal(sees_tk, (back_tk >= 0) & (back_tk < window)):
        raise Unfit("its layers see other tokens than the latest ones")
    return None if window == num_tokens else window
