"""The checkpoint of a training: everything that it needs to go on, in one file that is whole or absent.

Order of rows, learning rate and random numbers are functions of the step, so the step says where each of them is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tale_ray.errors import StoreError, TaleRayError
from tale_ray.store.local import LocalFolder, make_token
from tale_ray.tuning.records import CHECKPOINT, Progress

Tensors = Mapping[str, torch.Tensor]


def save_checkpoint(folder: Path, progress: Progress, tensors: Tensors) -> None:
    """Write progress and weights, in place of what was there.

    Raises:
        TaleRayError: they cannot be written; what was there stays.
    """
    data = save(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, {"progress": json.dumps(progress.to_json())}
    )
    try:
        LocalFolder(folder, make_token()).put(CHECKPOINT, data, lambda: None)
    except OSError as error:
        raise TaleRayError(
            f"{folder / CHECKPOINT} cannot be written ({error}): make room, and run the same command again to go on "
            "from the checkpoint before"
        ) from error


def read_progress(folder: Path) -> Progress | None:
    """Return how far a training is, or None if it has not got anywhere.

    Raises:
        StoreError: the checkpoint is damaged.
    """
    return _open(folder, lambda _: None)[0]


def read_checkpoint(folder: Path) -> tuple[Progress | None, dict[str, torch.Tensor]]:
    """Return how far a training is, with its weights; None and no weights if it has not got anywhere.

    Raises:
        StoreError: the checkpoint is damaged.
    """
    progress, tensors = _open(folder, lambda file: {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  no mapping
    return progress, tensors or {}


def _open(folder: Path, read: Any) -> tuple[Progress | None, Any]:
    path = folder / CHECKPOINT
    if not path.is_file():
        return None, None
    try:
        with safe_open(path, framework="pt") as file:
            return Progress.from_json(json.loads(file.metadata()["progress"])), read(file)
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise StoreError(
            f"{path} is damaged ({error}): delete it to train from the beginning, or put back a copy"
        ) from error
