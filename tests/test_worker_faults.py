"""Workers that always die, or die at a bad moment. They are made of paper: no model is loaded."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paper import QUESTIONS, TABLE, scored, wait_for
from paper import executor_fixture as executor_fixture
from paper import paper_fixture as paper_fixture
from simulation import MODEL, measured

from tale_ray.config import ModelSection, ResourceSection
from tale_ray.errors import PoisonUnit, WorkersLost
from tale_ray.records import Probe, WorkUnit
from tale_ray.search.executor import UnitDone, WorkerJoined, WorkerLost

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("method", ["load", "encode", "share", "score"])
def test_a_worker_that_dies_twice_at_one_moment(executor: Callable[..., Any], paper: Any, method: str) -> None:
    paper(**{method: 2})
    scheduler = scored(executor(workers=1))
    answers = [TABLE.correct(row, (1,)) for row in range(24)]
    assert [answer.correct for answer in scheduler.answers(1)] == answers
    assert scheduler.retries == (2 if method == "score" else 0)


@pytest.mark.parametrize("method", ["load", "encode", "share", "score"])
def test_a_worker_that_always_dies(executor: Callable[..., Any], paper: Any, method: str) -> None:
    paper(**{method: 99})
    with pytest.raises(WorkersLost, match=r"died 3 times [^\n]*tale-ray resume"):
        scored(executor(workers=1))


def test_a_worker_that_dies_while_it_measures_is_replaced_and_that_is_told(
    executor: Callable[..., Any], paper: Any
) -> None:
    paper(measure=1)
    ray = executor(workers=1)
    ray.connect()
    ray.load()
    ray.share(QUESTIONS)
    seen: list[Any] = []
    wait_for(lambda: seen.extend(ray.poll(1.0)) or seen)
    probe = Probe("block_influence", (), (0, 1, 2))
    assert ray.measure(probe, [(1, 2)]).values == measured(TABLE.seed, probe)
    wait_for(lambda: seen.extend(ray.poll(1.0)) or len(seen) == 3)
    joined, lost, again = seen
    assert joined == again == WorkerJoined("worker-0")
    assert isinstance(lost, WorkerLost)
    ray.submit("worker-0", WorkUnit(1, "round-0001", "search", (), (0,), (0, 1)))
    (done,) = wait_for(lambda: ray.poll(1.0))
    assert isinstance(done, UnitDone)


def test_a_worker_that_always_dies_while_it_measures(executor: Callable[..., Any], paper: Any) -> None:
    paper(measure=99)
    ray = executor(workers=1)
    ray.connect()
    ray.load()
    with pytest.raises(WorkersLost, match=r"died 3 times [^\n]*tale-ray resume"):
        ray.measure(Probe("block_influence", (), (0, 1, 2)), [(1, 2)])


def test_a_unit_that_kills_every_worker(executor: Callable[..., Any], paper: Any) -> None:
    paper(score=99)
    with pytest.raises(PoisonUnit, match=r"unit 0 of round-0001 .* failed on every try") as found:
        scored(executor(workers=2))
    assert re.search(
        r"its log is /.*worker-.*\.err on .*:\n(.*\n)*?  these were the last words of worker-\d\n", str(found.value)
    )
    assert "its worker process has died" in str(found.value).splitlines()[-1]


@pytest.mark.parametrize(("bad", "reason"), [("refuses", "no such folder here"), ("differs", "loaded another model")])
def test_a_bad_node_is_lost_and_the_others_go_on(
    executor: Callable[..., Any], paper: Any, bad: str, reason: str
) -> None:
    paper(bad=bad)
    ray = executor(workers=2)
    ray.connect()
    assert ray.load() == MODEL
    ray.share(QUESTIONS)
    seen: list[Any] = []
    wait_for(lambda: seen.extend(ray.poll(1.0)) or sum(isinstance(each, WorkerLost) for each in seen) == 3)
    assert WorkerJoined("worker-0") in seen
    assert all(each.worker == "worker-1" and reason in each.reason for each in seen if isinstance(each, WorkerLost))
    ray.submit("worker-0", WorkUnit(1, "round-0001", "search", (), (None,), (1,)))
    (done,) = wait_for(lambda: ray.poll(1.0))
    assert isinstance(done, UnitDone)


def test_a_new_worker_begins_with_the_budget_that_others_had_to_learn(
    executor: Callable[..., Any], paper: Any, tmp_path: Path
) -> None:
    paper(halvings=3)
    ray = executor(workers=1)
    scored(ray)
    (slot,) = ray._slots
    os.kill(slot.place.pid, signal.SIGKILL)
    ray.submit("worker-0", WorkUnit(1, "round-0001", "search", (), (None,), (1,)))
    seen: list[Any] = []
    wait_for(lambda: seen.extend(ray.poll(1.0)) or WorkerJoined("worker-0") in seen)
    assert (tmp_path / "loads").read_text().split() == ["0", "3"]


def test_a_worker_whose_node_is_short_of_memory_begins_with_half_of_its_budget(paper: Any) -> None:
    """Ray's own monitor ends the workers, at a threshold that any machine is above."""
    from ray.cluster_utils import Cluster

    from tale_ray.cluster.ray_executor import MAX_STARTS_IN_VAIN, RayExecutor

    system = {"memory_usage_threshold": 0.001, "memory_monitor_refresh_ms": 100}
    head = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False, "_system_config": system}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    paper(seconds=60)
    ray = RayExecutor(ModelSection(model="simulated"), "float32", ResourceSection(address=cluster.address, workers=1))
    try:
        with pytest.raises(WorkersLost, match=r"the last one because: .*the node running low on memory"):
            scored(ray)
    finally:
        ray.close()
        cluster.shutdown()
    assert ray._halvings == MAX_STARTS_IN_VAIN
