"""Which rows a model may be trained on: enough of them, of more than one answer, and none that is scored."""

import reprlib
from collections.abc import Mapping
from dataclasses import replace

from tale_ray.attempt.rows import PreparedRows
from tale_ray.errors import TaskError
from tale_ray.records import Example, SplitName
from tale_ray.tasks.shots import question_of
from tale_ray.tasks.splits import check_disjoint
from tale_ray.tuning.options import MIN_ROWS, TuningOptions


def trained_rows(prepared: PreparedRows, options: TuningOptions) -> PreparedRows:
    """Return the rows with the finetune rows that a model is trained on, and what a user should know of them.

    Finetune rows that ask what a scored row, or a demonstration, asks are refused in tasks of one's own, as splits
    share no row; of a built-in task, whose rows nobody can correct, they are left out.

    Raises:
        TaskError: there are none or too few, some are scored, or all have one reply.
    """
    name = prepared.spec.name
    if not prepared.finetune:
        raise TaskError(
            f"task {name} has no finetune rows: its rows are {prepared.counts}; give the finetune split a share, such "
            "as --splits search=0.2,select=0.1,test=0.3,finetune=0.4 (of a run, when it is searched)"
        )
    scored: dict[SplitName, tuple[Example, ...]] = {**prepared.splits}
    del scored["finetune"]
    taken = {_asked(example) for examples in scored.values() for example in examples}
    rows = tuple(example for example in prepared.finetune if _asked(example) not in taken)
    notes = prepared.notes
    if left_out := len(prepared.finetune) - len(rows):
        if not prepared.spec.is_builtin:
            _refuse_common(prepared, scored)
        notes = (*notes, f"{left_out} finetune rows ask what a scored row asks: they are left out of training")
    needed = max(MIN_ROWS, options.rows_per_step)
    if len(rows) < needed:
        raise TaskError(
            f"task {name} has {len(rows)} finetune rows, and training needs {needed}: at least {MIN_ROWS}, and those "
            f"of a step ({options.batch_size} times {options.accumulate}); raise the share of the finetune split, or "
            "lower --batch-size or --accumulate"
        )
    if len({example.reply for example in rows}) == 1:
        raise TaskError(
            f"all {len(rows)} finetune rows of task {name} have the reply {reprlib.repr(rows[0].reply)}: a model would "
            "learn to say that whatever is asked; give rows with several answers"
        )
    if "select" not in prepared.examples:
        notes = (*notes, "there are no select rows to stop early by: the weights after the last step are kept")
    return replace(prepared, finetune=rows, notes=notes)


def _asked(example: Example) -> str:
    return question_of(example) if example.prompt is None else example.prompt


def _refuse_common(prepared: PreparedRows, scored: Mapping[SplitName, tuple[Example, ...]]) -> None:
    """Name the rows that ask the same, by digest and by how their question starts."""
    names = {_asked(example): example.digest for example in prepared.finetune}
    shown = {example.digest: f"{example.digest[:12]} {_start(example)!r}" for example in prepared.finetune}
    for split, examples in scored.items():
        asked = [names.get(_asked(example), example.digest) for example in examples]
        check_disjoint({"finetune": [*names.values()], split: asked}, shown)


def _start(example: Example) -> str:
    text = " ".join((example.prompt or example.messages[-1]["content"]).split())
    return text if len(text) <= 60 else f"{text[:60]}..."
