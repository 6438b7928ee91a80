"""The Python API: the same as the command line, without its display."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

from tale_ray.attempt.evaluate import StoredIdentity, picked_removal, run_evaluation, stored_identity
from tale_ray.attempt.search import RunOpened, run_search
from tale_ray.config import (
    SearchConfig,
    StorageSection,
    StrategySection,
    parse_bytes,
    parse_duration,
    parse_layers,
    parse_splits,
)
from tale_ray.errors import ConfigError
from tale_ray.records import Round, Score, SplitName
from tale_ray.results.summary import stored_history, summarize
from tale_ray.search.history import History
from tale_ray.search.interruption import Interruption
from tale_ray.store.reader import RunReader


@dataclass(frozen=True, slots=True)
class Run:
    """A run, read from its folder. Every property reads again, so a run under way can be watched."""

    uri: str

    @property
    def summary(self) -> dict[str, Any]:
        """What `tale-ray show --json` prints."""
        return summarize(RunReader(self.uri))

    @property
    def history(self) -> History:
        """The finished rounds."""
        reader = RunReader(self.uri)
        return stored_history(reader, reader.manifest())

    @property
    def best(self) -> Round:
        """The first round with the highest accuracy on the search rows."""
        return self.history.best

    @property
    def bsba(self) -> Round:
        """The last round that is at least as accurate as the full model on the search rows."""
        return self.history.bsba

    @property
    def final(self) -> Round:
        """The last committed round."""
        return self.history.final


_RENAMED = {"wait_resources": "wait_resources_seconds", "time_limit": "time_limit_seconds"}
_TEXTS: Mapping[str, Callable[[str], Any]] = {  # how the text of an option is read, as on the command line
    "splits": parse_splits,
    "remove": partial(parse_layers, name="remove"),
    "keep_layers": partial(parse_layers, name="keep layers"),
    "wait_resources": parse_duration,
    "time_limit": parse_duration,
    "batch_bytes": parse_bytes,
}


def make_config(**options: Any) -> SearchConfig:
    """Return a configuration from the long option names of `tale-ray search`, with underscores.

    Where neither `local` nor an address is given, it has the address in RAY_ADDRESS, as in a Ray job.

    Raises:
        ConfigError: an option is missing or unknown, or a value breaks a rule.
    """
    for name in ("model", "task"):
        if options.get(name) is None:
            raise ConfigError(
                f"{name} is missing: name it with --{name}, in the --config file, or as {name}=... in Python"
            )
    values = _values(options)
    sections: dict[str, Any] = {}
    for section in fields(SearchConfig):
        kind: Any = section.type
        sections[section.name] = kind(
            **{item.name: values.pop(item.name) for item in fields(kind) if item.name in values}
        )
    if values:
        raise ConfigError(f"option {sorted(values)[0]!r} is not known: the options are those of `tale-ray search`")
    return _at_ray_address(SearchConfig(**sections))


def _values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as the fields of a configuration: renamed, and texts read as on the command line."""
    values = {}
    for name, value in options.items():
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif name == "epsilon":
            value = str(value)
        elif isinstance(value, str) and name in _TEXTS:
            value = _TEXTS[name](value)
        elif name == "splits" and isinstance(value, Mapping):
            value = {split: str(share) for split, share in value.items()}
        elif name in ("remove", "keep_layers") and isinstance(value, Iterable):
            value = tuple(value)
        values[_RENAMED.get(name, name)] = value
    return values


def search(**options: Any) -> Run:
    """Search to the end, or go on with what the run folder holds, and return the run.

    Takes the long option names of `tale-ray search`, e.g. `search(model="bundled", task="boolean_synthetic",
    rows=200, local=True)`. In the main thread a signal interrupts the search as it does the command.

    Raises:
        UsageError: the request cannot be met.
        Interrupted: stopped before the end; `resume` goes on.
        TaleRayError: the run failed.
    """
    return run_to_end(make_config(**options))


def resume(run: str | os.PathLike[str], **options: Any) -> Run:
    """Go on with a run from its folder. `options` may change where it runs, never what was decided.

    Raises:
        UsageError: there is no run, or the options would change a decision.
        Interrupted: stopped before the end.
        TaleRayError: the run failed.
    """
    return run_to_end(resumed_config(os.fspath(run), **options))


def run_to_end(config: SearchConfig) -> Run:
    """Search as configured and return the run."""
    interruption = Interruption()
    uri = ""
    with interruption.on_signals(config.storage.time_limit_seconds):
        for event in run_search(config, interruption):
            if isinstance(event, RunOpened):
                uri = event.run
    return Run(uri)


def resumed_config(run: str, **options: Any) -> SearchConfig:
    """Return the configuration of a stored run with some options changed, set to go on with it.

    It is where it was, unless `local` or an address is given; only a run that had no address looks at RAY_ADDRESS.

    Raises:
        StoreError: there is no run.
        ConfigError: an option is unknown, or a value breaks a rule.
    """
    stored = SearchConfig.from_json(RunReader(run).manifest().config)
    values = _values(options) | {"run": run, "resume": "must"}
    resources = stored.resources  # a place that is asked for now replaces the one that was
    if values.get("address") or values.get("local"):
        resources = replace(resources, address=None, local=False)
    if values.get("local"):
        resources = replace(resources, workers=None)
    elif values.get("workers") not in (None, 1):
        resources = replace(resources, local=False)
    sections: dict[str, Any] = {
        "model": stored.model,
        "task": stored.task,
        "strategy": stored.strategy,
        "resources": resources,
        "storage": StorageSection(),
    }
    changed = {
        name: replace(section, **{item.name: values.pop(item.name) for item in fields(section) if item.name in values})
        for name, section in sections.items()
    }
    if values:
        raise ConfigError(f"option {sorted(values)[0]!r} is not known: the options are those of `tale-ray search`")
    return _at_ray_address(SearchConfig(**changed))


def _at_ray_address(config: SearchConfig) -> SearchConfig:
    """Return the configuration with the address that Ray's own tools would use, unless it has a place."""
    address = os.environ.get("RAY_ADDRESS")
    if config.resources.local or config.resources.address or not address:
        return config
    return replace(config, resources=replace(config.resources, address=address))


def open_run(run: str | os.PathLike[str]) -> Run:
    """Return a run from its folder or URI, finished or not.

    Raises:
        StoreError: there is no run.
    """
    RunReader(os.fspath(run)).manifest()
    return Run(os.fspath(run))


def evaluate(split: SplitName | Literal["all"] = "test", **options: Any) -> Score:
    """Return the score of a model on a split of a task, as `tale-ray evaluate` does, whose options it takes.

    `evaluate(run="runs/x", pick="best")` scores a result of a run, and `evaluate(model=..., task=..., remove=(3, 7))`
    a model without some layers.

    Raises:
        UsageError: the request cannot be met.
        Interrupted: stopped; nothing is stored.
    """
    interruption = Interruption()
    config, expected = evaluated_config(**options)
    with interruption.on_signals():
        *_, score = run_evaluation(config, expected, None if split == "all" else split, interruption)
    assert isinstance(score, Score)
    return score


def evaluated_config(
    run: str | os.PathLike[str] | None = None, pick: str | None = None, **options: Any
) -> tuple[SearchConfig, StoredIdentity]:
    """Return the configuration of what is scored: a result of a run, or a model without some of its layers.

    With it comes what model and rows have to be: those of the run, but for what the options ask to be different.

    Raises:
        UsageError: there is no such run or result, or a value breaks a rule.
    """
    if run is None:
        if pick is not None:
            raise ConfigError(f"pick {pick!r} is a result of a run: name the run too, or the layers in remove instead")
        return make_config(**options), StoredIdentity()
    if pick is not None and "remove" in options:
        raise ConfigError(f"pick {pick!r} and remove both say which layers are removed: leave one out")
    reader = RunReader(os.fspath(run))
    remove = _values(options).get("remove")
    if remove is None:
        remove = picked_removal(reader, str(pick or "best"))
    options.pop("remove", None)
    config = replace(resumed_config(os.fspath(run), **options), strategy=StrategySection(remove=remove))
    return config, stored_identity(reader.uri, reader.manifest(), options)
