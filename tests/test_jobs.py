"""Jobs on a real cluster: a head without CPUs for work and a worker node, with a token, started and ended here."""

import contextlib
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from folders import show
from job_cluster import JobCluster, job_cluster, wait_for

from tale_ray.api import search

pytestmark = pytest.mark.ray

SEARCH = {
    "model": "bundled",
    "task": "boolean_synthetic",
    "rows": 24,
    "max_removed": 2,
    "workers": 1,
}
LONG = {
    **SEARCH,
    "exhaustive": True,
    "rows": 1200,
    "splits": {"search": 1},
    "max_removed": 3,
}  # still running when it is looked at


@pytest.fixture(scope="module")
def cluster() -> Iterator[JobCluster]:
    with job_cluster(secrets.token_hex(32)) as started:
        yield started


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tale") as folder:
        yield Path(folder)


def write_job(folder: Path, name: str, options: dict[str, Any], **more: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"search": {**options, "run": str(folder / name)}, **more}))
    return path


def decisions(run: Path) -> dict[str, Any]:
    shown = show(run)
    return {
        name: shown[name] for name in ("baseline", "rounds", "rejected_round", "best", "bsba", "final", "stop_reason")
    }


def driver_of(run: Path) -> psutil.Process:
    """The process that a job's command became."""
    (found,) = wait_for(
        lambda: [
            process
            for process in psutil.process_iter(["cmdline"])
            if f"--run={run}" in (process.info["cmdline"] or ()) and "tale_ray" in process.info["cmdline"]
        ]
    )
    return found  # type: ignore[no-any-return]


def started(cluster: JobCluster, *arguments: object, url: str = "") -> subprocess.Popen[str]:
    command = cluster.command(*arguments, "--address", url or cluster.url)
    heeding = ["env", "--default-signal=INT"]  # a process in the background of a shell ignores Ctrl-C
    return subprocess.Popen([*heeding, *command], **cluster.options())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The decisions of the long search, without a cluster and without a fault."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    search(**LONG, run=run, local=True)
    return decisions(run)


class CuttingProxy:
    """Passes bytes on to a server, and cuts all connections that are open when `cut` is called."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> int:
        """Return how many connections were cut."""
        cut = [each for each in self._open if each.fileno() >= 0]
        for each in cut:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        return len(cut)

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                self._open += [client, server]
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        source.close()


def test_a_followed_job_is_heard_to_its_end_though_the_connection_drops(cluster: JobCluster, folder: Path) -> None:
    path = write_job(folder, "heard", {**LONG, "workers": 2})
    lines, cuts = [], []
    with (
        contextlib.closing(CuttingProxy(int(cluster.url.rpartition(":")[2]))) as proxy,
        started(cluster, "submit", path, "--follow", url=proxy.url) as following,
    ):
        assert following.stdout is not None
        assert following.stderr is not None
        for line in following.stdout:
            lines.append(line)
            if line.startswith(("baseline:", "round 1:", "round 2:")):
                cuts.append(proxy.cut())
        assert following.wait(60) == 0, following.stderr.read()
        assert following.stderr.read() == "submitted heard-a1\nheard-a1: done (exit code 0)\n"
    assert len(cuts) == 3
    assert cuts[0] > 0  # lines that came at once are read after their connection was cut: the later may be 0
    printed = "".join(lines)
    assert printed.count("round 2: layer") == 1
    assert "boolean_synthetic on bundled, 12 layers: finished (max_removed)" in printed
    assert printed == cluster.tale_ray("logs", "heard-a1", "--address", cluster.url).stdout
    assert show(folder / "heard")["state"] == "finished"

    status = cluster.tale_ray("status", path, "--address", cluster.url)
    assert status.returncode == 0
    assert status.stdout.startswith("heard-a1: done (exit code 0)\n")
    assert f"tale-ray show {folder / 'heard'}" in status.stdout
    assert cluster.tale_ray("stop", path, "--address", cluster.url).stdout == "heard-a1: done (exit code 0)\n"


def test_a_stopped_job_goes_on_when_it_is_submitted_again(
    cluster: JobCluster, folder: Path, undisturbed: dict[str, Any]
) -> None:
    path = write_job(folder, "stopped", LONG)
    waiting = started(cluster, "submit", path, "--wait", "--attempts", 3)
    wait_for((folder / "stopped" / "rounds" / "round-0000.parquet").exists)
    second = cluster.tale_ray("submit", path, "--address", cluster.url)
    assert second.returncode == 2
    assert "stopped-a1 of the same run is running" in second.stderr
    stop = cluster.tale_ray("stop", "stopped-a1", "--address", cluster.url)
    assert (stop.returncode, stop.stderr) == (0, "")
    assert stop.stdout == "stopped-a1: stopped; interrupted and resumable (exit code 75)\n"
    _, errors = waiting.communicate(timeout=60)
    assert waiting.returncode == 75, errors  # nobody submits again what was stopped on purpose
    assert show(folder / "stopped")["state"] == "interrupted"
    assert (
        "SIGTERM was received: everything finished is stored"
        in cluster.tale_ray("logs", "stopped-a1", "--address", cluster.url).stdout
    )

    again = cluster.tale_ray("submit", path, "--wait", "--address", cluster.url)
    assert again.returncode == 0, again.stderr
    assert "submitted stopped-a2" in again.stderr
    shown = show(folder / "stopped")
    assert (shown["state"], shown["attempts"]) == ("finished", 2)
    assert decisions(folder / "stopped") == undisturbed


def test_a_lost_driver_is_replaced(cluster: JobCluster, folder: Path, undisturbed: dict[str, Any]) -> None:
    path = write_job(folder, "lost", LONG, attempts=2)
    waiting = started(cluster, "submit", path, "--follow")
    wait_for((folder / "lost" / "rounds" / "round-0000.parquet").exists)
    driver_of(folder / "lost").send_signal(signal.SIGKILL)
    _, errors = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, errors
    assert "lost-a1: its driver is lost; interrupted and resumable (exit code 75); submitting it again" in errors
    assert show(folder / "lost")["attempts"] == 2
    assert decisions(folder / "lost") == undisturbed


def test_an_interrupted_driver_is_replaced(cluster: JobCluster, folder: Path) -> None:
    """A time limit ends each attempt with 75; together they come to the end."""
    path = write_job(folder, "limited", {**SEARCH, "time_limit": 1}, attempts=2)
    outcome = cluster.tale_ray("submit", path, "--wait", "--address", cluster.url)
    assert outcome.returncode == 75
    assert outcome.stderr.count("limited-a1: interrupted and resumable (exit code 75); submitting it again") == 1
    assert "limited-a2: interrupted and resumable (exit code 75)\n" in outcome.stderr


def test_a_request_that_cannot_be_met_is_not_made_again(cluster: JobCluster, folder: Path) -> None:
    path = write_job(folder, "huge", {**SEARCH, "gpus_per_worker": 8}, attempts=3)
    outcome = cluster.tale_ray("submit", path, "--follow", "--address", cluster.url)
    assert outcome.returncode == 2
    assert "no node of the cluster can ever give that" in outcome.stdout
    assert "huge-a1: the request cannot be met (exit code 2)" in outcome.stderr
    assert "again" not in outcome.stderr


def test_ctrl_c_leaves_the_job_running(cluster: JobCluster, folder: Path) -> None:
    path = write_job(folder, "left", LONG)
    following = started(cluster, "submit", path, "--follow")
    wait_for((folder / "left" / "rounds" / "round-0000.parquet").exists)
    following.send_signal(signal.SIGINT)
    _, errors = following.communicate(timeout=60)
    assert following.returncode == 75
    assert (
        f"left-a1 goes on without this command: follow it with `tale-ray logs left-a1 --address {cluster.url}" in errors
    )
    assert "Traceback" not in errors
    assert driver_of(folder / "left").is_running()
    back = cluster.tale_ray("logs", path, "--follow", "--address", cluster.url)
    assert back.returncode == 0, back.stderr
    assert "finished (max_removed)" in back.stdout


@pytest.mark.parametrize("token", [None, "w" * 32])
def test_a_token_that_is_missing_or_wrong_is_explained(cluster: JobCluster, folder: Path, token: str | None) -> None:
    environment = {**cluster.environment, "HOME": str(folder)}
    environment.pop("RAY_AUTH_TOKEN")
    if token is None:
        environment.pop("RAY_AUTH_MODE")
    else:
        environment["RAY_AUTH_TOKEN"] = token
    path = write_job(folder, "closed", SEARCH)
    outcome = cluster.tale_ray("submit", path, "--follow", "--address", cluster.url, env=environment)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert f"the cluster at {cluster.url} asks for a token" in outcome.stderr
    assert "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_the_address_that_is_given_wins(cluster: JobCluster) -> None:
    environment = {**cluster.environment, "RAY_ADDRESS": "127.0.0.1:1", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}
    outcome = cluster.tale_ray("status", "nobody-a1", "--address", cluster.url, env=environment)
    assert outcome.returncode == 2
    assert f"job 'nobody-a1' is not known at {cluster.url}" in outcome.stderr
