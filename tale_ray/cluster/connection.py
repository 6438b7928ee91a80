"""Reaching a Ray cluster, and whether it can give what is asked for."""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray._private.worker as ray_worker
from ray.exceptions import AuthenticationError
from ray.experimental.internal_kv import _internal_kv_get

from tale_ray.config import ResourceSection
from tale_ray.errors import InfeasibleError, Interrupted

logger = logging.getLogger("tale_ray.cluster")

CONNECT_SECONDS = 5.0
PATIENCE_SECONDS = 8.0  # with a head that does not answer; Ray ends this process after a minute
JOIN_SECONDS = 5.0  # for nodes of a young cluster to join
CHECK_SECONDS = 2.0  # between two checks of the head
_TRIES_VARIABLE = "RAY_gcs_server_port_wait_time_s"  # about one try per second
_PRINTS = "print_to_stdstream"  # how Ray's driver shows what it is told
_AUTOSCALER_STATUS = b"__autoscaling_status"  # JSON, of the autoscaler's version 1
_AUTOSCALER_V2 = b"__autoscaler_v2_enabled"


@dataclass(slots=True)
class Head:
    """The process that a cluster cannot do without. Most calls of Ray hang for a minute when it is gone."""

    address: str
    gone: bool = False
    checked_at: float = 0.0

    def check(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Find out that the head is gone before Ray does.

        Raises:
            Interrupted: it did not answer for so long.
        """
        deadline = time.monotonic() + patience_seconds
        while not self.gone:
            try:
                _check_listening(self.address, max(0.1, min(CONNECT_SECONDS, deadline - time.monotonic())))
            except OSError:
                self.gone = time.monotonic() + 0.5 >= deadline
                time.sleep(0 if self.gone else 0.5)
            else:
                self.checked_at = time.monotonic()
                return
        raise Interrupted(f"the Ray cluster at {self.address} does not answer any more")

    def check_now_and_then(self) -> None:
        """Check, unless that was done a moment ago."""
        if time.monotonic() - self.checked_at >= CHECK_SECONDS:
            self.check()


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Head]:
    """Join the cluster at `address`, or start a private one that ends with the body.

    Raises:
        InfeasibleError: nothing answers there, it refuses the token, or this process has joined another cluster.
    """
    if ray.is_initialized():
        raise InfeasibleError(
            "this process is connected to a Ray cluster already: call ray.shutdown() first, or run with local=True"
        )
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": True, "logging_level": "error"}
    with _messages_logged():
        try:
            if address is None:
                ray.init(address="local", include_dashboard=False, **options)
            else:
                _check_listening(address)
                with _few_tries():
                    ray.init(address=address, **options)
        except SystemExit as error:  # from here on Ray handles SIGTERM
            raise Interrupted("SIGTERM was received") from error
        except (AuthenticationError, OSError, RuntimeError, ValueError) as error:
            raise _as_infeasible(error, address) from error
        client = address is not None and address.startswith("ray://")
        head = Head(str(address) if client else ray.get_runtime_context().gcs_address)
        try:
            yield head
        finally:
            ray.shutdown()  # ends a private cluster, only disconnects from another; takes 5 s when the head is gone


@contextlib.contextmanager
def _messages_logged() -> Iterator[None]:
    """Let Ray's messages to its driver, of processes that died, become log lines: it prints them among the results.

    No option of `ray.init` does that. Where this Ray has no such function any more, it prints as it likes.
    """
    own = getattr(ray_worker, _PRINTS, None)
    if own is not None:
        setattr(ray_worker, _PRINTS, _log_messages)
    try:
        yield
    finally:
        if own is not None:
            setattr(ray_worker, _PRINTS, own)


def _log_messages(data: Mapping[str, Any], *_: Any, **__: Any) -> None:
    for text in data["lines"]:
        logger.warning("Ray says: %s", " ".join(str(text).split()))


def _check_listening(address: str, timeout_seconds: float = CONNECT_SECONDS) -> None:
    """Find out in seconds that nobody answers: Ray tries for more than a minute, deaf to signals.

    Raises:
        OSError: no connection to the host and port in `address`.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_seconds).close()


@contextlib.contextmanager
def _few_tries() -> Iterator[None]:
    """Let `ray.init` try for seconds, unless the environment says for how long: a wrong token stays wrong."""
    if _TRIES_VARIABLE in os.environ:
        yield
        return
    os.environ[_TRIES_VARIABLE] = "3"
    try:
        yield
    finally:
        del os.environ[_TRIES_VARIABLE]


def _as_infeasible(error: Exception, address: str | None) -> InfeasibleError:
    """Return in words why there is no cluster. Ray hides a refused token in the text of a cause."""
    if isinstance(error, AuthenticationError) or "AuthenticationError" in f"{error} {error.__cause__}":
        return InfeasibleError(
            f"the Ray cluster at {address} asks for a token, and RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or "
            "~/.ray/auth_token does not hold the right one: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the "
            "cluster's own"
        )
    return InfeasibleError(
        f"no Ray cluster can be reached at {address or 'this machine'}: check the address (HOST:PORT of the head "
        f"node, or auto) and that it is up; the error was: {error}"
    )


def check_feasible(resources: ResourceSection) -> None:
    """Refuse a worker that no node could ever hold, unless an autoscaler might bring a larger one.

    A cluster that was joined may have been started a moment ago, and its nodes still be on their way: they are given
    a few seconds.

    Raises:
        InfeasibleError: names what is asked for, what every node has, and what is missing.
    """
    wanted = {"CPU": resources.worker_cpus, "GPU": resources.gpus_per_worker}
    patience_seconds = min(JOIN_SECONDS, resources.wait_resources_seconds) if resources.address else 0.0
    deadline = time.monotonic() + patience_seconds
    while not _fits(nodes := _nodes(), wanted) and not has_autoscaler() and time.monotonic() < deadline:
        time.sleep(0.2)
    if _fits(nodes, wanted):
        return
    if has_autoscaler():
        logger.info("no node has %s yet; the cluster's autoscaler may bring one", describe(wanted))
        return
    missing = {name: amount - max((node.get(name, 0) for node in nodes), default=0) for name, amount in wanted.items()}
    raise InfeasibleError(
        f"a worker needs {describe(wanted)}, and no node of the cluster can ever give that: "
        f"{'; '.join(f'one has {describe(node)}' for node in nodes)}. "
        f"The largest misses {describe({name: amount for name, amount in missing.items() if amount > 0})}. "
        "Ask for less per worker, or join a larger node"
    )


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _fits(nodes: Sequence[Mapping[str, float]], wanted: Mapping[str, float]) -> bool:
    return any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes)


def has_autoscaler() -> bool:
    """Return whether the cluster can grow by itself.

    Every head runs a monitor that reports its nodes; without an autoscaler each is said to be of a type of its own.
    """
    if _internal_kv_get(_AUTOSCALER_V2) == b"1":
        return True
    report = json.loads(_internal_kv_get(_AUTOSCALER_STATUS) or b"{}").get("autoscaler_report") or {}
    types = {*(report.get("active_nodes") or ()), *(report.get("idle_nodes") or ())}
    return bool(types - {f"node_{node['NodeID']}" for node in ray.nodes()})


def describe(resources: Mapping[str, float]) -> str:
    """Return CPUs and GPUs in words, e.g. `2 CPUs and 1 GPU`."""
    amounts = {name: resources[name] for name in ("CPU", "GPU") if resources.get(name)}
    return " and ".join(f"{amount:g} {name}{'s' if amount != 1 else ''}" for name, amount in amounts.items()) or "none"


def describe_worker(resources: ResourceSection) -> str:
    """Return what one worker needs, in words."""
    return describe({"CPU": resources.worker_cpus, "GPU": resources.gpus_per_worker})


def describe_cluster() -> str:
    """Return what the cluster has and what of it is free, in words."""
    return f"the cluster has {describe(ray.cluster_resources())}, of these free: {describe(ray.available_resources())}"
