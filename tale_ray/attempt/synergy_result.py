"""What a finished study of pruning and fine-tuning has found, kept in its runs, so that their reports show it."""

import json
from collections.abc import Sequence
from typing import Any

from tale_ray.attempt.finetune_folder import TrainingFolder
from tale_ray.attempt.synergy_folder import REGIMES, Regime, SynergyFolder
from tale_ray.errors import StoreError
from tale_ray.results.synergy import RESULT, SEARCHES, StageNotDone, summarize_synergy
from tale_ray.store.reader import RunReader
from tale_ray.store.run import RunWriter


def conclude_study(folder: SynergyFolder, asked: Sequence[Regime] = REGIMES) -> dict[str, Any]:
    """Return what a study has found, as JSON values, and store it in its runs.

    Regimes of the study that are not asked for are told of if their stages are done.

    Raises:
        LeaseHeld: another process writes to one of them.
        StoreError: there is no study, a stage is not done, or a run cannot be written.
    """
    found = summarize_study(folder, asked)
    keep_summary(folder, found)
    return {"study": str(folder.path), **found}


def summarize_study(folder: SynergyFolder, asked: Sequence[Regime] = REGIMES) -> dict[str, Any]:
    """Return what the stages of a study have come to, as JSON values; of regimes not asked for, if they are done.

    Raises:
        StoreError: there is no study, a stage that is asked for is not done, or is of other rows than the others.
    """
    study = folder.stored()
    if study is None:
        raise StoreError(f"{folder.path} holds no study of pruning and fine-tuning: run `tale-ray synergy` on it first")

    def record(seed: int, stage: Any) -> dict[str, Any]:
        place = folder.stage(seed, stage)
        found = TrainingFolder(place).record()
        if found is None or found["state"] != "finished":
            raise StageNotDone(f"{place} is not trained to its end: run the command again to go on")
        return found

    found = summarize_synergy(study, lambda seed, stage: str(folder.stage(seed, stage)), record, asked)  # type: ignore[arg-type]
    values: dict[str, Any] = json.loads(json.dumps(found))  # as it is read again
    return values


def keep_summary(folder: SynergyFolder, found: dict[str, Any]) -> None:
    """Store what a study has found in each of its runs that does not have it yet.

    Raises:
        LeaseHeld: another process writes to one of them.
        StoreError: a run cannot be written.
    """
    stages: Sequence[Any] = SEARCHES
    for seed in found["seeds"]:
        for stage in stages:
            run = str(folder.stage(seed, stage))
            reader = RunReader(run)
            if not reader.exists() or _stored(reader) == found:
                continue
            with RunWriter.claim(run, wait=False) as writer:
                writer.write_result(RESULT, found)


def _stored(reader: RunReader) -> dict[str, Any] | None:
    stored = reader.result(RESULT)
    return None if stored is None else {name: value for name, value in stored.items() if name != "schema_version"}
