"""Whole searches whose run folder is on S3: killed, resumed, doubled and cut off, they decide as a local one does."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import Fault
from folders import DECISIONS, Material, command, show
from folders import material_fixture as material_fixture
from places import S3Place
from s3_server import S3Server

import tale_ray.cluster.worker
from tale_ray.store import files as store_files
from tale_ray.store import s3 as store_s3

DEADLINE_SECONDS = 120.0
DRIVER = """
import sys
from tale_ray.cli import main
from tale_ray.search.pace import Pace, UnitShape
Pace.shape = lambda *arguments: UnitShape(rows=4, candidates=3)  # many small units, to kill between
main(sys.argv[1:])
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts drivers, and ends those that are left."""
    drivers: list[subprocess.Popen[str]] = []

    def started(*arguments: Any) -> subprocess.Popen[str]:
        line = [sys.executable, "-c", DRIVER, *map(str, arguments)]
        drivers.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return drivers[-1]

    yield started
    for driver in drivers:
        driver.kill()
        driver.communicate()


def wait_until(driver: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not happened():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_decided_alike(one: str | Path, other: str | Path) -> None:
    first, second = show(one), show(other)
    for name in DECISIONS:
        assert first[name] == second[name], name
    assert first["work"]["candidate_rows"] == second["work"]["candidate_rows"]


def test_a_search_on_s3_that_is_killed_and_resumed_decides_as_a_local_one(
    material: Material, s3_server: S3Server, s3_place: S3Place, start: Callable[..., Any], tmp_path: Path
) -> None:
    rounds: dict[str, bytes] = {}
    for killed_at in ((0, 2), (1, 3)):  # rounds, and units of the one under way
        began = "run.json" in s3_place.names()
        driver = start(*(["resume", s3_place.uri] if began else material.arguments(s3_place.uri)))

        def is_there(target: tuple[int, int] = killed_at) -> bool:
            names = s3_place.names()
            finished = sum(name.startswith("rounds/") for name in names)
            units = sum(name.startswith(f"partial/round-{finished:04d}/") for name in names)
            return (finished, units) >= target

        wait_until(driver, is_there)
        driver.kill()
        driver.communicate()
        found = {name: s3_place.read(name) for name in s3_place.names() if name.startswith("rounds/")}
        assert {name: found[name] for name in rounds} == rounds
        rounds = found
        assert show(s3_place.uri)["state"] == "interrupted"
    final = start("resume", s3_place.uri)
    _, said = final.communicate(timeout=DEADLINE_SECONDS)
    assert final.returncode == 0, said
    assert {name: s3_place.read(name) for name in rounds} == rounds
    assert material.search(tmp_path / "quiet").code == 0
    assert_decided_alike(s3_place.uri, tmp_path / "quiet")
    summary = show(s3_place.uri)
    assert (summary["state"], summary["attempts"]) == ("finished", 3)
    puts = [item.key.removeprefix(f"{s3_place.key}/") for item in s3_server.requests("PUT", s3_place.key)]
    tables = [name for name in puts if name.endswith(".parquet")]
    assert len(tables) > 100
    assert len(set(tables)) == len(tables), "no file is written twice, and each is one request"
    assert command("show", s3_place.uri).code == 0
    assert "lease.json" not in s3_place.names()


def test_a_second_driver_is_refused_and_the_first_is_undisturbed(
    material: Material, s3_place: S3Place, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = start(*material.arguments(s3_place.uri, "--task", material.long_task))
    wait_until(driver, lambda: any(name.startswith("partial/") for name in s3_place.names()))
    monkeypatch.setattr(tale_ray.cluster.worker, "load_model", None)
    for refused in (material.search(s3_place.uri, "--task", material.long_task), command("resume", s3_place.uri)):
        assert refused.code == 2
        assert f"is being written by process {driver.pid} on host" in refused.err
    assert show(s3_place.uri)["state"] == "running"
    before = len(s3_place.names())
    wait_until(driver, lambda: len(s3_place.names()) > before)
    driver.terminate()
    driver.communicate()
    assert driver.returncode == 75


def test_storage_that_goes_away_in_a_search_ends_it_resumably(
    material: Material, s3_server: S3Server, s3_place: S3Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_s3, "ATTEMPTS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(store_files, "RETRY_SECONDS", (0.01, 0.02))
        s3_server.plan(Fault(kind="drop", key="/(rounds/round-0001|lease)", after=8))
        ended = material.search(s3_place.uri)
    assert ended.code == 75, ended.err
    assert "Traceback" not in ended.err
    assert "what was stored before is safe" in ended.err
    assert "go on with" in ended.err
    s3_server.plan()
    assert show(s3_place.uri)["stop_reason"] is None
    s3_place.delete("lease.json")  # it could not be given back, and this process is still there
    assert command("resume", s3_place.uri).code == 0
    assert material.search(tmp_path / "quiet").code == 0
    assert_decided_alike(s3_place.uri, tmp_path / "quiet")


def test_wrong_addresses_are_refused_before_a_model_is_loaded(
    material: Material, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tale_ray.cluster.worker, "load_model", None)
    for uri, reason in (
        (s3_server.uri("run", bucket="nobody-has-this"), "there is no bucket 'nobody-has-this'"),
        ("s3://bucket/run?endpoint_override=127.0.0.1:1&scheme=http", "Could not connect"),
        ("s3://bucket/run?colour=red", "colour is none of the options"),
    ):
        started = time.monotonic()
        refused = material.search(uri)
        assert refused.code == 2
        assert reason in refused.err
        assert "choose another --run" in refused.err
        assert time.monotonic() - started < 15
        shown = command("show", uri, "--json")
        assert shown.code == 2
        assert reason in shown.err
