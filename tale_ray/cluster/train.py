"""Several processes that train together, through Ray Train. Knows nothing of models, rows or adapters.

Ray Train goes on silently with whatever a run of the same name has left, so the name has to say what is trained.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from tale_ray.cluster.connection import (
    JOIN_SECONDS,
    check_feasible,
    connected,
    describe_cluster,
    describe_worker,
    has_autoscaler,
)
from tale_ray.cluster.nodes import Nodes
from tale_ray.config import ResourceSection
from tale_ray.errors import InfeasibleError, TaleRayError, WorkersLost

logger = logging.getLogger("tale_ray.cluster")

POLL_SECONDS = 1.0
RESTARTS = 2  # of all processes, after one of them died
Part = Callable[[Any, int, int], None]  # what is trained, rank, number of processes


def train_together(job: Any, part: Part, *, name: str, storage: Path, resources: ResourceSection) -> Iterator[None]:
    """Let `resources.workers` processes run `part(job, rank, size)` together; yields now and then until all have ended.

    Args:
        job: travels to every process.
        part: what each does; torch.distributed is set up, by gloo, or by nccl on GPUs.
        name: of the run of Ray Train: equal for what is to go on, different for everything else.
        storage: folder that every node reaches, for what Ray Train keeps.
        resources: the processes, and what each needs.

    Raises:
        InfeasibleError: the cluster is out of reach, or has no room for the processes.
        TaleRayError: what one of the processes raised.
        WorkersLost: processes died again and again.
    """
    with connected(resources.address) as head:
        check_feasible(resources)
        check_room(resources, Nodes(sees_drains=not head.address.startswith("ray://")))
        trainer = TorchTrainer(
            _run_part,
            train_loop_config={"job": job, "part": part},
            torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=resources.workers or 1,
                use_gpu=resources.gpus_per_worker > 0,
                resources_per_worker={
                    "CPU": resources.cpus_per_worker,
                    **({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}),
                },
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=str(storage),
                failure_config=ray.train.FailureConfig(max_failures=RESTARTS),
            ),
        )
        yield from _waiting(trainer)


def _waiting(trainer: Any) -> Iterator[None]:
    """Run the trainer in a thread, so that this one can be interrupted; pass on what it raises."""
    raised: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  passed on by the other thread
            raised.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        yield
    if raised:
        raise _as_ours(raised[0]) from raised[0]


def _run_part(given: dict[str, Any]) -> None:
    context = ray.train.get_context()
    given["part"](given["job"], context.get_world_rank(), context.get_world_size())


def check_room(resources: ResourceSection, nodes: Nodes) -> None:
    """Refuse more processes than the nodes can hold at once, unless an autoscaler may bring more.

    Ray Train would wait for ever. Nodes of a young cluster may still be on their way: they are given a few seconds.

    Raises:
        InfeasibleError: says what is asked for and what there is.
    """
    number = resources.workers or 1
    deadline = time.monotonic() + (JOIN_SECONDS if resources.address else 0.0)
    nodes.look()
    while nodes.num_places(resources) < number and not has_autoscaler() and time.monotonic() < deadline:
        time.sleep(0.2)
        nodes.look()
    if (places := nodes.num_places(resources)) >= number:
        return
    if has_autoscaler():
        logger.info("there is room for %d of %d processes; the cluster's autoscaler may bring more", places, number)
        return
    raise InfeasibleError(
        f"{number} processes with {describe_worker(resources)} each are asked for, the nodes can hold {places} at "
        f"once, and {describe_cluster()}: all have to be there at once; ask for fewer --workers"
    )


def _as_ours(error: BaseException) -> BaseException:
    """Return the error of ours that a process raised, if it was one; else that processes were lost, with its words."""
    seen: list[Any] = [error]
    while seen:
        each = seen.pop()
        if isinstance(each, TaleRayError):
            return each
        failures = getattr(each, "worker_failures", None) or {}
        seen += [*failures.values(), *filter(None, (getattr(each, "cause", None), each.__cause__))]
    if not isinstance(error, Exception):
        return error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return WorkersLost(f"training together failed ({type(error).__name__}: {lines[-1].strip()}): see Ray's logs")
