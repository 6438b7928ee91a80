"""The folder of a training: what it is, how far it is, and what came of it.

OUT/
  finetune.json    configuration and digests, written first; losses and times when training has ended
  adapter/         the adapter with the weights that are kept, in peft's format
  model/           the model with the adapter merged into it: a standard checkpoint
  state/           the checkpoint of a training under way
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from tale_ray.attempt.identity import differences
from tale_ray.errors import ConfigError, StoreError
from tale_ray.model.digest import digest_model
from tale_ray.store.documents import check_fields, dump_json, parse_json
from tale_ray.store.local import LocalFolder, make_token
from tale_ray.tuning.records import CHECKPOINT

RECORD = "finetune.json"
_OWN = {RECORD, "adapter", "model", "state"}
_ROWS = Mapping[str, Any]
_KINDS: Mapping[str, Any] = {"identity": Mapping[str, Any], "state": Literal["training", "finished"]}
_FINISHED: Mapping[str, Any] = {  # what tables and studies read
    **dict.fromkeys(("model", "task", "why"), str),
    **dict.fromkeys(("seed", "steps", "steps_done", "kept_step", "workers", "num_layers"), int),
    **dict.fromkeys(("parameters", "trainable_parameters"), int),
    "removed": list[int],
    "splits": Mapping[str, str],
    "rows": Mapping[str, _ROWS],
    "evaluations": list[Mapping[str, Any]],
    "kept": Mapping[str, Any] | None,
    "seconds": Mapping[str, float],
    "merged": Mapping[str, Any],
}


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
        remedy = f"put back a copy, or delete {self.path} and run the command again to train anew"
        check_fields(found, _KINDS, str(path), remedy)
        if found["state"] == "finished":
            check_fields(found, _FINISHED, str(path), remedy)
            check_fields(found["rows"], {"finetune": _ROWS}, str(path), remedy)
            check_fields(found["seconds"], {"training": float, "training_cpu": float}, str(path), remedy)
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
        lines = differences(stored["identity"], json.loads(json.dumps(identity)))
        if not lines:
            return stored
        if not self._has_learned(stored):
            return None
        told = "\n  ".join(line.replace("the run has", "the folder has") for line in lines)
        raise StoreError(
            f"--out {self.path} holds a training with another configuration; nothing was changed. Name another "
            f"folder, or ask for what it has:\n  {told}"
        )

    def _has_learned(self, stored: Mapping[str, Any]) -> bool:
        """Return whether there is anything to lose: not if what was asked for was refused when the model was there."""
        places = (self.adapter, self.model, self.state / CHECKPOINT)
        return stored["state"] == "finished" or any(place.exists() for place in places)

    def check_model(self, stored: Mapping[str, Any]) -> None:
        """Refuse a finished training whose model is gone, or is not what was written.

        Raises:
            StoreError: says which, and what to do.
        """
        remedy = f"put back a copy, or delete {self.path} and run the command again to train anew"
        if not (self.adapter / "adapter_config.json").is_file():
            raise StoreError(f"{self.adapter} is gone, and the training has ended: {remedy}")
        if not (self.model / "config.json").is_file():
            raise StoreError(f"{self.model} is gone, and the training has ended: {remedy}")
        digest = stored["merged"].get("digest")  # older versions did not store it
        if digest is not None and (found := digest_model(self.model, None)) != digest:
            raise StoreError(
                f"{self.model} is not what was merged there (SHA-256 {digest[:12]}, now {found[:12]}): {remedy}"
            )

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
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise ConfigError(f"--out {self.path} is in use by another process: wait for it, or name another") from None
        except OSError as error:
            raise ConfigError(f"--out {self.path} cannot be written ({error}): name another folder") from error
        try:
            yield
        finally:
            lock.release()
