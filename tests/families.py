"""Tiny random models of many families, seeded, float32, with a tokenizer: enough to tell right from wrong layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from tale_ray.engine.score import Scorer
from tale_ray.model.layers import find_layers
from tale_ray.model.load import LoadedModel, max_positions, neutral_generation
from tale_ray.records import ModelInfo, UnitResult

VOCABULARY = 97
WINDOW = 6  # shorter than the prompts
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SHARED: dict[str, Any] = {"tie_word_embeddings": True}


def _sizes(**changes: Any) -> dict[str, Any]:
    return {**_SIZES, **changes}


_WITHOUT_HEAD_DIM = {key: value for key, value in _SIZES.items() if key != "head_dim"}
_FULL, _SLIDING = "full_attention", "sliding_attention"

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**_sizes()),
    "qwen2": lambda: tf.Qwen2Config(**_WITHOUT_HEAD_DIM, **_SHARED),
    "qwen2_window": lambda: tf.Qwen2Config(
        **_WITHOUT_HEAD_DIM, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "qwen3": lambda: tf.Qwen3Config(**_sizes()),
    "mistral_window": lambda: tf.MistralConfig(**_sizes(sliding_window=WINDOW)),
    "gemma2": lambda: tf.Gemma2Config(**_sizes(sliding_window=WINDOW, query_pre_attn_scalar=8)),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **_sizes(num_hidden_layers=6, sliding_window=WINDOW, query_pre_attn_scalar=8),
        layer_types=[_SLIDING, _SLIDING, _FULL, _SLIDING, _FULL, _SLIDING],
    ),
    "phi3": lambda: tf.Phi3Config(**_WITHOUT_HEAD_DIM, sliding_window=WINDOW),
    "gpt2": lambda: tf.GPT2Config(
        **{"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},
        **{"initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(
        **{key: value for key, value in _WITHOUT_HEAD_DIM.items() if key != "num_key_value_heads"}
    ),
    "mixtral": lambda: tf.MixtralConfig(**_sizes(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **_sizes(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=2)
    ),
    "olmo2": lambda: tf.Olmo2Config(**_WITHOUT_HEAD_DIM),
    "smollm3": lambda: tf.SmolLM3Config(
        **_WITHOUT_HEAD_DIM, no_rope_layers=[1, 0, 1, 0], use_sliding_window=True, sliding_window=WINDOW
    ),
    "gpt_oss": lambda: tf.GptOssConfig(
        **_sizes(num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "bloom": lambda: tf.BloomConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 4, "n_head": 4, "initializer_range": 0.3},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "lfm2": lambda: tf.Lfm2Config(**_sizes(), layer_types=["conv", _FULL, "conv", _FULL]),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **{**_WITHOUT_HEAD_DIM, "num_key_value_heads": 4},
        **{"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2},
        **{"topk_group": 1, "first_k_dense_replace": 2, "kv_lora_rank": 8, "q_lora_rank": 8},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_mtp_layers": 0},
    ),
}


def _deeper(config: Any, num_layers: int) -> Any:
    """The configuration with more layers, whose kinds go on as they began."""
    fields = config.to_dict()
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            fields[name] = (value * num_layers)[:num_layers]
    fields["n_layer" if "n_layer" in fields else "num_hidden_layers"] = num_layers
    return type(config)(**fields)


def tiny_model(family: str, seed: int = 0, num_layers: int | None = None) -> Any:
    """A random model of a family in evaluation mode, without gradients; the same for the same seed."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    config = config if num_layers is None else _deeper(config, num_layers)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "sink" not in name:  # norms and biases start as ones and zeros: make them count
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


def tiny_tokenizer(size: int = VOCABULARY) -> Any:
    """A tokenizer of words t3 ... t96 (token n is the word tn) with padding 0, start 1 and end 2."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    words = {**special, **{f"t{number}": number for number in range(3, size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tiny_loaded(family: str, seed: int = 0, num_layers: int | None = None) -> LoadedModel:
    """A tiny model as `load_model` would return it, without a folder."""
    model, tokenizer = tiny_model(family, seed, num_layers), tiny_tokenizer()
    model.generation_config = neutral_generation(model, tokenizer)
    layers = find_layers(model)
    info = ModelInfo(
        layers.num_layers, model.config.model_type, "0" * 64, "float32", "cpu", 0.0, max_positions=max_positions(model)
    )
    return LoadedModel(model, tokenizer, layers, info)


def save_tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint of a tiny model with its tokenizer, as a user would have it."""
    tiny_model(family, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_prompts(count: int, seed: int = 0, shortest: int = 3, longest: int = 3 * WINDOW) -> list[tuple[int, ...]]:
    """Random prompts of different lengths, the first one the longest."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    lengths[0] = longest
    return [tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()) for length in lengths]


def score_unit(
    loaded: LoadedModel, unit: Any, rows: Any, answer: Any, new_tokens: int, batch_bytes: int | None, worker: str
) -> UnitResult:
    """One unit by the plain path."""
    return Scorer(loaded, batch_bytes, sweeps=False).score(unit, rows, answer, new_tokens, worker)
