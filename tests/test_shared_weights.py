"""What several workers of one node hold in memory: one copy of the weights, in the page cache."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import tiny_tokenizer

from tale_ray.config import ModelSection
from tale_ray.model.load import load_model
from tale_ray.model.placement import Placement

MEBI = 2**20
BATCH_BYTES = 16 * MEBI
PROCESS = f"""
import sys, torch
from tale_ray.cluster.worker import Worker
from tale_ray.config import ModelSection, ResourceSection
from tale_ray.records import PromptRow, WorkUnit
from tale_ray.search.executor import Questions
from tale_ray.tasks.spec import AnswerSpec

torch.set_num_threads(1)
Worker("small", ModelSection(model="bundled"), "float32", ResourceSection(batch_bytes=2**20))  # imports
print("imported", flush=True)
folder = sys.stdin.readline().strip()
resources = ResourceSection(batch_bytes={BATCH_BYTES})
worker = Worker("one", ModelSection(model=folder), "float32", resources)
rows = [PromptRow(tuple(range(3 + row, 13 + row)), "t5") for row in range(8)]
worker.share(Questions({{"search": rows}}, AnswerSpec(type="regex", pattern="(t.*)"), 1))
result = worker.score(WorkUnit(0, "round-0001", "search", (), (0, 1, 2), tuple(range(8))))
print([each.answers[0].reply for each in result.candidates], flush=True)
sys.stdin.readline()
"""


def save_model(folder: Path, dtype: torch.dtype, seed: int = 0) -> int:
    """Save a random Llama; return the bytes of its weights in float32."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = tf.LlamaConfig(vocab_size=97, num_hidden_layers=12, max_position_embeddings=128, eos_token_id=2, **sizes)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return 4 * sum(weight.numel() for weight in model.parameters())


def pss(process: subprocess.Popen[str]) -> int:
    """The process's memory in bytes; what it shares with others counts in equal parts."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts processes that have imported everything and wait for a folder."""
    monkeypatch.setenv("TALE_RAY_CACHE", str(tmp_path / "cache"))
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert said(process) == "imported"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], line: object) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="shared memory is counted by Linux alone")
def test_two_workers_hold_one_copy_of_the_weights(tmp_path: Path, start: Any) -> None:
    weights = save_model(tmp_path / "model", torch.float32)
    assert weights > 150 * MEBI, "what else a process holds would hide a second copy"
    workers = [start(), start()]
    before = sum(map(pss, workers))
    for worker in workers:
        tell(worker, tmp_path / "model")
    replies = {said(worker) for worker in workers}
    after = sum(map(pss, workers))
    assert len(replies) == 1
    assert json.loads(replies.pop().replace("'", '"'))
    print(f"{(after - before) / MEBI:.0f} MiB more for two workers, weights of {weights / MEBI:.0f} MiB")
    assert after - before <= 1.25 * weights + 2 * BATCH_BYTES
    assert after - before >= 0.9 * weights, "the weights are not there at all"


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="shared memory is counted by Linux alone")
def test_weights_in_other_numbers_are_converted_once(tmp_path: Path, start: Any) -> None:
    weights = save_model(tmp_path / "model", torch.bfloat16)
    copies = tmp_path / "cache" / "float32"
    for worker in (start(), start()):  # the first one keeps some of what it converted
        tell(worker, tmp_path / "model")
        assert said(worker)
        (copy,) = [path for path in copies.iterdir() if path.is_dir()]
    made_at = (copy / "model.safetensors").stat().st_mtime_ns
    later = [start(), start()]
    before = sum(map(pss, later))
    for worker in later:
        tell(worker, tmp_path / "model")
        assert said(worker)
    assert sum(map(pss, later)) - before <= 1.25 * weights + 2 * BATCH_BYTES
    assert (copy / "model.safetensors").stat().st_mtime_ns == made_at


def test_each_hub_model_has_a_copy_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TALE_RAY_CACHE", str(tmp_path / "cache"))
    loaded = []
    for number, name in enumerate(("one", "two")):
        commit = f"{number:040x}"
        cached = tmp_path / "hub" / f"models--me--{name}"
        save_model(cached / "snapshots" / commit, torch.bfloat16, seed=number)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(commit)
        loaded.append(load_model(ModelSection(model=f"me/{name}"), "float32", Placement(shares_weights=True)))
        assert (tmp_path / "cache" / "float32" / f"{commit}-safetensors").is_dir()
    first, second = (each.model.get_input_embeddings().weight for each in loaded)
    assert not torch.equal(first, second)
