"""A study: the same search with several seeds, each an ordinary run, one after another under one folder."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeAlias

from tale_ray.attempt.identity import run_identity, with_absolute_paths
from tale_ray.attempt.request import check_request
from tale_ray.attempt.rows import calibration_rows, prepare_rows
from tale_ray.attempt.search import RUNS_FOLDER, AttemptEvent, RunOpened, run_name, run_search
from tale_ray.config import SearchConfig
from tale_ray.errors import BaselineZero
from tale_ray.model.digest import digest_model, model_folder
from tale_ray.search.interruption import Interruption
from tale_ray.store.documents import StudyManifest
from tale_ray.store.study import StudyFolder


@dataclass(frozen=True, slots=True)
class SeedStarted:
    """The run of a seed follows."""

    seed: int
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StudyOpened:
    """The folder of the study is ours, and says what it is."""

    study: str  # as it was asked for, to open it again


StudyEvent: TypeAlias = SeedStarted | StudyOpened | AttemptEvent


def run_study(config: SearchConfig, seeds: Sequence[int], interruption: Interruption) -> Iterator[StudyEvent]:
    """Search with every seed, from wherever the folder of the study stands, to the end. A finished run is not repeated.

    Raises:
        UsageError: the request cannot be met.
        Interrupted: stopped before the end; everything finished is stored.
        BaselineZero: the full model answers nothing with a seed; the runs of all others are finished.
        TaleRayError: a run failed; those before it are finished.
    """
    with interruption.breakable():
        study, configs = plan_study(config, seeds)
    folder = StudyFolder(study)
    is_open = False
    in_vain: dict[int, BaselineZero] = {}
    for seed, seeded in zip(seeds, configs, strict=True):
        yield SeedStarted(seed, tuple(seeds))
        try:
            with contextlib.closing(run_search(seeded, interruption)) as events:  # type: ignore[type-var]  # a generator
                for event in events:
                    if isinstance(event, RunOpened) and not is_open:  # all that can be refused was not
                        _write(folder, configs[0], seeds)
                        yield StudyOpened(study)
                        is_open = True
                    yield event
        except BaselineZero as error:
            in_vain[seed] = error
    if in_vain:
        raise BaselineZero("; ".join(f"seed {seed}: {error}" for seed, error in in_vain.items()))


def plan_study(config: SearchConfig, seeds: Sequence[int]) -> tuple[str, list[SearchConfig]]:
    """Return where the study is, and the configuration of every seed's run, which lies under it.

    Raises:
        UsageError: the request cannot be met, or the folder is not one for this study.
    """
    config = with_absolute_paths(config)
    study = config.storage.run or _default_study(_with_seed(config, seeds[0]), seeds)
    folder = StudyFolder(study)
    folder.check(seeds, config.storage.resume)
    storage = replace(config.storage, resume="auto")
    return study, [replace(_with_seed(config, seed), storage=replace(storage, run=folder.run(seed))) for seed in seeds]


def _with_seed(config: SearchConfig, seed: int) -> SearchConfig:
    return replace(config, task=replace(config.task, seed=seed))


def _default_study(first: SearchConfig, seeds: Sequence[int]) -> str:
    """Return the folder of a study that was given none: named after the run of its first seed.

    The digest of a hub's model is not known here: its name stands for it.
    """
    prepared = prepare_rows(first.task)
    check_request(first)
    folder = model_folder(first.model.model)
    model = digest_model(folder, first.model.gguf) if folder else f"{first.model.model}@{first.model.revision}"
    name = run_name(prepared, run_identity(first, prepared, model, calibration_rows(first.strategy)))
    return f"{RUNS_FOLDER}/{name}-seeds-{'-'.join(map(str, seeds))}"


def _write(folder: StudyFolder, config: SearchConfig, seeds: Sequence[int]) -> None:
    """Store what the study is, unless it is there already: a finished one may be where nothing can be written."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    stored = folder.manifest() if folder.exists() else None
    created = now if stored is None else stored.created
    manifest = StudyManifest(seeds=list(seeds), created=created, config=json.loads(json.dumps(config.to_json())))
    if manifest != stored:
        folder.write(manifest)
