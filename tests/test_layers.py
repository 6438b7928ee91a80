"""The layer stack: what it finds, what it refuses, and that it always puts everything back."""

import pytest
import torch
import transformers as tf
from families import FAMILIES, VOCABULARY, tiny_loaded, tiny_model, tiny_prompts
from oracles import next_logits
from signals import Signal, struck_at
from torch import nn

from tale_ray.errors import ModelError
from tale_ray.model.cut import cut_fields
from tale_ray.model.layers import cut_config, find_layers


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "layers"), ("gpt2", "h"), ("gpt_neox", "layers"), ("mixtral", "layers")]
)
def test_finds_the_decoder_list_whatever_its_name(family, name):
    model = tiny_model(family)
    layers = find_layers(model)
    assert (layers.num_layers, layers.name) == (4, name)
    assert list(layers.full) == list(getattr(model.base_model, name))


def test_experts_of_the_same_number_are_not_taken_for_layers():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList(nn.Identity() for _ in range(4))
    assert find_layers(model).full is model.model.layers


def test_finds_the_text_layers_of_a_model_that_also_sees():
    text = FAMILIES["gemma3"]().to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2}
    config = tf.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8})
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    layers, prompt = find_layers(model), tiny_prompts(1)[0]
    assert layers.full is model.model.language_model.layers
    cut = tf.AutoModelForCausalLM.from_config(cut_config(config, (0, 2))).eval()
    with layers.without((0, 2)):
        cut.load_state_dict(model.state_dict())
        torch.testing.assert_close(next_logits(cut, prompt), next_logits(model, prompt), atol=1e-5, rtol=1e-5)
    assert config.get_text_config().num_hidden_layers == 6


def test_two_lists_of_the_right_length_are_ambiguous():
    model = tiny_model("llama")
    model.model.others = nn.ModuleList(nn.Identity() for _ in range(4))
    with pytest.raises(ModelError, match=r"several lists of 4 layers \(layers, others\)"):
        find_layers(model)


def test_no_list_of_the_right_length():
    model = tiny_model("llama")
    del model.model.layers[0]
    with pytest.raises(ModelError, match="no list of 4 layers was found in LlamaForCausalLM"):
        find_layers(model)


def test_a_layer_that_numbers_itself_otherwise_is_refused():
    model = tiny_model("llama")
    model.model.layers[2].self_attn.layer_idx = 5
    with pytest.raises(ModelError, match="layer 2 of LlamaForCausalLM carries the number 5"):
        find_layers(model)


def test_scaling_by_layer_number_is_refused():
    config = tf.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=VOCABULARY, scale_attn_by_inverse_layer_idx=True)
    config.bos_token_id = config.eos_token_id = 1
    with pytest.raises(ModelError, match="divides attention scores by the layer's number"):
        find_layers(tf.GPT2LMHeadModel(config))


def test_an_unknown_list_by_layer_is_refused():
    model = tiny_model("llama")
    model.config.secret_layer_scales = [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(ModelError, match="has the field secret_layer_scales with 4 entries for 4 layers"):
        find_layers(model)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ([4], "layer 4 cannot be removed: the model has 4 layers, numbered 0 to 3"),
        ([-1], "layer -1 cannot be removed: the model has 4 layers, numbered 0 to 3"),
        ([1, 1], "layer is named twice"),
        ([0, 1, 2, 3], "all 4 layers cannot be removed: a model keeps at least one"),
    ],
)
def test_layers_that_cannot_be_removed(removed, message):
    layers = tiny_loaded("llama").layers
    with pytest.raises(ModelError, match=message), layers.without(removed):
        pytest.fail("entered")
    with pytest.raises(ModelError, match=message):
        cut_config(layers.model.config, removed)


def test_contexts_do_not_nest():
    loaded = tiny_loaded("gemma3")
    before = loaded.model.config.to_dict()
    with loaded.layers.without({1}):
        inside = loaded.model.config.to_dict()
        with pytest.raises(ModelError, match="layers are removed already"), loaded.layers.without({2}):
            pytest.fail("entered")
        assert loaded.model.config.to_dict() == inside != before
    assert loaded.model.config.to_dict() == before


def test_an_exception_inside_restores():
    loaded = tiny_loaded("gpt2")
    full, config = list(loaded.layers.full), loaded.model.config.to_dict()

    def interrupt() -> None:
        assert len(loaded.model.transformer.h) == loaded.model.config.n_layer == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), loaded.layers.without({0, 2}):
        interrupt()
    assert list(loaded.model.transformer.h) == full
    assert loaded.model.transformer.h is loaded.layers.full
    assert loaded.model.config.to_dict() == config
    assert [block.attn.layer_idx for block in full] == [0, 1, 2, 3]


def test_nothing_is_copied():
    loaded = tiny_loaded("llama")
    before = {tensor.data_ptr() for tensor in loaded.model.state_dict().values()}
    with loaded.layers.without({1}):
        after = {tensor.data_ptr() for tensor in loaded.model.state_dict().values()}
    assert after < before


def test_cut_config_is_a_copy_and_cuts_every_list():
    config = FAMILIES["deepseek_v3"]()
    for removed, dense in [((0,), 1), ((3,), 2), ((0, 1), 0)]:
        cut = cut_config(config, removed)
        assert (cut.num_hidden_layers, cut.first_k_dense_replace) == (4 - len(removed), dense)
    assert (config.num_hidden_layers, config.first_k_dense_replace) == (4, 2)


@pytest.mark.parametrize(
    ("fields", "kept", "expected"),
    [
        ({"no_rope_layers": [1, 0, 1, 0]}, (1, 2), {"no_rope_layers": [0, 1]}),
        ({"moe_layers": [1, 3]}, (0, 3), {"moe_layers": [1]}),
        ({"max_window_layers": 3}, (0, 1, 3), {"max_window_layers": 2}),
        # Layers 1 and 3 are sparse by the step; 2 is the first that is left.
        (
            {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
            (1, 2, 3),
            {"decoder_sparse_step": 1, "mlp_only_layers": [1, 2]},
        ),
        (
            {"moe_layer_start_index": 1, "moe_layer_end_index": 2},
            (0, 2, 3),
            {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
        ),
        (
            {"moe_layer_start_index": 1, "moe_layer_end_index": -1},
            (0,),
            {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
        ),
        (
            {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
            (1, 2),
            {"attention_types": [[["local"], 1], [["global"], 1]], "attention_layers": ["local", "global"]},
        ),
        ({"eos_token_id": [1, 2, 3, 4]}, (0, 1), {}),
    ],
)
def test_fields_by_layer(fields, kept, expected):
    config = FAMILIES["llama"]()
    vars(config).update(fields)
    assert cut_fields(config, kept) == {"num_hidden_layers": len(kept), **expected}


def test_configurations_that_differ_by_layer_are_renumbered():
    config = FAMILIES["llama"]()
    config.per_layer_config = {1: {"intermediate_size": 16}, 3: {"intermediate_size": 8}}
    cut = cut_config(config, {0, 1})
    assert [layer.intermediate_size for layer in cut.per_layer_config] == [48, 8]
    assert [layer.intermediate_size for layer in config.per_layer_config] == [48, 16, 48, 8]


def test_a_signal_at_any_line_leaves_the_model_whole_or_to_be_restored():
    """The handler may strike between any two lines of the context; `restore` then has the last word."""
    loaded = tiny_loaded("gemma3")
    layers, before = loaded.layers, loaded.model.config.to_dict()

    def leave_out():
        nonlocal struck
        try:
            with layers.without({0, 2}):
                pass
        except Signal:
            struck += 1
            raise

    struck, line, was_struck = 0, 0, True
    while was_struck:
        was_struck = struck_at(line, leave_out, {"without", "restore", "_changes"})
        layers.restore()
        assert loaded.model.model.layers is layers.full
        assert loaded.model.config.to_dict() == before
        assert [layer.self_attn.layer_idx for layer in layers.full] == list(range(6))
        line += 1
    assert struck > 50
