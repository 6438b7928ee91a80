"""The rows of a run: read, split by content, rendered."""

from collections.abc import Mapping
from dataclasses import dataclass

from tale_ray.config import TaskSection
from tale_ray.errors import TaskError
from tale_ray.records import Example, SplitName
from tale_ray.tasks.data import load_rows
from tale_ray.tasks.prompts import render_rows
from tale_ray.tasks.spec import TaskSpec, load_task
from tale_ray.tasks.splits import split_rows

SCORED_SPLITS: tuple[SplitName, ...] = ("search", "select", "test")


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """A task and its rendered rows by split, in split order. `notes` are what a user should know of them."""

    spec: TaskSpec
    examples: Mapping[SplitName, tuple[Example, ...]]
    notes: tuple[str, ...]

    @property
    def counts(self) -> dict[SplitName, int]:
        """Number of rows by split."""
        return {split: len(rows) for split, rows in self.examples.items()}


def prepare_rows(section: TaskSection) -> PreparedRows:
    """Return the rows that a run scores, before any model is looked at.

    Raises:
        TaskError: unknown task, bad task file, rows that cannot be read or rendered, no search rows.
    """
    spec = load_task(section.task)
    rows = load_rows(spec, section.data_root)
    positions = split_rows(rows, section.shares, section.seed)
    notes = []
    if not positions["search"]:
        raise TaskError(
            f"the search split of task {spec.name} is empty: {len(rows)} rows times a share of "
            f"{section.splits['search']} leave none; raise the share or give more rows"
        )
    if section.rows is not None:
        if section.rows > len(positions["search"]):
            notes.append(
                f"{section.rows} search rows are asked for and the split has {len(positions['search'])}: all are used"
            )
        positions["search"] = positions["search"][: section.rows]
    if not positions.get("test"):
        notes.append("no rows are left to report on: accuracies on the search rows are optimistic, report no others")
    scored = {
        split: render_rows(spec, [rows[position] for position in positions[split]])
        for split in SCORED_SPLITS
        if positions.get(split)
    }
    return PreparedRows(spec=spec, examples=scored, notes=tuple(notes))
