"""Tensors that go to the device of the layer that needs them, without waiting for what runs there. Knows no models.

A pipeline's devices work at the same time because nothing here, nor in the sweep, waits for any of them before answers
are read: the work of one micro-batch is queued on all devices, and then that of the next one.
"""

from dataclasses import dataclass, field

import torch

from tale_ray.model.layers import LayerStack


def layer_devices(layers: LayerStack) -> tuple[torch.device, ...]:
    """Return the device that each layer's weights lie on; a layer without weights runs where the one below it does."""
    if layers.is_streamed:  # weights come and go: they are where the rest of the model is when they are needed
        device: torch.device = layers.model.device  # type: ignore[assignment]
        return (device,) * layers.num_layers
    found: list[torch.device] = []
    for layer in layers.full:
        first = next(layer.parameters(), None)
        found.append(first.device if first is not None else found[-1])
    return tuple(found)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on a device. A GPU that is busy is not waited for: what it gets comes from pinned memory."""
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(slots=True)
class Copies:
    """Tensors on the devices that they were asked for on, each sent once."""

    _found: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def on(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the tensor on a device."""
        if tensor.device == device:
            return tensor
        key = (id(tensor), device)
        if key not in self._found:
            self._found[key] = (tensor, sent(tensor, device))  # the tensor, too: its id stays its
        return self._found[key][1]
