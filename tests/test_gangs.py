"""Gangs on Ray: several processes that are one worker. They decide what one process decides, also when one is lost."""

import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from paper import executor_fixture as executor_fixture
from paper import wait_for
from test_ray import decisions, workers_of_this_session

from tale_ray.api import Run, make_config, search
from tale_ray.attempt.search import run_search
from tale_ray.search.interruption import Interruption
from tale_ray.search.pace import Pace, UnitShape
from tale_ray.search.pool import ScoringAdvanced, WorkersChanged

pytestmark = pytest.mark.ray

OPTIONS: dict[str, Any] = {
    "model": "bundled",
    "task": "boolean_synthetic",
    "rows": 12,
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


def test_a_gang_decides_what_one_process_decides(ray_address: str, one_process: dict[str, Any], tmp_path: Path) -> None:
    run = search(**OPTIONS, address=ray_address, workers=1, tensor_parallel=2, run=str(tmp_path / "run"))
    assert decisions(run.summary) == one_process
    assert run.summary["work"]["retries"] == 0


MEMBER_AT_WORK = "ray::GangMember.predict"


def hurt(how: signal.Signals, but: set[int]) -> int | None:
    """Send a signal to a member that is in the middle of a unit; return its process, if there was one."""
    for process in workers_of_this_session(MEMBER_AT_WORK):
        if process.pid not in but:
            process.send_signal(how)
            return process.pid
    return None


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (signal.SIGKILL, "is lost: The actor is dead because its worker process has died."),
        (signal.SIGSTOP, "does not answer; its lead failed, too: RuntimeError: "),
    ],
)
def test_a_gang_that_loses_a_member_is_replaced(
    ray_address: str,
    one_process: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: signal.Signals,
    reason: str,
) -> None:
    one_row = UnitShape(1, 100)
    monkeypatch.setattr(Pace, "shape", lambda *_arguments: one_row)  # many units, so that one is always under way
    config = make_config(
        **OPTIONS, address=ray_address, workers=1, tensor_parallel=2, gang_timeout=5, run=str(tmp_path / "run")
    )
    earlier = {process.pid for process in workers_of_this_session()}
    hurt_pid, reasons = None, []
    for event in run_search(config, Interruption()):
        if hurt_pid is None and isinstance(event, ScoringAdvanced):
            hurt_pid = hurt(how, earlier)
        if isinstance(event, WorkersChanged) and event.lost_because is not None:
            reasons.append(event.lost_because)
    assert hurt_pid is not None
    summary = Run(str(tmp_path / "run")).summary
    assert decisions(summary) == one_process
    assert summary["work"]["retries"] >= 1
    assert len(reasons) == 1
    assert reason in reasons[0]
    wait_for(lambda: not psutil.pid_exists(hurt_pid), 30)
