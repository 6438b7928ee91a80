"""What a cluster says of itself, for `tale-ray doctor`: a process of its own, as Ray may hang or end the process.

python -m tale_ray.cluster.examine ADDRESS

Prints one JSON object: `nodes`, `resources`, `free`, `versions` and `gpus` (of one node), or the `error`.
"""

import contextlib
import json
import sys
from typing import Any

import ray

from tale_ray.cluster.connection import connected
from tale_ray.cluster.machine import installed_versions, visible_gpus
from tale_ray.errors import TaleRayError

TASK_SECONDS = 8.0  # for an answer from a node


def look_around() -> dict[str, Any]:
    """Return versions and GPUs of the machine that this runs on."""
    return {"versions": installed_versions(), "gpus": visible_gpus()}


def examine_cluster(address: str) -> dict[str, Any]:
    """Return what the cluster at an address has.

    Raises:
        InfeasibleError: it cannot be reached, or refuses the token.
    """
    with connected(address):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        found: dict[str, Any] = {
            "nodes": [{"address": node["NodeManagerAddress"], "resources": node["Resources"]} for node in nodes],
            "resources": ray.cluster_resources(),
            "free": ray.available_resources(),
        }
        call = ray.remote(look_around).options(num_cpus=0, max_retries=0).remote()
        with contextlib.suppress(ray.exceptions.RayError):  # without tale-ray there: then nothing is known of it
            found |= ray.get(call, timeout=TASK_SECONDS)
    return found


def main() -> None:
    """Print what the cluster named on the command line has."""
    try:
        found = examine_cluster(sys.argv[1])
    except TaleRayError as error:
        found = {"error": str(error)}
    print(json.dumps(found, default=str))


if __name__ == "__main__":
    main()
