"""Seeded random Llamas without an end token, and a tokenizer of words: models of any size, made on the spot."""

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils import logging

from tale_ray.model.layers import find_layers
from tale_ray.model.load import LoadedModel, max_positions, neutral_generation
from tale_ray.records import ModelInfo

VOCABULARY = 512
FIRST_WORD = 2  # below it: padding and start
HEAD_SIZE = 64


def random_llama(
    num_layers: int, hidden_size: int, *, layer_strength: float = 1.0, max_tokens: int = 1024, seed: int = 0
) -> Any:
    """Return a random model in evaluation mode, the same for the same arguments.

    Args:
        num_layers: of the decoder.
        hidden_size: a multiple of 64; the feed-forward part is 8/3 as wide, as in Llama.
        layer_strength: how much a layer adds to what it gets. Below 1 a removed layer is missed less.
        max_tokens: of prompt and reply together.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_SIZE,
        num_key_value_heads=hidden_size // HEAD_SIZE,
        head_dim=HEAD_SIZE,
        max_position_embeddings=max_tokens,
        initializer_range=0.3,  # large enough that different prompts get different replies
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(layer_strength)
            layer.mlp.down_proj.weight.mul_(layer_strength)
    return model.eval().requires_grad_(False)


def word_tokenizer() -> Any:
    """Return a tokenizer of the words t2 ... t511: token n is the word tn."""
    words = {"<pad>": 0, "<s>": 1, **{f"t{number}": number for number in range(FIRST_WORD, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")


def save(model: Any, folder: Path) -> None:
    """Write the model and its tokenizer into a folder."""
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def loaded(model: Any) -> LoadedModel:
    """Return the model as if it had been loaded from a folder."""
    tokenizer = word_tokenizer()
    model.generation_config = neutral_generation(model, tokenizer)
    layers = find_layers(model)
    info = ModelInfo(
        layers.num_layers, model.config.model_type, "0" * 64, "float32", "cpu", 0.0, max_positions=max_positions(model)
    )
    return LoadedModel(model, tokenizer, layers, info)


def random_words(count: int, length: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Return `count` different sequences of `length` word tokens; no two need begin alike."""
    return [tuple(torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=generator).tolist()) for _ in range(count)]
