"""Models whose layers stay in their files: the same answers as in memory, little memory, and no wrong weights ever."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers as tf
from families import save_tiny, score_unit, tiny_model, tiny_prompts, tiny_tokenizer

from tale_ray.cluster.worker import Worker
from tale_ray.config import ConfigError, ModelSection, ResourceSection
from tale_ray.engine.score import Scorer
from tale_ray.errors import ModelError
from tale_ray.model import streaming
from tale_ray.model.checkpoint import MappedFile, stored_tensors, stretches
from tale_ray.model.load import load_model
from tale_ray.model.placement import ON_CPU, Placement
from tale_ray.model.stream import CopiedWeights, LayerStream
from tale_ray.model.streaming import should_stream, weight_bytes
from tale_ray.records import PromptRow, WorkUnit
from tale_ray.tasks.spec import AnswerSpec

STREAMED = Placement(is_streamed=True)
ANSWER = AnswerSpec(type="regex", pattern=r"(t\d+)")
ROWS = [PromptRow(prompt, f"t{30 + number}") for number, prompt in enumerate(tiny_prompts(6))]
FAMILIES = ["llama", "qwen2", "gemma2", "gemma3", "mistral_window", "gpt_neox", "phi3", "gpt2", "gpt_oss"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("streamed")
    return lambda family: root / family if (root / family).exists() else save_tiny(family, root / family)


def load(folder, dtype="float32", placement=STREAMED):
    return load_model(ModelSection(model=str(folder)), dtype, placement)


def unit(num_layers, removed=(1,)):
    candidates = (None, *(layer for layer in range(num_layers) if layer not in removed))
    return WorkUnit(7, "round-0002", "search", removed, candidates, tuple(range(len(ROWS))))


def answers(result):
    return [(candidate.layer, [answer.reply for answer in candidate.answers]) for candidate in result.candidates]


def swept(loaded, new_tokens=1, removed=(1,)):
    scorer = Scorer(loaded)
    assert scorer.fit.sweep is not None
    return answers(scorer.score(unit(loaded.info.num_layers, removed), ROWS, ANSWER, new_tokens, "w"))


@pytest.fixture
def fetches(monkeypatch):
    """(file, start, end) of everything that is fetched."""
    found = []
    fetch = MappedFile.fetch

    def noted(file, start, end):
        found.append((file.path, start, end))
        fetch(file, start, end)

    monkeypatch.setattr(MappedFile, "fetch", noted)
    return found


def layer_of(folder):
    """Which layer a stretch of a file belongs to."""
    found = {}
    for name, tensor in stored_tensors(folder).items():
        if match := re.search(r"layers\.(\d+)\.", name):
            found.setdefault(int(match[1]), []).append(tensor)
    return {place: layer for layer, tensors in found.items() for place in stretches(tensors)}


# The same answers.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("new_tokens", [1, 4])
def test_answers_are_those_in_memory(checkpoints, family, new_tokens):
    whole, streamed = load(checkpoints(family), placement=ON_CPU), load(checkpoints(family))
    expected = swept(whole, new_tokens)
    assert swept(streamed, new_tokens) == expected
    each = unit(whole.info.num_layers)
    assert answers(score_unit(streamed, each, ROWS, ANSWER, new_tokens, None, "w")) == expected
    assert streamed.info.device == "cpu"
    assert streamed.info.digest == whole.info.digest


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_a_checkpoint_in_another_dtype_is_cast(tmp_path, family):
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    whole, streamed = load(tmp_path, placement=ON_CPU), load(tmp_path)
    assert streamed.info.dtype == "float32"
    assert swept(streamed) == swept(whole)
    assert swept(streamed, 4) == swept(whole, 4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_checkpoint_is_streamed_in_its_own_dtype(tmp_path, family):
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    whole, streamed = load(tmp_path, "checkpoint", ON_CPU), load(tmp_path, "checkpoint")
    tokens = torch.tensor([tiny_prompts(1)[0]])
    assert streamed.info.dtype == "bfloat16"
    assert torch.equal(streamed.model(input_ids=tokens).logits, whole.model(input_ids=tokens).logits)


def test_shards_are_read(tmp_path, checkpoints):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert swept(load(tmp_path)) == swept(load(checkpoints("llama"), placement=ON_CPU))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_weights_stay_tied(checkpoints, dtype):
    model = load(checkpoints("qwen2"), dtype).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_checkpoint_of_the_decoder_alone_is_found_by_its_shorter_names(tmp_path, checkpoints):
    """As GPT-2's is on the hub."""
    tiny_model("gpt2").base_model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "architectures": ["GPT2LMHeadModel"]}))
    assert swept(load(tmp_path)) == swept(load(checkpoints("gpt2"), placement=ON_CPU))


# Memory.


def resident_bytes(path):
    """Bytes of a file that are mapped into this process."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def large_model(folder, layers, hidden_size):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    config = tf.LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        **{**sizes, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_two_layers_are_in_memory_at_most(tmp_path, monkeypatch):
    folder = large_model(tmp_path, 16, 256)
    weights = sum(tensor.end - tensor.start for tensor in stored_tensors(folder).values())
    loaded = load(folder)
    scorer = Scorer(loaded)
    enter, most = LayerStream.enter, []

    def watched(stream, layer):
        enter(stream, layer)
        if (ahead := stream._ahead.get((layer + 1) % 16)) is not None:
            ahead.result()
        most.append(resident_bytes(folder / "model.safetensors"))

    monkeypatch.setattr(LayerStream, "enter", watched)
    scorer.score(unit(16), ROWS, ANSWER, 1, "w")
    assert len(most) >= 15
    assert weights / 16 < max(most) < 0.25 * weights, "two of 16 layers, and what the system maps around them"


def test_a_model_above_the_data_limit_is_searched(tmp_path):
    """Plain loading fails under it, in the same process."""
    folder = large_model(tmp_path, 12, 512)
    code = """
        import re, resource, sys
        from pathlib import Path
        import torch
        from test_streaming import STREAMED, ON_CPU, load, swept
        from tale_ray.errors import ModelError
        torch.set_num_threads(1)
        folder = Path(sys.argv[1])
        expected = swept(load(folder, placement=ON_CPU))
        weights = (folder / "model.safetensors").stat().st_size
        held = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (held + weights // 2,) * 2)
        try:
            load(folder, placement=ON_CPU)
            raise SystemExit("plain loading went well")
        except ModelError:
            pass
        assert swept(load(folder)) == expected
        print("searched")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["searched"], done.stderr[-2000:]


def test_a_pass_takes_as_many_rows_as_the_whole_budget_holds(checkpoints):
    budget = Scorer(load(checkpoints("llama"))).budget
    assert budget.batch == budget.total
    assert Scorer(load(checkpoints("llama"), placement=ON_CPU)).budget.batch < budget.total


def test_whether_a_model_fits_is_found_out_on_few_layers(tmp_path, fetches):
    tiny_model("llama", num_layers=20).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path)
    del fetches[:]
    assert Scorer(loaded).fit.sweep is not None
    layers = layer_of(tmp_path)
    read = [layers[place] for place in fetches]
    assert sum(layer > 3 and layer != 19 for layer in read) < 20, "no whole pass"


# Which layers are read.


def test_layers_that_are_removed_are_not_fetched(tmp_path, checkpoints, fetches):
    folder = shutil.copytree(checkpoints("gemma3"), tmp_path / "copy")
    loaded = load(folder)
    layers, tokens = layer_of(folder), torch.tensor([ROWS[0].token_ids])
    with loaded.layers.without((2, 3)):
        loaded.model(input_ids=tokens)  # learns
        del fetches[:]
        for _ in range(3):
            loaded.model(input_ids=tokens)
    assert {layers[place] for place in fetches} == {0, 1, 4, 5}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_right_in_any_order_of_layers(checkpoints, dtype):
    whole, streamed = load(checkpoints("gemma3"), dtype, ON_CPU), load(checkpoints("gemma3"), dtype)
    tokens = torch.tensor([ROWS[0].token_ids])
    for removed in [(), (0,), (5,), (1, 3), (), (0, 1, 2, 3, 4), (4,), (0, 2, 4)]:
        with whole.layers.without(removed), streamed.layers.without(removed):
            assert torch.equal(streamed.model(input_ids=tokens).logits, whole.model(input_ids=tokens).logits), removed


# Interruptions and errors.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", ["sweep", "decode", "view"])
def test_an_interruption_anywhere_leaves_no_layer_with_wrong_weights(checkpoints, monkeypatch, dtype, path):
    whole, streamed = load(checkpoints("llama"), dtype, ON_CPU), load(checkpoints("llama"), dtype)
    scorers = [Scorer(loaded, sweeps=path != "view") for loaded in (whole, streamed)]
    new_tokens = 3 if path == "decode" else 1
    expected, found = (answers(scorer.score(unit(4), ROWS, ANSWER, new_tokens, "w")) for scorer in scorers)
    assert found == expected
    forwards = [vars(layer)["forward"] for layer in streamed.layers.full]
    for at in range(0, 24, 3):
        left = iter(range(at))

        def stop(left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            for name in ("use", "let_go"):
                interrupt(patch, type(source_of(streamed)), name, stop)
            with pytest.raises(KeyboardInterrupt):
                for _ in range(10):
                    scorers[1].score(unit(4), ROWS, ANSWER, new_tokens, "w")
        assert [vars(layer)["forward"] for layer in streamed.layers.full] == forwards
        assert answers(scorers[1].score(unit(4), ROWS, ANSWER, new_tokens, "w")) == expected


def stream_of(loaded):
    cells = vars(loaded.layers.full[0])["forward"].__closure__
    return next(cell.cell_contents for cell in cells if isinstance(cell.cell_contents, LayerStream))


def source_of(loaded):
    return stream_of(loaded)._source


def interrupt(patch, kind, name, stop):
    """Let a signal come before or after what a method does."""
    own = getattr(kind, name)

    def interrupted(*args):
        stop()
        found = own(*args)
        stop()
        return found

    patch.setattr(kind, name, interrupted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_error_while_fetching_is_raised_by_the_forward_that_needs_the_layer(checkpoints, monkeypatch, dtype):
    loaded = load(checkpoints("llama"), dtype)
    assert isinstance(source_of(loaded), CopiedWeights) == (dtype == "bfloat16")
    tokens = torch.tensor([ROWS[0].token_ids])
    expected = loaded.model(input_ids=tokens).logits
    reached = []
    hooks = [
        layer.register_forward_hook(lambda *_, number=number: reached.append(number))
        for number, layer in enumerate(loaded.layers.full)
    ]
    fetch, layers = MappedFile.fetch, layer_of(checkpoints("llama"))
    begun = dtype == "float32"  # there a layer is one stretch; else its first weight arrives, and overwrites another

    def failing(file, start, end):
        nonlocal begun
        if any(path == file.path and first <= start < last for (path, first, last), at in layers.items() if at == 2):
            if begun:
                raise ModelError("the disk is gone")
            begun = True
        fetch(file, start, end)

    with monkeypatch.context() as patch:
        patch.setattr(MappedFile, "fetch", failing)
        with pytest.raises(ModelError, match="the disk is gone"):
            loaded.model(input_ids=tokens)
    assert reached == [0, 1]
    for hook in hooks:
        hook.remove()
    assert torch.equal(loaded.model(input_ids=tokens).logits, expected), "the next one starts afresh"


def test_a_file_that_is_cut_off_is_named(tmp_path, checkpoints):
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "copy")
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(ModelError, match=r"model\.safetensors has \d+ bytes, but the tensor .* is cut off"):
        load(folder)


def test_a_file_that_is_cut_off_while_it_is_in_use_is_named(tmp_path, checkpoints):
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "copy")
    loaded = load(folder)
    layer = stream_of(loaded)._current
    end = max(end for (_, _, end), each in layer_of(folder).items() if each == 2)
    assert layer != 2
    for each in list(stream_of(loaded)._ahead.values()):
        each.result()
    os.truncate(folder / "model.safetensors", end - 1)
    with pytest.raises(ModelError, match=r"model\.safetensors has \d+ bytes, but weights lie up to byte \d+"):
        stream_of(loaded).enter(2)


def weight_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("tale-weights")]


def test_the_thread_ends_with_the_model(checkpoints):
    gc.collect()
    before = set(weight_threads())
    loaded = load(checkpoints("llama"))
    mine = set(weight_threads()) - before
    assert mine
    del loaded
    deadline = time.monotonic() + 10
    while mine & set(weight_threads()):
        assert time.monotonic() < deadline
        gc.collect()
        time.sleep(0.01)


# What is refused, and when models are streamed.


def test_checkpoints_that_have_to_be_converted_are_refused(checkpoints, fetches):
    with pytest.raises(ModelError, match=r"cannot be streamed: its checkpoint stores .*experts.* in another form"):
        load(checkpoints("mixtral"))
    assert not fetches


def test_other_formats_are_refused(tmp_path, checkpoints):
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ModelError, match=r"is quantised .*--stream never"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tiny_model("llama").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no safetensors files, and only those can be streamed"):
        load(folder)
    with pytest.raises(ModelError, match=r"GGUF file model\.gguf cannot be streamed"):
        streaming.stream_model(
            ModelSection(model=str(folder), gguf="model.gguf"), tf.LlamaConfig(), "float32", STREAMED
        )


def test_missing_weights_and_other_shapes_are_refused(tmp_path, checkpoints):
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(ModelError, match=r"lacks weights .*layers\.4"):
        load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ModelError, match=r"has the shape \[\d+, \d+\] in model.safetensors, but"):
        load(folder)


def test_models_are_streamed_that_do_not_fit(checkpoints, monkeypatch):
    section = ModelSection(model=str(checkpoints("llama")))
    size = weight_bytes(stored_tensors(checkpoints("llama")), "float32")
    assert size == sum(parameter.nbytes for parameter in tiny_model("llama").parameters())
    assert weight_bytes(stored_tensors(checkpoints("llama")), "bfloat16") == size // 2
    for free, expected in ((size, False), (size - 1, True)):
        monkeypatch.setattr(streaming, "free_memory_bytes", lambda free=free: free)
        assert should_stream(section, "float32", ON_CPU, "auto") is expected
        assert should_stream(section, "bfloat16", ON_CPU, "auto") is False
        assert should_stream(section, "float32", ON_CPU, "always") is True
        assert should_stream(section, "float32", ON_CPU, "never") is False


def test_a_worker_says_that_it_streams(checkpoints):
    section = ModelSection(model=str(checkpoints("llama")))
    info = Worker("one", section, "float32", ResourceSection(stream="always")).info
    assert any("weights do not stay in memory" in note for note in info.notes)
    assert info.is_streamed
    assert not Worker("one", section, "float32", ResourceSection()).info.is_streamed
    with pytest.raises(ConfigError, match="stream 'often' is not known: choose one of auto, always, never"):
        ResourceSection(stream="often")
