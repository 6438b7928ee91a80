"""Gangs on Ray: several processes that are one worker. They decide what one process decides, also when one is lost."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import CLUSTER_CPUS
from paper import TABLE, scored, wait_for
from paper import executor_fixture as executor_fixture
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from simulation import MODEL
from test_ray import decisions, visible_gpus, workers_of_this_session

from tale_ray.api import Run, make_config, search
from tale_ray.attempt.search import run_search
from tale_ray.cluster.actor import Scored
from tale_ray.cluster.gang import END_SECONDS, GangBroken, GangLead, GangOutOfMemory, predictions_digest
from tale_ray.config import ResourceSection
from tale_ray.errors import ConfigError, InfeasibleError
from tale_ray.records import CandidateAnswers, ModelInfo, PromptRow, RowAnswer, UnitResult, WorkUnit
from tale_ray.search.interruption import Interruption
from tale_ray.search.pace import Pace, UnitShape
from tale_ray.search.pool import ScoringAdvanced, WorkersChanged

OPTIONS: dict[str, Any] = {
    "model": "bundled",
    "task": "boolean_synthetic",
    "rows": 8,
    "splits": "search=0.1,test=0.02",
    "epsilon": "1",
    "max_removed": 2,
    "exhaustive": True,
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = search(**OPTIONS, local=True, run=str(tmp_path_factory.mktemp("runs") / "local"))
    assert run.summary["baseline"]["correct"] > 2
    assert len(run.summary["rounds"]) == 2
    return decisions(run.summary)


@pytest.mark.ray
def test_a_gang_decides_what_one_process_decides(ray_address: str, one_process: dict[str, Any], tmp_path: Path) -> None:
    run = search(**OPTIONS, address=ray_address, workers=1, tensor_parallel=2, run=str(tmp_path / "run"))
    assert decisions(run.summary) == one_process
    assert run.summary["work"]["retries"] == 0


LEAD, MEMBER = "ray::GangLead.score", "ray::GangMember.predict"
TIMEOUT = 4.0


def hurt(title: str, how: signal.Signals, but: set[int]) -> set[int]:
    """Send a signal to a process that is in the middle of a unit; return those of its gang, none if there was none."""
    for process in workers_of_this_session(title):
        if process.pid not in but:
            process.send_signal(how)
            return {process.pid, *(each.pid for each in workers_of_this_session("ray::Gang"))} - but
    return set()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("title", "how", "reason"),
    [
        (MEMBER, signal.SIGKILL, r"member 1 of the gang \(.*, pid \d+\) is lost: The actor is dead"),
        (
            MEMBER,
            signal.SIGSTOP,
            r"member 1 of the gang \(.*\) does not answer; its lead failed, too: RuntimeError: .*4000ms",
        ),
        (LEAD, signal.SIGKILL, "its worker process has died"),
    ],
)
def test_a_gang_that_loses_a_process_is_replaced(
    ray_address: str,
    one_process: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    title: str,
    how: signal.Signals,
    reason: str,
) -> None:
    one_row = UnitShape(1, 100)
    monkeypatch.setattr(Pace, "shape", lambda *_arguments: one_row)  # many units, so that one is always under way
    config = make_config(
        **OPTIONS, address=ray_address, workers=1, tensor_parallel=2, gang_timeout=TIMEOUT, run=str(tmp_path / "run")
    )
    earlier = {process.pid for process in workers_of_this_session()}
    gang: set[int] = set()
    hurt_at, reasons = 0.0, []
    for event in run_search(config, Interruption()):
        if not gang and isinstance(event, ScoringAdvanced):
            gang, hurt_at = hurt(title, how, earlier), time.monotonic()
        if isinstance(event, WorkersChanged) and event.lost_because is not None:
            reasons.append(event.lost_because)
            seconds = time.monotonic() - hurt_at
    summary = Run(str(tmp_path / "run")).summary
    assert decisions(summary) == one_process
    assert summary["work"]["retries"] >= 1
    (told,) = reasons
    assert re.search(reason, told)
    print(f"{how.name} to {title}: lost after {seconds:.1f} s")
    assert seconds < 30
    if how == signal.SIGSTOP:
        assert seconds >= TIMEOUT
    assert len(gang) == 2
    wait_for(lambda: not any(map(psutil.pid_exists, gang)), 30)


@pytest.mark.ray
def test_a_gang_that_freezes_while_it_loads_is_replaced(executor: Callable[..., Any]) -> None:
    earlier = {process.pid for process in workers_of_this_session()}
    frozen: set[int] = set()

    def freeze() -> bool:
        frozen.update(hurt("ray::GangMember.load_part", signal.SIGSTOP, earlier))
        return bool(frozen)

    watcher = threading.Thread(target=wait_for, args=(freeze,))
    watcher.start()
    ray = executor("bundled", workers=1, tensor_parallel=2, gang_timeout_seconds=TIMEOUT)
    ray.connect()
    assert ray.load().num_layers == 12
    watcher.join()
    assert ray._slots[0].starts_in_vain == 1
    wait_for(lambda: not any(map(psutil.pid_exists, frozen)), 30)


# How the lead finds out what has become of the others. There is no cluster: calls are answered from a list.

NEVER = object()


@pytest.fixture
def lead(monkeypatch: pytest.MonkeyPatch) -> GangLead:
    """The lead of a gang of three whose other members are what they answer."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))  # which actors set
    monkeypatch.setattr("tale_ray.cluster.gang.ALIKE_SECONDS", 0.1)

    def get(answer: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    def wait(answers: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return ([], answers) if answers[0] is NEVER else (answers, [])

    monkeypatch.setattr("tale_ray.cluster.gang.ray", SimpleNamespace(get=get, wait=wait))
    return GangLead("w", ResourceSection(tensor_parallel=3, gang_timeout_seconds=1.0))


def raised(error: Exception) -> RayTaskError:
    """An error that another member's method has raised."""
    return RayTaskError("predict", "Traceback", error)


def together(lead: GangLead, own: Any, *others: Any) -> Any:
    """What the lead makes of its own outcome (NEVER: it hangs) and of the others'."""
    hung = threading.Event()

    def work() -> Any:
        if own is NEVER:
            hung.wait(30)
        if isinstance(own, Exception):
            raise own
        return own

    lead._others = list(others)
    try:
        return lead._together(work, lambda member, rank: member)
    finally:
        hung.set()


def test_what_all_members_return(lead: GangLead) -> None:
    assert together(lead, "result", "one", "two") == ("result", ["one", "two"])


@pytest.mark.parametrize("error", [ConfigError("too few bytes"), IndexError("out of range")])
def test_an_error_that_all_members_raise_leaves_the_gang_whole(lead: GangLead, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        together(lead, error, raised(error), raised(error))
    assert together(lead, 1, 2, 3) == (1, [2, 3])


OUT_OF_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory")
TIMED_OUT = RuntimeError("Timed out waiting 4000ms")


@pytest.mark.parametrize(
    ("own", "others", "kind", "message"),
    [
        (NEVER, (NEVER, ActorDiedError()), GangBroken, "member 2 of the gang is lost: "),
        (NEVER, (raised(TIMED_OUT), NEVER), GangBroken, "member 1 of the gang failed: RuntimeError: Timed out"),
        (NEVER, (raised(OUT_OF_MEMORY), NEVER), GangOutOfMemory, "member 1 of the gang failed: OutOfMemoryError"),
        (NEVER, (OutOfMemoryError("node"), NEVER), GangOutOfMemory, "member 1 of the gang is lost: node"),
        (OUT_OF_MEMORY, (NEVER, NEVER), GangOutOfMemory, "member 1 .* does not answer; its lead failed, too: OutOf"),
        (OUT_OF_MEMORY, (raised(OUT_OF_MEMORY),) * 2, GangOutOfMemory, "all members of the gang failed: OutOfMemory"),
        (TIMED_OUT, (raised(TIMED_OUT), NEVER), GangBroken, "member 2 of the gang does not answer; its lead failed"),
        (TIMED_OUT, (raised(TIMED_OUT), ActorDiedError()), GangBroken, "member 2 of the gang is lost: "),
        (TIMED_OUT, (raised(TIMED_OUT),) * 2, GangBroken, "all members of the gang failed: RuntimeError: Timed out"),
        ("result", ("one", NEVER), GangBroken, "member 2 of the gang does not answer$"),
        ("result", ("one", raised(IndexError("x"))), GangBroken, "member 2 of the gang failed: IndexError: x"),
        (IndexError("x"), ("one", "two"), GangBroken, "the lead of the gang failed alone: IndexError: x"),
        (ConfigError("x"), (raised(ConfigError("x")), raised(KeyError("y"))), GangBroken, "member 2 .* KeyError: 'y'"),
    ],
)
def test_a_gang_that_is_of_no_more_use(
    lead: GangLead,
    monkeypatch: pytest.MonkeyPatch,
    own: Any,
    others: tuple[Any, ...],
    kind: type[GangBroken],
    message: str,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("tale_ray.cluster.gang.time", SimpleNamespace(sleep=slept.append))
    for asked in range(2):  # a unit that was queued finds it broken, and is not answered at once
        with pytest.raises(GangBroken, match=message) as broken:
            together(lead, own, *others)
        assert type(broken.value) is kind
        assert slept == [END_SECONDS] * asked
        own, others = 1, (2, 3)


def result_of(*predictions: str | None) -> UnitResult:
    unit = WorkUnit(1, "round-0001", "search", (), (None, 1), (0,))
    answers = [
        CandidateAnswers(layer, (RowAnswer("", text, False),), 0.0)
        for layer, text in zip((None, 1), predictions, strict=True)
    ]
    return UnitResult(unit, tuple(answers), 0, 0.0, "w")


def test_a_member_that_predicts_otherwise(lead: GangLead, monkeypatch: pytest.MonkeyPatch) -> None:
    lead._worker = SimpleNamespace(score=lambda unit: result_of("a", "b"), halvings=2)

    def member(*predictions: str | None) -> Any:
        found = predictions_digest(result_of(*predictions))
        return SimpleNamespace(predict=SimpleNamespace(remote=lambda unit: found))

    lead._others = [member("a", "b"), member("a", "b")]
    assert lead.score(result_of("a", "b").unit) == Scored(result_of("a", "b"), 2)
    lead._others = [member("a", "b"), member("a", None)]
    with pytest.raises(GangBroken, match="member 2 of the gang predicts otherwise than its lead"):
        lead.score(result_of("a", "b").unit)


# What the driver makes of it.


class PaperLead(GangLead):
    """A lead whose gang loads nothing, and answers with the GPUs that its processes see."""

    def load(self, section: Any, dtype: str, halvings: int) -> ModelInfo:
        return MODEL

    def share(self, questions: Any) -> None:
        pass

    def score(self, unit: WorkUnit) -> Scored:
        import ray

        seen = [member.__ray_call__.remote(lambda _: os.environ["CUDA_VISIBLE_DEVICES"]) for member in self._others]
        return Scored(TABLE.score(unit, "/".join([os.environ["CUDA_VISIBLE_DEVICES"], *ray.get(seen)])), 0)


class PoorLead(PaperLead):
    """The lead of a gang that needs two halvings."""

    def load(self, section: Any, dtype: str, halvings: int) -> ModelInfo:
        self._halvings = halvings
        return MODEL

    def encode(self, examples: Any) -> tuple[PromptRow, ...]:
        return tuple(PromptRow((1, 2), example.target) for example in examples)

    def score(self, unit: WorkUnit) -> Scored:
        if self._halvings < 2:
            raise GangOutOfMemory("member 1 of the gang failed: OutOfMemoryError")
        return Scored(TABLE.score(unit, self._name), 0)


@pytest.mark.ray
def test_the_gang_after_one_that_ran_out_of_memory_takes_smaller_batches(
    executor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes the whole cluster: the next one has a place only when the last one's is free."""
    monkeypatch.setattr("tale_ray.cluster.gang.GangLead", PoorLead)
    ray = executor(workers=1, tensor_parallel=2, cpus_per_worker=CLUSTER_CPUS // 2, wait_resources_seconds=20)
    scheduler = scored(ray)
    assert [answer.correct for answer in scheduler.answers(1)] == [TABLE.correct(row, (1,)) for row in range(24)]
    assert ray._halvings == 2


@pytest.mark.ray
@pytest.mark.parametrize(("gpus", "seen"), [(2, {"0", "1", "2", "3"}), (0, {""})])
def test_as_many_gangs_as_fit_and_each_process_sees_its_own_gpu(
    executor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, gpus: int, seen: set[str]
) -> None:
    monkeypatch.setattr("tale_ray.cluster.gang.GangLead", PaperLead)
    num_gangs = 2 if gpus else 1
    ray = executor(tensor_parallel=2, gpus_per_worker=gpus, cpus_per_worker=1 if gpus else CLUSTER_CPUS // 2)
    found = visible_gpus(ray, num_gangs)
    assert len(ray._slots) == num_gangs
    each = [gpu for gang in found for gpu in gang.split("/")]
    assert len(each) == 4 if gpus else 2
    assert set(each) == seen


@pytest.mark.ray
def test_a_gang_that_no_node_can_hold(executor: Callable[..., Any]) -> None:
    with pytest.raises(InfeasibleError, match=r"a worker needs 8 CPUs, .* misses 2 CPUs"):
        executor(tensor_parallel=4, cpus_per_worker=2).connect()
