"""The Python API: the same as the command line, without its display."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

from tale_ray.attempt.evaluate import Evaluation, StoredIdentity, picked_round, run_evaluation, stored_identity
from tale_ray.attempt.export import ExportDType, run_export
from tale_ray.attempt.latency import run_latency, store_latency
from tale_ray.attempt.search import RunOpened, run_search
from tale_ray.attempt.study import StudyOpened, run_study
from tale_ray.config import SearchConfig, StorageSection, StrategySection
from tale_ray.errors import ConfigError
from tale_ray.option_texts import parse_bytes, parse_duration, parse_layers, parse_splits, read_seeds
from tale_ray.records import Round, Score, SplitName
from tale_ray.report_file import write_report
from tale_ray.results.held_out import selected_result
from tale_ray.results.study import summarize_study
from tale_ray.results.summary import stored_history, summarize
from tale_ray.search.history import History
from tale_ray.search.interruption import Interruption
from tale_ray.store.reader import RunReader
from tale_ray.store.study import StudyFolder


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

    @property
    def selected(self) -> Round | None:
        """The round that the select rows recommend; None before they are scored, or if there are none."""
        history = self.history
        found = selected_result(RunReader(self.uri), history)
        return None if found is None else history.rounds[found["round"]]

    def export(
        self,
        out: str | os.PathLike[str],
        pick: str | int = "best",
        *,
        model: str | os.PathLike[str] | None = None,
        dtype: ExportDType = "checkpoint",
        base_model: str | None = None,
        push_to_hub: str | None = None,
    ) -> Path:
        """Write a result as a checkpoint that plain transformers loads, as `tale-ray export` does; return its folder.

        Raises:
            UsageError: there is no such result, or it cannot be written there.
            TaleRayError: it is written, but was not uploaded.
        """
        moved = None if model is None else os.fspath(model)
        options: Mapping[str, Any] = {"base_model": base_model, "push_to_hub": push_to_hub}
        return run_export(self.uri, out, pick=str(pick), model=moved, dtype=dtype, **options).folder

    def report(
        self,
        output: str | os.PathLike[str] = "report.html",
        *,
        plots: str | os.PathLike[str] | None = None,
        data_root: str | os.PathLike[str] | None = None,
    ) -> Path:
        """Write what is found as one page of HTML, as `tale-ray report` does, and return its path.

        Raises:
            UsageError: it cannot be written there, or a file of the run is damaged.
        """
        root = None if data_root is None else os.fspath(data_root)
        return write_report(self.uri, Path(output), None if plots is None else Path(plots), root)[0]

    def latency(self, pick: str | int = "best", *, store: bool = False, **options: Any) -> dict[str, Any]:
        """Measure what a result saves, and return what `tale-ray latency --json` prints; takes its options.

        Raises:
            UsageError: there is no such result, it removes nothing, or a value breaks a rule.
        """
        values = run_latency(self.uri, pick=str(pick), **options)
        if store:
            store_latency(self.uri, values)
        return values


@dataclass(frozen=True, slots=True)
class Study:
    """The runs of one search with several seeds, read from their folder."""

    uri: str

    @property
    def summary(self) -> dict[str, Any]:
        """What `tale-ray show STUDY --json` prints."""
        return summarize_study(StudyFolder(self.uri))

    @property
    def runs(self) -> dict[int, Run]:
        """The runs that have begun, by seed."""
        folder = StudyFolder(self.uri)
        uris = {seed: folder.run(seed) for seed in folder.manifest().seeds}
        return {seed: Run(uri) for seed, uri in uris.items() if RunReader(uri).exists()}


_RENAMED = {
    "wait_resources": "wait_resources_seconds",
    "gang_timeout": "gang_timeout_seconds",
    "time_limit": "time_limit_seconds",
}
_TEXTS: Mapping[str, Callable[[str], Any]] = {  # how the text of an option is read, as on the command line
    "splits": parse_splits,
    "remove": partial(parse_layers, name="remove"),
    "keep_layers": partial(parse_layers, name="keep layers"),
    "wait_resources": parse_duration,
    "gang_timeout": parse_duration,
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


@overload
def search(*, seeds: None = None, **options: Any) -> Run: ...


@overload
def search(*, seeds: str | Iterable[int], **options: Any) -> Study: ...


def search(*, seeds: str | Iterable[int] | None = None, **options: Any) -> Run | Study:
    """Search to the end, or go on with what the run folder holds, and return the run; with `seeds`, the study.

    Takes the long option names of `tale-ray search`, e.g. `search(model="bundled", task="boolean_synthetic",
    rows=200, local=True)`. In the main thread a signal interrupts the search as it does the command.

    Raises:
        UsageError: the request cannot be met.
        Interrupted: stopped before the end; `resume` goes on.
        TaleRayError: the run failed.
    """
    if seeds is None:
        return run_to_end(make_config(**options))
    chosen = read_seeds(seeds)
    if "seed" in options:
        raise ConfigError(f"seed {options['seed']!r} and seeds {chosen} exclude each other: leave one out")
    return study_to_end(make_config(**options), chosen)


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


def study_to_end(config: SearchConfig, seeds: Sequence[int]) -> Study:
    """Search as configured with every seed and return the study."""
    interruption = Interruption()
    uri = ""
    with interruption.on_signals(config.storage.time_limit_seconds):
        for event in run_study(config, seeds, interruption):
            if isinstance(event, StudyOpened):
                uri = event.study
    return Study(uri)


def resume_study(study: str | os.PathLike[str], **options: Any) -> Study:
    """Go on with a study from its folder. `options` may change where it runs, never what was decided.

    Raises:
        UsageError: there is no study, or the options would change a decision.
        Interrupted: stopped before the end.
        TaleRayError: a run failed.
    """
    return study_to_end(*resumed_study(os.fspath(study), **options))


def resumed_study(study: str, **options: Any) -> tuple[SearchConfig, tuple[int, ...]]:
    """Return the configuration and the seeds of a stored study with some options changed, set to go on with it.

    Raises:
        StoreError: there is no study.
        ConfigError: an option is unknown, or a value breaks a rule.
    """
    manifest = StudyFolder(study).manifest()
    return _resumed(SearchConfig.from_json(manifest.config), study, options), tuple(manifest.seeds)


def resumed_config(run: str, **options: Any) -> SearchConfig:
    """Return the configuration of a stored run with some options changed, set to go on with it.

    It is where it was, unless `local` or an address is given; only a run that had no address looks at RAY_ADDRESS.

    Raises:
        StoreError: there is no run.
        ConfigError: an option is unknown, or a value breaks a rule.
    """
    return _resumed(SearchConfig.from_json(RunReader(run).manifest().config), run, options)


def _resumed(stored: SearchConfig, run: str, options: Mapping[str, Any]) -> SearchConfig:
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


def open_study(study: str | os.PathLike[str]) -> Study:
    """Return a study from its folder or URI, finished or not.

    Raises:
        StoreError: there is no study.
    """
    StudyFolder(os.fspath(study)).manifest()
    return Study(os.fspath(study))


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
        *_, evaluation = run_evaluation(config, expected, None if split == "all" else split, interruption)
    assert isinstance(evaluation, Evaluation)
    return evaluation.score


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
        remove = picked_round(reader, str(pick or "best")).removed
    options.pop("remove", None)
    config = replace(resumed_config(os.fspath(run), **options), strategy=StrategySection(remove=remove))
    return config, stored_identity(reader, options)
