"""One attempt at a search, as a generator of events.

Whatever can be refused is refused in the cheapest place: options and rows before the run folder is touched, the
folder before a model is loaded, the model before a row is scored.
"""

import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, TypeAlias

from tale_ray.attempt.execution import (
    connect,
    encode_calibration,
    encode_questions,
    make_executor,
    make_metrics,
    similar_ranks,
    token_digests,
)
from tale_ray.attempt.identity import differences, identity_digest, run_identity, with_absolute_paths
from tale_ray.attempt.request import check_request
from tale_ray.attempt.rows import PreparedRows, calibration_rows, prepare_rows
from tale_ray.cluster.machine import installed_versions
from tale_ray.config import SearchConfig
from tale_ray.errors import BaselineZero, Interrupted, LeaseLost, StorageAway, StoreError
from tale_ray.model.digest import digest_model, model_folder
from tale_ray.records import Example, ModelInfo, SplitName, StopReason
from tale_ray.results.held_out import held_out_results, selected_result
from tale_ray.results.statistics import recommend
from tale_ray.results.summary import stop_reason, stored_history
from tale_ray.search.driver import Driver, SearchEvent, why_zero
from tale_ray.search.history import History
from tale_ray.search.interruption import Interruption
from tale_ray.search.pool import Pool
from tale_ray.search.strategy import make_strategy
from tale_ray.store.documents import Manifest
from tale_ray.store.files import Clock
from tale_ray.store.reader import RunReader
from tale_ray.store.run import RunWriter
from tale_ray.tasks.splits import digest_rows

RUNS_FOLDER = "runs"


@dataclass(frozen=True, slots=True)
class RowsPrepared:
    """The rows are read, split and rendered."""

    task: str
    counts: Mapping[SplitName, int]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadingStarted:
    """Workers are found a place, and load the model."""


@dataclass(frozen=True, slots=True)
class ModelLoaded:
    """The first worker has loaded the model."""

    info: ModelInfo


@dataclass(frozen=True, slots=True)
class RunOpened:
    """The run folder is ours, or holds a finished run (`attempt` 0: nothing is left to do)."""

    run: str  # as it was asked for, to open it again
    attempt: int
    history: History | None  # what earlier attempts have finished


AttemptEvent: TypeAlias = RowsPrepared | LoadingStarted | ModelLoaded | RunOpened | SearchEvent


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """All that is known of a search before a model is loaded."""

    config: SearchConfig
    prepared: PreparedRows
    identity: Mapping[str, Any] | None  # None: the model is at a hub, and only workers can say what it is
    run: str | None  # None: named by the identity
    calibration: tuple[Example, ...] = ()  # of a file; empty: the prompts of the search rows


def plan_search(config: SearchConfig) -> SearchPlan:
    """Check a search as far as no model is needed for it, and return what would be done.

    Raises:
        UsageError: the request cannot be met.
    """
    config = with_absolute_paths(config)
    prepared = prepare_rows(config.task)
    calibration = calibration_rows(config.strategy)
    check_request(config)
    folder = model_folder(config.model.model)
    model = digest_model(folder, config.model.gguf) if folder else None
    identity = None if model is None else run_identity(config, prepared, model, calibration)
    run = config.storage.run
    if run is None and identity is not None:
        run = _default_run(prepared, identity)
    if run is not None:
        _check_mode(RunReader(run), config, identity)
    return SearchPlan(config=config, prepared=prepared, identity=identity, run=run, calibration=calibration)


def run_search(config: SearchConfig, interruption: Interruption) -> Iterator[AttemptEvent]:
    """Search from wherever the run folder stands, to the end.

    Raises:
        UsageError: the request cannot be met; nothing was changed.
        Interrupted: stopped before the end; everything finished is stored.
        TaleRayError: the run failed; everything finished is stored.
    """
    config = with_absolute_paths(config)
    with interruption.breakable():
        plan = plan_search(config)
    prepared, identity, run = plan.prepared, plan.identity, plan.run
    yield RowsPrepared(prepared.spec.name, prepared.counts, prepared.notes)
    with contextlib.ExitStack() as stack:
        writer = None
        if run is not None:
            reader = RunReader(run)
            if identity is not None and (history := _nothing_left(reader, config, prepared)):
                yield RunOpened(run, 0, history)
                if history.baseline.correct == 0:
                    raise BaselineZero(why_zero(history.baseline))
                return
            writer = stack.enter_context(_claim(run, interruption))

        yield LoadingStarted()
        executor = make_executor(config, prepared.spec.name)
        stack.callback(executor.close)
        connect(executor, interruption)
        with interruption.breakable():
            info = executor.load()
        loaded_at = time.monotonic()
        yield ModelLoaded(info)
        config.strategy.check_layers(info.num_layers)

        identity = run_identity(config, prepared, info.digest, plan.calibration)
        if writer is None:
            run = _default_run(prepared, identity)
            _check_mode(RunReader(run), config, identity)
            writer = stack.enter_context(_claim(run, interruption))
        with interruption.breakable():
            questions = encode_questions(executor, prepared, info)
            calibration = encode_calibration(executor, plan.calibration, info)
            executor.share(questions)
        manifest = _manifest(config, prepared, identity, info, token_digests(questions.rows))
        _adopt(writer, manifest)
        history = stored_history(writer.reader, manifest)
        assert run is not None, "a writer has a run"
        yield RunOpened(run, writer.attempt, history)
        writer.update_attempt(load_seconds=info.load_seconds)
        driver = Driver(
            strategy=make_strategy(config.strategy, config.task.seed),
            history=history,
            examples=prepared.examples,
            pool=Pool(executor, interruption),
            writer=writer,
            recommend=recommend,
            loaded_at=loaded_at,
            similar={split: similar_ranks(rows) for split, rows in questions.rows.items()},
            calibration=calibration or tuple(row.token_ids for row in questions.rows["search"]),
            exhaustive=config.strategy.exhaustive,
            max_new_tokens=questions.max_new_tokens,
            is_streamed=info.is_streamed,
        )
        tell_metrics = make_metrics(config, manifest.run)
        with _ending(writer, driver):
            for event in driver.run():
                tell_metrics(event)
                yield event


def _claim(run: str, interruption: Interruption) -> RunWriter:
    """Claim a run folder; a request to stop breaks into waiting only, so that no lease is left without a holder."""
    return RunWriter.claim(run, clock=Clock(sleep=interruption.sleep))


def _default_run(prepared: PreparedRows, identity: Mapping[str, Any]) -> str:
    """Return the folder of a run that was given none."""
    return f"{RUNS_FOLDER}/{run_name(prepared, identity)}"


def run_name(prepared: PreparedRows, identity: Mapping[str, Any]) -> str:
    """Return the name of a run: its task and the start of its digest."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", prepared.spec.name)  # lm-eval:NAME is no name of a folder everywhere
    task = name.lstrip("._-") or "task"  # nor is one that is hidden, leads upwards or looks like an option
    return f"{task}-{identity_digest(identity)[:12]}"


def _check_mode(reader: RunReader, config: SearchConfig, identity: Mapping[str, Any] | None) -> None:
    """Refuse a folder that `--resume` does not allow, that no run can begin in, or that holds another run.

    Raises:
        StoreError: names the folder, the rule and the remedy.
    """
    mode = config.storage.resume
    if mode == "never" and not reader.is_empty():
        raise StoreError(f"{reader.uri} is not empty and --resume never asks for a new run: choose another --run")
    if not reader.exists():
        if mode == "must":
            raise StoreError(f"{reader.uri} holds no run to go on with: check the path, or leave out --resume must")
        reader.check_place()
        return
    if identity is not None and (lines := differences(reader.manifest().identity, identity)):
        raise StoreError(
            f"{reader.uri} holds a run with another configuration; nothing was changed. "
            "Choose another --run, or ask for what it has:\n  " + "\n  ".join(lines)
        )


def _nothing_left(reader: RunReader, config: SearchConfig, prepared: PreparedRows) -> History | None:
    """Return the history of a run that has ended and is reported on, else None."""
    if not reader.exists():
        return None
    reader.check()
    history = stored_history(reader, reader.manifest())
    reason = stop_reason(history, config)
    reported = [
        selected_result(reader, history) is not None or "select" not in prepared.examples,
        held_out_results(reader, history) is not None or "test" not in prepared.examples,
    ]
    ended = reason is StopReason.BASELINE_ZERO or (reason is not None and all(reported))
    return history if ended else None


def _manifest(
    config: SearchConfig,
    prepared: PreparedRows,
    identity: Mapping[str, Any],
    info: ModelInfo,
    tokens: Mapping[str, str],
) -> Manifest:
    """Return what a run is, as run.json says it."""
    return Manifest(
        run=run_name(prepared, identity),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        config=config.to_json(),
        identity=dict(identity),
        model={"num_layers": info.num_layers, "family": info.family, "digest": info.digest, "dtype": info.dtype},
        task={"name": prepared.spec.name, **prepared.spec.identity()},
        rows={
            split: {"count": len(examples), "digest": digest_rows([example.digest for example in examples])}
            for split, examples in prepared.splits.items()
        },
        tokens=dict(tokens),
        versions=_versions(),
    )


def _adopt(writer: RunWriter, manifest: Manifest) -> None:
    """Write run.json, or go on with the one that is there.

    Raises:
        StoreError: it describes another run.
    """
    changed: list[str] = []
    if writer.reader.exists():
        stored = writer.reader.manifest()
        if lines := differences(stored.identity, manifest.identity):
            raise StoreError(f"{writer.reader.uri} holds a run with another configuration:\n  " + "\n  ".join(lines))
        if stored.tokens != manifest.tokens or stored.model != manifest.model:
            raise StoreError(
                f"{writer.reader.uri} was searched with other prompts or another dtype "
                f"({stored.model['dtype']}, now {manifest.model['dtype']}): the same rows give other tokens with this "
                f"version of transformers (then: {stored.versions.get('transformers')}); install that one, or "
                "choose another --run"
            )
        kept_apart = [rows["finetune"] for rows in (stored.rows, manifest.rows) if "finetune" in rows]
        if len(kept_apart) == 2 and kept_apart[0] != kept_apart[1]:
            raise StoreError(
                f"{writer.reader.uri} keeps other rows apart for training: the run has {kept_apart[0]['count']} "
                f"finetune rows, asked for are {kept_apart[1]['count']}; ask for the same share, or for another --run"
            )
        changed = _changed_options(stored.config, manifest.config)
        manifest = replace(manifest, run=stored.run, created=stored.created)
    if not writer.reader.exists() or changed:
        writer.write_manifest(manifest)
    sections = {name: manifest.config[name] for name in ("resources", "storage")}
    writer.start_attempt(options={**sections, "changed": changed}, versions=_versions())


def _changed_options(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Return in words the options that differ from those of earlier attempts, but for where the run is kept."""
    return [
        f"{section}.{name}: {stored[section].get(name)!r} became {value!r}"
        for section, options in asked.items()
        if section != "storage"
        for name, value in json.loads(json.dumps(options)).items()
        if stored[section].get(name) != value
    ]


def _versions() -> dict[str, str]:
    harness = {"lm-eval": version("lm-eval")} if find_spec("lm_eval") is not None else {}
    return {name: number for name, number in installed_versions().items() if number is not None} | harness


@contextlib.contextmanager
def _ending(writer: RunWriter, driver: Driver) -> Iterator[None]:
    """Record how the attempt ended."""

    def record(how: str, error: BaseException | None) -> None:
        writer.update_attempt(
            ended=datetime.now(UTC).isoformat(timespec="seconds"),
            how=how,
            error=None if error is None else f"{type(error).__name__}: {error}",
            retries=driver.retries,
            wasted_rows=driver.wasted_rows,
        )

    try:
        yield
    except (LeaseLost, StorageAway):
        raise  # nothing may, or can, be written any more
    except (Interrupted, KeyboardInterrupt, GeneratorExit) as error:
        record("interrupted", error)
        raise
    except BaseException as error:
        record("failed", error)
        raise
    record("finished", None)
