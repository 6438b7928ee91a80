"""Which device each part of a model lies on: layers are dealt to the stages of a pipeline, the rest lies beside them.

Knows the shapes of weights, not their values: what is looked at is a model without storage. Never run on GPUs.
"""

from collections.abc import Sequence
from typing import Any

import torch

from tale_ray.errors import ModelError
from tale_ray.model.outline import outline

_USABLE_PERCENT = 90  # of a GPU's free memory, for weights


def device_map(model: Any, devices: Sequence[str]) -> dict[str, str]:
    """Return the device of each part of a model, by name, together all of it.

    A stage's layers lie together, and stages are as even in bytes as they can be.

    Raises:
        ConfigError: there are more devices than layers.
        ModelError: the weights do not fit into the GPUs' free memory.
    """
    found = outline(model)
    stages = found.deal(len(devices))
    for device, weights in zip(devices, found.stage_bytes(stages), strict=True):
        check_fits(weights, device, len(devices))
    return {
        **dict.fromkeys(found.first, devices[0]),
        **{f"{found.layers}.{layer}": devices[stage] for layer, stage in enumerate(stages)},
        **dict.fromkeys(found.last, devices[-1]),
    }


def check_fits(weight_bytes: int, device: str, num_devices: int, free_bytes: int | None = None) -> None:
    """Refuse weights that are too large for a GPU; anything else is not asked.

    Args:
        weight_bytes: that are to lie there.
        device: such as cuda:1.
        num_devices: of the worker.
        free_bytes: of the GPU; None: it is asked.

    Raises:
        ModelError: they are.
    """
    if not device.startswith("cuda"):
        return
    free = int(torch.cuda.mem_get_info(torch.device(device))[0]) if free_bytes is None else free_bytes
    if weight_bytes > weight_room(free):
        gpus = f"{num_devices} GPU{'s' if num_devices > 1 else ''}"
        raise ModelError(
            f"the model does not fit into the memory of {gpus}: {weight_bytes / 2**30:.1f} GiB of weights are to go to "
            f"{device}, which has {free / 2**30:.1f} GiB free, and a tenth of that is not for weights: "
            "give each worker more GPUs (--gpus-per-worker), or choose a smaller dtype"
        )


def weight_room(free_bytes: int) -> int:
    """Return how many bytes of a GPU's free memory, or of several GPUs', weights may take."""
    return free_bytes * _USABLE_PERCENT // 100
