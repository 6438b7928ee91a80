"""What is exported is a standard checkpoint: plain transformers, in a process of its own, computes the same with it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_tiny, tiny_prompts, tiny_tokenizer
from oracles import end_tokens, greedy_tokens, next_logits, rebuild
from plain_transformers import NEW_TOKENS
from test_model_load import write_gguf

from tale_ray.config import ModelSection
from tale_ray.errors import ModelError
from tale_ray.model.checkpoint import stored_tensors
from tale_ray.model.digest import digest_model
from tale_ray.model.export import Checkpoint, write_checkpoint
from tale_ray.model.load import load_model

PROMPTS = tiny_prompts(3)
REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def forward(self, *arguments, **options):
        outputs = super().forward(*arguments, **options)
        outputs.logits = outputs.logits * 1.5
        return outputs
"""


@dataclass(frozen=True)
class Case:
    """A checkpoint and what is removed from it."""

    section: ModelSection
    removed: tuple[int, ...]
    dtype: str = "checkpoint"

    @property
    def folder(self) -> Path:
        return Path(self.section.model)

    @property
    def digest(self) -> str:
        return digest_model(self.folder, self.section.gguf)


def save_remote(folder: Path) -> None:
    """A checkpoint whose family only the code beside it knows."""
    save_tiny("llama", folder)
    (folder / "odd.py").write_text(REMOTE_CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "odd", "architectures": ["OddForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))


def make_cases(folder: Path) -> dict[str, Case]:
    """Every family without two layers that are apart (without the last of its kind where that matters), and more."""
    cases = {}
    for family in FAMILIES:
        save_tiny(family, folder / family)
        cases[family] = Case(ModelSection(model=str(folder / family)), (0, 2))
    for family in ("deepseek_v3", "qwen3_moe", "gemma3", "qwen2_window"):  # a layer of another kind goes
        cases[f"{family}, layer 1"] = Case(ModelSection(model=str(folder / family)), (1,))
    cases["bfloat16"] = Case(ModelSection(model=str(folder / "llama")), (1,), "bfloat16")
    (folder / "gguf").mkdir()
    tiny_tokenizer().save_pretrained(folder / "gguf")
    write_gguf(folder / "gguf")
    cases["gguf"] = Case(ModelSection(model=str(folder / "gguf"), gguf="tiny.gguf"), (1,))
    save_remote(folder / "remote")
    cases["remote"] = Case(ModelSection(model=str(folder / "remote"), trust_remote_code=True), (1,))
    return cases


@dataclass(frozen=True)
class Exported:
    """All cases, exported, and what a fresh process says of them."""

    cases: dict[str, Case]
    written: dict[str, Checkpoint]
    folder: Path
    answers: dict[str, Any]


@pytest.fixture(scope="module", name="exported")
def exported_fixture(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("export")
    cases = make_cases(folder / "models")
    written, asked = {}, {}
    for name, case in cases.items():
        out = folder / "out" / name
        out.mkdir(parents=True)
        written[name] = write_checkpoint(case.section, case.removed, out, digest=case.digest, dtype=case.dtype)
        options = {"trust_remote_code": True} if case.section.trust_remote_code else {}
        asked[name] = {"path": str(out), "options": options, "generates": can_generate(out)}
    (folder / "request.json").write_text(json.dumps({"prompts": PROMPTS, "folders": asked}))
    script = Path(__file__).parent / "plain_transformers.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-P", script, folder / "request.json", folder / "answers.pt"],
        check=True,
        cwd=folder,
        env=environment | {"HF_MODULES_CACHE": str(folder / "modules")},
    )
    return Exported(cases, written, folder / "out", torch.load(folder / "answers.pt", weights_only=True))


def can_generate(out: Path) -> bool:
    """`generate` cannot cache what has convolutions only."""
    kinds = json.loads((out / "config.json").read_text()).get("layer_types") or [""]
    return set(kinds) != {"conv"}


NAMES = [*FAMILIES, *(f"{family}, layer 1" for family in ("deepseek_v3", "qwen3_moe", "gemma3", "qwen2_window"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "gguf", "remote"])
def test_plain_transformers_computes_the_same(exported: Exported, name: str) -> None:
    case, answer = exported.cases[name], exported.answers[name]
    assert answer["missing"] == []
    loaded = load_model(case.section, "float32")
    with loaded.layers.without(case.removed):
        for prompt, logits in zip(PROMPTS, answer["logits"], strict=True):
            torch.testing.assert_close(logits, next_logits(loaded.model, prompt), atol=1e-6, rtol=1e-6)
        if answer["written"]:
            for prompt, tokens in zip(PROMPTS, answer["written"], strict=True):
                assert tokens == greedy_tokens(loaded.model, prompt, NEW_TOKENS, end_tokens(loaded.model))
    for prompt, logits in zip(PROMPTS, answer["logits"], strict=True):  # else this test could not fail
        assert not torch.allclose(logits, next_logits(loaded.model, prompt), atol=1e-3)
    assert bool(answer["tied"]) is bool(loaded.model.config.tie_word_embeddings)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rebuilt_model_computes_the_same(exported: Exported, family: str) -> None:
    """The oracle, which uses nothing of the package to cut a model."""
    case = exported.cases[family]
    rebuilt = rebuild(load_model(case.section, "float32").model, case.removed)
    for prompt, logits in zip(PROMPTS, exported.answers[family]["logits"], strict=True):
        torch.testing.assert_close(logits, next_logits(rebuilt, prompt), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_per_layer_fields_are_cut(exported: Exported) -> None:
    def config(name: str) -> dict[str, Any]:
        return json.loads((exported.folder / name / "config.json").read_text())  # type: ignore[no-any-return]

    assert config("deepseek_v3, layer 1")["first_k_dense_replace"] == 1
    full, sliding = "full_attention", "sliding_attention"
    assert config("gemma3")["layer_types"] == [sliding, sliding, full, sliding]
    assert config("smollm3")["no_rope_layers"] == [0, 0]
    assert config("qwen3_moe, layer 1")["mlp_only_layers"] == [0, 1]
    assert config("mistral_window")["sliding_window"] == 6
    assert config("gpt2")["n_layer"] == 2
    assert "quantization_config" not in config("gguf")
    for name, case in exported.cases.items():
        total = exported.written[name].num_layers
        fields = exported.answers[name]["config"]
        assert fields.get("num_hidden_layers", fields.get("n_layer")) == total - len(case.removed)


@pytest.mark.slow
def test_numbers_are_those_of_the_checkpoint_unless_others_are_asked_for(exported: Exported, tmp_path: Path) -> None:
    assert exported.answers["llama"]["dtype"] == "torch.float32"
    assert exported.written["bfloat16"].dtype == "bfloat16"
    assert exported.answers["bfloat16"]["dtype"] == "torch.bfloat16"
    stored = {tensor.dtype for tensor in stored_tensors(exported.folder / "bfloat16").values()}
    assert stored == {torch.bfloat16}
    again = Case(ModelSection(model=str(exported.folder / "bfloat16"), dtype="float32"), (1,))
    write_checkpoint(again.section, again.removed, tmp_path, digest=again.digest)
    assert {tensor.dtype for tensor in stored_tensors(tmp_path).values()} == {torch.bfloat16}


@pytest.mark.slow
def test_numbers_are_those_of_the_files_whatever_the_configuration_says(exported: Exported, tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    case = Case(ModelSection(model=str(tmp_path / "model")), (1,))
    (tmp_path / "out").mkdir()
    assert write_checkpoint(case.section, (1,), tmp_path / "out", digest=case.digest).dtype == "float32"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_what_is_no_layer_is_copied_as_it_is(tmp_path: Path) -> None:
    source, out = save_tiny("llama", tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    generation = {
        "temperature": 0.3,
        "top_p": 0.9,
        "do_sample": False,
        "eos_token_id": [2, 5],
    }  # some versions of transformers refuse to save it
    (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "LICENSE.txt").write_text("a license")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\ntags: [x]\n---\n# Model\n")
    (source / "optimizer.pt").write_bytes(b"no part of the model")
    section = ModelSection(model=str(source))
    written = write_checkpoint(section, (3, 1), out, digest=digest_model(source, None))
    assert written.removed == (1, 3)
    assert written.license == {"license": "mit", "language": ["en"]}
    copied = [
        *("generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "LICENSE.txt"),
        "additional_chat_templates/tools.jinja",
    ]
    for name in copied:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {*copied, "config.json", "model.safetensors"}
    assert str(tmp_path) not in (out / "config.json").read_text()


def test_a_checkpoint_without_generation_defaults_gets_none(tmp_path: Path) -> None:
    source, out = save_tiny("llama", tmp_path / "model"), tmp_path / "out"
    (source / "generation_config.json").unlink()
    out.mkdir()
    write_checkpoint(ModelSection(model=str(source)), (0,), out, digest=digest_model(source, None))
    assert not (out / "generation_config.json").exists()


@pytest.mark.slow
def test_code_of_the_model_comes_along(exported: Exported) -> None:
    assert exported.written["remote"].code_files == ("odd.py",)
    assert (exported.folder / "remote" / "odd.py").read_text() == REMOTE_CODE
    assert exported.written["llama"].code_files == ()


def test_a_damaged_model_card_says_nothing_of_a_license(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, out = save_tiny("llama", tmp_path / "model"), tmp_path / "out"
    (source / "README.md").write_text("---\nlicense: [mit\n---\n")
    out.mkdir()
    assert write_checkpoint(ModelSection(model=str(source)), (0,), out, digest=digest_model(source, None)).license == {}
    assert "cannot be read" in caplog.text


def test_what_is_refused_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source, out = save_tiny("llama", tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    section, digest = ModelSection(model=str(source)), digest_model(source, None)
    with pytest.raises(ModelError, match=r"is not the one that was searched \(SHA-256 0000.*with --model"):
        write_checkpoint(section, (0,), out, digest="0" * 64)
    with pytest.raises(ModelError, match="layer 4 cannot be removed: the model has 4 layers, numbered 0 to 3"):
        write_checkpoint(section, (4,), out, digest=digest)
    config = json.loads((source / "config.json").read_text())
    quantised = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "model.layers.3.mlp"]}
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    with pytest.raises(ModelError, match=r"names layers by number \(layers\.3\).*that is not quantised"):
        write_checkpoint(section, (0,), out, digest=digest_model(source, None))
    assert list(out.iterdir()) == []


def test_a_full_disk_is_noticed_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = save_tiny("llama", tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"GB are needed there and 0\.0 GB are free"):
        write_checkpoint(ModelSection(model=str(source)), (0,), out, digest=digest_model(source, None))
    assert list(out.iterdir()) == []
