"""Where and how something was measured: command, commit, versions, machine."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("tale-ray", "torch", "transformers", "ray", "pyarrow")
_FOLDER = Path(__file__).parent


def circumstances(threads: int) -> dict[str, Any]:
    """Return command, date, commit, versions and machine of this process, without the paths of this machine."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=_FOLDER, stdout=subprocess.PIPE, text=True, check=False
    )
    arguments = [Path(each).name if Path(each).is_absolute() else each for each in sys.argv[1:]]
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": commit.stdout.strip() or "unknown",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        },
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),  # of the minute before
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
