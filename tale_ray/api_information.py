"""The Python API of what layers know of a label: the same as the command `information`."""

import os
from collections.abc import Iterable
from typing import Any

from tale_ray.api import make_config, resumed_config
from tale_ray.attempt.information import InformationOptions, run_information
from tale_ray.config import SearchConfig
from tale_ray.errors import ConfigError
from tale_ray.results.probe import FOLDS, ProbeRule

_OF_A_RUN = ("model", "data_root", "include_path", "dtype", "gpus_per_worker", "batch_bytes", "stream")


def information(run: str | os.PathLike[str] | None = None, pick: str | int = "best", **options: Any) -> dict[str, Any]:
    """Return what probes read of the label at every layer: what `tale-ray information --json` prints.

    `information("runs/x", pick="selected")` is about a run, and `information(model=..., task=...)` about any model; the
    options are those of the command, `split` as `"select,test"` or `("select", "test")`. Nothing is stored.

    Raises:
        UsageError: the request cannot be met.
    """
    uri = None if run is None else os.fspath(run)
    if uri is None and pick != "best":
        raise ConfigError(f"pick {pick!r} is a result of a run: name the run too, or the layers in remove instead")
    return run_information(*information_request(uri, **options), run=uri, pick=str(pick))


def information_request(run: str | None = None, **options: Any) -> tuple[SearchConfig, InformationOptions]:
    """Return which model and rows the options of `tale-ray information` mean, and how they are probed.

    Raises:
        UsageError: there is no such run, an option is not for it, or a value breaks a rule.
    """
    split: Any = options.pop("split", None)
    splits: Any = split.split(",") if isinstance(split, str) else split
    if not isinstance(splits, Iterable | None):
        raise ConfigError(f"split {split!r} is no list of splits: write it like select,test")
    asked = InformationOptions(
        splits=None if splits is None else tuple(splits),
        rows=options.pop("rows", None),
        allow_search_rows=options.pop("allow_search_rows", False),
        drop_rare_labels=options.pop("drop_rare_labels", False),
        rule=ProbeRule(folds=options.pop("folds", FOLDS), seed=options.pop("probe_seed", 0)),
    )
    if run is None:
        return make_config(**options), asked
    if other := [name for name in options if name not in _OF_A_RUN]:
        raise ConfigError(
            f"{other[0].replace('_', ' ')} {options[other[0]]!r} is given with a run, which has its own: leave it out, "
            "or name a model and a task instead of the run"
        )
    return resumed_config(run, **options), asked
