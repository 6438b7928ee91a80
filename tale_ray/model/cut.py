"""The configuration of a model without some of its layers. Knows nothing of weights or modules.

Whatever a configuration says layer by layer has to be cut with the layers, or the pruned model computes something else:
at once (masks and caches are chosen by `layer_types`) or after it was saved and loaded again (which layers are dense).
"""

import copy
from collections.abc import Collection
from typing import Any

from tale_ray.errors import ModelError

# One value per layer.
_VALUES = (
    *("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "attention_layers", "block_types"),
    *("num_attention_heads_per_layer", "layer_rope_theta", "indexer_types", "activation_sparsity_pattern"),
    *("layers_num_experts", "sliding_window_pattern", "moe_layer_freq", "intermediate_size", "num_key_value_heads"),
    *("num_attention_heads", "hybrid_override_pattern"),
)
# Numbers of the layers that have some property.
_NUMBERS = (
    *("moe_layers", "mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "global_attention_layers"),
    *("rope_scaling_layers", "kv_source_layers"),
)
# The first so many layers have some property.
_COUNTS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")


def num_layers(config: Any) -> int:
    """Return the number of layers of the decoder that `config` describes.

    Raises:
        ModelError: the configuration does not say.
    """
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise ModelError(f"the configuration of {config.model_type} does not say how many layers the decoder has")
    return count


def check_removed(removed: Collection[int], total: int) -> tuple[int, ...]:
    """Return the layers in ascending order.

    Raises:
        ModelError: a layer does not exist, is named twice, or none would be left.
    """
    for layer in removed:
        if not 0 <= layer < total:
            raise ModelError(
                f"layer {layer} cannot be removed: the model has {total} layers, numbered 0 to {total - 1}"
            )
    if len(set(removed)) < len(removed):
        raise ModelError(f"layers {sorted(removed)} cannot be removed: a layer is named twice; name each once")
    if len(removed) == total:
        raise ModelError(f"all {total} layers cannot be removed: a model keeps at least one layer")
    return tuple(sorted(removed))


def cut_config(config: Any, removed: Collection[int]) -> Any:
    """Return a deep copy of a transformers configuration, of the model without the layers `removed`.

    Raises:
        ModelError: a layer cannot be removed, or a per-layer field has a form that is not known.
    """
    total = num_layers(config)
    cut = copy.deepcopy(config)
    if kept := kept_layers(removed, total):
        values = cut_fields(cut.get_text_config(decoder=True), kept)
        vars(cut.get_text_config(decoder=True)).update(values)
    return cut


def kept_layers(removed: Collection[int], total: int) -> tuple[int, ...]:
    """Return the surviving layers of `total`, ascending; empty when nothing is removed.

    Raises:
        ModelError: a layer cannot be removed.
    """
    gone = set(check_removed(removed, total))
    return tuple(layer for layer in range(total) if layer not in gone) if gone else ()


def cut_fields(text_config: Any, kept: tuple[int, ...]) -> dict[str, Any]:
    """Return the new values of those entries of `vars(text_config)` that change when only `kept` layers stay.

    Raises:
        ModelError: a per-layer field has a form that is not known.
    """
    entries = vars(text_config)
    total = num_layers(text_config)
    new_number = {layer: position for position, layer in enumerate(kept)}
    fields: dict[str, Any] = {_stored_name(text_config, "num_hidden_layers"): len(kept)}
    for name, value in entries.items():
        if name in _COUNTS and isinstance(value, int):
            fields[name] = sum(layer < value for layer in kept)
        elif not isinstance(value, list | tuple):
            continue
        elif name in _NUMBERS:
            fields[name] = type(value)(new_number[layer] for layer in value if layer in new_number)
        elif name in _VALUES and len(value) == total:
            fields[name] = type(value)(value[layer] for layer in kept)
        elif _sounds_per_layer(name, value, total):
            raise ModelError(
                f"layers of {text_config.model_type} cannot be removed: its configuration has the field {name} "
                f"with {len(value)} entries for {total} layers, and what they mean is not known"
            )
    fields.update(_dense_layers(entries, kept))
    fields.update(_sparse_range(entries, kept))
    if "attention_layers" in fields and "attention_types" in entries:  # GPT-Neo derives the one from the other
        fields["attention_types"] = [[[name], 1] for name in fields["attention_layers"]]
    if (heterogeneity := entries.get("_heterogeneity_spec")) is not None:
        fields["_heterogeneity_spec"] = spec = copy.copy(heterogeneity)
        overrides = heterogeneity.per_layer_overrides
        spec.per_layer_overrides = {new_number[at]: over for at, over in overrides.items() if at in new_number}
    return fields


def _dense_layers(entries: dict[str, Any], kept: tuple[int, ...]) -> dict[str, Any]:
    """Qwen's MoE families make every `decoder_sparse_step`-th layer sparse: said by a list, it survives the cut."""
    step = entries.get("decoder_sparse_step")
    if not isinstance(step, int) or step < 1 or "mlp_only_layers" not in entries:
        return {}
    only_dense = entries["mlp_only_layers"] or ()
    dense = [at for at, layer in enumerate(kept) if layer in only_dense or (layer + 1) % step]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def _sparse_range(entries: dict[str, Any], kept: tuple[int, ...]) -> dict[str, Any]:
    """ERNIE's MoE families name the first and the last sparse layer (-1: the last of all)."""
    start, end = entries.get("moe_layer_start_index"), entries.get("moe_layer_end_index")
    if not isinstance(start, int) or not isinstance(end, int):
        return {}
    sparse = [at for at, layer in enumerate(kept) if layer >= start and (end == -1 or layer <= end)]
    first, last = (sparse[0], sparse[-1]) if sparse else (len(kept), len(kept))
    return {"moe_layer_start_index": first, "moe_layer_end_index": last}


def _stored_name(config: Any, name: str) -> str:
    return str(config.attribute_map.get(name, name))


def _sounds_per_layer(name: str, value: list[Any] | tuple[Any, ...], total: int) -> bool:
    if not value or "token" in name:
        return False
    return "layer" in name or (len(value) == total and name.endswith(("_types", "_pattern", "_idxs", "_indices")))
