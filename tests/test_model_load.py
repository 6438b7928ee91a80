"""Models from folders: what is refused before anything is loaded, what is loaded, and how."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as tf
from families import VOCABULARY, save_tiny, tiny_model, tiny_prompts, tiny_tokenizer
from oracles import greedy_tokens, next_logits, rebuild

from tale_ray.config import ModelSection
from tale_ray.errors import ModelError
from tale_ray.model import load
from tale_ray.model.digest import check_model, digest_model, model_folder
from tale_ray.model.load import load_model
from tale_ray.model.placement import Placement


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.set_num_threads(1)
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def section(folder, **options):
    return ModelSection(model=str(folder), **options)


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def refused(folder, message, **options):
    """The refusal is the same before loading and on loading."""
    with pytest.raises(ModelError, match=message):
        check_model(section(folder, **options))
    with pytest.raises(ModelError, match=message):
        load_model(section(folder, **options), "float32")


def test_references():
    assert model_folder("bundled").name == "bundled"
    assert model_folder("nobody/nothing") is None
    check_model(ModelSection(model="nobody/nothing"))  # a hub id: not looked up


@pytest.mark.parametrize("ref", ["./nowhere", "/nowhere", "~/nowhere-at-all", "a/b/c"])
def test_a_missing_folder(ref):
    refused(ref, f"model folder {ref} does not exist: give an existing folder, a hub id .* or 'bundled'")


def test_a_file(checkpoint):
    refused(checkpoint / "model.safetensors", "is a file: give the folder that it lies in, and .* with --gguf")


def test_a_folder_without_configuration(folder):
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "is not a JSON object")])
def test_a_damaged_configuration(folder, text, message):
    (folder / "config.json").write_text(text)
    refused(folder, message)


def test_a_folder_without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no tokenizer: expected tokenizer.json")


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "has no weights: expected model.safetensors")


def test_a_missing_shard(folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, r"lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names \(1 missing\)")


def test_a_missing_gguf_file(folder):
    refused(folder, "GGUF file q8.gguf is not in .*: the GGUF files there are none", gguf="q8.gguf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "its architecture is BertForMaskedLM, which writes no text"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "writes no text"),
        ({"architectures": "BertForMaskedLM"}, "its architecture is BertForMaskedLM, which writes no text"),
        ({"architectures": None, "model_type": "bert"}, "the family bert, an encoder: is_decoder is not set"),
        *(
            ({"architectures": [], "model_type": family}, f"the family {family}, an encoder")
            for family in (
                "roberta",
                "xlm-roberta",
                "electra",
                "camembert",
                "distilbert",
                "albert",
                "deberta-v2",
                "mpnet",
            )
        ),
        (
            {"architectures": ["BertLMHeadModel"], "model_type": "bert", "is_decoder": False},
            "the family bert, an encoder",
        ),
        ({"is_encoder_decoder": True}, "it is an encoder-decoder"),
        ({"num_kv_shared_layers": 2}, "its layers share keys and values"),
        ({"hidden_size_per_layer_input": 16}, "feeds every layer an input of its own"),
        ({"text_config": {"model_type": "gemma3n_text", "num_kv_shared_layers": 2}}, "family gemma3n_text"),
        ({"scale_attn_by_inverse_layer_idx": True}, "divides attention scores by the layer's number"),
        ({"model_type": "mamba"}, "state-space layers"),
        ({"model_type": "nemotron_h"}, "state-space layers"),
        ({"layers_block_type": ["mamba", "attention"]}, "state-space layers"),
        ({"model_type": "diffllama"}, "depends on their position"),
        ({"moe_layer_interval": 2}, "depends on their position"),
        ({"kv_source_layers": [0, 0, 2, 3]}, "its layers share keys and values"),
        ({"use_bidirectional_attention": True}, "its attention looks ahead"),
    ],
)
def test_families_that_cannot_lose_layers(folder, fields, message):
    refused(change(folder, **fields), f"cannot be searched: .*{message}")


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": "LlamaForCausalLM"},
        {"architectures": 5},
        {"architectures": ["BertLMHeadModel"], "model_type": "bert", "is_decoder": True},
        {"model_type": "modernbert-decoder-like"},
        {"moe_layer_interval": "x"},
    ],
)
def test_families_that_can(folder, fields):
    check_model(section(change(folder, **fields)))


def test_a_real_encoder_and_a_real_encoder_decoder(tmp_path):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tf.BertForMaskedLM(tf.BertConfig(**sizes, intermediate_size=16)).save_pretrained(tmp_path / "bert")
    tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    for name, message in (("bert", "BertForMaskedLM, which writes no text"), ("t5", "it is an encoder-decoder")):
        tiny_tokenizer().save_pretrained(tmp_path / name)
        refused(tmp_path / name, message)


def test_a_model_that_looks_ahead_is_found_out_by_its_logits(folder, monkeypatch):
    """For families that no list of ours names: earlier logits may not change with later tokens."""
    model = tiny_model("llama")
    plain = model.forward

    def forward(input_ids, **options):
        outputs = plain(input_ids=input_ids, **options)
        outputs.logits += outputs.logits[:, -1:]
        return outputs

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ModelError, match="earlier logits change with later tokens"):
        load.check_causal(model)


def test_logits_that_are_not_finite_are_refused():
    model = tiny_model("llama")
    model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="logits are not finite in float32: use --dtype"):
        load.check_causal(model)


def test_code_of_the_checkpoint_is_not_run_unasked(folder):
    change(folder, auto_map={"AutoModelForCausalLM": "modeling_new.NewForCausalLM"}, model_type="brand_new")
    refused(folder, "brings its own code .* pass --trust-remote-code")
    check_model(section(folder, trust_remote_code=True))
    check_model(section(change(folder, model_type="phi3")))  # transformers has its own code for that one


def test_code_of_the_checkpoint_is_run_when_asked(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    code = """
from transformers import LlamaConfig, LlamaForCausalLM

class NewConfig(LlamaConfig):
    model_type = "brand_new"

class NewForCausalLM(LlamaForCausalLM):
    config_class = NewConfig
"""
    (folder / "modeling_new.py").write_text(code)
    auto_map = {"AutoConfig": "modeling_new.NewConfig", "AutoModelForCausalLM": "modeling_new.NewForCausalLM"}
    change(folder, auto_map=auto_map, model_type="brand_new", architectures=["NewForCausalLM"])
    loaded = load_model(section(folder, trust_remote_code=True), "float32")
    assert (loaded.info.family, loaded.info.num_layers) == ("brand_new", 4)
    prompt = tiny_prompts(1)[0]
    with loaded.layers.without({1, 2}):
        mine = next_logits(loaded.model, prompt)
    assert torch.equal(mine, next_logits(rebuild(tiny_model("llama"), {1, 2}), prompt))


def test_a_loaded_model_is_ready(checkpoint):
    loaded = load_model(section(checkpoint), "float32")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    info = loaded.info
    assert (info.num_layers, info.family, info.dtype, info.device) == (4, "llama", "float32", "cpu")
    assert info.digest == digest_model(checkpoint, None)
    assert info.notes == ()
    assert info.load_seconds > 0
    assert pickle.loads(pickle.dumps(info)) == info
    prompt = tiny_prompts(1)[0]
    assert torch.equal(next_logits(loaded.model, prompt), next_logits(tiny_model("llama"), prompt))


@pytest.mark.parametrize(
    ("asked", "got"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("checkpoint", "bfloat16")]
)
def test_dtypes(folder, asked, got):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    assert load_model(section(folder), asked).info.dtype == got


def test_generation_defaults_are_neutral(folder):
    """Some checkpoints carry a repetition penalty or sampling: `generate` would merge them into every call."""
    steered = tf.GenerationConfig(
        **{"repetition_penalty": 5.0, "do_sample": True, "temperature": 3.0, "top_k": 5, "forced_eos_token_id": 7},
        **{"no_repeat_ngram_size": 2, "suppress_tokens": [3, 4], "eos_token_id": [2, 96], "bos_token_id": 1},
    )
    steered.save_pretrained(folder)
    loaded = load_model(section(folder), "float32")
    kept = loaded.model.generation_config
    assert (kept.eos_token_id, kept.pad_token_id, kept.bos_token_id) == ([2, 96], 0, 1)
    for prompt in tiny_prompts(3):
        tokens = torch.tensor([prompt])
        options = tf.GenerationConfig(max_new_tokens=8, do_sample=False)
        written = loaded.model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=options)
        assert written[0, len(prompt) :].tolist() == greedy_tokens(loaded.model, prompt, 8, {2, 96})


def test_the_end_token_pads_where_there_is_no_padding_token(folder):
    change(folder, pad_token_id=None, eos_token_id=5)
    (folder / "generation_config.json").write_text("{}")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": None}))
    loaded = load_model(section(folder), "float32")
    assert loaded.model.generation_config.pad_token_id == 5


def test_weights_that_are_missing_are_not_made_up(folder):
    """Transformers would fill the layers that a checkpoint lacks with random numbers."""
    with pytest.raises(ModelError, match=r"lacks weights that its configuration asks for: model\.layers\.4\."):
        load_model(section(change(folder, num_hidden_layers=5)), "float32")


def test_weights_that_the_model_does_not_use_are_told(folder):
    notes = load_model(section(change(folder, num_hidden_layers=3)), "float32").info.notes
    assert notes[0].startswith("the checkpoint holds 9 weights that the model does not use, such as model.layers.3.")


def test_a_tokenizer_of_another_model(folder):
    tiny_tokenizer(VOCABULARY + 3).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"tokenizer of .* has 100 tokens and the model embeds 97: copy the tokenizer"):
        load_model(section(folder), "float32")


def test_a_token_without_an_embedding_matters_only_where_it_is_used(folder):
    """Gemma 3 of 1B has the tokenizer of its larger siblings, with an image token that nothing writes."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    info = load_model(section(folder), "float32").info
    assert info.num_embeddings == VOCABULARY
    info.check_tokens((VOCABULARY - 1, 0))
    with pytest.raises(ModelError, match=r"token 97 .* the model embeds 97 tokens, numbered 0 to 96"):
        info.check_tokens((0, VOCABULARY))


def test_weights_of_another_shape(folder):
    with pytest.raises(ModelError, match=r"model .* cannot be loaded \(.*\): check that"):
        load_model(section(change(folder, intermediate_size=64)), "float32")


def test_damaged_weights(folder):
    (folder / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ModelError, match=r"model .* cannot be loaded \(.*\): check that"):
        load_model(section(folder), "float32")


def test_an_unknown_family(folder):
    with pytest.raises(
        ModelError, match=r"cannot be loaded .*: check that the installed transformers knows the family"
    ):
        load_model(section(change(folder, model_type="never_heard_of")), "float32")


def test_a_hub_id_without_a_hub(monkeypatch):
    def away(*_arguments, **_options):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more")

    monkeypatch.setattr(load.AutoConfig, "from_pretrained", away)
    with pytest.raises(
        ModelError, match=r"\(OSError: We couldn't connect .*\): .*download the model and give its folder"
    ):
        load_model(ModelSection(model="nobody/nothing"), "float32")


@pytest.mark.slow
def test_a_hub_id_from_the_cache_has_the_digest_of_its_files(checkpoint, tmp_path):
    cached = tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree(checkpoint, cached / "snapshots" / ("a" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    code = """
from tale_ray.config import ModelSection
from tale_ray.errors import ModelError
from tale_ray.model.load import load_model
print(load_model(ModelSection(model="somebody/tiny"), "float32").info.digest)
try:
    load_model(ModelSection(model="somebody/else"), "float32")
except ModelError as error:
    print(error)
"""
    offline = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=offline)
    digest, refusal = done.stdout.splitlines()
    assert digest == digest_model(checkpoint, None)
    assert refusal.startswith("model somebody/else cannot be loaded (")
    assert refusal.endswith("the hub may be out of reach: download the model and give its folder, or check the name")


def test_digest_is_of_content_not_of_place(checkpoint, folder):
    assert digest_model(folder, None) == digest_model(checkpoint, None)
    (folder / "README.md").write_text("not loaded")
    (folder / "pytorch_model.bin").write_bytes(b"safetensors are loaded, this is not")
    assert digest_model(folder, None) == digest_model(checkpoint, None)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
def test_digest_covers_what_is_loaded(checkpoint, folder, name):
    with (folder / name).open("ab") as stream:
        stream.write(b" ")
    assert digest_model(folder, None) != digest_model(checkpoint, None)


def test_digest_covers_new_files(checkpoint, folder):
    digests = {digest_model(folder, None)}
    for name, text in (("chat_template.jinja", "{{ messages }}"), ("config.json", '{"auto_map": {}}'), ("code.py", "")):
        (folder / name).write_text(text)
        digests.add(digest_model(folder, None))
    assert len(digests) == 4


def test_checking_and_digesting_import_no_torch(checkpoint):
    code = (
        "import sys; from tale_ray.config import ModelSection; from tale_ray.model.digest import *; "
        f"check_model(ModelSection(model={str(checkpoint)!r})); digest_model(model_folder({str(checkpoint)!r}), None); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def write_gguf(folder, name="tiny.gguf"):
    """The tiny Qwen2 model as a GGUF file, its square matrices quantised to 8 bits."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    model = tiny_model("qwen2")
    config = model.config
    writer = gguf.GGUFWriter(folder / name, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for tensor_name, tensor in model.state_dict().items():
        if tensor_name == "lm_head.weight":
            continue  # tied
        values = tensor.numpy()
        target = names.get_name(tensor_name, try_suffixes=(".weight", ".bias"))
        if values.shape == (32, 32):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture
def gguf_folder(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    model = write_gguf(tmp_path)
    return tmp_path, model


def test_a_gguf_file_is_dequantised(gguf_folder):
    folder, model = gguf_folder
    loaded = load_model(section(folder, gguf="tiny.gguf"), "float32")
    assert (loaded.info.num_layers, loaded.info.family, loaded.info.dtype) == (4, "qwen2", "float32")
    assert loaded.info.digest == digest_model(folder, "tiny.gguf")
    assert getattr(loaded.model.config, "quantization_config", None) is None
    prompt = tiny_prompts(1)[0]
    with loaded.layers.without({1}):
        mine = next_logits(loaded.model, prompt)
    torch.testing.assert_close(mine, next_logits(rebuild(model, {1}), prompt), atol=0.3, rtol=0.1)


def test_workers_share_the_copy_of_a_gguf_file(gguf_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TALE_RAY_CACHE", str(tmp_path / "cache"))
    folder, _ = gguf_folder
    shared = load_model(section(folder, gguf="tiny.gguf"), "float32", Placement(shares_weights=True))
    assert (tmp_path / "cache" / "float32" / shared.info.digest / "model.safetensors").is_file()
    alone = load_model(section(folder, gguf="tiny.gguf"), "float32")
    prompt = tiny_prompts(1)[0]
    assert torch.equal(next_logits(shared.model, prompt), next_logits(alone.model, prompt))


def test_gguf_without_its_package(gguf_folder, monkeypatch):
    folder, _ = gguf_folder
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"needs the package gguf: pip install 'tale-ray\[gguf\]'"):
        load_model(section(folder, gguf="tiny.gguf"), "float32")
