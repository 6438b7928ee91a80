"""What a plan says before anything is loaded is what a search then takes, and what it would be refused for."""

import json
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import tiny_tokenizer
from folders import command
from hypothesis import given, settings
from hypothesis import strategies as st

from tale_ray.api import make_config
from tale_ray.attempt.gpus import GPUS
from tale_ray.attempt.plan import Device, Plan, make_plan
from tale_ray.attempt.plan_place import MOST_GPUS, Subject, make_subject, place
from tale_ray.attempt.plan_rows import plan_rows
from tale_ray.config import ModelSection, TaskSection
from tale_ray.errors import InfeasibleError, ModelError, UsageError
from tale_ray.model.digest import model_folder
from tale_ray.model.load import load_model
from tale_ray.model.outline import num_bytes
from tale_ray.model.placement import Placement
from tale_ray.model.stages import check_fits, device_map

DATA = Path(__file__).parent / "data"
SOURCES = json.loads((DATA / "configurations.json").read_text(encoding="utf-8"))
MODELS = sorted(SOURCES)
SMOLLM2 = Path(os.environ.get("TALE_RAY_SMOLLM2", ".cache/smollm2"))
GIB = 2**30
some_models = pytest.mark.parametrize("model", MODELS)


def path(model: str) -> Path:
    return DATA / "configurations" / f"{model}.json"


def arguments(model: str, *more: str) -> list[str]:
    return [
        "plan",
        "--model",
        str(path(model)),
        "--task",
        "arc_challenge",
        "--rows",
        "350",
        "--tokens-per-row",
        "120",
        *more,
    ]


@cache
def subject(model: str, stream: str = "auto", rows: int = 8) -> Subject:
    config = make_config(model=str(path(model)), task="arc_challenge", rows=rows, stream=stream)
    return make_subject(config, on_cpu=False, tokens_per_row=40, max_new_tokens=None)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """There is none, though nobody said so; to reach for it is wrong, whatever becomes of it."""
    reached = []

    def refuse(*arguments: Any, **named: Any) -> None:
        reached.append(arguments)
        raise OSError("there is no network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield
    assert not reached


# Bytes.


@some_models
def test_weights_are_as_many_as_were_published(model: str) -> None:
    weights = subject(model).weights
    assert weights.total_bytes == pytest.approx(2 * SOURCES[model]["parameters"], rel=1e-3)  # bfloat16; and buffers


def save(family: str, folder: Path) -> Path:
    """A random model of some hundred MB in float32, with a tokenizer of words."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        **{"vocab_size": 2000, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128},
        **{"max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }
    if family == "llama":
        config = tf.LlamaConfig(**sizes, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6)
    else:
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1024}
        config = tf.Qwen3MoeConfig(**sizes, **experts, hidden_size=512, intermediate_size=1024, num_hidden_layers=8)
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer(2000).save_pretrained(folder)
    return folder


TASK = """
name: words
source: {path: json, data_files: rows.jsonl}
messages: [{role: user, content: "{{ question }}"}]
reply: "{{ answer }}"
target: "{{ answer }}"
answer: {type: regex, pattern: "(t.)"}
max_new_tokens: 1
"""


def write_task(folder: Path, num_rows: int, num_words: int) -> Path:
    """A task whose rows begin with the same words, a third of them."""
    words = random.Random(0)
    shared = [f"t{words.randrange(3, 97)}" for _ in range(num_words // 3)]
    rows = []
    for _ in range(num_rows):
        own = [f"t{words.randrange(3, 97)}" for _ in range(num_words - len(shared))]
        rows.append(json.dumps({"question": " ".join([*shared, *own]), "answer": "t5"}))
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    task = folder / "task.yaml"
    task.write_text(TASK, encoding="utf-8")
    return task


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "num_rows", "num_words"),
    [("llama", 8, 150), ("qwen3_moe", 8, 150), ("smollm2", 3, 60), ("bundled", 40, 0)],
)
def test_weights_and_peak_memory_are_those_of_a_real_round(
    family: str, num_rows: int, num_words: int, tmp_path: Path
) -> None:
    """See `round_peak.py` for what the peak is; without what is at work it would be missed by more."""
    if family == "smollm2" and not (SMOLLM2 / "config.json").is_file():
        pytest.skip(f"{SMOLLM2} is not there: make smollm2, or name its folder in TALE_RAY_SMOLLM2")
    if family == "bundled":
        model, task, batch_bytes = "bundled", "boolean_synthetic", 64 * 2**20
    else:
        model = str(SMOLLM2.absolute() if family == "smollm2" else save(family, tmp_path / "model"))
        task, batch_bytes = str(write_task(tmp_path, num_rows, num_words)), 160 * 2**20
    program = [sys.executable, str(Path(__file__).parent / "round_peak.py")]
    given = [model, task, str(num_rows), str(batch_bytes)]
    done = subprocess.run([*program, *given], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    config = make_config(model=model, task=task, rows=num_rows, splits="search=1", batch_bytes=batch_bytes)
    found = make_plan(config, Device(free_bytes=64 * GIB, gpus_per_worker=0))
    shown = f"planned {found.peak_bytes / 2**20:.0f} MiB, measured {measured}"
    print(f"{family}: {shown}, {found.peak_bytes / measured['peak']:.3f} of it")
    assert found.weights.total_bytes == pytest.approx(measured["weights"], rel=0.02), shown
    assert found.peak_bytes == pytest.approx(measured["peak"], rel=0.15), shown
    efforts = (found.baseline.layer_applications, found.first_round.layer_applications)
    for planned, applied in zip(efforts, measured["applications"], strict=True):
        assert applied <= planned <= 1.01 * applied, shown


# What fits.


@settings(max_examples=60)
@given(model=st.sampled_from(MODELS), free=st.floats(0.5, 80))
def test_the_fewest_gpus_whose_stages_fit_are_recommended(model: str, free: float) -> None:
    free_bytes, found = int(free * GIB), subject(model, "never")

    def fits(gpus: int) -> bool:
        try:
            for gpu, held in enumerate(found.weights.stage_bytes(found.weights.deal(gpus))):
                check_fits(held, f"cuda:{gpu}", gpus, free_bytes)
        except ModelError:
            return False
        return True

    fewest = next((gpus for gpus in range(1, MOST_GPUS + 1) if fits(gpus)), None)
    if fewest is None:
        with pytest.raises(ModelError, match=f"does not fit into the memory of {MOST_GPUS} GPUs"):
            place(found, None, free_bytes)
        return
    placed = place(found, None, free_bytes)
    assert placed.gpus_per_worker == fewest
    assert sum(placed.held_bytes) == found.weights.total_bytes
    if fewest > 1:
        with pytest.raises(ModelError, match="does not fit into the memory of"):
            place(found, fewest - 1, free_bytes)


@settings(max_examples=60)
@given(model=st.sampled_from(MODELS), free=st.floats(0.5, 80), gpus=st.integers(1, MOST_GPUS))
def test_a_plan_and_a_worker_refuse_the_same_weights_in_the_same_words(model: str, free: float, gpus: int) -> None:
    found, free_bytes = subject(model, "never"), int(free * GIB)

    def refusal(ask: Any) -> str | None:
        try:
            ask()
        except ModelError as error:
            return str(error)
        return None

    devices = [f"cuda:{gpu}" for gpu in range(gpus)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, free_bytes))
        worker = refusal(lambda: device_map(found.model, devices))
    assert refusal(lambda: place(found, gpus, free_bytes)) == worker


def test_one_gpu_is_asked_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**30))
    with pytest.raises(ModelError, match=r"does not fit into the memory of 1 GPU: .* are to go to cuda:0"):
        load_model(ModelSection(model="bundled"), "float32", Placement(devices=("cuda:0",)))


def test_rows_that_do_not_fit_beside_the_weights_need_another_gpu() -> None:
    found = subject("qwen2.5-0.5b", "never")
    weights = found.weights.total_bytes
    tight = int(weights / 0.9) + 1
    assert place(found, None, tight).gpus_per_worker == 1
    config = make_config(model=str(path("qwen2.5-0.5b")), task="arc_challenge", rows=2, stream="never")
    long = make_subject(config, on_cpu=False, tokens_per_row=4_000, max_new_tokens=None)
    with pytest.raises(UsageError, match=r"batch bytes .* are too few: the longest row"):
        place(long, 1, tight)
    assert place(long, None, tight).gpus_per_worker == 2


def test_what_does_not_fit_is_streamed_where_it_can_be() -> None:
    found = subject("llama-3.1-70b")
    placed = place(found, None, 8 * GIB)
    assert placed.is_streamed
    assert placed.gpus_per_worker == 1
    two_layers = 2 * max(found.weights.layer_bytes)
    assert placed.held_bytes == (found.weights.first_bytes + found.weights.last_bytes + two_layers,)
    assert place(found, 2, 24 * GIB).is_streamed, "as `--stream auto` would"
    with pytest.raises(
        InfeasibleError, match=r"8 GPUs at most.*does not fit.*Nor can it be streamed: .*experts one by"
    ):
        place(subject("mixtral-8x7b"), None, 8 * GIB)


# Work, time, and the command.


@some_models
def test_every_configuration_is_answered_soon_and_without_a_network(model: str, no_network: None) -> None:
    for gpu in ("L4", "A100-40GB", "A100-80GB"):
        started = time.monotonic()
        outcome = command(*arguments(model, "--gpu", gpu, "--max-removed", "4", "--json"))
        assert outcome.code == 0, outcome.err
        assert time.monotonic() - started < 10
        found = outcome.json
        assert found["weights"]["total_bytes"] == pytest.approx(2 * SOURCES[model]["parameters"], rel=1e-3)
        assert sum(stage["weight_bytes"] for stage in found["stages"]) == found["weights"]["total_bytes"]
        assert found["rounds"] == 4
        assert found["search"]["seconds"] > found["first_round"]["seconds"] > found["baseline"]["seconds"] > 0
        assert found["peak_bytes"] < found["free_bytes"]


def test_the_whole_command_takes_less_than_ten_seconds_of_computing() -> None:
    program = (
        "import socket, sys\n"
        "def refuse(*arguments, **named): raise AssertionError('a plan reached for the network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from tale_ray.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments("llama-3.1-70b", "--max-removed", "4")],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10  # wall time is the neighbours', too
    assert "2 GPUs (A100-80GB" in done.stdout
    assert "No plan was ever checked on a GPU" in done.stdout


def plan(model: str, gpus: int | None = None, gpu: str = "A100-80GB", **options: Any) -> Plan:
    config = make_config(model=str(path(model)), task="arc_challenge", rows=64, **options)
    device = Device(gpu=GPUS[gpu], free_bytes=GPUS[gpu].free_bytes, gpus_per_worker=gpus)
    return make_plan(config, device, tokens_per_row=100)


def test_work_is_that_of_the_sweep_and_experts_count_as_far_as_a_token_meets_them() -> None:
    found, rows, tokens, layers = plan("llama-3.1-8b"), 64, 100, 32
    assert found.first_round.layer_applications == rows * (layers - 1 + layers * (layers - 1) // 2)
    per_token = 2 * (SOURCES["llama-3.1-8b"]["parameters"] - 2 * 128256 * 4096)
    assert found.baseline.flops == pytest.approx(rows * tokens * per_token * (layers - 1) / layers, rel=0.05)
    mixtral, mistral = plan("mixtral-8x7b"), plan("mistral-7b")
    assert 1.5 < mixtral.first_round.flops / mistral.first_round.flops < 2, "two experts of eight"


def test_rounds_become_shorter_and_faster_gpus_faster() -> None:
    few, many = (plan("llama-3.1-8b", max_removed=number) for number in (2, 20))
    assert (few.rounds, many.rounds) == (2, 20)
    assert few.search.seconds is not None
    assert many.search.seconds is not None
    assert many.search.seconds < 10 * few.search.seconds
    of_row = [left - 1 + left * (left - 1) // 2 for left in range(32, 12, -1)]  # layers that are left in each round
    assert many.search.layer_applications == many.baseline.layer_applications + 64 * sum(of_row)
    assert plan("llama-3.1-8b").rounds == 31
    slow, fast = (plan("llama-3.1-8b", gpu=gpu).search.seconds for gpu in ("L4", "H100-80GB"))
    assert slow is not None
    assert fast is not None
    assert 5 < slow / fast < 15
    halved = plan("llama-3.1-8b", workers=2).search.seconds
    assert halved is not None
    assert few.rounds == 2
    assert halved < 0.6 * (plan("llama-3.1-8b").search.seconds or 0)


def test_tokens_are_counted_with_a_tokenizer_and_estimated_without() -> None:
    task = TaskSection(task="boolean_synthetic", rows=20)
    counted = plan_rows(ModelSection(model="bundled"), task, None)
    estimated = plan_rows(ModelSection(model=str(path("qwen2.5-7b"))), task, None)
    assert not counted.is_estimated
    assert estimated.is_estimated
    assert "3.5 characters" in estimated.counted
    assert len({row.token_ids[0] for row in estimated.rows}) == 1, "prompts that begin alike share their first token"
    given_tokens = plan_rows(ModelSection(model="bundled"), task, 77)
    assert {len(row.token_ids) for row in given_tokens.rows} == {77}
    assert len(given_tokens.rows) == 20


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["--gpu", "A100-80"],
            r"GPU 'A100-80' is not known \(did you mean A100-80GB\?\): the GPUs are L4, .*--gpu-memory",
        ),
        (["--gpus-per-worker", "0", "--gpu", "L4"], "gpu 'L4' and gpus per worker 0 exclude each other: leave one out"),
        (["--gpus-per-worker", "33"], "33 pipeline stages cannot be made of 32 layers"),
        (["--gpu", "L4", "--gpus-per-worker", "0", "--stream", "never"], "exclude each other"),
        (
            ["--gpu-memory", "12GiB", "--gpus-per-worker", "1", "--stream", "never"],
            "does not fit into the memory of 1 GPU",
        ),
        (["--tokens-per-row", "0"], "tokens per row 0 is too small: it is at least 1"),
        (["--tokens-per-row", "200000"], "a row has 200000 prompt tokens .* but the model has 131072 positions"),
        (["--max-new-tokens", "0"], "max new tokens 0 is too small"),
        (["--remove", "40"], "layer 40 cannot be removed: the model has 32 layers"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_value_rule_and_remedy(more: list[str], words: str) -> None:
    outcome = command(*arguments("llama-3.1-8b", *more))
    assert outcome.code == 2
    assert outcome.out == ""
    assert re.search(words, outcome.err), outcome.err


def test_a_model_that_is_not_here_is_refused(tmp_path: Path, no_network: None) -> None:
    for model, words in (("nobody/nothing", "is not here"), ("a b", "is not here"), (str(tmp_path), "cannot be read")):
        outcome = command("plan", "--model", model, "--task", "boolean_synthetic")
        assert outcome.code == 2
        assert words in outcome.err
        assert "the path of one" in outcome.err
    fields = json.loads(path("llama-3.1-8b").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**fields, "quantization_config": {"quant_method": "fp8"}}))
    assert "is quantised" in command("plan", "--model", str(tmp_path), "--task", "boolean_synthetic").err


def test_configuration_and_tokenizer_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder, and in the hub's cache."""
    snapshot = tmp_path / "models--somebody--something" / "snapshots" / "abc"
    bundled = model_folder("bundled")
    assert bundled is not None
    shutil.copytree(bundled, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = []
    for model in (str(snapshot), "somebody/something"):
        outcome = command("plan", "--model", model, "--task", "boolean_synthetic", "--rows", "4", "--json")
        assert outcome.code == 0, outcome.err
        found.append(outcome.json)
    for each in found:
        each.pop("model")
        assert "counted with the model's tokenizer" in each["tokens_counted"]
    assert found[0] == found[1]


def test_ram_is_planned_without_gpus() -> None:
    outcome = command(
        "plan", "--model", "bundled", "--task", "boolean_synthetic", "--rows", "20", "--gpus-per-worker", "0", "--json"
    )
    found = outcome.json
    assert found["gpu"] is None
    assert found["first_round"]["seconds"] is None
    assert found["dtype"] == "float32"
    loaded = load_model(ModelSection(model="bundled"), "float32")
    assert found["weights"]["total_bytes"] == num_bytes([loaded.model])
