"""A cluster as people start it: a head without CPUs for work, its dashboard, a token, and worker nodes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 90
OWN_PORTS = (
    "dashboard-agent-listen",
    "dashboard-agent-grpc",
    "metrics-export",
    "ray-client-server",
    "runtime-env-agent",
)


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.05)
    return found


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@dataclass(frozen=True)
class JobCluster:
    """Where a cluster is, and the environment of somebody who may use it."""

    url: str
    address: str
    environment: dict[str, str]

    def tale_ray(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Call the command line, in a process of its own: Ray reads its token when it is imported."""
        return subprocess.run(self.command(*arguments), **self.options(120.0, **options), check=False)

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "tale_ray", *map(str, arguments)]

    def options(self, timeout: float | None = None, **options: Any) -> dict[str, Any]:
        known: dict[str, Any] = {"env": self.environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return {**known, "text": True, **({"timeout": timeout} if timeout else {}), **options}


@contextmanager
def job_cluster(token: str, num_workers: int = 1, cpus: int = 2) -> Iterator[JobCluster]:
    """Start a head and worker nodes, each in processes of its own, and end them, by their ids."""
    port, dashboard = free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="tale")  # sockets have short names
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "RAY_memory_monitor_refresh_ms": "0",
    }
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        environment.pop(name, None)
    head = [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
    cluster = JobCluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", environment)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(_node(["--head", *head, "--include-dashboard=true", "--num-cpus=0"], environment, folder))
        wait_for(lambda: _answers(cluster.url), START_SECONDS)
        for _ in range(num_workers):
            stack.enter_context(_node([f"--address={cluster.address}", f"--num-cpus={cpus}"], environment, folder))
        log = Path(folder) / "start.log"
        wait_for(lambda: log.read_text().count("Ray runtime started.") == 1 + num_workers, START_SECONDS)
        yield cluster


@contextmanager
def _node(arguments: list[str], environment: dict[str, str], folder: str) -> Iterator[subprocess.Popen[bytes]]:
    options = ["--block", "--num-gpus=0", "--object-store-memory=100000000", "--disable-usage-stats"]
    options += [f"--{name}-port={free_port()}" for name in OWN_PORTS]
    with (Path(folder) / "start.log").open("ab") as log:
        node = subprocess.Popen(
            [BIN / "ray", "start", *arguments, *options], env=environment, stdout=log, stderr=log, process_group=0
        )
        try:
            yield node
        finally:
            node.send_signal(signal.SIGTERM)  # `ray start --block` ends what it started
            try:
                node.wait(30)
            finally:
                os.killpg(node.pid, signal.SIGKILL) if node.poll() is None else None


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False
    return True
