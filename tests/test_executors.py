"""The contract of every executor: what a driver may rely on, wherever units are run."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, score_unit, tiny_prompts, tiny_tokenizer
from transformers import AutoModelForCausalLM

from tale_ray.cluster.local import LocalExecutor
from tale_ray.cluster.worker import Worker
from tale_ray.config import ModelSection, ResourceSection
from tale_ray.engine.measure import measure
from tale_ray.engine.score import Scorer
from tale_ray.errors import ConfigError, InfeasibleError, ModelError, TaskError
from tale_ray.model.load import LoadedModel, load_model
from tale_ray.records import Example, ModelInfo, Probe, PromptRow, UnitResult, WorkUnit
from tale_ray.search.executor import Executor, Questions, UnitDone, UnitFailed, WorkerEvent, WorkerJoined
from tale_ray.tasks.prompts import encode
from tale_ray.tasks.spec import AnswerSpec

MakeExecutor = Callable[[Path], Executor]

TEMPLATE = "{% for m in messages %}{{ raise_exception('not this') if 'bad' in m.content else m.content }}{% endfor %}"
QUESTIONS = Questions(
    rows={"search": [PromptRow(prompt, "t9") for prompt in tiny_prompts(6)]},
    answer=AnswerSpec(type="regex", pattern=r"(t\d+)"),
    max_new_tokens=3,
)
NEVER_SHARED = 99


def unit(number: int, candidates: tuple[int | None, ...] = (None, 1), rows: tuple[int, ...] = (0, 1, 2)) -> WorkUnit:
    return WorkUnit(number, "round-0001", "search", (), candidates, rows)


def example(content: str) -> Example:
    return Example(digest="0" * 64, messages=({"role": "user", "content": content},), reply="t9", target="t9")


def poll_until(executor: Executor, count: int, kind: type, seconds: float = 120.0) -> list[Any]:
    """All events up to the one with which `count` of a kind have come."""
    events: list[WorkerEvent] = []
    deadline = time.monotonic() + seconds
    while sum(isinstance(event, kind) for event in events) < count:
        assert time.monotonic() < deadline, f"only {events}"
        events += executor.poll(1.0)
    return events


def without_seconds(result: UnitResult) -> UnitResult:
    candidates = tuple(replace(candidate, seconds=0.0) for candidate in result.candidates)
    return replace(result, candidates=candidates, seconds=0.0, worker="")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = save_tiny("llama", tmp_path_factory.mktemp("model"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(ModelSection(model=str(folder)), "float32")


@pytest.fixture(
    scope="module", params=["local", *(pytest.param(name, marks=pytest.mark.ray) for name in ("ray", "gang"))]
)
def make(request: pytest.FixtureRequest) -> MakeExecutor:
    if request.param == "local":
        return lambda folder: LocalExecutor(ModelSection(model=str(folder)), "float32", ResourceSection(local=True))
    from tale_ray.cluster.ray_executor import RayExecutor

    address = request.getfixturevalue("ray_address")
    num_members = 2 if request.param == "gang" else 1
    resources = ResourceSection(address=address, workers=1, tensor_parallel=num_members)
    return lambda folder: RayExecutor(ModelSection(model=str(folder)), "float32", resources)


@pytest.fixture(scope="module")
def connected(make: MakeExecutor, folder: Path) -> Iterator[Executor]:
    executor = make(folder)
    executor.connect()
    yield executor
    executor.close()


@pytest.fixture(scope="module")
def info(connected: Executor) -> ModelInfo:
    return connected.load()


@pytest.fixture(scope="module")
def executor(connected: Executor, info: ModelInfo) -> Executor:
    """One that has loaded the model."""
    return connected


@pytest.fixture(scope="module")
def worker(executor: Executor) -> str:
    """The name of the worker that joined, which it does when the questions are there."""
    assert executor.poll(0.0) == ()
    executor.share(QUESTIONS)
    joined = next(event for event in poll_until(executor, 1, WorkerJoined) if isinstance(event, WorkerJoined))
    return joined.worker


def test_a_model_that_cannot_be_loaded(make: MakeExecutor, tmp_path: Path) -> None:
    executor = make(tmp_path)
    try:
        executor.connect()
        with pytest.raises(ModelError, match=r"has no config\.json"):
            executor.load()
    finally:
        executor.close()
        executor.close()


def test_closing_what_was_never_connected(make: MakeExecutor, folder: Path) -> None:
    executor = make(folder)
    executor.close()
    executor.close()


def test_what_is_said_of_the_model(info: ModelInfo, loaded: LoadedModel) -> None:
    of_a_gang = [note for note in info.notes if "processes split the weights" in note]
    info = replace(info, notes=tuple(note for note in info.notes if note not in of_a_gang))
    assert replace(info, load_seconds=0.0) == replace(loaded.info, load_seconds=0.0)
    assert info.load_seconds > 0


def test_prompts_are_encoded_under_the_models_own_template(executor: Executor, loaded: LoadedModel) -> None:
    examples = [example("t3 t4"), example("t5")]
    assert executor.encode(examples) == tuple(
        PromptRow(tuple(encode(loaded.tokenizer, each.messages)), each.target) for each in examples
    )


def test_a_prompt_that_the_template_rejects(executor: Executor) -> None:
    with pytest.raises(TaskError, match="not this"):
        executor.encode([example("t3"), example("bad")])
    assert len(executor.encode([example("t3")])) == 1


PROBES = [
    Probe("block_influence", (1,), (0, 2, 3)),
    Probe("angular_distance", (), (0, 1, 2), span=2),
    Probe("log_perplexity", (3,), (0, 1, 2)),
]


@pytest.mark.parametrize("probe", PROBES, ids=[probe.measure for probe in PROBES])
def test_what_is_measured_is_what_the_engine_measures(executor: Executor, loaded: LoadedModel, probe: Probe) -> None:
    direct = measure(loaded, Scorer(loaded), probe, tiny_prompts(6))
    found = executor.measure(probe, tiny_prompts(6))
    assert found.values == pytest.approx(direct.values, abs=1e-6)
    assert replace(found, values=(), seconds=0.0) == replace(direct, values=(), seconds=0.0)
    assert found.seconds > 0


def test_what_cannot_be_measured_is_refused(executor: Executor) -> None:
    with pytest.raises(ModelError, match="layer 7"):
        executor.measure(Probe("log_perplexity", (), (7,)), tiny_prompts(6))
    with pytest.raises(ConfigError, match="no calibration text"):
        executor.measure(PROBES[0], [])


def test_measuring_between_units(executor: Executor, worker: str, loaded: LoadedModel) -> None:
    """Units that are queued are not lost, and answer what they would have answered."""
    executor.submit(worker, unit(11))
    for probe in PROBES:
        executor.measure(probe, tiny_prompts(6, seed=1))
    executor.submit(worker, unit(12))
    events = poll_until(executor, 2, UnitDone)
    assert [event.result.unit.number for event in events] == [11, 12]
    for event in events:
        direct = Scorer(loaded).score(event.result.unit, QUESTIONS.rows["search"], QUESTIONS.answer, 3, "direct")
        assert without_seconds(event.result) == without_seconds(direct)


def test_queued_units_answer_what_the_engine_answers(executor: Executor, worker: str, loaded: LoadedModel) -> None:
    units = [unit(1), unit(2, candidates=(0, 2, 3), rows=(5, 3))]
    for each in units:
        executor.submit(worker, each)
    events = poll_until(executor, 2, UnitDone)
    assert [event.worker for event in events] == [worker, worker]
    for each, event in zip(units, events, strict=True):
        direct = Scorer(loaded).score(each, QUESTIONS.rows["search"], QUESTIONS.answer, 3, "direct")
        assert without_seconds(event.result) == without_seconds(direct)
        plain = score_unit(loaded, each, QUESTIONS.rows["search"], QUESTIONS.answer, 3, None, "plain")
        assert [found.answers for found in direct.candidates] == [found.answers for found in plain.candidates]
        assert event.result.worker == worker
        assert event.result.seconds > 0
    assert executor.poll(0.0) == ()


def test_a_refused_unit(executor: Executor, worker: str) -> None:
    refused = unit(3, candidates=(7,))
    executor.submit(worker, refused)
    executor.submit(worker, unit(4))
    failed, done = poll_until(executor, 1, UnitDone)
    assert isinstance(failed, UnitFailed)
    assert (failed.worker, failed.unit) == (worker, refused)
    assert isinstance(failed.refusal, ModelError)
    assert "layer 7" in str(failed.refusal)
    assert done.result.unit.number == 4


def test_a_unit_that_fails_by_accident(executor: Executor, worker: str) -> None:
    executor.submit(worker, unit(5, rows=(NEVER_SHARED,)))
    executor.submit(worker, unit(6))
    failed, done = poll_until(executor, 1, UnitDone)
    assert isinstance(failed, UnitFailed)
    assert failed.refusal is None
    assert "IndexError" in failed.error
    assert failed.error.strip().splitlines()[-1].startswith("IndexError")  # the line that is shown
    assert done.result.unit.number == 6


def test_other_questions_are_answered_as_such(executor: Executor, worker: str, loaded: LoadedModel) -> None:
    """Nothing is left of rows that had the same positions before; the worker joins again when it has them."""
    first = replace(QUESTIONS, max_new_tokens=1)  # states of rows are remembered where nothing more is decoded
    others = replace(first, rows={"search": [PromptRow(prompt, "t9") for prompt in tiny_prompts(6, seed=7)]})
    later = replace(unit(22), scope="round-0002", removed=(2,))  # goes on from states that are known
    results = []
    try:
        for questions, each in ((first, unit(21, candidates=(None, 1, 2, 3))), (others, later)):
            executor.share(questions)
            executor.submit(worker, each)
            results += [event.result for event in poll_until(executor, 1, UnitDone) if isinstance(event, UnitDone)]
    finally:
        executor.share(QUESTIONS)
        poll_until(executor, 1, WorkerJoined)
    direct = Scorer(loaded).score(later, others.rows["search"], others.answer, 1, "direct")
    before = Scorer(loaded).score(later, first.rows["search"], first.answer, 1, "direct")
    assert without_seconds(results[-1]) == without_seconds(direct)
    assert [each.answers for each in results[-1].candidates] != [each.answers for each in before.candidates]


def test_a_local_worker_uses_no_more_gpus_than_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def from_pretrained(*_: Any, **options: Any) -> Any:
        raise Seen({name: options[name] for name in ("device_map", "max_memory") if name in options})

    def placement(num_gpus: int) -> str:
        resources = ResourceSection(local=True, gpus_per_worker=num_gpus, stream="never")
        executor = LocalExecutor(ModelSection(model=str(folder)), "float32", resources)
        executor.connect()
        with pytest.raises(ModelError) as refused:
            executor.load()
        return str(refused.value)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    assert "{'device_map': None}" in placement(0)
    assert "{'device_map': {'': 'cuda:0'}}" in placement(1)
    places = placement(2)
    assert "'model.embed_tokens': 'cuda:0'" in places
    assert "'model.layers.0': 'cuda:0'" in places
    assert "'model.layers.3': 'cuda:1'" in places
    assert "cuda:2" not in places
    with pytest.raises(InfeasibleError, match="5 GPUs per worker are asked for, and this machine shows 4"):
        placement(5)


def test_a_local_worker_without_gpus_runs_on_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    executor = LocalExecutor(ModelSection(model=str(folder)), "float32", ResourceSection(local=True))
    executor.connect()
    assert executor.load().device == "cpu"


def test_a_worker_out_of_gpu_memory_takes_smaller_batches(
    folder: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 10 * 2**20
    budgets: list[int] = []

    original = Scorer.score
    direct = Scorer(loaded).score(unit(1), QUESTIONS.rows["search"], QUESTIONS.answer, 3, "direct")

    def scarce(scorer: Scorer, *arguments: Any) -> UnitResult:
        budgets.append(scorer.budget.total)
        if scorer.budget.total > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(scorer, *arguments)

    monkeypatch.setattr(Scorer, "score", scarce)
    worker = Worker("one", ModelSection(model=str(folder)), "float32", ResourceSection(batch_bytes=256 * 2**20))
    worker.share(QUESTIONS)
    result = worker.score(unit(1))
    assert budgets == [mebi * 2**20 for mebi in (256, 128, 64, 32, 16, 8)]
    assert without_seconds(result) == without_seconds(direct)
    worker.score(unit(2))
    assert budgets[-1] == 8 * 2**20  # learned
    assert len(budgets) == 7
    assert worker.halvings == 5
    resources = ResourceSection(batch_bytes=256 * 2**20)
    later = Worker("two", ModelSection(model=str(folder)), "float32", resources, worker.halvings)
    later.share(QUESTIONS)
    later.score(unit(3))
    assert budgets[7:] == [8 * 2**20]
    room = 0
    with pytest.raises(ConfigError, match="the longest row"):
        worker.score(unit(3))
