"""Layers found on some tasks, to be tested on each other's: what is scored, checked before any model is loaded.

A row of the matrix is a run, a column a task. All models of a column answer the same rows: the test rows of the task
but for those that any of the runs was searched on, found by their content.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from tale_ray.attempt.evaluate import StoredIdentity, picked_round
from tale_ray.attempt.identity import with_absolute_paths
from tale_ray.attempt.request import check_request
from tale_ray.attempt.rows import PreparedRows, prepare_rows
from tale_ray.config import SearchConfig, StrategySection, TaskSection
from tale_ray.errors import ConfigError, StoreError, TaskError
from tale_ray.records import Round, SplitName
from tale_ray.results.summary import summarize
from tale_ray.search.driver import held_out_scope
from tale_ray.store.documents import Manifest
from tale_ray.store.reader import RunReader
from tale_ray.store.tables import AnswerSheet, canonical_json

SEEN: tuple[SplitName, ...] = ("shots", "search", "select")  # rows that took part in choosing the layers


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferRequest:
    """Runs of one model, each of a search on a task, and further tasks to test on."""

    configs: tuple[SearchConfig, ...]  # of the runs, with the places where things are now; the first one says where
    tasks: tuple[TaskSection, ...] = ()
    pick: str | None = None  # None: selected, of a run without select rows best


@dataclass(frozen=True, slots=True)
class SearchedRun:
    """A run, and which of its results is tested."""

    reader: RunReader
    manifest: Manifest
    config: SearchConfig
    pick: str
    round: Round

    @property
    def removed(self) -> tuple[int, ...]:
        """The layers that its model does without; empty: its result is the full model."""
        return self.round.removed


@dataclass(frozen=True, slots=True)
class TaskColumn:
    """A task, and on which of its test rows the models are compared."""

    name: str  # for people; no two have the same
    prepared: PreparedRows
    digest: str  # of all that is asked of a model, and of how answers are read
    own: tuple[int, ...]  # positions of the runs that were searched on it
    is_used: tuple[bool, ...]  # by test row: whether no run was searched on it

    @property
    def row_digests(self) -> tuple[str, ...]:
        """Digests of all its test rows, in their order."""
        return tuple(example.digest for example in self.prepared.examples["test"])


@dataclass(frozen=True, slots=True)
class Cell:
    """A model and the test rows of a task, and where its answers to them are kept."""

    searched_on: int | None  # position of the run; None: the full model
    tested_on: int  # position of the task
    removed: tuple[int, ...]
    keeper: int  # position of the run that keeps the answers
    scope: str  # of the answers there


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """All that is known of a matrix before a model is loaded. `names` are those of its rows."""

    config: SearchConfig  # of the first run: model and resources
    runs: tuple[SearchedRun, ...]
    names: tuple[str, ...]
    tasks: tuple[TaskColumn, ...]
    cells: tuple[Cell, ...]

    @property
    def identity(self) -> StoredIdentity:
        """What the model that is loaded has to be."""
        manifest = self.runs[0].manifest
        model = {"digest": str(manifest.model["digest"]), "dtype": str(manifest.model["dtype"])}
        return StoredIdentity(run=self.runs[0].reader.uri, model=model, may_differ=False)

    def stored(self, cell: Cell) -> AnswerSheet | None:
        """Return the answers of a cell, if they are kept.

        Raises:
            StoreError: they cannot be read, or are not to the test rows of the task.
        """
        keepers = [self.runs[cell.keeper]] if cell.scope.startswith("test-") else self.runs
        for run in keepers:
            if (sheet := run.reader.answers(cell.scope)) is not None:
                if sheet.row_digests != self.tasks[cell.tested_on].row_digests:
                    raise StoreError(
                        f"{run.reader.uri}/answers/{cell.scope}.parquet was changed: it has {len(sheet.row_digests)} "
                        f"answers, and not to the test rows of {self.tasks[cell.tested_on].name}; delete it, and they "
                        "are scored again"
                    )
                return sheet
        return None


def plan_transfer(request: TransferRequest) -> TransferPlan:
    """Check a matrix as far as no model is needed for it, and return what it is to hold.

    Raises:
        UsageError: the request cannot be met: runs of different models or unfinished ones, no test rows, one task only.
    """
    configs = [with_absolute_paths(config) for config in request.configs]
    runs = _searched_runs(configs, request.pick)
    own = [_own_rows(run) for run in runs]
    further = [_further_rows(configs[0], section) for section in request.tasks]
    check_request(replace(configs[0], strategy=StrategySection()))
    tasks = _tested_tasks(runs, own, further)
    names = unique(
        [next(task.name for task in tasks if position in task.own) for position in range(len(runs))],
        [_folder_name(run) for run in runs],
    )
    cells = [cell for at, task in enumerate(tasks) for cell in _cells(runs, at, task)]
    return TransferPlan(configs[0], runs, tuple(names), tasks, tuple(cells))


def _searched_runs(configs: Sequence[SearchConfig], pick: str | None) -> tuple[SearchedRun, ...]:
    """Return the runs, finished and of one model, with the results that are tested."""
    readers = [RunReader(str(config.storage.run)) for config in configs]
    places = [reader.uri.rstrip("/") for reader in readers]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise ConfigError(f"{twice} is named twice: name each run once")
    manifests = [reader.manifest() for reader in readers]
    for reader, manifest in zip(readers[1:], manifests[1:], strict=True):
        _check_same_model(readers[0], manifests[0], reader, manifest)
    for reader, manifest in zip(readers, manifests, strict=True):
        _check_ended(reader, manifest)
    picks = [pick or ("selected" if manifest.rows.get("select") else "best") for manifest in manifests]
    rounds = [picked_round(reader, each) for reader, each in zip(readers, picks, strict=True)]
    return tuple(map(SearchedRun, readers, manifests, configs, picks, rounds))


def _check_same_model(one: RunReader, first: Manifest, other: RunReader, second: Manifest) -> None:
    if all(first.model[name] == second.model[name] for name in ("digest", "dtype")):
        return
    raise ConfigError(
        f"{one.uri} and {other.uri} have different models: {_model_text(first)} and {_model_text(second)}; layers "
        "found in one model say nothing of another's: name runs of one model in one dtype"
    )


def _model_text(manifest: Manifest) -> str:
    """Return which model a run has, for the message."""
    section = manifest.config["model"]
    revision = f" at revision {section['revision']}" if section.get("revision") else ""
    return f"{section['model']}{revision} (SHA-256 {manifest.model['digest'][:12]}, {manifest.model['dtype']})"


def _check_ended(reader: RunReader, manifest: Manifest) -> None:
    """Refuse a run whose layers may still change, or that keeps no rows to report on."""
    if (state := summarize(reader)["state"]) != "finished":
        remedy = "wait for it" if state == "running" else f"go on with `tale-ray resume {reader.uri}`"
        raise ConfigError(
            f"{reader.uri} is {state}, and layers are tested once their search is finished: {remedy}, or leave it out"
        )
    if not manifest.rows.get("test", {}).get("count"):
        raise ConfigError(
            f"{reader.uri} has no test rows, and only on these are layers tested: search again with a share for them, "
            "such as --splits search=0.5,select=0.2,test=0.3, or leave it out"
        )


def _own_rows(run: SearchedRun) -> PreparedRows:
    """Return the rows of a run, which have to be those that it was searched on."""
    prepared = prepare_rows(run.config.task)
    rows = {split: values["digest"] for split, values in run.manifest.rows.items()}
    StoredIdentity(run=run.reader.uri, task=run.manifest.task, rows=rows, may_differ=False).check_task(prepared)
    return prepared


def _further_rows(config: SearchConfig, section: TaskSection) -> PreparedRows:
    prepared = prepare_rows(with_absolute_paths(replace(config, task=section)).task)
    if not prepared.examples.get("test"):
        raise TaskError(
            f"task {prepared.spec.name} has no test rows, and only on these are layers tested: its rows are "
            f"{prepared.counts}; give the test split a share with --splits"
        )
    return prepared


def _tested_tasks(
    runs: Sequence[SearchedRun], own: Sequence[PreparedRows], further: Sequence[PreparedRows]
) -> tuple[TaskColumn, ...]:
    """Return the tasks, each once, those of the runs first, with the rows that no run was searched on."""
    owners: dict[str, list[int]] = {}
    found: dict[str, PreparedRows] = {}
    for position, prepared in enumerate((*own, *further)):
        digest = _asked_digest(prepared)
        found.setdefault(digest, prepared)
        owners.setdefault(digest, []).extend([position] if position < len(own) else [])
    if len(found) < 2:
        raise ConfigError(
            f"{next(iter(found.values())).spec.name} is the only task, and nothing is tested on another one: name runs "
            "of other tasks, or tasks with --task; runs on one task are compared with `tale-ray compare`"
        )
    seen = {example.digest for prepared in own for split in SEEN for example in prepared.splits.get(split, ())}
    names = unique(
        [prepared.spec.name for prepared in found.values()],
        [_folder_name(runs[owners[digest][0]]) if owners[digest] else "further" for digest in found],
    )
    tasks = []
    for name, (digest, prepared) in zip(names, found.items(), strict=True):
        is_used = tuple(example.digest not in seen for example in prepared.examples["test"])
        if not any(is_used):
            raise TaskError(
                f"all {len(is_used)} test rows of task {name} are rows that one of the runs was searched on, so there "
                "is nothing to test on: leave the task out, or the run"
            )
        tasks.append(TaskColumn(name, prepared, digest, tuple(owners[digest]), is_used))
    return tuple(tasks)


def _asked_digest(prepared: PreparedRows) -> str:
    """Return the SHA-256 of all that can change what a model answers to the test rows, and its score, but the model."""
    rows = [asdict(example) for example in prepared.examples["test"]]
    return _digest({"task": prepared.spec.identity(), "rows": rows})


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content).encode("utf-8", errors="surrogatepass")).hexdigest()


def _cells(runs: Sequence[SearchedRun], at: int, task: TaskColumn) -> list[Cell]:
    """Return the models that answer the test rows of a task: the full one first, then what the runs found.

    Answers to a run's own test rows are kept where its search keeps them, others under a name of all that decides them.
    """
    owner = task.own[0] if task.own else None
    scope = _scope(task, ()) if owner is None else held_out_scope("test", 0)
    cells = [Cell(None, at, (), owner or 0, scope)]
    for position, run in enumerate(runs):
        if run.removed:
            is_own = position in task.own
            scope = held_out_scope("test", run.round.number) if is_own else _scope(task, run.removed)
            cells.append(Cell(position, at, run.removed, position, scope))
    return cells


def _scope(task: TaskColumn, removed: Sequence[int]) -> str:
    return f"transfer-{_digest({'asked': task.digest, 'removed': sorted(removed)})[:20]}"


def _folder_name(run: SearchedRun) -> str:
    return PurePosixPath(run.reader.uri).name


def unique(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return names that differ: where two are the same, with another name behind; with a number where that is, too."""
    told = [f"{name} ({other})" if names.count(name) > 1 else name for name, other in zip(names, others, strict=True)]
    return [f"{name} {told[:at].count(name) + 1}" if told.count(name) > 1 else name for at, name in enumerate(told)]
