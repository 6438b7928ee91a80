"""The files that start clusters, each read by the tool that it is for; nothing is asked over a network."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from folders import show

ROOT = Path(__file__).resolve().parent.parent
CLUSTERS = ROOT / "jobs" / "clusters"
BIN = Path(sys.executable).parent


# AWS.


def checked_by_ray(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared  # type: ignore[no-any-return]


@pytest.fixture
def aws() -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / "cluster.yaml").read_text())  # type: ignore[no-any-return]


def test_ray_accepts_the_cluster_on_aws(aws: dict[str, Any]) -> None:
    prepared = checked_by_ray(aws)
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    workers = [kind for name, kind in prepared["available_node_types"].items() if name != prepared["head_node_type"]]
    assert all(kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for kind in workers)
    assert all(kind["resources"]["GPU"] > 0 for kind in workers)


def test_ray_refuses_an_invented_field(aws: dict[str, Any]) -> None:
    for change in ({"idle_timeout": 3}, {"max_workers": "many"}):
        with pytest.raises(jsonschema.ValidationError):
            checked_by_ray({**aws, **change})


def test_the_cluster_on_aws_is_closed_and_pinned(aws: dict[str, Any]) -> None:
    import ray

    starts = [aws[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    assert all("RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/home/ray/.ray/auth_token" in start for start in starts)
    assert "/home/ray/.ray/auth_token" in aws["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in starts[0]
    images = {aws["docker"]["head_image"], aws["docker"]["worker_image"]}
    assert {image.rpartition("-")[0] for image in images} == {f"rayproject/ray:{ray.__version__}-py311"}
    assert not any("0.0.0.0" in start for start in starts)


# Kubernetes.


@pytest.fixture(scope="module")
def rayjob_schema() -> dict[str, Any]:
    """KubeRay's schema of a RayJob; fields that it does not name are refused."""
    data_root = os.environ.get("TALE_RAY_DATA_ROOT")
    path = Path(data_root).absolute().parent / "schemas" / "rayjob-v1.json" if data_root else None
    if path is None or not path.is_file():
        pytest.skip("KubeRay's schema is not here: schemas/rayjob-v1.json beside the folder TALE_RAY_DATA_ROOT")
    return strict(json.loads(path.read_text()))  # type: ignore[no-any-return]


def strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture
def rayjob() -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / "rayjob.yaml").read_text())  # type: ignore[no-any-return]


def test_kuberay_accepts_the_job(rayjob: dict[str, Any], rayjob_schema: dict[str, Any]) -> None:
    jsonschema.validate(rayjob, rayjob_schema)
    spec = rayjob["spec"]
    assert spec["submissionMode"] == "SidecarMode"
    assert spec["rayClusterSpec"]["authOptions"]["mode"] == "token"
    assert spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    "invent",
    [
        lambda job: job["spec"].update(retries=3),
        lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(token="x"),
        lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(spot=True),
        lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(gpu=1),
        lambda job: job["spec"].update(backoffLimit="many"),
    ],
)
def test_kuberay_refuses_what_is_invented(
    rayjob: dict[str, Any], rayjob_schema: dict[str, Any], invent: Callable[[Any], None]
) -> None:
    invent(rayjob)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(rayjob, rayjob_schema)


def test_what_kubernetes_runs_is_a_search(rayjob: dict[str, Any]) -> None:
    from test_job_file import searched

    config = searched(rayjob["spec"]["entrypoint"])
    assert config.resources.gpus_per_worker == 1
    assert str(config.storage.run).startswith("s3://")  # a retry is a new cluster: its disks are new, too
    assert yaml.safe_load(rayjob["spec"]["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}


# Slurm.

IN_A_NAMESPACE = """
for kind in pid net mnt; do
  if [ "$(readlink /proc/self/ns/$kind)" = "$(eval echo "\\$host_$kind")" ]; then
    echo "the $kind namespace is that of the host" >&2
    exit 99
  fi
done
if [ "$(ls -d /proc/[0-9]* | wc -l)" -gt 10 ]; then
  echo "processes of the host are seen" >&2
  exit 99
fi
ip link set lo up && mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray || exit 98
exec "$@"
"""


def unshared(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that sees no process, no port and no Ray session of this machine, and none of its own outlives."""
    unshare = ["unshare", "--fork", "--pid", "--net", "--mount", "--mount-proc", "--kill-child"]
    environment = {**os.environ, **options.pop("env", {})}
    environment |= {f"host_{kind}": str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("pid", "net", "mnt")}
    return subprocess.run(
        [*unshare, "sh", "-c", IN_A_NAMESPACE, "sh", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        **options,
    )


@pytest.fixture(scope="module")
def namespaces() -> None:
    missing = [tool for tool in ("unshare", "ip", "mount") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: `ray stop` must not see other processes")
    tried = unshared("true")
    if tried.returncode:
        pytest.skip(f"private namespaces are not permitted here: {tried.stderr.strip()}")


def test_shellcheck_has_nothing_to_say() -> None:
    checked = subprocess.run([BIN / "shellcheck", CLUSTERS / "slurm.sh"], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on one node, whose `srun` runs a command where it is."""
    for name, text in (
        ("srun", 'exec "$@"'),
        ("scontrol", f'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> {tmp_path}/asked; fi'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": os.pathsep.join([str(tmp_path), str(BIN), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",  # the script sets its own
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "GPUS_PER_WORKER": "0",
        "CPUS_PER_WORKER": "1",
        "RUN": str(tmp_path / "run"),
    }


@pytest.mark.ray
@pytest.mark.usefixtures("namespaces")
def test_symmetric_run_runs_the_search_of_the_slurm_script(slurm: dict[str, str], tmp_path: Path) -> None:
    slurm["OPTIONS"] = "--rows 12 --max-removed 1 --splits search=1"
    outcome = unshared("bash", CLUSTERS / "slurm.sh", env=slurm)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "On head node. Starting Ray cluster head..." in outcome.stdout
    assert outcome.stdout.endswith("tale-ray exited with 0\n")
    assert show(tmp_path / "run")["stop_reason"] == "max_removed"
    assert not (tmp_path / "asked").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("namespaces")
def test_a_search_that_slurm_interrupts_is_stored_and_queued_again(slurm: dict[str, str], tmp_path: Path) -> None:
    """As Slurm does two minutes before the end: the script alone gets the signal."""
    slurm["OPTIONS"] = "--rows 400 --exhaustive --splits search=1"
    waiting = 'until [ -e "$RUN/rounds/round-0000.parquet" ]; do sleep 0.1; done'
    outcome = unshared("bash", "-c", f'bash "$0" & {waiting}; kill -TERM $!; wait $!', CLUSTERS / "slurm.sh", env=slurm)
    assert outcome.returncode == 75, outcome.stdout + outcome.stderr
    assert "SIGTERM was received: everything finished is stored" in outcome.stderr
    assert outcome.stdout.endswith("tale-ray exited with 75\n")
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert show(tmp_path / "run")["state"] == "interrupted"
