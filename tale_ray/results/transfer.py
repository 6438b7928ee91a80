"""A matrix of layers found on some tasks (its rows) and tested on some tasks (its columns): numbers, and a table.

Pure functions of which test rows each model answers correctly. All models of a column answer the same rows. Does not
know who scored them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tale_ray.results.held_out import comparison_json
from tale_ray.results.statistics import adjust_holm, compare, wilson_interval
from tale_ray.results.tables import count_text, difference_text, interval_text, layers_text, p_text, percent
from tale_ray.tasks.splits import digest_rows

RESULT = "transfer"  # its name in a run's folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Searched:
    """A row of the matrix: layers that a run found."""

    name: str
    run: str
    task: str
    pick: str
    round: int
    removed: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of the matrix: the test rows of a task."""

    name: str
    task: str
    own: tuple[str, ...]  # names of the rows that were searched on it
    row_digests: tuple[str, ...]  # of the rows that are compared on
    left_out: int  # test rows that a run was searched on


def transfer_json(
    *,
    model: Mapping[str, Any],
    searched: Sequence[Searched],
    tested: Sequence[Column],
    correct: Mapping[tuple[int | None, int], Sequence[bool]],
    invalid: Mapping[tuple[int | None, int], int],
) -> dict[str, Any]:
    """Return the matrix as JSON values, row by row.

    `p_value_holm` is corrected for all cells whose model lacks a layer, those of a run's own task included; the others
    are the full model itself (p-value 1).

    Args:
        model: which model it is.
        searched: the rows.
        tested: the columns.
        correct: by positions of row (None: the full model) and column, whether each test row was answered correctly.
        invalid: in the same way, how many answers could not be read.
    """
    scores = []
    for row, source in enumerate(searched):
        for column, task in enumerate(tested):
            cell = (row if source.removed else None, column)
            comparison = compare(correct[cell], correct[None, column])
            scores.append(
                {
                    "searched_on": source.name,
                    "tested_on": task.name,
                    "is_own": source.name in task.own,
                    "baseline": _score(correct[None, column], invalid[None, column]),
                    "pruned": _score(correct[cell], invalid[cell]),
                    **comparison_json(comparison),
                    "p_value_holm": 1.0,
                }
            )
    is_pruned = {source.name: bool(source.removed) for source in searched}
    family = [score for score in scores if is_pruned[score["searched_on"]]]
    for score, adjusted in zip(family, adjust_holm([score["p_value"] for score in family]), strict=True):
        score["p_value_holm"] = adjusted
    return {
        "model": dict(model),
        "searched_on": [
            {
                "name": source.name,
                "run": source.run,
                "task": source.task,
                "pick": source.pick,
                "round": source.round,
                "removed": list(source.removed),
            }
            for source in searched
        ],
        "tested_on": [
            {
                "name": task.name,
                "task": task.task,
                "rows": {"count": len(task.row_digests), "digest": digest_rows(task.row_digests)},
                "left_out": task.left_out,
                "baseline": _score(correct[None, column], invalid[None, column]),
            }
            for column, task in enumerate(tested)
        ],
        "scores": scores,
        "num_tests": len(family),
    }


def _score(correct: Sequence[bool], invalid: int) -> dict[str, Any]:
    interval = wilson_interval(sum(correct), len(correct))
    return {
        "correct": sum(correct),
        "total": len(correct),
        "invalid": invalid,
        "interval": [interval.low, interval.high],
    }


def transfer_table(values: Mapping[str, Any]) -> RenderableType:
    """Return the matrix for a person: accuracy, change against the full model, and p-value in every cell."""
    model = values["model"]["model"]
    name = PurePosixPath(model).name if model.startswith("/") else model
    table = Table(title=f"{name}: layers searched on one task (rows), tested on another (columns)")
    table.add_column("searched on")
    for task in values["tested_on"]:
        table.add_column(Text(f"{task['name']}\n{count_text(task['rows']['count'], 'test row')}"), justify="right")
    baselines = [Text("\n".join(_accuracy_lines(task["baseline"]))) for task in values["tested_on"]]
    table.add_row("uncut", *baselines, end_section=True)
    cells = {(score["searched_on"], score["tested_on"]): score for score in values["scores"]}
    for source in values["searched_on"]:
        head = Text(f"{source['name']}\nwithout {layers_text(source['removed'])}")
        shown = [_cell_text(cells[source["name"], task["name"]], source) for task in values["tested_on"]]
        table.add_row(head, *shown, end_section=True)
    notes = [
        "in each cell: accuracy; change against the uncut model on the same rows, in points; p-value of an exact "
        f"McNemar test, corrected by Holm for {count_text(values['num_tests'], 'cell')}. In brackets: 95% intervals. "
        "*: tested on the task of its own search. invalid: replies without a readable answer, counted as wrong",
        *(
            f"{task['name']}: {count_text(task['left_out'], 'test row')} that a run was searched on left out for all "
            "models"
            for task in values["tested_on"]
            if task["left_out"]
        ),
    ]
    return Group(table, *(Text(note) for note in notes))


def _cell_text(score: Mapping[str, Any], source: Mapping[str, Any]) -> Text:
    mark = " *" if score["is_own"] else ""
    if not source["removed"]:
        return Text(f"the uncut model{mark}")
    lines = (*_accuracy_lines(score["pruned"]), difference_text(score), f"p {p_text(score['p_value_holm'])}{mark}")
    return Text("\n".join(lines))


def _accuracy_lines(score: Mapping[str, Any]) -> tuple[str, ...]:
    accuracy = f"{percent(score['correct'] / score['total'])} {interval_text(score['interval'])}"
    return (accuracy, f"{score['invalid']} invalid") if score["invalid"] else (accuracy,)
