"""Reaching a Ray cluster, and whether it can give what is asked for."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from tale_ray.config import ResourceSection
from tale_ray.errors import InfeasibleError

logger = logging.getLogger("tale_ray.cluster")

_AUTOSCALER_STATUS = b"__autoscaling_status"


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Join the cluster at `address`, or start a private one that ends with the body.

    Raises:
        InfeasibleError: nothing answers there, it refuses the token, or this process has joined another cluster.
    """
    if ray.is_initialized():
        raise InfeasibleError(
            "this process is connected to a Ray cluster already: call ray.shutdown() first, or run with local=True"
        )
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": True, "logging_level": "error"}
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, **options)
        else:
            ray.init(address=address, **options)
    except AuthenticationError as error:
        raise InfeasibleError(
            f"the Ray cluster at {address} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
            f"RAY_AUTH_TOKEN_PATH) to the cluster's own; it said: {error}"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InfeasibleError(
            f"no Ray cluster can be reached at {address or 'this machine'}: check the address (HOST:PORT of the head "
            f"node, or auto) and that it is up; Ray said: {error}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()  # ends a private cluster, only disconnects from another


def check_feasible(resources: ResourceSection) -> None:
    """Refuse a worker that no node could ever hold, unless an autoscaler might bring a larger one.

    Raises:
        InfeasibleError: names what is asked for, what every node has, and what is missing.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    if any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
        return
    if has_autoscaler():
        logger.info("no node has %s yet; the cluster's autoscaler may bring one", describe(wanted))
        return
    missing = {name: amount - max((node.get(name, 0) for node in nodes), default=0) for name, amount in wanted.items()}
    raise InfeasibleError(
        f"a worker needs {describe(wanted)}, and no node of the cluster can ever give that: "
        f"{len(nodes)} nodes have {'; '.join(describe(node) for node in nodes)}. "
        f"The largest misses {describe({name: amount for name, amount in missing.items() if amount > 0})}. "
        "Ask for less per worker, or join a larger node"
    )


def has_autoscaler() -> bool:
    """Return whether the cluster can grow by itself."""
    return bool(ray.experimental.internal_kv._internal_kv_get(_AUTOSCALER_STATUS))


def describe(resources: Mapping[str, float]) -> str:
    """Return CPUs and GPUs in words, e.g. `2 CPUs and 1 GPU`."""
    return " and ".join(
        f"{resources.get(name, 0):g} {name}{'s' if resources.get(name, 0) != 1 else ''}"
        for name in ("CPU", "GPU")
        if name in resources or name == "CPU"
    )


def describe_cluster() -> str:
    """Return what the cluster has and what of it is free, in words."""
    return f"the cluster has {describe(ray.cluster_resources())}, free are {describe(ray.available_resources())}"
