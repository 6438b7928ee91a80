"""Real processes that are killed, interrupted, put to sleep and doubled: what is finished stays, and nothing tears.

Drivers are forked from a server that has imported torch once, so a start takes a moment; one test pays for the real
command.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from folders import DECISIONS, Material, command, show
from folders import material_fixture as material_fixture

import tale_ray.cluster.worker
from tale_ray.cli import main
from tale_ray.errors import Interrupted
from tale_ray.search.interruption import Interruption
from tale_ray.search.pace import Pace, UnitShape
from tale_ray.store.reader import RunReader
from tale_ray.store.run import RunWriter

DEADLINE_SECONDS = 60.0
EXIT_SECONDS = 10.0  # within which a signal ends a driver

pytestmark = pytest.mark.slow


def drive(arguments: list[str], log: Path) -> None:
    """The command line in a process of its own, everything it says in a file; many small units, to kill between."""
    Pace.shape = lambda *_arguments: UnitShape(rows=4, candidates=3)  # type: ignore[method-assign,assignment]
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    main(arguments)


@pytest.fixture(scope="module")
def context() -> Any:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(
        ["tale_ray.cli", "tale_ray.cluster.worker", "transformers.models.llama.modeling_llama"]
    )
    return found


@pytest.fixture
def start(context: Any, tmp_path: Path) -> Iterator[Callable[..., "Driver"]]:
    """Starts drivers, and ends those that are left."""
    drivers: list[Driver] = []

    def started(*arguments: Any) -> Driver:
        log = tmp_path / f"log-{len(drivers)}"
        process = context.Process(target=drive, args=([str(argument) for argument in arguments], log))
        process.start()
        drivers.append(Driver(process, log))
        return drivers[-1]

    yield started
    for driver in drivers:
        driver.process.kill()
        driver.process.join()


class Driver:
    """A process that runs `tale-ray`."""

    def __init__(self, process: BaseProcess, log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def said(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def exit_code(self, seconds: float = DEADLINE_SECONDS) -> int | None:
        self.process.join(seconds)
        return self.process.exitcode

    def wait_until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not happened():
            assert self.process.is_alive(), self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.002)


def position(run: Path) -> tuple[int, int]:
    """How far a run is: finished rounds, and stored units that belong to no finished round."""
    rounds = len(list((run / "rounds").glob("round-*.parquet")))
    units = 0
    for scope in sorted((run / "partial").glob("*")):
        try:
            units += len(list(scope.glob("attempt-*.parquet")))
        except FileNotFoundError:  # dropped just now
            continue
    return rounds, units


def stored(run: Path, pattern: str = "*.parquet") -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob(pattern)}


@contextmanager
def no_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(tale_ray.cluster.worker, "load_model", None)
        yield


def assert_nothing_scored_twice(run: Path) -> None:
    reader = RunReader(str(run))
    for scope in reader.partial_scopes():
        units = [result.unit for result in reader.unit_results(scope)]
        cells = [(candidate, row) for unit in units for candidate in unit.candidates for row in unit.rows]
        assert len(set(cells)) == len(cells), f"{scope}: no finished unit is computed again"


KILLS = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 3), (2, 1), (2, 4), (3, 2), (4, 1), (4, 3)]  # rounds, units


def test_a_driver_killed_ten_times_decides_as_one_never_killed(
    material: Material, start: Callable[..., Driver], tmp_path: Path
) -> None:
    quiet = tmp_path / "quiet"
    task = ("--task", material.long_task)
    assert material.search(quiet, *task).code == 0
    run = tmp_path / "run"
    rounds: dict[str, tuple[bytes, int]] = {}
    for kill in KILLS:
        began, before = (run / "run.json").exists(), position(run)
        driver = start(*(["resume", run] if began else material.arguments(run, *task)))
        if kill == (0, 0):  # while it loads the model
            driver.wait_until((run / "lease.json").exists)
        else:
            driver.wait_until(lambda target=kill, start=before: position(run) >= target and position(run) > start)
        driver.signal(signal.SIGKILL)
        assert driver.exit_code() == -signal.SIGKILL
        found = stored(run / "rounds")
        assert {name: found[name] for name in rounds} == rounds, "no finished round is lost or written again"
        rounds = found
        assert_nothing_scored_twice(run)
        if (run / "run.json").exists():
            summary = show(run)
            assert summary["state"] in ("interrupted", "finished")
            assert (summary["stop_reason"] == "interrupted") is (summary["state"] == "interrupted")
    final = start("resume", run)
    assert final.exit_code() == 0, final.said
    assert {name: stored(run / "rounds")[name] for name in rounds} == rounds
    killed, undisturbed = show(run), show(quiet)
    for name in DECISIONS:
        assert killed[name] == undisturbed[name]
    assert killed["work"]["candidate_rows"] == undisturbed["work"]["candidate_rows"]
    assert killed["attempts"] == len(KILLS), "all but the one that was killed while it loaded"
    assert list(run.rglob("_tmp-*")) == [], "left-overs are cleaned up"


def test_a_matrix_of_transfer_that_is_killed_goes_on(
    material: Material, start: Callable[..., Driver], tmp_path: Path
) -> None:
    runs = [tmp_path / "runs" / name for name in ("short", "long")]
    for run, task in zip(runs, (material.task, material.long_task), strict=True):
        assert material.search(run, "--task", task, "--max-removed", "1").code == 0
    quiet = shutil.copytree(tmp_path / "runs", tmp_path / "quiet")
    transfer = ["transfer", *runs, "--pick", "final", "--local", "--json"]

    def units() -> set[Path]:
        return {path for run in runs for path in run.glob("partial/transfer-*/*.parquet")}

    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
        driver, before = start(*transfer), units()
        driver.wait_until(lambda known=before: len(units() - known) >= 2)
        driver.signal(number)
        assert driver.exit_code(EXIT_SECONDS) == code, driver.said
        assert before <= units(), "what is stored stays"
        for run in runs:
            assert_nothing_scored_twice(run)
            assert not (run / "results" / "transfer.json").exists()
    assert driver.said.strip().splitlines()[-1] == (
        "tale-ray: SIGTERM was received: what is scored is stored; run the same command again"
    )
    finished = command(*transfer)
    assert finished.code == 0, finished.err
    undisturbed = command("transfer", quiet / "short", quiet / "long", "--pick", "final", "--local", "--json")
    assert finished.json["scores"] == undisturbed.json["scores"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_driver_and_it_goes_on(
    material: Material, start: Callable[..., Driver], tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    driver = start(*material.arguments(run))
    driver.wait_until(lambda: position(run) >= (1, 4))
    driver.signal(number)
    assert driver.exit_code(EXIT_SECONDS) == 75, driver.said
    last = driver.said.strip().splitlines()[-1]
    assert last == (
        f"tale-ray: {number.name} was received: everything finished is stored; go on with: tale-ray resume {run}"
    )
    assert "Traceback" not in driver.said
    (attempt,) = RunReader(str(run)).attempts()
    assert attempt.how == "interrupted"
    assert attempt.ended is not None
    assert not (run / "lease.json").exists()
    summary = show(run)
    assert (summary["state"], summary["stop_reason"]) == ("interrupted", "interrupted")
    assert f"go on with: tale-ray resume {run}" in command("show", run).out
    assert command("resume", run).code == 0
    assert material.search(tmp_path / "quiet").code == 0
    for name in DECISIONS:
        assert show(run)[name] == show(tmp_path / "quiet")[name]


def test_the_real_command_is_interrupted_while_it_loads_and_while_it_searches(
    material: Material, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [sys.executable, "-m", "tale_ray", *material.arguments(run, "--task", material.long_task)]

    def interrupted_after(happened: Callable[[], bool]) -> str:
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                deadline = time.monotonic() + DEADLINE_SECONDS
                while not happened():
                    assert process.poll() is None, process.communicate()
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                out, said = process.communicate(timeout=EXIT_SECONDS)
            finally:
                process.kill()
        assert (process.returncode, out) == (75, "")
        assert "Traceback" not in said
        return said.strip().splitlines()[-1]

    said = interrupted_after((run / "lease.json").exists)
    assert said == "tale-ray: SIGTERM was received: nothing is lost; run the same command again"
    assert not (run / "run.json").exists()
    said = interrupted_after(lambda: position(run) >= (0, 1))
    assert said.endswith(f"go on with: tale-ray resume {run}")


def test_a_signal_that_the_loading_library_takes_for_an_error(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("tale_ray.model.load.AutoConfig.from_pretrained", load)
    outcome = material.search(tmp_path / "run")
    assert outcome.code == 75, outcome.err
    assert "SIGTERM was received: nothing is lost" in outcome.err


def test_the_time_limit(material: Material, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = time.monotonic()
    outcome = material.search(run, "--task", material.long_task, "--time-limit", "2")
    assert outcome.code == 75, outcome.err
    assert time.monotonic() - started < 2 + EXIT_SECONDS
    assert f"the time limit of 2 s is reached: everything finished is stored; go on with: tale-ray resume {run}" in (
        outcome.err
    )
    assert show(run)["state"] == "interrupted"
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    assert material.search(tmp_path / "other", "--max-removed", "0", "--time-limit", "1h").code == 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0), "an alarm must not come after the search"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)] == handlers


def test_a_time_limit_is_no_second_signal() -> None:
    """It must not kill a driver that a signal is ending, nor a signal one that it is ending."""
    interruption = Interruption()
    with interruption.on_signals(3600):
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        assert interruption.reason == "SIGTERM was received"
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "a second one ends the process at once"
    interruption = Interruption()
    with interruption.on_signals(3600):
        os.kill(os.getpid(), signal.SIGALRM)
        assert interruption.reason == "the time limit of 3600 s is reached"
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM"):
            interruption.check()


def test_a_second_driver_is_refused_and_the_first_is_undisturbed(
    material: Material, start: Callable[..., Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    driver = start(*material.arguments(run, "--task", material.long_task))
    driver.wait_until(lambda: position(run) >= (0, 1))
    with no_model(monkeypatch):
        second = material.search(run, "--task", material.long_task)
        third = command("resume", run)
    for refused in (second, third):
        assert refused.code == 2
        message = refused.err.strip().splitlines()[-1]
        assert f"is being written by process {driver.process.pid} on host" in message
        assert "Its lease runs until 20" in message
    summary = show(run)
    assert summary["state"] == "running"
    assert summary["stop_reason"] is None
    assert summary["attempts"] == 1
    before = position(run)
    driver.wait_until(lambda: position(run) > before)
    driver.signal(signal.SIGTERM)
    assert driver.exit_code(EXIT_SECONDS) == 75


def test_a_driver_that_was_asleep_too_long_writes_nothing_more(
    material: Material, start: Callable[..., Driver], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    driver = start(*material.arguments(run, "--task", material.long_task))
    driver.wait_until(lambda: position(run) >= (0, 3))
    driver.signal(signal.SIGSTOP)
    lease = json.loads((run / "lease.json").read_text())
    (run / "lease.json").write_text(json.dumps({**lease, "expires": time.time() - 1}))
    with RunWriter.claim(str(run)) as writer:
        assert writer.attempt == 2
        before = {**stored(run), **stored(run, "*.json")}
        driver.signal(signal.SIGCONT)
        assert driver.exit_code(EXIT_SECONDS) == 75, driver.said
        assert {**stored(run), **stored(run, "*.json")} == before
    last = driver.said.strip().splitlines()[-1]
    assert f"was taken over by process {os.getpid()}" in last
    assert "so this one stops" in last
