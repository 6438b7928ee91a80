"""One search, many faults: whatever happens, it decides what an undisturbed one does, and nothing finished is lost.

    python tests/chaos.py --faults 30 --seed 7

A real driver searches the bundled model on a real cluster of a head and two nodes, its run on an S3 server, both on
this machine. Faults come one after another, each after some progress. A driver that ends is started again by the same
command.
"""

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil
from faults import Fault
from s3_server import S3Server

from tale_ray.api import Run
from tale_ray.store.reader import RunReader

OPTIONS = ["--model", "bundled", "--task", "boolean_synthetic", "--rows", "40", "--max-removed", "4", "--exhaustive"]
DECISIONS = ("baseline", "rounds", "rejected_round", "best", "bsba", "final", "selected", "test", "stop_reason")
SMALL_UNITS = """
import sys
from tale_ray.search.pace import Pace, UnitShape
Pace.shape = lambda *_: UnitShape(rows=2, candidates=3)
from tale_ray.cli import main
main()
"""
KINDS = ("kill a worker", "kill the driver", "remove a node", "hurt the storage", "SIGTERM")
STORAGE = ("503", "500", "drop", "lose_reply", "slow")
PROGRESS = 4  # units at least between two faults
INTERRUPTED = 75
PATIENCE_SECONDS = 240.0  # without any progress


def undisturbed(folder: Path) -> dict[str, Any]:
    """What the search comes to when nothing happens."""
    run = folder / "undisturbed"
    subprocess.run(
        [sys.executable, "-c", SMALL_UNITS, "search", *OPTIONS, "--local", "--run", str(run)],
        check=True,
        capture_output=True,
    )
    return Run(str(run)).summary


@contextmanager
def small_cluster() -> Iterator[Any]:
    """A head where no worker fits; it notices within 2 s that a node is gone."""
    from ray.cluster_utils import Cluster

    system = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 2}
    head = {"num_cpus": 0, "object_store_memory": 100 * 2**20, "include_dashboard": False, "_system_config": system}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        cluster.shutdown()


@dataclass
class Chaos:
    """One search under faults, and what has to hold all the time."""

    cluster: Any
    server: S3Server
    log: Path
    seed: int
    say: Callable[[str], None] = print
    driver: subprocess.Popen[bytes] | None = None
    starts: int = 0
    happened: list[str] = field(default_factory=list)
    stored: dict[str, set[str]] = field(default_factory=dict)  # names of the units seen, by scope

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.uri = self.server.uri("run")
        self.nodes = [self._add_node() for _ in range(2)]

    def run(self, num_faults: int) -> dict[str, Any]:
        """Search to the end with so many faults, and return the summary."""
        kinds = [KINDS[number % len(KINDS)] for number in range(num_faults)]
        self.random.shuffle(kinds)
        try:
            self._start()
            for number, kind in enumerate(kinds):
                self._await_progress(PROGRESS + self.random.randrange(PROGRESS))
                assert not self._is_over(), f"the search was over after {number} faults"
                self.say(f"{number + 1}/{num_faults}: {kind}")
                self.happened.append(kind)
                self._hurt(kind)
            self.server.plan()
            self._await(self._is_over, "the end")
        finally:
            if self.driver is not None:
                self.driver.kill()
                self.driver.wait()
        return Run(self.uri).summary

    # Faults.

    def _hurt(self, kind: str) -> None:
        self.server.plan()
        match kind:
            case "kill a worker":
                if workers := _workers(self.cluster):
                    self.random.choice(workers).kill()
            case "kill the driver":
                assert self.driver is not None
                self.driver.kill()
                self._start()
            case "remove a node":
                gone = self.nodes.pop(self.random.randrange(len(self.nodes)))
                self.cluster.remove_node(gone, allow_graceful=False)
                self.nodes.append(self._add_node())
            case "hurt the storage":
                faults = [
                    Fault(
                        kind=self.random.choice(STORAGE),  # type: ignore[arg-type]
                        count=self.random.randrange(1, 6),
                        after=self.random.randrange(10),
                        seconds=2.0,
                    )
                    for _ in range(3)
                ]
                self.say("   " + ", ".join(f"{fault.kind} x {fault.count}" for fault in faults))
                self.server.plan(*faults, seed=self.random.randrange(2**32))
            case "SIGTERM":
                assert self.driver is not None
                self.driver.terminate()
                assert self.driver.wait(timeout=60) == INTERRUPTED, self._words()
                self._start()

    def _add_node(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)

    # The driver.

    def _start(self) -> None:
        if self.driver is not None:
            self.driver.wait()
        words = ["search", *OPTIONS, "--address", self.cluster.address, "--workers", "2", "--run", self.uri]
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-c", SMALL_UNITS, *words],
                stdout=log,
                stderr=log,
                env={**os.environ, **self.server.environment},
            )
        self.starts += 1

    def _is_over(self) -> bool:
        """Whether the search has ended; a driver that was interrupted is started again."""
        assert self.driver is not None
        code = self.driver.poll()
        if code == INTERRUPTED:
            self.say("   the driver ended with exit code 75 and is started again")
            self._start()
        assert code in (None, 0, INTERRUPTED), f"exit code {code}: {self._words()}"
        return code == 0

    def _words(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    # What has to hold.

    def _await_progress(self, num_units: int) -> None:
        """Wait for so many new units."""
        found = 0

        def enough() -> bool:
            nonlocal found
            found += self._look()
            return found >= num_units or self._is_over()

        self._await(enough, f"{num_units} more units")

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"no {what} in {PATIENCE_SECONDS:g} s: {self._words()}"
            time.sleep(0.2)

    def _look(self) -> int:
        """Make sure that every unit seen before is still there, or its scope done; return how many are new."""
        names = self._keys("partial/")
        new = 0
        for scope, seen in self.stored.items():
            missing = seen - names.get(scope, set())
            assert not missing or self._keys(f"answers/{scope}"), f"units of {scope} are lost: {sorted(missing)}"
        for scope, there in names.items():
            seen = self.stored.setdefault(scope, set())
            new += len(there - seen)
            seen |= there
        return new

    def _keys(self, folder: str) -> dict[str, set[str]]:
        """The names in the run, by the folder they lie in, as the server has them."""
        found: dict[str, set[str]] = {}
        for key in self.server.keys(f"run/{folder}"):
            parent, _, name = key.rpartition("/")
            found.setdefault(parent.rpartition("/")[2], set()).add(name)
        return found

    def check_end(self, summary: dict[str, Any], expected: dict[str, Any]) -> None:
        """Make sure of the end: decisions, exact counts, one file for every round, written once."""
        for name in DECISIONS:
            assert summary[name] == expected[name], f"{name}: {summary[name]} instead of {expected[name]}"
        assert summary["work"]["candidate_rows"] == expected["work"]["candidate_rows"]
        RunReader(self.uri).check()
        rounds = 1 + len(expected["rounds"]) + (expected["rejected_round"] is not None)
        names = self._keys("rounds/")["rounds"]
        assert names == {f"round-{number:04d}.parquet" for number in range(rounds)}
        for name in names:
            puts = [each for each in self.server.requests("PUT", f"run/rounds/{name}") if each.status == 200]
            assert len(puts) <= 1, f"{name} was written {len(puts)} times"


def _workers(cluster: Any) -> list[psutil.Process]:
    """The processes of the cluster's workers."""
    found = []
    for node in cluster.list_all_nodes():
        for raylet in node.all_processes.get("raylet", ()):
            try:
                children = psutil.Process(raylet.process.pid).children(recursive=True)
                found += [each for each in children if " ".join(each.cmdline()).startswith("ray::WorkerActor")]
            except psutil.Error:
                continue
    return found


def endure(num_faults: int, seed: int, folder: Path, say: Callable[[str], None] = print) -> Chaos:
    """A search with so many faults; every assertion that breaks names the seed's run in its log."""
    expected = undisturbed(folder)
    with S3Server() as server, small_cluster() as cluster:
        os.environ.update(server.environment)
        chaos = Chaos(cluster, server, folder / "driver.log", seed, say)
        summary = chaos.run(num_faults)
        chaos.check_end(summary, expected)
    work = summary["work"]
    say(
        f"{num_faults} faults, {chaos.starts} drivers, {summary['attempts']} attempts, {work['units']} units, "
        f"{work['retries']} retries, {work['wasted_rows']} wasted rows: decisions equal"
    )
    return chaos


@click.command()
@click.option("--faults", default=30, show_default=True)
@click.option("--seed", type=int, help="Of the faults.  [default: a new one]")
def main(faults: int, seed: int | None) -> None:
    """Search under faults."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), OMP_NUM_THREADS="1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    chosen = random.randrange(10**6) if seed is None else seed
    started = time.monotonic()
    click.echo(f"seed {chosen}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            endure(
                faults, chosen, Path(folder), lambda line: click.echo(f"{time.monotonic() - started:6.0f} s  {line}")
            )
        except AssertionError as error:
            raise click.ClickException(f"seed {chosen}: {error}") from error
    click.echo(json.dumps({"seed": chosen, "seconds": round(time.monotonic() - started)}))


if __name__ == "__main__":
    main()
