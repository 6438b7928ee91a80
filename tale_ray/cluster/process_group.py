"""The processes that split one model, as torch sees them. Knows nothing of Ray, units or answers."""

import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from tale_ray.engine.budget import Budget

_HOST = "127.0.0.1"  # members of a gang are on one node


def open_store(num_members: int, timeout_seconds: float) -> tuple[Any, int]:
    """Return the place where members find each other, in the first member's process, and its port on this machine."""
    listening = socket.create_server((_HOST, 0))
    port: int = listening.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]  # torch has it, and does not say so
        _HOST,
        port,
        num_members,
        is_master=True,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),  # the store closes it
    )
    return store, port


def join_group(
    rank: int, num_members: int, port: int, timeout_seconds: float, *, on_gpu: bool, store: Any = None
) -> None:
    """Make this process a member; waits for the others.

    Args:
        rank: of this process; 0 is the first member.
        num_members: of the group.
        port: of the store.
        timeout_seconds: after which a member that does not take its part in a computation is given up.
        on_gpu: whether members exchange what lies on their GPUs.
        store: the first member's own.

    Raises:
        torch.distributed.DistError: not all of them came in time.
    """
    timeout = timedelta(seconds=timeout_seconds)
    if store is None:
        store = dist.TCPStore(  # type: ignore[attr-defined]  # as above
            _HOST, port, num_members, is_master=False, timeout=timeout
        )
    device = torch.device("cuda", 0) if on_gpu else None
    backend = "nccl" if on_gpu else "gloo"
    os.environ["LOCAL_RANK"] = "0"  # by which transformers chooses the GPU: a member sees its own only
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())  # gloo asks nobody who it is: no other machine gets there
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_members, timeout=timeout, device_id=device)


def _loopback() -> str:
    """Return the name of the interface that only this machine reaches."""
    return next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == _HOST for address in addresses)
    )


def least_budget(budget: Budget, device: torch.device) -> Budget:
    """Return the budget of the member that has least: batches have to be the same everywhere."""
    bytes_2 = torch.tensor([budget.total, budget.batch], device=device)
    dist.all_reduce(bytes_2, dist.ReduceOp.MIN)
    total, batch = bytes_2.tolist()
    return Budget(total, batch)
