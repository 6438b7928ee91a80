"""Which models can lose layers, told from the fields of their configuration alone: no torch, no transformers.

Removing a layer is only well defined where each layer stands for itself: it reads the residual stream, adds to it, and
keeps a cache of its own. Families that share state between layers, or whose layers compute something that depends
on their position, are refused with the reason.
"""

from collections.abc import Mapping, Sequence
from typing import Any

NUM_LAYERS_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # as families write it in config.json

_STATE_SPACE = "its state-space layers keep a recurrent state instead of keys and values"
_SHARED = "its layers share keys and values, so one cannot be taken out alone"
_PER_LAYER = "it feeds every layer an input of its own, bound to the layer's position"
_POSITION = "its layers compute something that depends on their position in the stack"
_REFUSED_FAMILIES: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "zamba", "zamba2", "nemotron_h"),
            *("granitemoehybrid", "rwkv", "xlstm", "recurrent_gemma", "kimi_linear", "bailing_hybrid"),
        ),
        _STATE_SPACE,
    ),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), _PER_LAYER),
    **dict.fromkeys(
        (
            *("diffllama", "minimax", "modernbert-decoder", "beam", "inkling_text", "inkling2_text", "hrm_text"),
            *("blt", "imagegpt"),
        ),
        _POSITION,
    ),
    **dict.fromkeys(("longcat_flash", "deepseek_v4", "reformer"), _SHARED),
    "mllama": "its cross-attention layers need an image",
}
_ENCODERS = frozenset(  # those that can be made decoders read every token at once unless `is_decoder` is set
    (
        *("bert", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "electra", "ernie"),
        *("albert", "distilbert", "deberta", "deberta-v2", "mpnet", "rembert", "roformer", "roc_bert", "convbert"),
        *("data2vec-text", "megatron-bert", "mobilebert", "squeezebert", "nomic_bert", "modernbert", "eurobert"),
        *("big_bird", "longformer", "funnel", "esm", "ibert", "luke", "mra", "nezha", "nystromformer", "qdqbert"),
        *("xmod", "yoso", "fnet", "canine", "layoutlm"),
    )
)
_NOT_DECODERS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def text_fields(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration that describes the decoder: `text_config` where there is one."""
    nested = fields.get("text_config")
    return nested if isinstance(nested, Mapping) else fields


def refusal(fields: Mapping[str, Any]) -> str | None:
    """Return why a model with this configuration (the fields of config.json) cannot lose layers; None: it can."""
    text = text_fields(fields)
    family = str(text.get("model_type") or fields.get("model_type") or "")
    architectures = _texts(fields.get("architectures"))
    if fields.get("is_encoder_decoder"):
        return "it is an encoder-decoder; only decoder models are searched"
    if architectures and not any(_writes_text(name) for name in architectures):
        return (
            f"its architecture is {', '.join(architectures)}, which writes no text; "
            "only decoder models (…ForCausalLM) are searched"
        )
    if family in _ENCODERS and not text.get("is_decoder"):
        return f"it is of the family {family}, an encoder: is_decoder is not set; only decoder models are searched"
    for name in (family, str(fields.get("model_type") or "")):
        if name in _REFUSED_FAMILIES:
            return f"it is of the family {name}: {_REFUSED_FAMILIES[name]}"
    if text.get("num_kv_shared_layers") or "shared" in _texts(text.get("indexer_types")):
        return _SHARED
    sources = text.get("kv_source_layers")
    if isinstance(sources, Sequence) and list(sources) != list(range(len(sources))):
        return _SHARED
    if text.get("hidden_size_per_layer_input") or text.get("ple_layer_ids"):
        return _PER_LAYER
    if text.get("scale_attn_by_inverse_layer_idx"):
        return "it divides attention scores by the layer's number (scale_attn_by_inverse_layer_idx)"
    interval = text.get("moe_layer_interval")
    if isinstance(interval, int) and interval > 1:
        return f"{_POSITION} (moe_layer_interval {interval})"
    if "mamba" in _texts(text.get("layer_types")) + _texts(text.get("layers_block_type")):
        return _STATE_SPACE
    if text.get("use_bidirectional_attention"):
        return "its attention looks ahead (use_bidirectional_attention)"
    return None


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [str(item) for item in value] if isinstance(value, list | tuple) else []


def _writes_text(architecture: str) -> bool:
    """Whether the class has a language-model head over a decoder: …ForCausalLM, …LMHeadModel, or one that also sees."""
    if architecture.endswith(_NOT_DECODERS):
        return False
    return architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText"))
