"""The rows of a run: read, split by content, rendered, with the demonstrations that are shown before them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tale_ray.config import StrategySection, TaskSection
from tale_ray.errors import TaskError
from tale_ray.records import Example, SplitName
from tale_ray.tasks.calibration import load_calibration
from tale_ray.tasks.data import Row, load_rows, load_shots
from tale_ray.tasks.harness import PREFIX as HARNESS
from tale_ray.tasks.harness import load_harness_task
from tale_ray.tasks.prompts import render_rows
from tale_ray.tasks.shots import (
    Group,
    ambiguous_questions,
    check_asked_elsewhere,
    choose_shots,
    groups_with_repeats,
    question_of,
)
from tale_ray.tasks.spec import TaskSpec, load_task
from tale_ray.tasks.splits import rank, split_digests, split_rows

SCORED_SPLITS: tuple[SplitName, ...] = ("search", "select", "test")
_SHOWN_SPLITS: tuple[SplitName, ...] = (*SCORED_SPLITS, "finetune")  # whose rows have demonstrations


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """A task and its rendered rows by split, in split order. `notes` are what a user should know of them."""

    spec: TaskSpec
    examples: Mapping[SplitName, tuple[Example, ...]]  # scored
    notes: tuple[str, ...]
    shots: tuple[Example, ...] = ()  # every demonstration, of all groups; those of a row are in its example
    finetune: tuple[Example, ...] = ()  # kept apart for training

    @property
    def splits(self) -> dict[SplitName, tuple[Example, ...]]:
        """All rows that are used, by split: the demonstrations, what is scored, and what is kept apart; none empty."""
        splits: dict[SplitName, tuple[Example, ...]] = {
            "shots": self.shots,
            **self.examples,
            "finetune": self.finetune,
        }
        return {split: rows for split, rows in splits.items() if rows}

    @property
    def counts(self) -> dict[SplitName, int]:
        """Number of rows by split."""
        return {split: len(rows) for split, rows in self.splits.items()}


@dataclass(frozen=True, slots=True)
class _Demonstrations:
    """Demonstrations by group, and the splits of the rows without those that were carved out of them."""

    by_group: Mapping[Group, tuple[Example, ...]]
    positions: dict[SplitName, tuple[int, ...]]
    note: str | None


def prepare_rows(section: TaskSection) -> PreparedRows:
    """Return the rows that a run scores, before any model is looked at.

    Raises:
        TaskError: unknown task, bad task file, rows that cannot be read or rendered, no search rows, too few
            demonstrations, or ones that are scored.
    """
    if section.task.startswith(HARNESS):
        return _prepare_harness_rows(section)
    spec = load_task(section.task)
    rows = load_rows(spec, section.data_root)
    notes = []
    shots: Mapping[Group, tuple[Example, ...]] = {}
    if section.shots:
        demonstrations = _demonstrations(spec, section, rows)
        shots, positions = demonstrations.by_group, demonstrations.positions
        if demonstrations.note:
            notes.append(demonstrations.note)
        if repeating := groups_with_repeats(shots):
            whose = f" of {', '.join(repeating)}" if spec.group_by else ""
            notes.append(f"too few demonstrations{whose} ask different things: some are shown twice")
    else:
        positions = split_rows(rows, section.shares, section.seed)
    notes += _check_splits(spec, section, positions, len(rows))
    if section.rows is not None:
        positions["search"] = _in_turns(spec, rows, positions["search"])[: section.rows]
    scored = {
        split: _with_demonstrations(
            spec, _neighbours(spec, [rows[position] for position in positions[split]], shots), shots
        )
        for split in SCORED_SPLITS
        if positions.get(split)
    }
    used = _groups(spec, (rows[position] for split in scored for position in positions[split]))
    return PreparedRows(
        spec=spec,
        examples=scored,
        notes=tuple(notes),
        shots=tuple(example for group in sorted(shots) if group in used for example in shots[group]),
        finetune=_with_demonstrations(spec, [rows[position] for position in positions.get("finetune", ())], shots),
    )


def calibration_rows(section: StrategySection) -> tuple[Example, ...]:
    """Return the rows of the file that a model is measured on; none if it is measured on the search rows, or not.

    Raises:
        TaskError: the file cannot be read, or holds no text.
    """
    return () if section.calibration is None else load_calibration(section.calibration)


def _prepare_harness_rows(section: TaskSection) -> PreparedRows:
    """Return the rows of a task of lm-evaluation-harness, which renders them and chooses demonstrations itself."""
    if section.shares.get("shots"):
        raise TaskError(
            f"splits: task {section.task} takes demonstrations from rows of its own choice; leave out the shots share"
        )
    spec, examples = load_harness_task(section.task, section.include_path, section.shots)
    positions = split_digests([example.digest for example in examples], section.shares, section.seed)
    notes = _check_splits(spec, section, positions, len(examples))
    positions["search"] = positions["search"][: section.rows]
    scored = {split: tuple(examples[at] for at in positions[split]) for split in SCORED_SPLITS if positions.get(split)}
    finetune = tuple(examples[at] for at in positions.get("finetune", ()))
    return PreparedRows(spec=spec, examples=scored, notes=tuple(notes), finetune=finetune)


def _check_splits(
    spec: TaskSpec, section: TaskSection, positions: Mapping[SplitName, Sequence[int]], num_rows: int
) -> list[str]:
    """Refuse a search without rows, and return what a user should know of the splits."""
    num_search = len(positions["search"])
    if not num_search:
        raise TaskError(
            f"the search split of task {spec.name} is empty: {num_rows} rows times a share of "
            f"{section.splits['search']} leave none; raise the share or give more rows"
        )
    notes = []
    if section.rows is not None and section.rows > num_search:
        notes.append(f"{section.rows} search rows are asked for and the split has {num_search}: all are used")
    if not positions.get("test"):
        notes.append("no rows are left to report on: accuracies on the search rows are optimistic, report no others")
    return notes


def _demonstrations(spec: TaskSpec, section: TaskSection, rows: Sequence[Row]) -> _Demonstrations:
    """Choose demonstrations: from the `shots` share of the rows if it has one, else from the task's own source.

    Without either, they are carved out of the rows before these are split: the first ones by content digest.
    """
    examples = render_rows(spec, rows)
    groups = [_group(spec, row) for row in rows]
    if section.shares.get("shots"):
        positions = split_rows(rows, section.shares, section.seed)
        asked = {question_of(examples[at]) for split, found in positions.items() if split != "shots" for at in found}
        candidates = [(groups[at], examples[at]) for at in positions["shots"]]
        needed = {groups[at] for split in _SHOWN_SPLITS for at in positions.get(split, ())}
        note = None if spec.shots is None else "demonstrations are the shots share of the rows, as --splits asks for it"
        return _Demonstrations(choose_shots(candidates, needed, section.shots, asked), positions, note)

    source = load_shots(spec, section.data_root)
    if source is not None:
        positions = split_rows(rows, section.shares, section.seed)
        pool = render_rows(spec, source)
        excluded = {question_of(example) for example in examples}
        common = sum(question_of(example) in excluded for example in pool)
        if not spec.is_builtin:
            check_asked_elsewhere(pool, {name: [examples[at] for at in found] for name, found in positions.items()})
        candidates = list(zip((_group(spec, row) for row in source), pool, strict=True))
        candidates.sort(key=lambda candidate: rank(section.seed, candidate[1].digest))
        needed = {groups[at] for split in _SHOWN_SPLITS for at in positions.get(split, ())}
        note = f"{common} rows of {spec.shots} ask what rows of the task ask: none is a demonstration"
        return _Demonstrations(
            choose_shots(candidates, needed, section.shots, excluded), positions, note if common else None
        )

    candidates = list(zip(groups, examples, strict=True))
    candidates.sort(key=lambda candidate: rank(section.seed, candidate[1].digest))
    chosen = choose_shots(candidates, set(groups), section.shots, ambiguous_questions(examples))
    carved = {example.digest for shots in chosen.values() for example in shots}
    rest = [at for at, example in enumerate(examples) if example.digest not in carved]
    cut = split_rows([rows[at] for at in rest], section.shares, section.seed)
    why = (
        "the task names no source of demonstrations" if spec.shots is None else f"{spec.shots} is not in the data root"
    )
    return _Demonstrations(
        chosen,
        {name: tuple(rest[at] for at in found) for name, found in cut.items()},
        f"{why}: demonstrations are carved out of the rows, which leaves {len(rest)} of {len(rows)} to score",
    )


def _neighbours(spec: TaskSpec, rows: Sequence[Row], shots: Mapping[Group, tuple[Example, ...]]) -> Sequence[Row]:
    """Return the rows in an order in which those that share their demonstrations, and so a prefix, are neighbours."""
    if not shots:
        return rows
    order = {group: number for number, group in enumerate(_groups(spec, rows))}
    return sorted(rows, key=lambda row: order[_group(spec, row)])


def _with_demonstrations(
    spec: TaskSpec, rows: Sequence[Row], shots: Mapping[Group, tuple[Example, ...]]
) -> tuple[Example, ...]:
    """Return the rows as they are asked."""
    examples = render_rows(spec, rows)
    if not shots:
        return examples
    return tuple(
        replace(example, demonstrations=shots[_group(spec, row)]) for row, example in zip(rows, examples, strict=True)
    )


def _in_turns(spec: TaskSpec, rows: Sequence[Row], positions: Sequence[int]) -> tuple[int, ...]:
    """Return the rows of a split in turns: the first of every group, the second of every group, and so on."""
    turns: dict[Group, int] = {}
    turn_of = {}
    for at in positions:
        group = _group(spec, rows[at])
        turn_of[at] = turns[group] = turns.get(group, 0) + 1
    return tuple(sorted(positions, key=turn_of.__getitem__))


def _groups(spec: TaskSpec, rows: Iterable[Row]) -> dict[Group, None]:
    """Return the groups of the rows, each once, in the order of their first row."""
    return dict.fromkeys(_group(spec, row) for row in rows)


def _group(spec: TaskSpec, row: Row) -> Group:
    """Return the group of a row; a row that lacks the column is refused where it is rendered."""
    return "" if spec.group_by is None else str(row.get(spec.group_by))
