"""The layers of a loaded decoder, and the model without some of them. Knows nothing of candidates, rows or scores."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tale_ray.errors import ModelError
from tale_ray.model.cut import cut_config, cut_fields, kept_layers, num_layers
from tale_ray.model.support import refusal

__all__ = ["LayerStack", "check_config", "cut_config", "find_layers"]

_ABSENT = object()
_NUMBER_ATTRIBUTES = ("layer_idx", "layer_id", "layer_number")  # by which a module finds its slot in the KV cache


def check_config(config: Any) -> None:
    """Refuse a configuration whose model cannot lose layers.

    Raises:
        ModelError: with the reason.
    """
    fields = {**config.to_dict(), "text_config": config.get_text_config(decoder=True).to_dict()}
    if reason := refusal(fields):
        raise ModelError(f"a model of the family {config.model_type} cannot be searched: {reason}")
    total = num_layers(config)
    if total > 1:
        cut_config(config, {0})  # fails on per-layer fields that are not known


def find_layers(model: nn.Module) -> "LayerStack":
    """Return the decoder layers of a transformers model, whatever its family calls them.

    They are the one outermost `ModuleList` inside the decoder that is as long as the configuration says.

    Raises:
        ModelError: there is none, there are several, or the family cannot lose layers.
    """
    config: Any = model.config
    check_config(config)
    total = num_layers(config)
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    found = [place for place in _outermost_lists(decoder) if len(_list_at(*place)) == total]
    if not found:
        raise ModelError(f"no list of {total} layers was found in {type(model).__name__}: the family is not supported")
    if len(found) > 1:
        names = ", ".join(name for _, name in found)
        raise ModelError(f"{type(model).__name__} has several lists of {total} layers ({names}): not supported")
    owner, name = found[0]
    stack = LayerStack(model, owner, name)
    stack.check_numbers()
    return stack


def _outermost_lists(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield (owner, name) of each `ModuleList` that lies in no other one: experts inside a layer are not layers."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield module, name
        else:
            yield from _outermost_lists(child)


def _list_at(owner: nn.Module, name: str) -> nn.ModuleList:
    found = owner._modules[name]
    assert isinstance(found, nn.ModuleList)
    return found


@dataclass
class LayerStack:
    """The decoder's layers in the full model. Layer numbers are always those of the full model."""

    model: nn.Module
    owner: nn.Module  # the module that holds the list
    name: str  # of the list in its owner
    is_streamed: bool = False  # a pass reads the weights from the disk
    _undo: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        self.full: nn.ModuleList = _list_at(self.owner, self.name)

    @property
    def num_layers(self) -> int:
        """Number of layers of the full model."""
        return len(self.full)

    def check_numbers(self) -> None:
        """Refuse layers that number themselves otherwise than by their position.

        Raises:
            ModelError: a module inside layer k carries another number than k.
        """
        for layer, module in enumerate(self.full):
            for entries, name in _numbers(module):
                if entries[name] != layer:
                    raise ModelError(
                        f"layer {layer} of {type(self.model).__name__} carries the number {entries[name]} ({name}): "
                        "removing layers from this family is not supported"
                    )

    def check_removal(self, removed: Collection[int]) -> None:
        """Refuse layers that cannot be removed together.

        Raises:
            ModelError: a layer does not exist, or none would be left.
        """
        kept_layers(removed, self.num_layers)

    @contextmanager
    def without(self, removed: Collection[int]) -> Iterator[None]:
        """Within the context the model is the one without the layers `removed`; afterwards it is as before.

        The list of layers is shorter but holds the same modules, the configuration and the layers' own numbers follow,
        so that forward, KV cache and `generate` are those of the pruned model. No weight is copied. Nothing
        removed: nothing is touched. One context at a time.

        Raises:
            ModelError: a layer cannot be removed, or another context is open.
        """
        if self._undo:
            raise ModelError("layers are removed already: leave the first `without` before entering another")
        kept = kept_layers(removed, self.num_layers)
        changes = self._changes(kept) if kept else []
        try:
            for entries, name, value in changes:
                self._undo.append((entries, name, entries[name]))
                entries[name] = value
            yield
        finally:
            self.restore()

    @contextmanager
    def forwarding(self, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """Within the context layer k runs `forwards[k]` instead of its own forward. One context at a time.

        Raises:
            ModelError: another context is open.
        """
        if self._undo:
            raise ModelError("layers are changed already: leave the first context before entering another")
        try:
            for layer, forward in zip(self.full, forwards, strict=True):
                entries = vars(layer)
                self._undo.append((entries, "forward", entries.get("forward", _ABSENT)))
                entries["forward"] = forward
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Put the full model back. The contexts do so themselves; calling it again does no harm.

        It is for those whom a signal may interrupt between two steps of entering or leaving the context.
        """
        while self._undo:
            entries, name, value = self._undo[-1]
            if value is _ABSENT:
                entries.pop(name, None)
            else:
                entries[name] = value
            self._undo.pop()

    def _changes(self, kept: tuple[int, ...]) -> list[tuple[dict[str, Any], str, Any]]:
        """Return (dictionary, key, new value) of everything that differs in the model of the `kept` layers."""
        shorter = nn.ModuleList([self.full[layer] for layer in kept])
        shorter.training = self.full.training
        changes: list[tuple[dict[str, Any], str, Any]] = [(self.owner._modules, self.name, shorter)]
        for config in self._configs():
            changes.extend((vars(config), name, value) for name, value in cut_fields(config, kept).items())
        for position, layer in enumerate(kept):
            changes.extend((entries, name, position) for entries, name in _numbers(self.full[layer]))
        return changes

    def _configs(self) -> list[Any]:
        """The decoder's configuration, and copies of it that modules carry (composite models make some)."""
        own: Any = self.model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        configs = {id(own): own}
        for module in self.owner.modules():
            config: Any = vars(module).get("config")
            if config is not None and type(config) is type(own) and config.num_hidden_layers == self.num_layers:
                configs[id(config)] = config
        return list(configs.values())


def _numbers(layer: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (attribute dictionary, name) of every layer number inside `layer`."""
    for module in layer.modules():
        entries = vars(module)
        for name in _NUMBER_ATTRIBUTES:
            if isinstance(entries.get(name), int):
                yield entries, name
