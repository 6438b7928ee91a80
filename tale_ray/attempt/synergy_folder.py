"""The folder of a study of pruning and fine-tuning: what it is, and where each stage of each seed lies.

    STUDY/
      synergy.json       configuration and digests, written first
      seed-0/tale        run: layers of the full model
      seed-0/ft          training of the full model
      seed-0/ft-tale     run: layers of what that came to
      seed-0/tale-ft     training of what the first run came to
      seed-0/tale-ft-tale  run: layers of what that came to

Runs and trainings are ordinary ones.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tale_ray.attempt.identity import differences
from tale_ray.config import SearchConfig
from tale_ray.errors import ConfigError, StoreError
from tale_ray.store.documents import check_fields, dump_json, parse_json
from tale_ray.store.local import LocalFolder, make_token

Regime: TypeAlias = Literal["base", "tale", "ft", "tale-ft", "ft-tale", "tale-ft-tale"]
Stage: TypeAlias = Literal["tale", "ft", "ft-tale", "tale-ft", "tale-ft-tale"]

REGIMES: tuple[Regime, ...] = ("base", "tale", "ft", "tale-ft", "ft-tale", "tale-ft-tale")
STUDY_FILE = "synergy.json"
_KINDS: Mapping[str, Any] = {
    "identity": Mapping[str, Any],
    "seeds": list[int],
    "pick": str,
    "regimes": list[Regime],
    "config": Mapping[str, Any],
}
_SEED = re.compile(r"seed--?\d+")


@dataclass(frozen=True, slots=True)
class SynergyFolder:
    """A study at a local folder."""

    path: Path

    def stage(self, seed: int, stage: Stage) -> Path:
        """Return where a stage of a seed lies."""
        return self.path / f"seed-{seed}" / stage

    def stored(self) -> dict[str, Any] | None:
        """Return what the study is; None if none has begun here.

        Raises:
            StoreError: the file is damaged.
        """
        path = self.path / STUDY_FILE
        if not path.is_file():
            return None
        remedy = "put back a copy, or delete it and run the command again: stages are not repeated"
        found = parse_json(path.read_bytes(), str(path), remedy)
        check_fields(found, _KINDS, str(path), remedy)
        if any(found[name] != found["identity"].get(name) for name in ("seeds", "pick")):
            raise StoreError(f"{path} was changed: it names two kinds of seeds, or of results; {remedy}")
        try:
            SearchConfig.from_json(found["config"])
        except ConfigError as error:
            raise StoreError(f"{path} was changed: config: {error}; {remedy}") from error
        return found

    def check(self, identity: Mapping[str, Any]) -> None:
        """Refuse a folder that holds another study, or something else.

        Raises:
            StoreError: names the folder, the rule and the remedy.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise StoreError(f"--study {self.path} is no folder: name another one")
        names = [entry.name for entry in self.path.iterdir() if not entry.name.startswith((".", "_"))]
        if foreign := sorted(name for name in names if name != STUDY_FILE and not _SEED.fullmatch(name)):
            raise StoreError(
                f"--study {self.path} is not the folder of such a study: it holds {foreign[0]}; name another"
            )
        if (stored := self.stored()) is None:
            return
        if lines := differences(stored["identity"], json.loads(json.dumps(identity))):
            told = "\n  ".join(line.replace("the run has", "the study has") for line in lines)
            raise StoreError(
                f"--study {self.path} holds a study with another configuration; nothing was changed. Name another "
                f"folder, or ask for what it has:\n  {told}"
            )

    def write(self, values: Mapping[str, Any]) -> None:
        """Store what the study is, in place of what was there.

        Raises:
            ConfigError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            LocalFolder(self.path, make_token()).put(STUDY_FILE, dump_json(values), lambda: None)
        except OSError as error:
            raise ConfigError(f"--study {self.path} cannot be written ({error}): make room, or name another") from error
