"""The Python API: the same as the command line, without its display."""

from dataclasses import dataclass, replace
from typing import Any

from tale_ray.attempt.evaluate import run_evaluation
from tale_ray.attempt.search import RunOpened, run_search
from tale_ray.config import (
    ModelSection,
    ResourceSection,
    SearchConfig,
    StorageSection,
    StrategySection,
    TaskSection,
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


def make_config(**options: Any) -> SearchConfig:
    """Return a configuration from the long option names of `tale-ray search`, with underscores.

    Raises:
        ConfigError: an option is unknown, or a value breaks a rule.
    """
    options = {_RENAMED.get(name, name): value for name, value in options.items()}
    if isinstance(options.get("splits"), str):
        options["splits"] = parse_splits(options["splits"])
    if "epsilon" in options:
        options["epsilon"] = str(options["epsilon"])
    for name in ("remove", "keep_layers"):
        if name in options:
            options[name] = tuple(options[name])
    sections: dict[str, Any] = {}
    for name, kind in (
        ("model", ModelSection),
        ("task", TaskSection),
        ("strategy", StrategySection),
        ("resources", ResourceSection),
        ("storage", StorageSection),
    ):
        known = {field: options.pop(field) for field in kind.__dataclass_fields__ if field in options}
        try:
            sections[name] = kind(**known)
        except TypeError as error:
            raise ConfigError(f"the {name} is not described: {error}; give it") from error
    if options:
        raise ConfigError(f"option {sorted(options)[0]!r} is not known: the options are those of `tale-ray search`")
    return SearchConfig(**sections)


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


def resume(run: str, **options: Any) -> Run:
    """Go on with a run from its folder. `options` may change where it runs, never what is decided.

    Raises:
        StoreError: there is no run, or the options would change a decision.
    """
    return run_to_end(resumed_config(run, **options))


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
    """Return the configuration of a stored run with some options changed, set to go on with it."""
    stored = SearchConfig.from_json(RunReader(run).manifest().config)
    changed = {_RENAMED.get(name, name): value for name, value in options.items()}
    where = {"address", "local", "workers"} & set(changed)
    resources = stored.resources
    if where & {"address", "local"}:  # the two exclude each other: what is asked for now replaces what was
        resources = replace(
            resources, address=None, local=False, workers=None if changed.get("local") else resources.workers
        )
    sections: dict[str, Any] = {
        "model": stored.model,
        "task": stored.task,
        "strategy": stored.strategy,
        "resources": resources,
        "storage": StorageSection(),
    }
    changed |= {"run": run, "resume": "must"}
    for name, section in sections.items():
        fields = {field: changed.pop(field) for field in section.__dataclass_fields__ if field in changed}
        sections[name] = replace(section, **fields)
    if changed:
        raise ConfigError(f"option {sorted(changed)[0]!r} cannot be changed when a run goes on: leave it out")
    return SearchConfig(**sections)


def open_run(run: str) -> Run:
    """Return a run from its folder or URI, finished or not.

    Raises:
        StoreError: there is no run.
    """
    RunReader(run).manifest()
    return Run(run)


def evaluate(split: SplitName | None = None, **options: Any) -> Score:
    """Return the score of a model, without the layers in `remove`, on a split of a task (None: on all its rows).

    Takes the row, model and resource options of `search`.
    """
    interruption = Interruption()
    with interruption.on_signals():
        *_, score = run_evaluation(make_config(**options), split, interruption)
    assert isinstance(score, Score)
    return score
