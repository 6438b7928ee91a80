"""Which rows share how long a beginning of their prompts. Knows nothing of models."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

_LEAST_ROWS = 4  # that make a group of their own worth its smaller batches
_LEAST_TOKENS = 16  # that such a group shares beyond what all share


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """Rows whose prompts begin with the same tokens."""

    prefix: tuple[int, ...]  # shorter than any of the prompts
    rows: tuple[int, ...]  # positions


def group_prompts(prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> tuple[PromptGroup, ...]:
    """Return the rows (positions in `prompts`) in groups that share a prefix.

    All rows are one group unless some of them (the questions of one subject with its demonstrations, say) share much
    more among themselves. Groups that differ early and late are both found: the names of two subjects may begin alike.
    """
    shared = _shared([prompts[row] for row in rows])
    enough = len(shared) + _LEAST_TOKENS
    groups: list[PromptGroup] = []
    rest: list[int] = []
    by_next = sorted(rows, key=lambda row: tuple(prompts[row]))
    for _, branch in groupby(by_next, key=lambda row: tuple(prompts[row][:enough])):
        members = list(branch)
        if len(rows) > len(members) >= _LEAST_ROWS and len(_shared([prompts[row] for row in members])) >= enough:
            groups += group_prompts(prompts, members)
        else:
            rest += members
    if rest:
        groups.append(PromptGroup(tuple(shared), tuple(sorted(rest))))
    return tuple(groups)


def _shared(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return the tokens that all prompts begin with, leaving each at least one of its own."""
    first, last = min(prompts, key=tuple), max(prompts, key=tuple)
    same = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return first[: min(same, *(len(prompt) - 1 for prompt in prompts))]
