"""Nodes that die, are told to go, and appear in the middle of a scoring. Their workers are made of paper."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from paper import QUESTIONS, TABLE, wait_for
from paper import paper_fixture as paper_fixture

from tale_ray.config import ModelSection, ResourceSection
from tale_ray.search.executor import UnitDone, WorkerLeaving, WorkerLost
from tale_ray.search.instructions import Keep
from tale_ray.search.interruption import Interruption
from tale_ray.search.pace import UnitShape
from tale_ray.search.pool import Pool, UnitRetried, WorkersChanged
from tale_ray.search.scheduler import Scheduler, Scoring

pytestmark = pytest.mark.ray

NUM_ROWS = 24
SCORING = Scoring("round-0001", "search", (), (0, 1, 2), NUM_ROWS)
UNIT_SECONDS = 0.5
PLACE = 3  # CPUs of a worker, of which the head has none and every other node has as many


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head where no worker fits, and one node for one worker. The head notices within 2 s that a node is gone."""
    from ray.cluster_utils import Cluster

    system = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 2}
    head = {"num_cpus": 0, "object_store_memory": 100 * 2**20, "include_dashboard": False, "_system_config": system}
    found = Cluster(initialize_head=True, head_node_args=head)
    yield found
    found.shutdown()


@pytest.fixture
def nodes(cluster: Any) -> Iterator[Callable[[], Any]]:
    """Adds nodes, and removes what is left of them."""
    added: list[Any] = []

    def add() -> Any:
        added.append(cluster.add_node(num_cpus=PLACE, object_store_memory=100 * 2**20))
        return added[-1]

    yield add
    for node in added:
        if node in cluster.list_all_nodes():
            cluster.remove_node(node, allow_graceful=True)


@pytest.fixture
def start(cluster: Any, paper: Any) -> Iterator[Callable[..., Any]]:
    from tale_ray.cluster.ray_executor import RayExecutor

    made: list[RayExecutor] = []
    paper(seconds=UNIT_SECONDS)

    def started(num_loaded: int = 1, **resources: Any) -> RayExecutor:
        section = ResourceSection(address=cluster.address, cpus_per_worker=PLACE, **resources)
        made.append(RayExecutor(ModelSection(model="simulated"), "float32", section))
        made[-1].connect()
        made[-1].load()
        while sum(slot.info is not None for slot in made[-1]._slots) < num_loaded:
            assert made[-1].poll(0.5) == ()  # whoever polls an event away would have to tell the pool
        made[-1].share(QUESTIONS)
        return made[-1]

    yield started
    for each in made:
        each.close()


def is_dead(node: Any) -> bool:
    import ray

    return any(each["NodeID"] == node.node_id and not each["Alive"] for each in ray.nodes())


def run(executor: Any, after: dict[int, Callable[[], Any]]) -> tuple[Scheduler, list[Any]]:
    """A scoring from its first unit to the last; `after` so many finished units something happens."""
    pool = Pool(executor, Interruption())
    scheduler = pool.scheduler(SCORING, UnitShape(rows=1, candidates=3))
    seen: list[Any] = []
    finished = 0
    deadline = time.monotonic() + 100
    for step in pool.run(scheduler):
        assert time.monotonic() < deadline, "it hangs"
        seen.append(step)
        if isinstance(step, Keep):
            finished += 1
            if finished in after:
                after[finished]()
    for candidate in SCORING.candidates:
        assert [each.correct for each in scheduler.answers(candidate)] == [
            TABLE.correct(row, (candidate,))
            for row in range(NUM_ROWS)  # type: ignore[arg-type]
        ]
    assert scheduler.work.candidate_rows == scheduler.total_cells
    return scheduler, seen


def test_a_node_that_dies_costs_what_was_under_way(cluster: Any, nodes: Any, start: Any) -> None:
    first = nodes()
    nodes()
    executor = start(workers=2, num_loaded=2)
    victim = next(slot.name for slot in executor._slots if slot.place.node == first.node_id)

    def die() -> None:
        cluster.remove_node(first, allow_graceful=False)
        wait_for(lambda: is_dead(first), 20)

    scheduler, seen = run(executor, {6: die})
    lost = [each for each in seen if isinstance(each, WorkersChanged) and each.lost_because]
    assert [each.worker for each in lost] == [victim]
    assert scheduler.retries >= 1
    assert any(isinstance(each, UnitRetried) for each in seen)


def test_a_new_node_gets_a_worker_and_units(nodes: Any, start: Any) -> None:
    nodes()
    executor = start()  # as many workers as fit
    assert len(executor._slots) == 1
    _, seen = run(executor, {2: nodes})
    assert {each.result.worker for each in seen if isinstance(each, Keep)} == {"worker-0", "worker-1"}
    assert not any(isinstance(each, WorkersChanged) and each.lost_because for each in seen)


def test_a_worker_that_had_no_place_gets_one_on_a_new_node(nodes: Any, start: Any) -> None:
    nodes()
    executor = start(workers=2)
    _, seen = run(executor, {2: nodes})
    assert {each.result.worker for each in seen if isinstance(each, Keep)} == {"worker-0", "worker-1"}


def test_a_node_that_is_on_its_way_is_waited_for(nodes: Any, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tale_ray.cluster import connection

    has_autoscaler = connection.has_autoscaler
    joined: list[Any] = []

    def asked_when_no_node_fits() -> bool:
        if not joined:
            joined.append(nodes())
        return has_autoscaler()

    monkeypatch.setattr(connection, "has_autoscaler", asked_when_no_node_fits)
    assert start()._slots[0].info is not None
    assert len(joined) == 1, "there was room from the beginning"


def drain(cluster: Any, node: Any) -> None:
    """What a cloud's notice of a spot node that is taken away leads to."""
    import ray
    from ray.core.generated import autoscaler_pb2

    client = ray._private.worker.global_worker.gcs_client
    is_accepted, why = client.drain_node(
        node.node_id, autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot notice", 60_000
    )
    assert is_accepted, why


def test_a_node_that_is_told_to_go_is_left_in_peace(cluster: Any, nodes: Any, start: Any) -> None:
    first = nodes()
    executor = start(workers=1)
    events: list[Any] = []
    poll = executor.poll

    def watched(timeout_seconds: float) -> Any:
        found = poll(timeout_seconds)
        events.extend(found)
        return found

    executor.poll = watched

    def notice() -> None:
        nodes()
        drain(cluster, first)

    scheduler, _ = run(executor, {3: notice})
    assert scheduler.retries == scheduler.wasted_rows == 0
    (leaving,) = [each for each in events if isinstance(each, WorkerLeaving)]
    (lost,) = [each for each in events if isinstance(each, WorkerLost)]
    assert not lost.is_suspect
    done = [event for event in events[events.index(leaving) : events.index(lost)] if isinstance(event, UnitDone)]
    assert len(done) <= 2  # what it had
    assert executor._slots[0].place.node != first.node_id


def test_the_only_node_is_used_to_its_end(cluster: Any, nodes: Any, start: Any) -> None:
    only = nodes()
    executor = start(workers=1)
    scheduler, seen = run(executor, {3: lambda: drain(cluster, only)})
    assert scheduler.retries == 0
    assert not any(isinstance(each, WorkersChanged) and each.lost_because for each in seen)
