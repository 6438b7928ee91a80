"""Pruning and fine-tuning in every order, on the same test rows: a study whose stages are ordinary runs and trainings.

Each search scores the model it begins with and the layers it recommends on test rows, so three searches and two
trainings give all six regimes. A stage that is done is not repeated; one under way goes on where it was.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from tale_ray.attempt.evaluate import picked_round, stored_identity
from tale_ray.attempt.finetune import FinetuneConfig, FinetuneEvent, plan_finetune, run_finetune
from tale_ray.attempt.identity import identity_digest, with_absolute_paths
from tale_ray.attempt.search import AttemptEvent, run_search
from tale_ray.attempt.synergy_folder import REGIMES, Regime, Stage, SynergyFolder
from tale_ray.config import SearchConfig, StorageSection, StrategySection
from tale_ray.errors import ConfigError, TaskError
from tale_ray.search.interruption import Interruption
from tale_ray.store.reader import RunReader
from tale_ray.tuning.options import TuningOptions

PICKS = ("selected", "best", "bsba", "final")


@dataclass(frozen=True, kw_only=True, slots=True)
class SynergyConfig:
    """One study, whole."""

    config: SearchConfig  # of its searches, but for model, seed and folder
    options: TuningOptions  # of its trainings, but for the seed
    study: str  # absolute
    seeds: tuple[int, ...] = (0,)
    regimes: tuple[Regime, ...] = REGIMES
    pick: str = "selected"  # the result of a search that is gone on with, and reported

    def __post_init__(self) -> None:
        if unknown := [name for name in self.regimes if name not in REGIMES]:
            raise ConfigError(f"regimes: {unknown[0]!r} is not known: the regimes are {', '.join(REGIMES)}")
        if not self.regimes or len(set(self.regimes)) < len(self.regimes):
            raise ConfigError(f"regimes {','.join(self.regimes)!r}: name one at least, and each once")
        if self.pick not in PICKS:
            raise ConfigError(f"pick {self.pick!r} is not known: choose one of {', '.join(PICKS)}")
        if self.config.strategy.remove:
            raise ConfigError("remove is not for such a study, which begins with the full model: leave it out")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that the regimes need, in order."""
        asked = {*self.regimes}
        tunes = {"ft", "ft-tale"} & asked
        again = {"tale-ft", "tale-ft-tale"} & asked
        needed: dict[Stage, bool] = {
            "tale": True,  # scores the full model, too
            "ft": bool(tunes),
            "ft-tale": bool(tunes),
            "tale-ft": bool(again),
            "tale-ft-tale": bool(again),
        }
        return tuple(stage for stage, is_needed in needed.items() if is_needed)


@dataclass(frozen=True, slots=True)
class SynergyOpened:
    """The folder of the study is ours, and says what it is."""

    study: str


@dataclass(frozen=True, slots=True)
class StageStarted:
    """A stage follows: a search or a training."""

    seed: int
    stage: Stage
    number: int  # from 1
    total: int


SynergyEvent: TypeAlias = SynergyOpened | StageStarted | AttemptEvent | FinetuneEvent


def run_synergy(asked: SynergyConfig, interruption: Interruption) -> Iterator[SynergyEvent]:
    """Go through every stage of every seed, from wherever the folder stands, to the end.

    Raises:
        UsageError: the request cannot be met; nothing was changed.
        Interrupted: stopped before the end; the same request goes on.
        TaleRayError: a stage failed; those before it are done.
    """
    with interruption.breakable():
        asked, identity = plan_synergy(asked)
    folder = SynergyFolder(Path(asked.study))
    if (stored := folder.stored()) is None or not {*asked.regimes} <= {*stored["regimes"]}:
        regimes = [name for name in REGIMES if name in asked.regimes or (stored and name in stored["regimes"])]
        folder.write(
            {
                "identity": identity,
                "digest": identity_digest(identity),
                "seeds": list(asked.seeds),
                "pick": asked.pick,
                "regimes": regimes,
                "config": asked.config.to_json(),
                "options": asked.options.to_json(),
            }
        )
    yield SynergyOpened(asked.study)
    total = len(asked.seeds) * len(asked.stages)
    number = 0
    for seed in asked.seeds:
        for stage in asked.stages:
            number += 1
            yield StageStarted(seed, stage, number, total)
            with contextlib.closing(_stage(asked, folder, seed, stage, interruption)) as events:  # type: ignore[type-var]  # a generator
                yield from events


def plan_synergy(asked: SynergyConfig) -> tuple[SynergyConfig, Mapping[str, Any]]:
    """Check a study as far as no model is needed for it; return it with absolute paths, and its identity.

    Raises:
        UsageError: the request cannot be met, or the folder holds something else.
    """
    asked = replace(asked, config=with_absolute_paths(asked.config))
    folder = SynergyFolder(Path(asked.study))
    identity: dict[str, Any] = {"seeds": list(asked.seeds), "pick": asked.pick}
    for seed in asked.seeds:
        plan = plan_finetune(_training(_seeded(asked, seed), folder.stage(seed, "ft"), asked.options, seed))
        for split in ("test", *(("select",) if asked.pick == "selected" else ())):
            if split not in plan.prepared.examples:
                raise TaskError(
                    f"task {plan.prepared.spec.name} has no {split} rows with seed {seed}, and the study needs them: "
                    f"give the {split} split a share with --splits"
                )
        of_seed = {"rows.finetune", "rows.select", "option.seed"}
        identity |= {name: value for name, value in plan.identity.items() if name not in of_seed}
        identity |= {f"seed-{seed}.{name}": plan.identity[name] for name in sorted(of_seed)}
        search = {split: each for split, each in plan.prepared.counts.items() if split in ("search", "test")}
        identity[f"seed-{seed}.counts"] = search
    strategy = asked.config.decision_options()
    identity |= {f"search.{name}": value for name, value in strategy.items() if name not in ("seed", "dtype", "shots")}
    folder.check(identity)
    return asked, identity


def _seeded(asked: SynergyConfig, seed: int) -> SearchConfig:
    return replace(asked.config, task=replace(asked.config.task, seed=seed))


def _training(config: SearchConfig, out: Path, options: TuningOptions, seed: int) -> FinetuneConfig:
    return FinetuneConfig(config=config, options=replace(options, seed=seed), out=str(out))


def _stage(
    asked: SynergyConfig, folder: SynergyFolder, seed: int, stage: Stage, interruption: Interruption
) -> Iterator[AttemptEvent | FinetuneEvent]:
    """Do a stage, or go on with it; nothing if it is done."""
    config = _seeded(asked, seed)
    out = folder.stage(seed, stage)
    match stage:
        case "ft":
            return run_finetune(_training(config, out, asked.options, seed), interruption)
        case "tale-ft":
            reader = RunReader(str(folder.stage(seed, "tale")))
            removed = picked_round(reader, asked.pick).removed
            pruned = replace(config, strategy=StrategySection(remove=removed))
            training = _training(pruned, out, asked.options, seed)
            expected = stored_identity(reader, {})
            return run_finetune(replace(training, expected=expected, pick=asked.pick), interruption)
        case "tale":
            return run_search(_search(config, out), interruption)
        case "ft-tale":
            trained, is_searched = folder.stage(seed, "ft"), "ft-tale" in asked.regimes
        case "tale-ft-tale":
            trained, is_searched = folder.stage(seed, "tale-ft"), "tale-ft-tale" in asked.regimes
    model = replace(config.model, model=str(trained / "model"), gguf=None, revision=None)
    search = _search(replace(config, model=model), out)
    if not is_searched and not _has_searched(out):  # scores the model itself
        search = replace(search, strategy=replace(search.strategy, max_removed=0))
    return run_search(search, interruption)


def _search(config: SearchConfig, run: Path) -> SearchConfig:
    return replace(config, storage=StorageSection(run=str(run)))


def _has_searched(run: Path) -> bool:
    """Return whether a run has begun that may remove layers: it is not asked to remove fewer."""
    reader = RunReader(str(run))
    return reader.exists() and reader.manifest().config["strategy"]["max_removed"] != 0


def parse_regimes(text: str) -> tuple[Regime, ...]:
    """Return the regimes of a comma-separated list."""
    names: Sequence[Any] = [part.strip() for part in text.split(",")]
    return tuple(names)
