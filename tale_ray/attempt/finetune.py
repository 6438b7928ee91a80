"""Training an adapter on the finetune rows of a task, as a generator of events, from wherever its folder stands.

Whatever can be refused is refused before a model is loaded: options, rows, the folder, a missing package.
"""

import contextlib
import shutil
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from tale_ray.attempt.evaluate import StoredIdentity
from tale_ray.attempt.export import becoming, hub_id
from tale_ray.attempt.finetune_folder import TrainingFolder
from tale_ray.attempt.finetune_rows import trained_rows
from tale_ray.attempt.identity import identity_digest, with_absolute_paths
from tale_ray.attempt.request import check_request
from tale_ray.attempt.rows import PreparedRows, prepare_rows
from tale_ray.attempt.search import LoadingStarted, RowsPrepared
from tale_ray.cluster.authentication import protect_private_cluster
from tale_ray.cluster.machine import installed_versions
from tale_ray.config import SearchConfig
from tale_ray.errors import ConfigError, Interrupted
from tale_ray.model.digest import digest_model, model_folder
from tale_ray.results.tables import layers_text
from tale_ray.results.tuned_card import tuned_card
from tale_ray.search.interruption import Interruption
from tale_ray.tasks.splits import digest_rows
from tale_ray.tuning.options import TuningOptions, check_peft
from tale_ray.tuning.records import Evaluated, Progress, TrainingEnded, TrainingEvent

TunedDType: TypeAlias = Literal["trained", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """One training, whole."""

    config: SearchConfig  # model, layers that it does without, rows and resources
    options: TuningOptions
    out: str  # absolute
    expected: StoredIdentity = field(default_factory=StoredIdentity)  # what a run says of model and rows
    pick: str | None = None  # the result of that run
    dtype: TunedDType = "trained"  # of the merged checkpoint

    def __post_init__(self) -> None:
        if self.dtype not in (known := get_args(TunedDType)):
            raise ConfigError(f"merged dtype {self.dtype!r} is not known: choose one of {', '.join(known)}")

    @property
    def is_alone(self) -> bool:
        """Whether it is trained in this process."""
        return (self.config.resources.workers or 1) == 1


@dataclass(frozen=True, slots=True)
class TrainingOpened:
    """The folder of the training is ours, or holds a finished one."""

    out: str
    is_finished: bool


@dataclass(frozen=True, slots=True)
class ModelMerged:
    """The adapter is merged into the model, which is written."""

    folder: str
    num_parameters: int


@dataclass(frozen=True, slots=True)
class Finetuned:
    """The training has ended: what is stored of it."""

    out: str
    record: Mapping[str, Any]


FinetuneEvent: TypeAlias = RowsPrepared | TrainingOpened | LoadingStarted | TrainingEvent | ModelMerged | Finetuned


@dataclass(frozen=True, slots=True)
class FinetunePlan:
    """All that is known of a training before a model is loaded."""

    asked: FinetuneConfig
    prepared: PreparedRows
    identity: Mapping[str, Any]
    model_digest: str | None  # None: the model is at a hub

    @property
    def digest(self) -> str:
        """SHA-256 of all that can change the weights, hex."""
        return identity_digest(self.identity)


def plan_finetune(asked: FinetuneConfig) -> FinetunePlan:
    """Check a training as far as no model is needed for it.

    Raises:
        UsageError: the request cannot be met.
    """
    check_peft()
    config = with_absolute_paths(asked.config)
    workers = config.resources.workers or 1
    if asked.options.batch_size < workers:
        raise ConfigError(
            f"batch size {asked.options.batch_size} is less than the {workers} workers that share its rows: raise "
            "--batch-size, or ask for fewer --workers"
        )
    prepared = prepare_rows(config.task)
    asked.expected.check_task(prepared)
    prepared = trained_rows(prepared, asked.options)
    asked.options.num_steps(len(prepared.finetune))
    check_request(config)
    folder = model_folder(config.model.model)
    model_digest = None if folder is None else digest_model(folder, config.model.gguf)
    if model_digest is not None:
        asked.expected.check_digest(model_digest, config.model.model)
    model = model_digest or f"{config.model.model}@{config.model.revision}"  # a hub's is not known before it is there
    asked = replace(asked, config=config)
    return FinetunePlan(asked, prepared, _identity(asked, prepared, model), model_digest)


def _identity(asked: FinetuneConfig, prepared: PreparedRows, model: str) -> dict[str, Any]:
    """Return everything that can change the weights that are written, as flat JSON values."""
    rows = {"finetune": prepared.finetune, "select": prepared.examples.get("select", ())}
    return {
        "model": model,
        "dtype": asked.config.dtype,
        "merged_dtype": asked.dtype,
        "removed": sorted(asked.config.strategy.remove),
        "shots": asked.config.task.shots,
        **{f"option.{name}": value for name, value in asked.options.to_json().items()},
        **{f"task.{name}": value for name, value in prepared.spec.identity().items()},
        **{
            f"rows.{split}": f"{len(examples)} rows, SHA-256 {digest_rows([each.digest for each in examples])}"
            for split, examples in rows.items()
        },
    }


def run_finetune(asked: FinetuneConfig, interruption: Interruption) -> Iterator[FinetuneEvent]:
    """Train from wherever the folder stands, merge, and end with `Finetuned`.

    Raises:
        UsageError: the request cannot be met; nothing was changed.
        Interrupted: stopped before the end; the same request goes on.
        TaleRayError: training failed; what was stored stays.
    """
    with interruption.breakable():
        plan = plan_finetune(asked)
    asked, prepared = plan.asked, plan.prepared
    yield RowsPrepared(prepared.spec.name, prepared.counts, prepared.notes)
    folder = TrainingFolder(Path(asked.out))
    stored = folder.check(plan.identity)
    if stored is not None and stored["state"] == "finished":
        with interruption.breakable():
            folder.check_model(stored)
        yield TrainingOpened(asked.out, is_finished=True)
        yield Finetuned(asked.out, stored)
        return
    with folder.held():
        stored = folder.check(plan.identity)  # another process may have been here
        if stored is not None and stored["state"] == "finished":
            yield Finetuned(asked.out, stored)
            return
        _check_checkpoint(folder)
        record = stored or _new_record(plan)
        folder.write(record)
        yield TrainingOpened(asked.out, is_finished=False)
        yield LoadingStarted()
        progress = yield from _train(plan, folder, interruption)
        with interruption.breakable():
            merged, texts = _merge(plan, folder, progress)
        yield merged
        record = _finished_record(plan, record, progress, texts)
        folder.write(record)
        folder.clean()
    yield Finetuned(asked.out, record)


def _check_checkpoint(folder: TrainingFolder) -> None:
    """Refuse a damaged checkpoint before a model is loaded for it.

    Raises:
        StoreError: it is damaged.
    """
    from tale_ray.tuning.checkpoint import read_progress  # torch is wanted in this process only now

    read_progress(folder.state)


def _train(
    plan: FinetunePlan, folder: TrainingFolder, interruption: Interruption
) -> Generator[TrainingEvent, None, Progress]:
    """Train to the end, in this process or in several; returns what came of it."""
    from tale_ray.tuning.job import TrainingJob  # torch is wanted in this process only now

    asked, config = plan.asked, plan.asked.config
    shutil.rmtree(folder.adapter, ignore_errors=True)  # of one that was killed while it saved it
    job = TrainingJob(
        digest=plan.digest,
        section=config.model,
        dtype=config.dtype,
        removed=config.strategy.remove,
        model_digest=plan.model_digest or asked.expected.model.get("digest"),
        base=_base_name(config),
        examples=plan.prepared.finetune,
        select=plan.prepared.examples.get("select", ()),
        max_new_tokens=plan.prepared.spec.max_new_tokens,
        options=asked.options,
        folder=folder.state,
        adapter=folder.adapter,
        gpus_per_worker=config.resources.gpus_per_worker,
    )
    steps = _alone(job, interruption) if asked.is_alone else _together(job, plan, interruption)
    progress: Progress | None = None
    for event in steps:
        if isinstance(event, TrainingEnded):
            progress = event.progress
        yield event
    assert progress is not None, "a training ends, or raises"
    return progress


def _alone(job: Any, interruption: Interruption) -> Iterator[TrainingEvent]:
    from tale_ray.tuning.job import run_job

    with contextlib.closing(run_job(job)) as events:  # type: ignore[type-var]  # a generator: closing it stores the steps that are done
        with interruption.breakable():
            begun = next(events)
        yield begun
        for event in events:
            yield event
            interruption.check()


def _together(job: Any, plan: FinetunePlan, interruption: Interruption) -> Iterator[TrainingEvent]:
    resources = plan.asked.config.resources
    if resources.address is None:
        protect_private_cluster()
    from tale_ray.cluster.train import train_together  # ray is wanted in this process only now
    from tale_ray.tuning.checkpoint import read_progress

    seen = len(_evaluations(read_progress(job.folder), job.digest))
    together = train_together(
        job,
        _run_part,
        name=f"tale-ray-finetune-{plan.digest[:16]}",
        storage=job.folder / "ray",
        resources=resources,
    )
    with contextlib.closing(together) as ticks:  # type: ignore[type-var]  # a generator
        for _ in ticks:
            interruption.arm()
            for evaluation in _evaluations(read_progress(job.folder), job.digest)[seen:]:
                seen += 1
                yield Evaluated(evaluation)
            interruption.check()
    progress = read_progress(job.folder)
    if progress is None or progress.ended is None:
        raise Interrupted("training together ended before its end: run the same command again")
    yield TrainingEnded(progress)


def _run_part(job: Any, rank: int, size: int) -> None:
    """Train as one of several processes."""
    from tale_ray.tuning.job import run_job
    from tale_ray.tuning.loop import Place

    for _ in run_job(job, Place(rank, size)):
        pass


def _evaluations(progress: Progress | None, digest: str) -> tuple[Any, ...]:
    return progress.evaluations if progress is not None and progress.digest == digest else ()


def _merge(plan: FinetunePlan, folder: TrainingFolder, progress: Progress) -> tuple[ModelMerged, dict[str, Any]]:
    """Write the model with the adapter merged into it, unless it is there, and say what it is."""
    from tale_ray.model.export import write_checkpoint
    from tale_ray.tuning.adapter import merge_adapter

    config, dtype = plan.asked.config, plan.asked.dtype
    trained = str(progress.facts["dtype"])
    shutil.rmtree(folder.model, ignore_errors=True)  # of one that was killed before it was recorded

    def change(model: Any) -> None:
        if dtype == "float32":  # before it is merged: the sum is not rounded to the dtype of the training first
            model.to(_torch_dtype(dtype))
        merge_adapter(model, folder.adapter)
        if dtype not in ("trained", trained):
            model.to(_torch_dtype(dtype))

    with becoming(folder.model) as place:
        written = write_checkpoint(
            config.model, config.strategy.remove, place, digest=plan.model_digest, dtype=trained, change=change
        )
        facts = {"dtype": written.dtype, "num_parameters": written.num_parameters, "code_files": [*written.code_files]}
        facts["digest"] = digest_model(place, None)
        record = _finished_record(plan, _new_record(plan), progress, facts)
        (place / "README.md").write_text(tuned_card(record, written.license), encoding="utf-8")
    return ModelMerged(str(folder.model), written.num_parameters), facts


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def model_name(config: SearchConfig) -> str:
    """Return a model as people find it: the hub's id, or the name of its folder."""
    return hub_id(config.model, config.model) or Path(config.model.model).name


def _base_name(config: SearchConfig) -> str:
    """Return what an adapter is trained on; of a pruned model no name that peft would load the full one by."""
    removed = config.strategy.remove
    return model_name(config) + (f" without layers {layers_text(removed)}" if removed else "")


def _new_record(plan: FinetunePlan) -> dict[str, Any]:
    """Return what is known of a training before it begins."""
    asked = plan.asked
    rows = {"finetune": plan.prepared.finetune, **plan.prepared.examples}
    return {
        "state": "training",
        "created": _now(),
        "digest": plan.digest,
        "identity": dict(plan.identity),
        "model": model_name(asked.config),
        "run": asked.expected.run or None,
        "pick": asked.pick,
        "removed": list(asked.config.strategy.remove),
        "task": plan.prepared.spec.name,
        "splits": dict(asked.config.task.splits),
        "seed": asked.config.task.seed,
        "rows": {
            split: {"count": len(examples), "digest": digest_rows([each.digest for each in examples])}
            for split, examples in rows.items()
        },
        "options": asked.options.to_json(),
        "steps": asked.options.num_steps(len(plan.prepared.finetune)),
        "versions": installed_versions() | {"peft": _peft_version()},
    }


def _finished_record(
    plan: FinetunePlan, begun: Mapping[str, Any], progress: Progress, merged: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what is known of a training that has ended."""
    facts = progress.facts
    best = progress.best
    return {
        **begun,
        "state": "finished",
        "ended": _now(),
        "why": progress.ended,
        "steps_done": progress.step,
        "kept_step": progress.best_step,
        "kept": None if best is None else _evaluation(best),
        "evaluations": [_evaluation(each) for each in progress.evaluations],
        "losses": list(progress.losses),
        "seconds": {"load": facts["load_seconds"], "training": progress.seconds, "training_cpu": progress.cpu_seconds},
        "workers": plan.asked.config.resources.workers or 1,
        **{
            name: facts[name]
            for name in (
                *("num_layers", "family", "dtype", "device", "threads", "parameters", "trainable_parameters"),
                *("adapted", "tokens", "reply_tokens", "notes"),
            )
        },
        "merged": {"folder": "model", **merged},
    }


def _evaluation(each: Any) -> dict[str, Any]:
    return {"step": each.step, "loss": each.loss, "exact": each.exact, "train_loss": each.train_loss}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _peft_version() -> str:
    from importlib.metadata import version

    return version("peft")
