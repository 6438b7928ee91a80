"""What a machine has, told without Ray and without torch."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("tale-ray", "torch", "ray", "transformers", "pyarrow")
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits")


def installed_versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that a search needs; None: not installed."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def visible_gpus() -> list[dict[str, Any]]:
    """Return name and memory, in MiB, of the GPUs that this machine's driver shows; none without a driver."""
    try:
        shown = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(shown)


def parse_gpus(shown: str) -> list[dict[str, Any]]:
    """Return the GPUs in what nvidia-smi prints; those whose memory it does not tell (`[N/A]`) are left out."""
    rows = [[part.strip() for part in line.split(",")] for line in shown.splitlines() if line.strip()]
    return [
        {"name": name, "total_mib": int(total), "used_mib": int(used)}
        for name, total, used in rows
        if total.isdecimal() and used.isdecimal()
    ]
