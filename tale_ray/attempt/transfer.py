"""Layers found on one task, tested on another: every model that a plan names scores every task's test rows once.

Finished units and answers are stored as they come, in the run that the layers are of, so that a repetition, or what
goes on after an interruption, scores only what is missing.
"""

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from tale_ray.attempt.execution import connect, encode_questions, make_executor, similar_ranks, token_digests
from tale_ray.attempt.search import LoadingStarted, ModelLoaded, RowsPrepared
from tale_ray.attempt.transfer_plan import Cell, SearchedRun, TaskColumn, TransferPlan, TransferRequest, plan_transfer
from tale_ray.errors import StoreError
from tale_ray.records import ModelInfo, Score
from tale_ray.results.transfer import RESULT, Column, Searched, transfer_json
from tale_ray.search.executor import Executor, Questions
from tale_ray.search.instructions import Keep
from tale_ray.search.interruption import Interruption
from tale_ray.search.pace import Pace
from tale_ray.search.pool import Pool, PoolEvent
from tale_ray.search.scheduler import Scheduler, Scoring
from tale_ray.store.run import RunWriter
from tale_ray.store.tables import AnswerSheet


@dataclass(frozen=True, slots=True)
class CellScored:
    """A model has answered the test rows of a task; `searched_on` None: the full one. `score` is over all of them."""

    searched_on: str | None
    tested_on: str
    score: Score


@dataclass(frozen=True, slots=True)
class TransferFinished:
    """The matrix, as JSON values; it is stored in every run."""

    values: dict[str, Any]


TransferEvent: TypeAlias = RowsPrepared | LoadingStarted | ModelLoaded | PoolEvent | CellScored | TransferFinished


def run_transfer(request: TransferRequest, interruption: Interruption) -> Iterator[TransferEvent]:
    """Score what is missing of a matrix, and store it in every run. Ends with a TransferFinished.

    Raises:
        UsageError: the request cannot be met, or another process writes to one of the runs.
        Interrupted: asked to stop, lease lost, or storage away; what is finished is stored.
        TaleRayError: a unit failed on every try; what is finished is stored.
    """
    with interruption.breakable():
        plan = plan_transfer(request)
        sheets = _stored(plan)
    for task in plan.tasks:
        yield RowsPrepared(task.name, {"test": len(task.is_used)}, _notes(task))
    with contextlib.ExitStack() as stack:
        writers: dict[int, RunWriter] = {}

        def writer(position: int) -> RunWriter:
            if position not in writers:
                claimed = RunWriter.claim(str(plan.runs[position].config.storage.run), wait=False)
                writers[position] = stack.enter_context(claimed)
            return writers[position]

        if any(cell not in sheets for cell in plan.cells):
            by_run = [writer(position) for position in range(len(plan.runs))]
            sheets = _stored(plan)  # again: another process may have written to the runs until now
            missing = [cell for cell in plan.cells if cell not in sheets]
            if missing:
                sheets |= yield from _score(plan, missing, by_run, interruption)
        values = _values(plan, sheets)
        for position, run in enumerate(plan.runs):
            if run.reader.result(RESULT) != values:
                writer(position).write_result(RESULT, values)
    yield TransferFinished(values)


def _stored(plan: TransferPlan) -> dict[Cell, AnswerSheet]:
    found = {cell: plan.stored(cell) for cell in plan.cells}
    return {cell: sheet for cell, sheet in found.items() if sheet is not None}


def _notes(task: TaskColumn) -> tuple[str, ...]:
    left_out = task.is_used.count(False)
    return (f"{left_out} of them are rows that a run was searched on: left out for all models",) if left_out else ()


def _score(
    plan: TransferPlan, missing: Sequence[Cell], writers: Sequence[RunWriter], interruption: Interruption
) -> Generator[TransferEvent, None, dict[Cell, AnswerSheet]]:
    """Load the model once, and score task by task what is missing; return the answers."""
    yield LoadingStarted()
    executor = make_executor(plan.config, "transfer")
    found = {}
    with contextlib.closing(executor):
        connect(executor, interruption)
        with interruption.breakable():
            info = executor.load()
        yield ModelLoaded(info)
        plan.identity.check_model(info, plan.config.model.model)
        pool = Pool(executor, interruption)
        for at, task in enumerate(plan.tasks):
            cells = [cell for cell in missing if cell.tested_on == at]
            if not cells:
                continue
            with interruption.breakable():
                questions = _questions(executor, task, info)
                for position in task.own:
                    _check_tokens(plan.runs[position], questions)
                executor.share(questions)
            pace = Pace(info.num_layers, questions.max_new_tokens, is_streamed=info.is_streamed)
            order = _order(questions)
            for cell in cells:
                found[cell] = yield from _score_cell(cell, task, pool, pace, order, writers[cell.keeper])
                name = None if cell.searched_on is None else plan.names[cell.searched_on]
                yield CellScored(name, task.name, found[cell].score)
    return found


def _questions(executor: Executor, task: TaskColumn, info: ModelInfo) -> Questions:
    tested = replace(task.prepared, examples={"test": task.prepared.examples["test"]})
    return encode_questions(executor, tested, info)


def _check_tokens(run: SearchedRun, questions: Questions) -> None:
    """Refuse prompts that are no longer those of a run."""
    if run.manifest.tokens.get("test") != token_digests(questions.rows)["test"]:
        raise StoreError(
            f"{run.reader.uri} was searched with other prompts: the same rows give other tokens with this version of "
            f"transformers (then: {run.manifest.versions.get('transformers')}); install that one, or leave the run out"
        )


def _order(questions: Questions) -> tuple[int, ...]:
    """Return the rows with similar prompts side by side."""
    ranks = similar_ranks(questions.rows["test"])
    return tuple(sorted(range(len(ranks)), key=ranks.__getitem__))


def _score_cell(
    cell: Cell, task: TaskColumn, pool: Pool, pace: Pace, order: tuple[int, ...], writer: RunWriter
) -> Generator[TransferEvent, None, AnswerSheet]:
    """Score a model on the test rows of a task, but for units that are stored, and store its answers."""
    examples = task.prepared.examples["test"]
    scoring = Scoring(cell.scope, "test", cell.removed, (None,), len(examples), row_order=order)
    scheduler: Scheduler = pool.scheduler(scoring, pace, writer.reader.unit_results(cell.scope))
    for step in pool.run(scheduler):
        if isinstance(step, Keep):
            writer.write_unit(step.result, [examples[row].digest for row in step.result.unit.rows])
        else:
            yield step
    sheet = AnswerSheet(
        scope=cell.scope,
        split="test",
        row_digests=task.row_digests,
        targets=tuple(example.target for example in examples),
        answers=scheduler.answers(None),
    )
    writer.write_answers(sheet)
    writer.drop_partials(cell.scope)
    return sheet


def _values(plan: TransferPlan, sheets: Mapping[Cell, AnswerSheet]) -> dict[str, Any]:
    """Return the matrix as JSON values."""
    correct: dict[tuple[int | None, int], list[bool]] = {}
    invalid: dict[tuple[int | None, int], int] = {}
    for cell in plan.cells:
        is_used = plan.tasks[cell.tested_on].is_used
        pairs = zip(sheets[cell].answers, is_used, strict=True)
        answers = [answer for answer, used in pairs if used]
        correct[cell.searched_on, cell.tested_on] = [answer.correct for answer in answers]
        invalid[cell.searched_on, cell.tested_on] = sum(answer.prediction is None for answer in answers)
    manifest = plan.runs[0].manifest
    return transfer_json(
        model={
            "model": plan.config.model.model,
            **{name: manifest.model[name] for name in ("digest", "dtype", "num_layers")},
        },
        searched=[
            Searched(
                name=name,
                run=run.reader.uri,
                task=run.manifest.task["name"],
                pick=run.pick,
                round=run.round.number,
                removed=run.removed,
            )
            for name, run in zip(plan.names, plan.runs, strict=True)
        ],
        tested=[
            Column(
                name=task.name,
                task=task.prepared.spec.name,
                own=tuple(plan.names[position] for position in task.own),
                row_digests=tuple(digest for digest, used in zip(task.row_digests, task.is_used, strict=True) if used),
                left_out=task.is_used.count(False),
            )
            for task in plan.tasks
        ],
        correct=correct,
        invalid=invalid,
    )
