"""Float32 copies of checkpoints that are stored in other numbers, made once a machine and kept on its disk.

On a CPU, weights whose file holds what is computed with stay in the file: all workers of a machine share its pages.
What has to be converted would be in the memory of each.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

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
