"""Shared by all tests: one thread, no hub, and one Ray cluster for those that need one."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))  # Ray reads them when it is imported

TESTS = str(Path(__file__).parent)
# Actors made in tests import what tests import.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))
CLUSTER_CPUS = 6
CLUSTER_GPUS = 4


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a cluster whose CPUs and GPUs exist in its books only; to be joined with the session's token."""
    from ray.cluster_utils import Cluster

    head: dict[str, Any] = {
        "num_cpus": CLUSTER_CPUS,
        "num_gpus": CLUSTER_GPUS,
        "object_store_memory": 100 * 2**20,
        "include_dashboard": False,
        "_system_config": {"prestart_worker_first_driver": False},
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster.address
    cluster.shutdown()
