"""What only Ray can do: workers that die, places that are not there, clusters that are closed to us."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from conftest import CLUSTER_CPUS, CLUSTER_GPUS
from families import save_tiny, score_unit, tiny_prompts
from paper import QUESTIONS, wait_for
from paper import executor_fixture as executor_fixture
from paper import paper_fixture as paper_fixture

from tale_ray.api import Run, make_config, search
from tale_ray.attempt.gpus import FREE_SHARE
from tale_ray.attempt.plan import Device, make_plan
from tale_ray.attempt.search import run_search
from tale_ray.config import ModelSection
from tale_ray.errors import InfeasibleError, Interrupted
from tale_ray.model.load import load_model
from tale_ray.records import PromptRow, WorkUnit
from tale_ray.search.executor import Questions, UnitDone, WorkerJoined, WorkerLost
from tale_ray.search.interruption import Interruption
from tale_ray.search.pace import Pace, UnitShape
from tale_ray.search.pool import ScoringAdvanced
from tale_ray.tasks.prompts import encode
from tale_ray.tasks.spec import AnswerSpec

pytestmark = pytest.mark.ray

ANSWER = AnswerSpec(type="regex", pattern=r"(t\d+)")
NUM_ROWS = 48
ROWS = [PromptRow(prompt, "t9") for prompt in tiny_prompts(NUM_ROWS)]
MARK = "TALE_RAY_TEST_SESSION"


def workers_of_this_session(title: str = "ray::") -> list[psutil.Process]:
    """Processes of actors, by what they are doing."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


# A worker that is killed.


def long_unit(number: int, rows: int = NUM_ROWS) -> WorkUnit:
    return WorkUnit(number, "round-0001", "search", (), (0, 1, 2, 3), tuple(range(rows)))


def test_a_worker_killed_in_the_middle_of_a_unit_is_replaced(
    executor: Callable[..., Any],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ray = executor(folder, workers=1)
    ray.connect()
    ray.load()
    ray.share(Questions({"search": ROWS}, ANSWER, max_new_tokens=100))
    (joined,) = wait_for(lambda: ray.poll(1.0))
    assert joined == WorkerJoined("worker-0")
    for number in range(100):
        ray.submit("worker-0", long_unit(number))
    (process,) = wait_for(lambda: workers_of_this_session("ray::WorkerActor.score"))
    process.send_signal(signal.SIGKILL)
    seen: list[Any] = []
    wait_for(lambda: seen.extend(ray.poll(1.0)) or any(isinstance(each, WorkerLost) for each in seen))
    *finished, lost = seen
    assert isinstance(lost, WorkerLost)
    assert lost.worker == "worker-0"
    assert all(isinstance(each, UnitDone) for each in finished)
    assert len(finished) < 100
    assert wait_for(lambda: ray.poll(1.0)) == (joined,)  # the new one has the questions, which were shared before it
    ray.submit("worker-0", long_unit(2, rows=1))
    (done,) = wait_for(lambda: ray.poll(1.0))
    direct = score_unit(
        load_model(ModelSection(model=str(folder)), "float32"), long_unit(2, rows=1), ROWS, ANSWER, 100, None, "direct"
    )
    assert [each.answers for each in done.result.candidates] == [each.answers for each in direct.candidates]
    wait_for(lambda: "Ray says: A worker died or was killed" in caplog.text, 20)
    ray.close()
    assert capsys.readouterr().out == "", "Ray would print it among the results"
    wait_for(lambda: not workers_of_this_session("ray::WorkerActor"), 20)


@pytest.fixture(scope="module")
def task(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task that the tiny model answers correctly in two rows of three."""
    loaded = load_model(ModelSection(model=str(folder)), "float32")
    texts = [" ".join(f"t{token}" for token in row.token_ids) for row in ROWS]
    prompts = [PromptRow(encode(loaded.tokenizer, [{"role": "user", "content": text}]), "t9") for text in texts]
    unit = WorkUnit(0, "round-0000", "search", (), (None,), tuple(range(NUM_ROWS)))
    (scored,) = score_unit(loaded, unit, prompts, ANSWER, 2, None, "direct").candidates
    place = tmp_path_factory.mktemp("task")
    with (place / "rows.jsonl").open("w") as file:
        for number, (text, answer) in enumerate(zip(texts, scored.answers, strict=True)):
            target = answer.prediction if number % 3 and answer.prediction else "t9"
            file.write(json.dumps({"text": text, "target": target}) + "\n")
    content = {
        "name": "words",
        "source": {"path": "json", "data_files": "rows.jsonl"},
        "messages": [{"role": "user", "content": "{{ text }}"}],
        "reply": "{{ target }}",
        "target": "{{ target }}",
        "answer": {"type": "regex", "pattern": ANSWER.pattern},
        "max_new_tokens": 2,
    }
    (place / "task.yaml").write_text(yaml.safe_dump(content))
    return place / "task.yaml"


def options(folder: Path, task: Path) -> dict[str, Any]:
    return {
        "model": str(folder),
        "task": str(task),
        "splits": "search=0.7,test=0.3",
        "epsilon": "1",
        "max_removed": 2,
        "exhaustive": True,
    }


@pytest.fixture(scope="module")
def undisturbed(folder: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = search(**options(folder, task), local=True, run=str(tmp_path_factory.mktemp("runs") / "local"))
    assert run.summary["baseline"]["correct"] > 5
    assert len(run.summary["rounds"]) == 2
    return decisions(run.summary)


AT_WORK = "ray::WorkerActor.score"


def kill_at_work(worker: psutil.Process) -> bool:
    """Kill a worker if, brought to a halt, it is found in the middle of a unit."""
    worker.suspend()
    if " ".join(worker.cmdline()).startswith(AT_WORK):
        worker.kill()
        return True
    worker.resume()
    return False


def decisions(summary: dict[str, Any]) -> dict[str, Any]:
    names = ("baseline", "rounds", "rejected_round", "best", "bsba", "final", "test", "stop_reason", "state")
    return {name: summary[name] for name in names}


def test_a_search_that_loses_a_worker_decides_the_same(
    ray_address: str,
    folder: Path,
    task: Path,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_row = UnitShape(1, 100)
    monkeypatch.setattr(Pace, "shape", lambda *_arguments: one_row)  # many units, so that one is always under way
    config = make_config(**options(folder, task), address=ray_address, workers=2, run=str(tmp_path / "run"))
    others = {process.pid for process in workers_of_this_session()}  # of earlier tests, on their way out
    killed = False
    for event in run_search(config, Interruption()):
        if not killed and isinstance(event, ScoringAdvanced):
            killed = any(kill_at_work(each) for each in workers_of_this_session(AT_WORK) if each.pid not in others)
    assert killed
    summary = Run(str(tmp_path / "run")).summary
    assert decisions(summary) == undisturbed
    assert summary["work"]["retries"] >= 1


# Places.


def visible_gpus(ray: Any, count: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of the workers, `count` of which join."""
    ray.connect()
    ray.load()
    ray.share(QUESTIONS)
    found: dict[str, str] = {}

    def all_answered() -> bool:
        for event in ray.poll(1.0):
            if isinstance(event, WorkerJoined):
                ray.submit(event.worker, WorkUnit(1, "round-0001", "search", (), (None,), (1,)))
            if isinstance(event, UnitDone):
                found[event.worker] = event.result.worker
        return len(found) == count

    wait_for(all_answered)
    assert ray.poll(1.0) == ()
    return [found[worker] for worker in sorted(found)]


def test_workers_see_gpus_of_their_own_and_who_finds_none_waits(
    executor: Callable[..., Any], paper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper()
    monkeypatch.setattr("tale_ray.cluster.ray_executor.MAX_STARTS_IN_VAIN", 1)
    ray = executor(workers=3, gpus_per_worker=2)
    seen = visible_gpus(ray, 2)
    assert [len(gpus.split(",")) for gpus in seen] == [2, 2]
    assert sorted(gpu for gpus in seen for gpu in gpus.split(",")) == ["0", "1", "2", "3"]
    assert [slot.placed for slot in ray._slots].count(False) == 1
    gone = next(slot for slot in ray._slots if slot.placed)
    os.kill(gone.place.pid, signal.SIGKILL)  # and given up
    events: list[Any] = []
    wait_for(lambda: events.extend(ray.poll(1.0)) or any(isinstance(each, WorkerJoined) for each in events))
    (waited,) = (each.worker for each in events if isinstance(each, WorkerJoined))
    assert waited != gone.name


@pytest.mark.parametrize(("card_gibibytes", "gpus"), [(80, 2), (24, 7)])
def test_preflight_grants_what_a_plan_asks_for_or_refuses_it(
    executor: Callable[..., Any], paper: Any, card_gibibytes: int, gpus: int
) -> None:
    paper()
    llama = Path(__file__).parent / "data" / "configurations" / "llama-3.1-70b.json"
    config = make_config(model=str(llama), task="arc_challenge", rows=8)
    plan = make_plan(config, Device(free_bytes=int(FREE_SHARE * card_gibibytes * 2**30)), tokens_per_row=120)
    assert plan.gpus_per_worker == gpus
    ray = executor(gpus_per_worker=plan.gpus_per_worker)
    if gpus > CLUSTER_GPUS:
        with pytest.raises(InfeasibleError, match=f"needs 1 CPU and {gpus} GPUs, .*misses {gpus - CLUSTER_GPUS} GPUs"):
            ray.connect()
    else:
        assert [len(seen.split(",")) for seen in visible_gpus(ray, CLUSTER_GPUS // gpus)] == [gpus] * 2


def test_workers_that_ask_for_no_gpu_see_none(executor: Callable[..., Any], paper: Any) -> None:
    paper()
    assert visible_gpus(executor(workers=1), 1) == [""]


def test_fewer_places_than_workers(
    executor: Callable[..., Any], paper: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper()
    monkeypatch.setattr("tale_ray.cluster.ray_executor.MISSING_SECONDS", 1.0)
    caplog.set_level("INFO", "tale_ray.cluster")
    ray = executor(workers=5, cpus_per_worker=CLUSTER_CPUS // 2)
    assert len(visible_gpus(ray, 2)) == 2
    wait_for(lambda: ray.poll(0.5) or "have a place" in caplog.text, 10)
    ray.poll(1.5)
    told = [message for message in caplog.messages if "have a place" in message]
    assert len(told) == 1
    assert told[0].startswith("2 of 5 workers have a place; the cluster has 6 CPUs and 4 GPUs")


def test_no_place_for_a_worker_that_was_lost(executor: Callable[..., Any], paper: Any) -> None:
    paper()
    ray = executor(workers=1, wait_resources_seconds=30)
    ray.connect()
    ray.load()
    (slot,) = ray._slots
    slot.actor, slot.info, ray._unplaced_since = None, None, time.monotonic() - 30  # since its node was lost
    with pytest.raises(Interrupted, match=r"all workers are lost, and no worker found a place .* `tale-ray resume`"):
        ray._check_places()


def test_as_many_workers_as_fit(executor: Callable[..., Any], paper: Any) -> None:
    paper()
    assert len(visible_gpus(executor(gpus_per_worker=CLUSTER_GPUS // 2, cpus_per_worker=1), 2)) == 2


def test_a_worker_that_no_node_can_hold(executor: Callable[..., Any]) -> None:
    started = time.monotonic()
    with pytest.raises(
        InfeasibleError,
        match=r"needs 1 CPU and 16 GPUs, .*one has 6 CPUs and 4 GPUs\. The largest misses 12 GPUs\. Ask for less",
    ):
        executor(gpus_per_worker=16).connect()
    assert time.monotonic() - started < 15


TAKE_ALL = f"""
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus={CLUSTER_CPUS})
class Busy:
    def ready(self): return True
busy = Busy.remote()
ray.get(busy.ready.remote())
print("taken", flush=True)
sys.stdin.read()
"""


def test_a_cluster_that_is_busy(executor: Callable[..., Any], paper: Any, ray_address: str) -> None:
    paper()
    command = [sys.executable, "-c", TAKE_ALL, ray_address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "taken\n"
        ray = executor(workers=1, wait_resources_seconds=3)
        ray.connect()
        started = time.monotonic()
        with pytest.raises(
            InfeasibleError, match=r"within 3 s: each needs 1 CPU.*has 6 CPUs and 4 GPUs, of these free: 4 GPUs"
        ):
            ray.load()
        assert 3 <= time.monotonic() - started < 15
        other.communicate()


# Clusters that are closed to us.


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "no-such-host.invalid:6379", "nonsense"])
def test_an_address_where_nothing_is(executor: Callable[..., Any], address: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = address.format(port=free.getsockname()[1])
    started = time.monotonic()
    with pytest.raises(InfeasibleError, match=rf"no Ray cluster can be reached at {address}: check the address"):
        executor(address=address).connect()
    assert time.monotonic() - started < 10


JOIN = """
import sys
from tale_ray.cluster.connection import connected
from tale_ray.errors import InfeasibleError
try:
    with connected(sys.argv[1]):
        print("joined")
except InfeasibleError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "settings", [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}]
)
def test_a_token_is_asked_for(ray_address: str, settings: dict[str, str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", JOIN, ray_address]
    joined = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert joined.stdout.strip() == "joined"
    started = time.monotonic()
    found = subprocess.run(
        command, env={**environment, "HOME": str(tmp_path), **settings}, capture_output=True, text=True, timeout=60
    )
    assert f"the Ray cluster at {ray_address} asks for a token" in found.stdout
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in found.stdout
    assert "Traceback" not in found.stdout + found.stderr
    assert time.monotonic() - started < 20


# Whole processes.


COMMAND = """
import sys
from tale_ray.cli import main
try:
    main()
finally:
    print(sorted({"torch", "transformers"} & set(sys.modules)))
"""


def command_line(folder: Path, task: Path, run: Path, *more: str) -> list[str]:
    words: list[str] = []
    for name, value in options(folder, task).items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return [sys.executable, "-c", COMMAND, "search", *words, "--run", str(run), *more]


def marked(mark: str) -> list[str]:
    """Command lines of the processes that descend from the one that was started with the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(" ".join(process.cmdline())[:200])
        except psutil.Error:
            continue
    return found


def test_a_private_cluster_ends_with_its_search(
    folder: Path, task: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    mark = uuid.uuid4().hex
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    found = subprocess.run(
        command_line(folder, task, tmp_path / "run", "--workers", "1"),
        env={**environment, MARK: mark, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "[]"  # modules that the driver has no need of
    assert decisions(Run(str(tmp_path / "run")).summary) == undisturbed
    for line in found.stderr.splitlines():
        assert "ray" not in line.lower().replace(str(tmp_path).lower(), ""), line
    wait_for(lambda: not marked(mark), 20)
    assert not (tmp_path / ".ray").exists()


def test_sigterm_ends_a_private_cluster(folder: Path, task: Path, tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    run = tmp_path / "run"
    with subprocess.Popen(
        command_line(folder, task, run, "--workers", "1"),
        env={**os.environ, MARK: mark},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        wait_for(lambda: any("ray::WorkerActor" in line for line in marked(mark)), 100)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "SIGTERM was received" in errors
    assert "Traceback" not in errors
    wait_for(lambda: not marked(mark), 20)


def test_a_cluster_that_goes_away(folder: Path, task: Path, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    record = tmp_path / "run" / "attempts" / "attempt-0001.json"
    others = {process.pid for process in workers_of_this_session()}
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    address = cluster.address
    try:
        command = command_line(folder, task, tmp_path / "run", "--workers", "1", "--address", address)
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            wait_for(lambda: record.exists() or process.poll() is not None, 100)
            found = [each for each in workers_of_this_session("ray::WorkerActor") if each.pid not in others]
            for worker in found:
                worker.suspend()  # or the search might end first
            (head,) = cluster.head_node.all_processes["gcs_server"]
            head.process.kill()
            started = time.monotonic()
            _, errors = process.communicate(timeout=100)
            seconds = time.monotonic() - started
            for worker in found:
                worker.kill()
    finally:
        cluster.shutdown()
    assert process.returncode == 75, errors
    assert f"the Ray cluster at {address} does not answer any more" in errors
    assert "tale-ray resume" in errors
    assert seconds < 30
    assert json.loads(record.read_text())["how"] == "interrupted"
    assert not (tmp_path / "run" / "lease.json").exists()
