"""The Python API of training: the same as the commands `finetune` and `synergy`."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from tale_ray.api import evaluated_config, make_config
from tale_ray.attempt.finetune import FinetuneConfig, Finetuned, TunedDType, run_finetune
from tale_ray.attempt.synergy import SynergyConfig, parse_regimes, run_synergy
from tale_ray.attempt.synergy_folder import REGIMES, SynergyFolder
from tale_ray.attempt.synergy_result import conclude_study
from tale_ray.errors import ConfigError
from tale_ray.option_texts import read_seeds
from tale_ray.output_file import check_place, local_folder
from tale_ray.search.interruption import Interruption
from tale_ray.tuning.options import TUNED_SPLITS, TuningOptions

_OF_ADAPTERS = tuple(item.name for item in fields(TuningOptions) if item.name != "seed")


def finetune(out: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """Train an adapter and merge it, or go on with what the folder holds; return what `finetune --json` prints.

    `finetune("tuned", model=..., task=..., remove=(3, 7))` is about any model, and `finetune("tuned", run="runs/x",
    pick="selected")` about a result of a run; the options are those of the command, `target_modules` as
    `"q_proj,v_proj"` or `("q_proj", "v_proj")`. In the main thread a signal interrupts it as it does the command.

    Raises:
        UsageError: the request cannot be met.
        Interrupted: stopped before the end; the same call goes on.
        TaleRayError: training failed; what was stored stays.
    """
    request = finetune_request(out, **options)
    interruption = Interruption()
    with interruption.on_signals(request.config.storage.time_limit_seconds):
        *_, done = run_finetune(request, interruption)
    assert isinstance(done, Finetuned)
    return {"out": done.out, **done.record}


def finetune_request(
    out: str | os.PathLike[str],
    *,
    run: str | os.PathLike[str] | None = None,
    pick: str | int | None = None,
    training_seed: int | None = None,
    merged_dtype: TunedDType = "trained",
    **options: Any,
) -> FinetuneConfig:
    """Return what is to be trained, from options of `tale-ray finetune` that were given.

    Raises:
        UsageError: there is no such run or result, an option is unknown, or a value breaks a rule.
    """
    adapter = _taken(options)
    if run is None:
        options.setdefault("splits", TUNED_SPLITS)
    place = local_folder(out, "--out")
    config, expected = evaluated_config(run, None if pick is None else str(pick), **_placed(options))
    seed = config.task.seed if training_seed is None else training_seed
    return FinetuneConfig(
        config=config,
        options=_tuning(adapter, seed),
        out=str(place),
        expected=expected,
        pick=None if run is None else str(pick or "best"),
        dtype=merged_dtype,
    )


def synergy(study: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """Compare pruning and fine-tuning in every order, or go on with it; return what `tale-ray synergy --json` prints.

    Takes the options of that command, `seeds` as `"0,1"` or `(0, 1)`, `regimes` as `"base,ft"` or `("base", "ft")`. In
    the main thread a signal interrupts it as it does the command.

    Raises:
        UsageError: the request cannot be met.
        Interrupted: stopped before the end; the same call goes on.
        TaleRayError: a stage failed; those before it are done.
    """
    request = synergy_request(study, **options)
    interruption = Interruption()
    with interruption.on_signals(request.config.storage.time_limit_seconds):
        for _ in run_synergy(request, interruption):
            pass
    return conclude_study(SynergyFolder(Path(request.study)), request.regimes)


def synergy_request(
    study: str | os.PathLike[str],
    *,
    seeds: str | int | Iterable[int] = (0,),
    regimes: str | Iterable[str] = REGIMES,
    pick: str = "selected",
    **options: Any,
) -> SynergyConfig:
    """Return which study is asked for, from options of `tale-ray synergy` that were given.

    Raises:
        UsageError: an option is missing or unknown, or a value breaks a rule.
    """
    place = local_folder(study, "--study")
    check_place(place / "seed-0", "--study")
    adapter = _taken(options)
    options.setdefault("splits", TUNED_SPLITS)
    chosen = read_seeds(seeds)
    if "seed" in options:
        raise ConfigError(f"seed {options['seed']!r} is not for a study of several: name it in seeds")
    config = make_config(**_placed(options), seed=chosen[0])
    return SynergyConfig(
        config=config,
        options=_tuning(adapter, chosen[0]),
        study=str(place),
        seeds=chosen,
        regimes=parse_regimes(regimes if isinstance(regimes, str) else _joined(regimes)),
        pick=pick,
    )


def _joined(regimes: Any) -> str:
    found = [*regimes] if isinstance(regimes, Iterable) else [regimes]
    if any(not isinstance(name, str) for name in found):
        raise ConfigError(f"regimes {regimes!r} is no list of names: write it like base,tale")
    return ",".join(found)


def _taken(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the adapter, and take them from the others."""
    return {name: options.pop(name) for name in _OF_ADAPTERS if name in options}


def _tuning(given: Mapping[str, Any], seed: int) -> TuningOptions:
    """Return how an adapter is trained; without patience (0) training goes on to the last step."""
    values = {**given, "seed": seed}
    names = values.get("target_modules")
    if isinstance(names, str):
        values["target_modules"] = tuple(part.strip() for part in names.split(","))
    elif isinstance(names, Iterable):
        values["target_modules"] = tuple(names)
    if values.get("patience") == 0:
        values["patience"] = None
    return TuningOptions(**values)


def _placed(options: dict[str, Any]) -> dict[str, Any]:
    """Return options that say where a training runs: in this process, unless more than one worker is asked for.

    Raises:
        ConfigError: an address is given, and nothing is to run there.
    """
    workers = options.get("workers")
    if workers is not None and (not isinstance(workers, int) or workers > 1):  # what is no number is refused there
        return options
    if options.get("address"):
        raise ConfigError(
            f"address {options['address']!r} is given, and one worker trains in this process: ask for more --workers, "
            "or leave it out"
        )
    return {**options, "local": True}
