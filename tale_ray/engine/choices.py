"""Multiple choice by log-likelihood: what is put through the model for a row, and which choice that makes.

A row that is decoded is put through the model once, a row with choices once for each of them: context and continuation,
without the last token, which predicts nothing that is asked. What they share is computed once all the same (`layout`).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from tale_ray.engine.groups import PromptGroup, group_prompts
from tale_ray.records import Choice, PromptRow, RowAnswer
from tale_ray.tasks.harness import judge_choices
from tale_ray.tasks.spec import AnswerSpec

Key: TypeAlias = int | tuple[int, int]  # a row, or one of its choices
PromptKeys: TypeAlias = tuple[tuple[int, ...], list[Key]]  # the tokens of a prefix, and who shares it


def row_keys(rows: Sequence[PromptRow], chosen: Iterable[int]) -> list[Key]:
    """Return what is put through the model for some rows."""
    keys: list[Key] = []
    for row in chosen:
        keys += [(row, at) for at in range(len(rows[row].choices))] or [row]
    return keys


def key_choice(rows: Sequence[PromptRow], key: Key) -> Choice:
    """Return the choice that a key names."""
    assert isinstance(key, tuple), "the row has choices"
    return rows[key[0]].choices[key[1]]


def key_contexts(rows: Sequence[PromptRow], chosen: Iterable[int]) -> Iterator[tuple[tuple[int, ...], list[Key]]]:
    """Yield each row's context (all tokens before the first that is predicted), or contexts, and who has it."""
    for row in chosen:
        found: dict[tuple[int, ...], list[Key]] = {}
        for key in row_keys(rows, [row]):
            context = key_choice(rows, key).context_ids if isinstance(key, tuple) else rows[row].token_ids
            found.setdefault(context, []).append(key)
        yield from found.items()


def key_tokens(rows: Sequence[PromptRow], key: Key) -> tuple[int, ...]:
    """Return the tokens that predict something, and all before them."""
    if not isinstance(key, tuple):
        return rows[key].token_ids
    choice = key_choice(rows, key)
    return (*choice.context_ids, *choice.continuation_ids[:-1])


def prompt_groups(rows: Sequence[PromptRow], *, shares_prefix: bool = True) -> list[PromptKeys]:
    """Return prefixes that rows share, and who shares them; one group that shares nothing if prefixes may not be."""
    asked = list(key_contexts(rows, range(len(rows))))
    everyone = range(len(asked))
    prompts = [context for context, _ in asked]
    groups = group_prompts(prompts, everyone) if shares_prefix else (PromptGroup((), tuple(everyone)),)
    return [(group.prefix, [key for at in group.rows for key in asked[at][1]]) for group in groups]


def choose(answer: AnswerSpec, row: PromptRow, log_likelihoods: Sequence[float]) -> RowAnswer:
    """Return the most likely choice of a row as an answer; the first of equals.

    As lm-evaluation-harness defines them: `acc` compares log-likelihoods, `acc_norm` (`normalised`) divides each by
    the characters of its text first. A task of its own is left to it.

    Raises:
        TaskError: a task of lm-evaluation-harness cannot judge the row.
    """
    if answer.harness is not None:
        return judge_choices(answer.harness, row.choices, log_likelihoods, row.target)
    values = [
        value / max(1, choice.num_characters) if answer.normalised else value
        for choice, value in zip(row.choices, log_likelihoods, strict=True)
    ]
    best = values.index(max(values))
    return RowAnswer(row.choices[best].text, str(best), str(best) == row.target, tuple(log_likelihoods))
