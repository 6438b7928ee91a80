"""Decoder layers whose weights come when they are needed: one layer at work, the next one on its way.

A layer's `forward` is an instance attribute that first asks for its weights. Which layer comes after which is learned
from the last pass, so that layers that are removed are not fetched; what was fetched in vain is let go. Knows nothing
of families or candidates.

Where files hold the weights as they are used, on a CPU, parameters lie in the mapped files themselves for good, and all
there is to do is to read pages ahead and to give them back. Otherwise (another dtype, or a GPU) weights are copied into
one of two buffers, and a layer's parameters are bound to it. Buffers on a GPU are written for but have never been run.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from tale_ray.model.checkpoint import MappedFiles, StoredTensor

_ALIGNMENT = 256  # bytes, of every weight in a buffer


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter of a layer: whose it is, and where it is stored."""

    module: nn.Module
    name: str  # in its module
    stored: StoredTensor

    @property
    def dtype(self) -> torch.dtype:
        """The one that the model computes in."""
        found = self.module._parameters[self.name]
        assert found is not None
        return found.dtype


class WeightSource(Protocol):
    """Brings a layer's weights; `fetch` runs in a thread of its own, one call at a time, the rest in the model's."""

    def fetch(self, layer: int) -> None:
        """Bring the weights near. It does no harm where they are there already."""

    def use(self, layer: int) -> bool:
        """Make the layer compute with its weights; False if they are not there (any more)."""

    def let_go(self, layer: int) -> None:
        """Give up what the layer's weights take. It does no harm where they take nothing."""


class MappedWeights:
    """Weights that lie in mapped files."""

    def __init__(self, files: MappedFiles, layers: Sequence[Sequence[Weight]], rest: Sequence[StoredTensor]) -> None:
        self._files = files
        self._layers = [[weight.stored for weight in weights] for weights in layers]
        self._rest = rest  # embedding and head
        self._last = -1
        for weight in (weight for weights in layers for weight in weights):
            weight.module._parameters[weight.name] = _parameter(files.view(weight.stored))

    def fetch(self, layer: int) -> None:
        """Read the pages."""
        self._files.fetch(self._layers[layer])

    def use(self, layer: int) -> bool:
        """Nothing to do but to give the head's pages back when a pass begins."""
        if layer <= self._last:
            self._files.drop(self._rest)
        self._last = layer
        return True

    def let_go(self, layer: int) -> None:
        """Give the pages back."""
        self._files.drop(self._layers[layer])


class CopiedWeights:
    """Weights that are copied into one of two buffers, as large as the largest layer."""

    def __init__(self, files: MappedFiles, layers: Sequence[Sequence[Weight]], device: torch.device) -> None:
        self._files = files
        self._layers = layers
        self._used: int | None = None
        self._absent = [[weight.module._parameters[weight.name] for weight in weights] for weights in layers]
        size = max(_offsets(weights)[-1] for weights in layers)
        self._slots = [_Slot(files, size, layers, device) for _ in range(2)]

    def fetch(self, layer: int) -> None:
        """Copy the weights into the buffer that is not in use."""
        if any(slot.layer == layer for slot in self._slots):
            return
        slot = next(slot for slot in self._slots if slot.layer is None or slot.layer != self._used)
        slot.fill(layer)
        self._files.drop(weight.stored for weight in self._layers[layer])

    def use(self, layer: int) -> bool:
        """Bind the layer's parameters to its buffer."""
        slot = next((slot for slot in self._slots if slot.layer == layer), None)
        if slot is None:
            return False
        self._used = layer
        slot.arrive()
        for weight, parameter in zip(self._layers[layer], slot.parameters[layer], strict=True):
            weight.module._parameters[weight.name] = parameter
        return True

    def let_go(self, layer: int) -> None:
        """Unbind the layer's parameters. The weights stay in their buffer until it is filled again."""
        if self._used != layer:
            return
        for weight, absent in zip(self._layers[layer], self._absent[layer], strict=True):
            weight.module._parameters[weight.name] = absent
        for slot in self._slots:
            if slot.layer == layer:
                slot.leave()
        self._used = None


class _Slot:
    """A buffer that holds one layer at a time."""

    def __init__(self, files: MappedFiles, size: int, layers: Sequence[Sequence[Weight]], device: torch.device) -> None:
        self.layer: int | None = None
        self._files = files
        self._layers = layers
        self._is_gpu = device.type == "cuda"
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
        staging = torch.empty(size, dtype=torch.uint8, pin_memory=True) if self._is_gpu else buffer
        self._views = [_views(buffer, weights) for weights in layers]
        self._staged = [_views(staging, weights) for weights in layers]
        self.parameters = [[_parameter(view) for view in views] for views in self._views]
        if self._is_gpu:
            self._copies: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._left: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def fill(self, layer: int) -> None:
        """Copy a layer's weights from the files."""
        self.layer = None
        if self._is_gpu:
            self._arrived.synchronize()  # what was staged last has been copied
        for weight, staged in zip(self._layers[layer], self._staged[layer], strict=True):
            self._files.fetch([weight.stored])
            staged.copy_(self._files.view(weight.stored))
        if self._is_gpu:
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(self._left)  # the layer that was here has been computed
                for view, staged in zip(self._views[layer], self._staged[layer], strict=True):
                    view.copy_(staged, non_blocking=True)
                self._arrived.record(self._copies)
        self.layer = layer

    def arrive(self) -> None:
        """Let what is computed next wait for the copies."""
        if self._is_gpu:
            torch.cuda.current_stream().wait_event(self._arrived)

    def leave(self) -> None:
        """Let the next copies wait for what is being computed."""
        if self._is_gpu:
            self._left.record(torch.cuda.current_stream())


class LayerStream:
    """Has every layer's weights there when its forward begins.

    Whatever interrupts a forward, the next one begins with the right weights: what is bound is told by the source,
    not remembered from what was done last.
    """

    def __init__(self, layers: Sequence[nn.Module], source: WeightSource) -> None:
        self._source = source
        self._num_layers = len(layers)
        self._current: int | None = None
        self._after: dict[int, int] = {}  # as in the last pass
        self._ahead: dict[int, Future[None]] = {}
        self._thread = ThreadPoolExecutor(1, "tale-weights")  # ends with this object
        for number, layer in enumerate(layers):
            vars(layer)["forward"] = self._streaming(number, layer.forward)

    def _streaming(self, number: int, own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.enter(number)
            return own(*args, **kwargs)

        return forward

    def enter(self, layer: int) -> None:
        """Have the layer's weights there, let the last one's go and send for the next one's.

        Raises:
            ModelError: the weights cannot be read.
        """
        if layer == self._current:
            return
        last, self._current = self._current, None
        if last is not None:
            self._after[last] = layer
        arriving = self._ahead.get(layer) or self._thread.submit(self._source.fetch, layer)
        self._ahead[layer] = arriving
        for other in range(self._num_layers):
            if other != layer and (other == last or other in self._ahead or last is None):
                self._forget(other)
        try:
            arriving.result()
        finally:
            if arriving.done():
                self._ahead.pop(layer, None)
        while not self._source.use(layer):
            self._thread.submit(self._source.fetch, layer).result()
        self._current = layer
        following = self._after.get(layer, (layer + 1) % self._num_layers)
        if following != layer:
            self._ahead[following] = self._thread.submit(self._source.fetch, following)

    def _forget(self, layer: int) -> None:
        """Give up a layer, after waiting for it if it was sent for in vain."""
        if (fetched := self._ahead.get(layer)) is not None:
            if not fetched.cancel():
                wait([fetched])
            del self._ahead[layer]
        self._source.let_go(layer)


def _offsets(weights: Sequence[Weight]) -> list[int]:
    """Return where in a buffer each weight begins, and where the last one ends."""
    offsets = [0]
    for weight in weights:
        size = torch.Size(weight.stored.shape).numel() * weight.dtype.itemsize
        offsets.append(offsets[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return offsets


def _views(buffer: torch.Tensor, weights: Sequence[Weight]) -> list[torch.Tensor]:
    views = []
    for start, weight in zip(_offsets(weights), weights, strict=False):
        size = torch.Size(weight.stored.shape).numel() * weight.dtype.itemsize
        views.append(buffer[start : start + size].view(weight.dtype).view(weight.stored.shape))
    return views


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def make_source(
    files: MappedFiles,
    layers: Sequence[Sequence[Weight]],
    rest: Mapping[str, StoredTensor],
    device: torch.device,
    *,
    is_mapped: bool,
) -> WeightSource:
    """Return the source that suits: the mapped files themselves, or buffers."""
    if is_mapped:
        return MappedWeights(files, layers, list(rest.values()))
    return CopiedWeights(files, layers, device)
