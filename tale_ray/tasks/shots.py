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
    """Return the first `num_shots` candidates of each group that ask different things, none of them `excluded`.

    Raises:
        TaskError: a group has too few.
    """
    chosen: dict[Group, dict[str, Example]] = {group: {} for group in groups}
    available = dict.fromkeys(chosen, 0)
    seen = set(excluded)
    for group, example in candidates:
        question = question_of(example)
        if group not in chosen or question in seen:
            continue
        seen.add(question)
        available[group] += 1
        if len(chosen[group]) < num_shots:
            chosen[group][question] = example
    for group in sorted(chosen):
        if available[group] < num_shots:
            whose = f"group {group!r} has" if group else "there are"
            raise TaskError(
                f"shots {num_shots} is too many: {whose} {available[group]} rows to demonstrate with, which ask "
                f"different things and are not scored; ask for at most {available[group]}, or give more rows"
            )
    return {group: tuple(examples.values()) for group, examples in chosen.items()}
