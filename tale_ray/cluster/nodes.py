"""The nodes of the cluster as they come and go, looked at now and then. Knows nothing of units."""

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray._private.state
import ray._private.worker
from ray.exceptions import RayError

from tale_ray.config import ResourceSection

LOOK_SECONDS = 2.0  # between two looks at the nodes
LOG_LINES = 20  # of a worker that died


@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor runs."""

    host: str
    pid: int
    node: str  # Ray's id
    log: str  # path of its standard error, on its node

    def __str__(self) -> str:
        return f"{self.host}, pid {self.pid}"


def here() -> Place:
    """Return where this process runs, an actor's."""
    log = ray._private.worker.global_worker.get_err_file_path()
    return Place(os.uname().nodename, os.getpid(), ray.get_runtime_context().get_node_id(), log)


@dataclass(slots=True)
class Nodes:
    """What is known of the nodes since the last look.

    `sees_drains`: Ray's client (ray://) is not told which nodes are.
    """

    sees_drains: bool = True
    resources: dict[str, Mapping[str, float]] = field(default_factory=dict)  # of those alive, by id
    draining: frozenset[str] = frozenset()  # of these, told to go: Ray places nothing there any more
    looked_at: float = 0.0

    def look_now_and_then(self) -> bool:
        """Look again, unless that was done a moment ago; return whether it was."""
        if time.monotonic() - self.looked_at < LOOK_SECONDS:
            return False
        self.look()
        return True

    def look(self) -> None:
        """Ask the head which nodes there are."""
        self.resources = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        draining = ray._private.state.state.get_draining_nodes() if self.sees_drains else ()
        self.draining = frozenset(draining) & self.resources.keys()
        self.looked_at = time.monotonic()

    def is_going(self, node: str) -> bool:
        """Return whether a node is gone, or told to go."""
        return node in self.draining or node not in self.resources

    def num_places(self, resources: ResourceSection) -> int:
        """Return how many workers the nodes that stay can hold, were they empty."""
        return sum(_times(node, resources) for name, node in self.resources.items() if name not in self.draining)


def _times(node: Mapping[str, float], resources: ResourceSection) -> int:
    fits = int(node.get("CPU", 0) // resources.worker_cpus)
    if resources.gpus_per_worker:
        fits = min(fits, int(node.get("GPU", 0) // resources.gpus_per_worker))
    return fits


def last_words(place: Place | None) -> str:
    """Return the end of a dead worker's log, with where the whole of it is; "" if it never ran.

    A log of another node is fetched through the dashboard's agents, where the cluster has them.
    """
    if place is None or not place.log:
        return ""
    lines = _read_here(place)
    if lines is None:
        lines = _fetch(place)
    shown = "".join(f"\n  {line}" for line in (lines or [])[-LOG_LINES:])
    return f"its log is {place.log} on {place.host}{':' + shown if shown else ''}\n"


def _read_here(place: Place) -> list[str] | None:
    if place.node != ray.get_runtime_context().get_node_id():
        return None
    with contextlib.suppress(OSError):  # it is gone already: its path has to do
        return Path(place.log).read_text(encoding="utf-8", errors="replace").splitlines()
    return None


def _fetch(place: Place) -> list[str] | None:
    from ray.util.state import get_log
    from ray.util.state.exception import RayStateApiException

    options: dict[str, Any] = {"node_id": place.node, "filename": Path(place.log).name, "tail": LOG_LINES}
    try:
        return [line for chunk in get_log(**options, timeout=5) for line in chunk.splitlines()]
    except (RayStateApiException, RayError, OSError, ValueError):
        return None  # no dashboard, or the node is gone with its logs: the path has to do
