"""What stands between this machine and a search: one check after another, each with what was found and what to do.

Nothing is changed, but for a probe that is written to the run folder and deleted. What may hang has a deadline.
"""

import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tale_ray.cluster.machine import installed_versions
from tale_ray.config import ModelSection
from tale_ray.errors import TaleRayError
from tale_ray.model.digest import check_model, model_folder
from tale_ray.store.files import Files
from tale_ray.store.uris import strip_credentials
from tale_ray.tasks.data import load_rows
from tale_ray.tasks.harness import PREFIX as HARNESS
from tale_ray.tasks.harness import load_harness_task
from tale_ray.tasks.spec import load_task

Answer = TypeVar("Answer")

CLUSTER_SECONDS = 18.0
STORAGE_SECONDS = 15.0
_PROBE = "_tmp-doctor-"  # readers pass over it, and the next attempt would delete it
_EXAMINE = "tale_ray.cluster.examine"  # run as a process: Ray hangs, or ends its process, where nobody answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line: what was looked at, what was found, and what to do if that is a problem."""

    name: str
    found: str
    remedy: str | None = None  # None: no problem

    @property
    def is_ok(self) -> bool:
        """Whether nothing stands in the way of a search here."""
        return self.remedy is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Examined:
    """What is looked at; None: not looked at."""

    address: str | None = None
    run: str | None = None
    model: str | None = None
    task: str | None = None
    data_root: str | None = None


def examine(asked: Examined) -> Iterator[Check]:
    """Yield the checks, in this order: versions, cluster, storage, model, data. What may hang is begun at once."""
    address, run = asked.address, asked.run
    cluster = None if address is None else _begin(partial(_ask_cluster, address))
    storage = None if run is None else _begin(lambda: list(check_storage(run)))
    yield check_versions()
    if cluster is None:
        yield Check(name="cluster", found="none is named: a search starts a private one, or runs with --local")
    else:
        yield from check_cluster(str(address), cluster(CLUSTER_SECONDS))
    if storage is not None:
        yield from storage(STORAGE_SECONDS) or [
            Check(
                name="storage",
                found=f"{strip_credentials(str(run))} did not answer within {STORAGE_SECONDS:g} s",
                remedy="check the address and its endpoint, and that this machine can reach it",
            )
        ]
    if asked.model is not None:
        yield check_model_reachable(asked.model)
    if asked.task is not None:
        yield check_task(asked.task, asked.data_root)


def _begin(work: Callable[[], Answer]) -> Callable[[float], Answer | None]:
    """Start something that may hang; return what waits for its answer, None if there is none in time."""
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  raised where the answer is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()

    def answer(seconds: float) -> Answer | None:
        try:
            return future.result(seconds)
        except TimeoutError:
            if future.done():  # it was its own
                raise
            return None

    return answer


# Versions.


def check_versions() -> Check:
    """Return whether everything that a search needs is installed."""
    found = installed_versions()
    missing = [name for name, number in found.items() if number is None]
    return Check(
        name="versions",
        found=", ".join(f"{name} {number or 'missing'}" for name, number in found.items()),
        remedy=f"pip install {' '.join(missing)}" if missing else None,
    )


# The cluster.


def _ask_cluster(address: str) -> Mapping[str, Any]:
    command = [sys.executable, "-m", _EXAMINE, address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CLUSTER_SECONDS - 1, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"the cluster at {address} did not answer within {CLUSTER_SECONDS - 1:g} s"}
    lines = done.stdout.strip().splitlines()
    try:
        found: Mapping[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = [*done.stderr.strip().splitlines(), f"exit code {done.returncode}"][-1]
        return {"error": f"asking the cluster at {address} ended with: {last}"}
    return found


def check_cluster(address: str, found: Mapping[str, Any] | None) -> Iterator[Check]:
    """Yield what is to be said of a cluster that was asked, or did not answer."""
    shown = strip_credentials(address)
    if found is None or "error" in found:
        yield _unreachable(shown, "it did not answer" if found is None else str(found["error"]))
        return
    nodes = found["nodes"]
    yield Check(name="address", found=f"{shown} answers, {_count(len(nodes), 'node')}")
    mode = os.environ.get("RAY_AUTH_MODE", "disabled")
    yield Check(
        name="authentication",
        found="the cluster takes our token" if mode == "token" else "no token is used: whoever reaches it runs code",
        remedy=None if mode == "token" else "start the cluster with RAY_AUTH_MODE=token, and set it here too",
    )
    yield _resources(found)
    yield from _cluster_versions(found)
    yield from _gpus(found)


def _unreachable(address: str, error: str) -> Check:
    if "asks for a token" in error:
        return Check(
            name="authentication",
            found=f"{address} refuses our token (401)",
            remedy="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token) to the "
            "cluster's own token",
        )
    return Check(
        name="address",
        found=error,
        remedy="check HOST:PORT of the head node (its GCS port, 6379 by default), that it is up, and that this machine "
        "reaches it",
    )


def _resources(found: Mapping[str, Any]) -> Check:
    total, free = found["resources"], found["free"]
    parts = [
        f"{total.get(name, 0):g} {name} ({free.get(name, 0):g} free)" for name in ("CPU", "GPU") if total.get(name)
    ]
    parts.append(f"{total.get('memory', 0) / 2**30:.1f} GiB of memory")
    return Check(
        name="resources",
        found=", ".join(parts),
        remedy=None if total.get("CPU") else "no node takes work: start a worker node, or let the autoscaler bring one",
    )


def _cluster_versions(found: Mapping[str, Any]) -> Iterator[Check]:
    there = found.get("versions")
    if there is None:
        yield Check(
            name="cluster versions",
            found="a node could not tell: tale-ray is not installed there, or no node takes tasks",
            remedy="install the same tale-ray on every node (in the image, or in the job's runtime environment)",
        )
        return
    here = installed_versions()
    differing = [
        f"{name} {there.get(name) or 'missing'} (here {here[name]})" for name in here if there.get(name) != here[name]
    ]
    yield Check(
        name="cluster versions",
        found=", ".join(differing) or "the same as here",
        remedy="install the same versions on every node and here" if differing else None,
    )


def _gpus(found: Mapping[str, Any]) -> Iterator[Check]:
    """Yield the memory of a node's GPUs; a cluster without any needs none."""
    gpus: Sequence[Mapping[str, Any]] = found.get("gpus") or ()
    for number, gpu in enumerate(gpus):
        total, used = gpu["total_mib"] / 1024, gpu["used_mib"] / 1024
        yield Check(
            name=f"GPU {number}",
            found=f"{gpu['name']}, {total:.0f} GiB, {total - used:.0f} GiB free",
            remedy=None if used < total / 2 else "another process holds most of its memory: end it (nvidia-smi)",
        )


# Storage.


def check_storage(run: str) -> Iterator[Check]:
    """Yield whether the run folder can be written and read, and how sure its lease is. Leaves nothing behind."""
    shown = strip_credentials(run)
    probe, content = f"{_PROBE}{secrets.token_hex(4)}", b"probe"
    try:
        files = Files(run)
        is_new = not files.list()
        files.prepare()
        files.put(probe, content)
        read = files.read(probe)
        files.delete(probe)
        if is_new and "://" not in run:
            _remove_empty(Path(run).expanduser())
    except (TaleRayError, OSError) as error:
        yield Check(
            name="storage",
            found=strip_credentials(str(error)),
            remedy="check address, credentials in this environment and permissions, or choose another --run",
        )
        return
    yield Check(
        name="storage",
        found=f"{shown} is written, read and deleted" if read == content else f"{shown} gives back other bytes",
        remedy=None if read == content else "use storage that reads what was just written",
    )
    yield Check(
        name="lease",
        found="two writers at once are impossible" if files.is_exclusive else "best effort: no conditional writes",
        remedy=None if files.is_exclusive else "pip install 'tale-ray[s3]', on storage that knows If-None-Match",
    )


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


# Model and data.


def check_model_reachable(model: str) -> Check:
    """Return whether a model's files are here, or its hub knows it."""
    try:
        check_model(ModelSection(model=model))
    except TaleRayError as error:
        return Check(name="model", found=str(error), remedy="name a model that is there")
    if model_folder(model) is not None:
        return Check(name="model", found=f"{model} is here and can be searched")
    from huggingface_hub import model_info  # imports much, and only hub ids need it

    try:
        info = model_info(model, timeout=5)
    except Exception as error:  # noqa: BLE001  whatever a hub's client raises is what was found
        return Check(
            name="model",
            found=f"{model} is not here, and the hub said: {str(error).splitlines()[0]}",
            remedy="check the name, that this machine reaches the hub, and HF_TOKEN for a gated model; or download it",
        )
    return Check(name="model", found=f"{model} is at the hub, revision {str(info.sha)[:12]}")


def check_task(task: str, data_root: str | None) -> Check:
    """Return whether a task's rows can be read."""
    try:
        if task.startswith(HARNESS):
            count = len(load_harness_task(task, None, num_shots=0)[1])
        else:
            count = len(load_rows(load_task(task), data_root))
    except TaleRayError as error:
        return Check(name="data", found=str(error), remedy="check --task and --data-root")
    return Check(name="data", found=f"{task}: {_count(count, 'row')}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
