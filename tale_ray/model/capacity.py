"""How much memory this process may still take. Knows nothing of models."""

import resource
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_memory_bytes() -> int:
    """Return the bytes of RAM that this process can still fill: the machine's, its control group's, its data limit's.

    Pages that the system can drop, such as cached files, count as free.
    """
    known = (psutil.virtual_memory().available, _left_in_group(), _left_of_data())
    return max(0, min(free for free in known if free is not None))


def free_gpu_bytes(num_gpus: int) -> int:
    """Return the free bytes of the first GPUs together."""
    return sum(int(torch.cuda.mem_get_info(gpu)[0]) for gpu in range(num_gpus))


def _left_in_group() -> int | None:
    """The rest of a control group's limit (version 2, as containers see their own); None: there is none."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        held = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        fields = (line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        files = sum(int(value) for name, value in fields if name in ("inactive_file", "active_file"))
    except (OSError, ValueError):  # no such files: another version of control groups, or another system
        return None
    return int(limit) - held + files


def _left_of_data() -> int | None:
    """The rest of RLIMIT_DATA; None: it is not limited."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux: what is held is not known
        return limit
    held = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), 0)
    return limit - held
