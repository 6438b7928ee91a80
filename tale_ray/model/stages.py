"""Which device each part of a model lies on: layers are dealt to the stages of a pipeline, the rest lies beside them.

Knows the shapes of weights, not their values: what is looked at is a model without storage. Never run on GPUs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tale_ray.errors import ModelError
from tale_ray.model.balance import balance
from tale_ray.model.layers import find_layers

_USABLE = 0.9  # of a GPU's free memory, for weights


def hollow_model(config: Any, dtype: Any, *, trust_remote_code: bool = False) -> Any:
    """Return the model of a configuration without storage: shapes, no values."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def device_map(model: Any, devices: Sequence[str]) -> dict[str, str]:
    """Return the device of each part of a model, by name, together all of it.

    A stage's layers lie together, and stages are as even in bytes as they can be. What stands before the layers goes to
    the first device, what stands after them to the last; a head that shares the embedding's weights, to the embedding.

    Raises:
        ConfigError: there are more devices than layers.
        ModelError: the weights do not fit into the GPUs' free memory.
    """
    layers = find_layers(model)
    name = next(name for name, module in model.named_modules() if module is layers.full)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    first: list[tuple[str, nn.Module]] = []
    last: list[tuple[str, nn.Module]] = []
    has_passed = False
    for part, module in _parts(model, "", name):
        if module is layers.full:
            has_passed = True
        elif not has_passed or (is_tied and module is head) or next(module.parameters(), None) is None:
            first.append((part, module))
        else:
            last.append((part, module))
    sizes = [num_bytes([layer]) for layer in layers.full]
    first_bytes, last_bytes = (num_bytes([module for _, module in parts]) for parts in (first, last))
    stages = balance(sizes, first_bytes, last_bytes, len(devices))
    held = [sum(size for size, of in zip(sizes, stages, strict=True) if of == stage) for stage in range(len(devices))]
    held[0] += first_bytes
    held[-1] += last_bytes
    for device, weights in zip(devices, held, strict=True):
        check_fits(weights, device, len(devices))
    return {
        **{part: devices[0] for part, _ in first},
        **{f"{name}.{layer}": devices[stage] for layer, stage in enumerate(stages)},
        **{part: devices[-1] for part, _ in last},
    }


def check_fits(weight_bytes: int, device: str, num_devices: int) -> None:
    """Refuse weights that are too large for a GPU; anything else is not asked.

    Raises:
        ModelError: they are.
    """
    if not device.startswith("cuda"):
        return
    free = int(torch.cuda.mem_get_info(torch.device(device))[0])
    if weight_bytes > _USABLE * free:
        gpus = f"{num_devices} GPU{'s' if num_devices > 1 else ''}"
        raise ModelError(
            f"the model does not fit into the memory of {gpus}: {weight_bytes / 2**30:.1f} GiB of weights are to go to "
            f"{device}, which has {free / 2**30:.1f} GiB free, and a tenth of that is not for weights: "
            "give each worker more GPUs (--gpus-per-worker), or choose a smaller dtype"
        )


def num_bytes(modules: Sequence[nn.Module]) -> int:
    """Return the bytes of the weights and buffers of some modules; what they share counts once."""
    tensors = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _parts(module: nn.Module, prefix: str, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the largest parts that do not hold the list of that name, and the list itself."""
    for child, part in module.named_children():
        full = f"{prefix}{child}"
        if name.startswith(f"{full}."):
            yield from _parts(part, f"{full}.", name)
        else:
            yield full, part
