"""Float32 copies of checkpoints that are stored in other numbers, made once a machine and kept on its disk.

On a CPU, weights whose file holds what is computed with stay in the file: all workers of a machine share its pages.
What has to be converted would be in the memory of each.
"""

import ctypes
import gc
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM

logger = logging.getLogger("tale_ray.model")

CACHE_VARIABLE = "TALE_RAY_CACHE"  # a folder; empty: nothing is kept
_DONE = "complete"  # written last


def cache_folder() -> Path | None:
    """Return where copies are kept on this machine; None: nowhere."""
    named = os.environ.get(CACHE_VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tale_ray"


class ConvertedCheckpoint:
    """The copy of one model, named by the digest of its files. One process at a time holds it, to make it."""

    def __init__(self, cache: Path, digest: str) -> None:
        self.folder = cache / "float32" / digest
        self._lock = FileLock(f"{self.folder}.lock")

    def __enter__(self) -> "ConvertedCheckpoint":
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def exists(self) -> bool:
        """Whether it was made."""
        return (self.folder / _DONE).is_file()

    def make(self, model: Any) -> None:
        """Write the weights of a model in float32.

        Raises:
            OSError: the disk is full, or cannot be written to.
        """
        needed = sum(weight.nbytes for weight in model.parameters())
        free = shutil.disk_usage(self.folder.parent).free
        if free < needed:
            raise OSError(f"{needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free")
        shutil.rmtree(self.folder, ignore_errors=True)  # of someone who was killed
        try:
            model.save_pretrained(self.folder)
            (self.folder / _DONE).touch()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        logger.info("the weights were converted to float32 once, for all workers of this machine: %s", self.folder)


def shared_weights(key: str, read: Callable[[], tuple[Any, dict[str, Any]]]) -> tuple[Any, dict[str, Any]]:
    """Return the model from its float32 copy, which is made if need be; from its own files if there is no room.

    Args:
        key: names the content of its files.
        read: loads it from them, and returns with it what transformers says of that.
    """
    if (cache := cache_folder()) is None:
        return read()
    try:
        with ConvertedCheckpoint(cache, key) as copy:
            if not copy.exists:
                model, loading = read()
                try:
                    copy.make(model)
                except OSError as error:
                    logger.warning("each worker holds weights of its own, as no float32 copy can be kept: %s", error)
                    return model, loading
                del model
                _give_back_memory()
    except OSError as error:
        logger.warning("each worker holds weights of its own, as no float32 copy can be kept: %s", error)
        return read()
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, loading = AutoModelForCausalLM.from_pretrained(copy.folder, **options)
    return model, loading


def _give_back_memory() -> None:
    """Let the C library return what was freed, where it can be told to (glibc): it would keep a whole model."""
    gc.collect()
    if (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)
