"""The folder of a training: what it is, how far it is, and what came of it.

OUT/
  finetune.json    configuration and digests, written first; losses and times when training has ended
  adapter/         the adapter with the weights that are kept, in peft's format
  model/           the model with the adapter merged into it: a standard checkpoint
  state/           the checkpoint of a training under way
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tale_ray.attempt.identity import differences
from tale_ray.errors import ConfigError, StoreError
from tale_ray.store.documents import dump_json, parse_json
from tale_ray.store.local import LocalFolder, make_token

RECORD = "finetune.json"
_OWN = {RECORD, "adapter", "model", "state"}


@dataclass(frozen=True, slots=True)
class TrainingFolder:
    """A training at a local folder."""

    path: Path

    @property
    def state(self) -> Path:
        """Folder of the checkpoint."""
        return self.path / "state"

    @property
    def adapter(self) -> Path:
        """Folder of the adapter."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """Folder of the merged checkpoint."""
        return self.path / "model"

    def record(self) -> dict[str, Any] | None:
        """Return what is stored of the training; None if none has begun here.

        Raises:
            StoreError: the file is damaged.
        """
        path = self.path / RECORD
        if not path.is_file():
            return None
        found = parse_json(path.read_bytes(), str(path), "delete it with its folder, or put back a copy")
        if not {"identity", "state"} <= found.keys() or not isinstance(found["identity"], dict):
            raise StoreError(f"{path} was changed: it does not say what was trained; put back a copy, or delete OUT")
        return found

    def check(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what is stored of this very training, None if it has not begun.

        Raises:
            StoreError: the folder holds something else, or another training.
        """
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise StoreError(f"--out {self.path} is no folder: name another one")
        names = [entry.name for entry in self.path.iterdir() if not entry.name.startswith((".", "_"))]
        if foreign := sorted({*names} - _OWN):
            raise StoreError(f"--out {self.path} is not the folder of a training: it holds {foreign[0]}; name another")
        stored = self.record()
        if stored is None:
            if names:
                raise StoreError(f"--out {self.path} is not empty, and holds no {RECORD}: name another folder")
            return None
        if lines := differences(stored["identity"], json.loads(json.dumps(identity))):
            told = "\n  ".join(line.replace("the run has", "the folder has") for line in lines)
            raise StoreError(
                f"--out {self.path} holds a training with another configuration; nothing was changed. Name another "
                f"folder, or ask for what it has:\n  {told}"
            )
        if stored["state"] == "finished" and not (self.model / "config.json").is_file():
            raise StoreError(
                f"{self.model} is gone, though its training is finished: put back a copy, or delete --out {self.path} "
                "to train again"
            )
        return stored

    def write(self, record: Mapping[str, Any]) -> None:
        """Store what is known of the training, in place of what was there.

        Raises:
            ConfigError: the folder cannot be written.
        """
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            LocalFolder(self.path, make_token()).put(RECORD, dump_json(record), lambda: None)
        except OSError as error:
            raise ConfigError(f"--out {self.path} cannot be written ({error}): make room, or name another") from error

    def clean(self) -> None:
        """Delete what only an unfinished training needs."""
        shutil.rmtree(self.state, ignore_errors=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training here.

        Raises:
            ConfigError: one does, or the folder cannot be made.
        """
        lock = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with FileLock(lock, timeout=0):
                yield
        except Timeout:
            raise ConfigError(f"--out {self.path} is in use by another process: wait for it, or name another") from None
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            if error.filename is None or not os.fspath(error.filename).startswith(str(self.path)):
                raise
            raise ConfigError(f"--out {self.path} cannot be written ({error}): name another folder") from error
