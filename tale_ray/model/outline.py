"""How large the parts of a model are, told by a model without storage. Knows neither devices nor files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tale_ray.model.balance import balance
from tale_ray.model.layers import find_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def hollow_model(config: Any, dtype: Any, *, trust_remote_code: bool = False) -> Any:
    """Return the model of a configuration without storage: shapes, no values."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def configured_dtype(config: Any, dtype: str) -> torch.dtype | None:
    """Return the dtype asked for; of `checkpoint`, the one that the configuration names, None if it names none."""
    if dtype in DTYPES:
        return DTYPES[dtype]
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    return named if isinstance(named, torch.dtype) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """The bytes of a model's parts in a pipeline.

    What stands before the layers goes to the first stage, what stands after them to the last; a head that shares the
    embedding's weights, to the embedding.
    """

    layers: str  # name of the list of layers
    layer_bytes: tuple[int, ...]
    first: tuple[str, ...]  # names of the parts that go to the first stage
    first_bytes: int
    last: tuple[str, ...]
    last_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights and buffers; shared ones count once."""
        return self.first_bytes + sum(self.layer_bytes) + self.last_bytes

    def deal(self, num_stages: int) -> tuple[int, ...]:
        """Return the stage of each layer: contiguous, and as even in bytes as they can be.

        Raises:
            ConfigError: there are more stages than layers.
        """
        return balance(self.layer_bytes, self.first_bytes, self.last_bytes, num_stages)

    def stage_bytes(self, stages: Sequence[int]) -> tuple[int, ...]:
        """Return the bytes of the weights of each stage, given that of each layer."""
        held = [0] * (max(stages) + 1)
        for size, stage in zip(self.layer_bytes, stages, strict=True):
            held[stage] += size
        held[0] += self.first_bytes
        held[-1] += self.last_bytes
        return tuple(held)


def outline(model: Any) -> Outline:
    """Return the outline of a transformers model, with or without storage.

    Raises:
        ModelError: it has no layers that can be removed.
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
    return Outline(
        layers=name,
        layer_bytes=tuple(num_bytes([layer]) for layer in layers.full),
        first=tuple(part for part, _ in first),
        first_bytes=num_bytes([module for _, module in first]),
        last=tuple(part for part, _ in last),
        last_bytes=num_bytes([module for _, module in last]),
    )


def num_bytes(modules: Sequence[nn.Module]) -> int:
    """Return the bytes of the weights and buffers of some modules; what they share counts once."""
    tensors = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def token_products(model: Any) -> tuple[int, ...]:
    """Return how many weights of each layer a token is multiplied with: of experts, those of one token only."""
    config = model.config.get_text_config(decoder=True)
    experts = next((found for name in _NUM_EXPERTS if (found := getattr(config, name, None))), 0)
    chosen = getattr(config, "num_experts_per_tok", None) or experts

    def met(weight: nn.Parameter) -> int:
        if weight.ndim == 3 and weight.shape[0] == experts:
            return weight.numel() // experts * chosen
        return weight.numel() if weight.ndim > 1 else 0

    return tuple(sum(map(met, layer.parameters())) for layer in find_layers(model).full)


def _parts(module: nn.Module, prefix: str, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the largest parts that do not hold the list of that name, and the list itself."""
    for child, part in module.named_children():
        full = f"{prefix}{child}"
        if name.startswith(f"{full}."):
            yield from _parts(part, f"{full}.", name)
        else:
            yield full, part
