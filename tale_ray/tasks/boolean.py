"""Generated boolean expressions, in the words and the columns of BIG-Bench Hard's `boolean_expressions`.

An expression grows from its leaves. Every step writes the text and computes the value side by side, so nothing is
ever parsed or evaluated, and both can only agree: the text follows Python's precedence, with parentheses where it
asks for them and, now and then, where it does not.

This module does not know what a task, a prompt or a tokenizer is.
"""

import random
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from tale_ray.errors import TaskError

MAX_ROWS: Final = 20_000
LEAF_WEIGHTS: Final = {2: 1, 3: 2, 4: 3}

_PARENTHESES_PROBABILITY: Final = 0.05
_NEGATION_WEIGHTS: Final = {0: 75, 1: 20, 2: 5}


class Binding(IntEnum):
    """How tightly the outermost operator of an expression holds its operands, loosest first."""

    OR = 0
    AND = 1
    NOT = 2
    ATOM = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Expression:
    """A boolean expression as its words (`True False and or not ( )`), with the value Python gives it."""

    words: tuple[str, ...]
    value: bool
    binding: Binding

    def to_row(self) -> dict[str, str]:
        """Return the expression as a row of the data set: `input` ends in "is", `target` is "True" or "False"."""
        return {"input": " ".join((*self.words, "is")), "target": str(self.value)}


def generate_rows(seed: int, rows: int) -> list[dict[str, str]]:
    """Return `rows` distinct expressions of 2 to 4 leaves as rows, every other one true.

    The rows depend on the two numbers alone, and fewer rows of one seed are a prefix of more.

    Raises:
        TaskError: `rows` is below 1 or above `MAX_ROWS`.
    """
    if not 1 <= rows <= MAX_ROWS:
        raise TaskError(
            f"{rows} rows cannot be generated: distinct expressions are drawn for 1 to {MAX_ROWS} rows; "
            "set `rows` of the task's source within these bounds"
        )
    rng = random.Random(seed)
    distinct: dict[str, dict[str, str]] = {}
    while len(distinct) < rows:
        expression = draw_expression(rng, draw_num_leaves(rng, LEAF_WEIGHTS))
        if expression.value == (len(distinct) % 2 == 0):
            row = expression.to_row()
            distinct.setdefault(row["input"], row)
    return list(distinct.values())


def draw_num_leaves(rng: random.Random, weights: dict[int, int]) -> int:
    """Return a number of leaves, drawn in proportion to its weight."""
    return rng.choices(list(weights), list(weights.values()))[0]


def draw_expression(rng: random.Random, num_leaves: int) -> Expression:
    """Return a random expression of `num_leaves` leaves, at least 1; every operator and every leaf is a fair coin."""
    if num_leaves == 1:
        value = rng.random() < 0.5
        drawn = Expression(words=(str(value),), value=value, binding=Binding.ATOM)
    else:
        num_left = rng.randint(1, num_leaves - 1)
        operator = Binding.AND if rng.random() < 0.5 else Binding.OR
        drawn = _joined(operator, draw_expression(rng, num_left), draw_expression(rng, num_leaves - num_left))
    drawn = _sometimes_parenthesized(rng, drawn)
    for _ in range(rng.choices(list(_NEGATION_WEIGHTS), list(_NEGATION_WEIGHTS.values()))[0]):
        drawn = _negated(drawn)
    return _sometimes_parenthesized(rng, drawn)


def _joined(operator: Binding, left: Expression, right: Expression) -> Expression:
    left, right = _operand(left, operator), _operand(right, operator)
    return Expression(
        words=(*left.words, operator.name.lower(), *right.words),
        value=left.value and right.value if operator is Binding.AND else left.value or right.value,
        binding=operator,
    )


def _negated(inner: Expression) -> Expression:
    inner = _operand(inner, Binding.NOT)
    return Expression(words=("not", *inner.words), value=not inner.value, binding=Binding.NOT)


def _operand(inner: Expression, operator: Binding) -> Expression:
    return _parenthesized(inner) if inner.binding < operator else inner


def _sometimes_parenthesized(rng: random.Random, inner: Expression) -> Expression:
    return _parenthesized(inner) if rng.random() < _PARENTHESES_PROBABILITY else inner


def _parenthesized(inner: Expression) -> Expression:
    return Expression(words=("(", *inner.words, ")"), value=inner.value, binding=Binding.ATOM)
