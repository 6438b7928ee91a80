"""The tensors of a safetensors checkpoint: which file holds each, and where. Knows nothing of models or devices.

A file begins with 8 bytes, the length of the JSON that follows; the JSON names tensors, types, shapes and offsets.
"""

import json
import math
import mmap
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tale_ray.errors import ModelError

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
_LENGTH_BYTES = 8
_PAGE = mmap.PAGESIZE
_STRETCH = 16 * 2**20  # bytes that are asked of the disk at once


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `start` and `end` are bytes of its file."""

    path: Path
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a folder's safetensors files by name, from the files' headers alone.

    Raises:
        ModelError: there is no such file, or one is missing, damaged or shorter than its header says.
    """
    return {name: tensor for path in _files(folder) for name, tensor in _read_header(path)}


def _files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(
            f"model folder {folder} has no safetensors files, and only those can be streamed: "
            "save the model as safetensors, or load it whole (--stream never)"
        )
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, OSError):
        raise ModelError(f"{index} is not an index of weight files: copy the checkpoint again") from None
    return [folder / name for name in shards]


def _read_header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            fields = json.loads(stream.read(length)) if length <= size else None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): make it readable, or copy it again") from None
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ModelError(f"{path} is not a safetensors file (its header cannot be read): copy the checkpoint again")
    for name, entry in fields.items():
        if name == "__metadata__":
            continue
        tensor = _stored(path, name, entry, _LENGTH_BYTES + length)
        if tensor.end > size:
            raise ModelError(
                f"{path} has {size} bytes, but the tensor {name} ends at byte {tensor.end}: the file is cut off; "
                "copy the checkpoint again"
            )
        yield name, tensor


def _stored(path: Path, name: str, entry: Any, base: int) -> StoredTensor:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, end = (base + offset for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path} does not say where the tensor {name} lies: copy the checkpoint again") from None
    if dtype not in _DTYPES:
        raise ModelError(
            f"{path}: the tensor {name} is of the type {dtype}, which cannot be streamed: "
            "load the model whole (--stream never)"
        )
    if end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ModelError(f"{path}: the tensor {name} has another length than its shape: copy the checkpoint again")
    return StoredTensor(path, start, end, _DTYPES[dtype], shape)


class MappedFile:
    """A file in memory, shared and read-only: its pages are the page cache's, and count as no data of the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            self._descriptor = os.dup(stream.fileno())
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def __del__(self) -> None:
        if (descriptor := vars(self).get("_descriptor")) is not None:
            os.close(descriptor)

    def view(self, stored: StoredTensor) -> torch.Tensor:
        """Return a tensor that lies in the file itself; it must not be written to.

        Raises:
            ModelError: its place is no multiple of the size of its numbers.
        """
        if stored.start % stored.dtype.itemsize:
            raise ModelError(
                f"{self.path}: a tensor begins at byte {stored.start}, no multiple of {stored.dtype.itemsize}: "
                "save the checkpoint again with safetensors, or load it whole (--stream never)"
            )
        if stored.start == stored.end:
            return torch.empty(stored.shape, dtype=stored.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self._map, dtype=stored.dtype, count=math.prod(stored.shape), offset=stored.start)
        return flat.view(stored.shape)

    def fetch(self, start: int, end: int) -> None:
        """Read a stretch from the disk, and map its pages.

        Raises:
            ModelError: the file has become shorter, or cannot be read.
        """
        size = os.fstat(self._descriptor).st_size
        if size < end:
            raise ModelError(
                f"{self.path} has {size} bytes, but weights lie up to byte {end}: the file was cut off while it was "
                "in use; copy the checkpoint again"
            )
        begin = start // _PAGE * _PAGE
        os.posix_fadvise(self._descriptor, begin, _STRETCH, os.POSIX_FADV_WILLNEED)
        for at in range(begin, end, _STRETCH):
            os.posix_fadvise(self._descriptor, at + _STRETCH, _STRETCH, os.POSIX_FADV_WILLNEED)
            self._bytes[at : min(at + _STRETCH, end) : _PAGE].max()  # numpy lets other threads run

    def drop(self, start: int, end: int) -> None:
        """Take a stretch's pages out of the process; they stay in the page cache as long as there is room."""
        begin = start // _PAGE * _PAGE
        self._map.madvise(mmap.MADV_DONTNEED, begin, min(end, len(self._map)) - begin)


@dataclass(frozen=True)
class MappedFiles:
    """Files of a checkpoint in memory, each mapped once."""

    paths: tuple[Path, ...]

    @cached_property
    def files(self) -> dict[Path, MappedFile]:
        """The mapped files by path."""
        return {path: MappedFile(path) for path in self.paths}

    def view(self, stored: StoredTensor) -> torch.Tensor:
        """Return a tensor in the file itself."""
        return self.files[stored.path].view(stored)

    def fetch(self, tensors: Iterable[StoredTensor]) -> None:
        """Read some tensors from the disk, and map their pages.

        Raises:
            ModelError: a file has become shorter.
        """
        for path, start, end in stretches(tensors):
            self.files[path].fetch(start, end)

    def drop(self, tensors: Iterable[StoredTensor]) -> None:
        """Take the pages of some tensors out of the process."""
        for path, start, end in stretches(tensors):
            self.files[path].drop(start, end)


def map_files(tensors: Iterable[StoredTensor]) -> MappedFiles:
    """Return the files that hold some tensors, in memory."""
    return MappedFiles(tuple(sorted({tensor.path for tensor in tensors})))


def stretches(tensors: Iterable[StoredTensor]) -> list[tuple[Path, int, int]]:
    """Return the fewest (file, start, end) that cover the tensors and nothing else, in the order of the files."""
    found: list[tuple[Path, int, int]] = []
    for tensor in sorted(tensors, key=lambda each: (each.path, each.start)):
        if found and found[-1][0] == tensor.path and tensor.start - found[-1][2] < _PAGE:
            found[-1] = (tensor.path, found[-1][1], max(found[-1][2], tensor.end))
        else:
            found.append((tensor.path, tensor.start, tensor.end))
    return found
