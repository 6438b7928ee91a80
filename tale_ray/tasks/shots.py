"""Demonstrations: which rows are shown before every question, chosen by content and seed and never scored.

Two rows are the same here if they ask the same: an `id` that differs, or another set of columns, hides no overlap.

This module does not know where rows come from.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence

from tale_ray.errors import TaskError
from tale_ray.records import Example, SplitName
from tale_ray.tasks.splits import check_disjoint

Group = str  # the value of the column to group by as text; "" where there is none


def question_of(example: Example) -> str:
    """Return what a row asks, as one text: equal for two rows if and only if their prompts are."""
    return json.dumps([dict(message) for message in example.messages], sort_keys=True)


def ambiguous_questions(examples: Iterable[Example]) -> set[str]:
    """Return what is asked by more than one row, where equal rows count as one."""
    digests: dict[str, str] = {}
    found = set()
    for example in examples:
        question = question_of(example)
        if digests.setdefault(question, example.digest) != example.digest:
            found.add(question)
    return found


def check_asked_elsewhere(shots: Sequence[Example], splits: Mapping[SplitName, Sequence[Example]]) -> None:
    """Refuse demonstrations to choose from that ask what a row of a split asks.

    Raises:
        TaskError: names the rows, by digest and by how their question starts.
    """
    names = {question_of(example): example.digest for example in shots}
    shown = {example.digest: f"{example.digest[:12]} {_start(example)!r}" for example in shots}
    for split, examples in splits.items():
        asked = [names.get(question_of(example), example.digest) for example in examples]
        check_disjoint({"shots": list(names.values()), split: asked}, shown)


def _start(example: Example) -> str:
    text = " ".join(example.messages[-1]["content"].split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def choose_shots(
    candidates: Iterable[tuple[Group, Example]], groups: Iterable[Group], num_shots: int, excluded: Collection[str]
) -> dict[Group, tuple[Example, ...]]:
    """Return the first `num_shots` candidates of each group that ask nothing `excluded`.

    Those that ask what an earlier one asks come last: they are taken only where there are no others.

    Raises:
        TaskError: a group has too few.
    """
    fresh: dict[Group, list[Example]] = {group: [] for group in groups}
    repeated: dict[Group, list[Example]] = {group: [] for group in fresh}
    seen: set[str] = set()
    for group, example in candidates:
        question = question_of(example)
        if group in fresh and question not in excluded:
            (repeated if question in seen else fresh)[group].append(example)
            seen.add(question)
    for group in sorted(fresh):
        if (available := len(fresh[group]) + len(repeated[group])) < num_shots:
            whose = f"group {group!r} has" if group else "there are"
            raise TaskError(
                f"shots {num_shots} is too many: {whose} {available} rows to demonstrate with, which ask nothing that "
                f"is scored; ask for at most {available}, or give more rows"
            )
    return {group: tuple((fresh[group] + repeated[group])[:num_shots]) for group in fresh}


def groups_with_repeats(shots: Mapping[Group, Sequence[Example]]) -> list[Group]:
    """Return the groups of which one question is demonstrated more than once, sorted."""
    return sorted(group for group, examples in shots.items() if len({*map(question_of, examples)}) < len(examples))
