"""Shared by all tests: one thread, no hub, and one Ray cluster and one S3 server for those that need one."""

import atexit
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from places import LocalPlace, Place, S3Place
from s3_server import S3Server

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))  # Ray reads them when it is imported

if "TALE_RAY_CACHE" not in os.environ:  # what workers keep is not kept for longer than the tests
    os.environ["TALE_RAY_CACHE"] = tempfile.mkdtemp(prefix="tale-ray-cache-")
    atexit.register(shutil.rmtree, os.environ["TALE_RAY_CACHE"], ignore_errors=True)

hypothesis.settings.register_profile("untimed", deadline=None)  # no test fails for a slow machine
hypothesis.settings.load_profile("untimed")

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


@pytest.fixture(scope="session")
def s3_process() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def s3_server(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The session's S3 server in fair weather, its log empty, its credentials in the environment."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_process.environment.items():
        monkeypatch.setenv(name, value)
    s3_process.plan()
    s3_process.forget()
    return s3_process


@pytest.fixture
def s3_place(s3_server: S3Server) -> S3Place:
    """An empty folder for a run on S3."""
    return S3Place(s3_server, f"{secrets.token_hex(4)}/run")


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty folder for a run, on each kind of storage."""
    if request.param == "local":
        return LocalPlace(tmp_path / "run")
    return request.getfixturevalue("s3_place")  # type: ignore[no-any-return]
