"""The generator of boolean expressions: its values against Python's own, its rows against what they promise."""

import hashlib
import json
import random
import re
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tale_ray.tasks.boolean import LEAF_WEIGHTS, MAX_ROWS, draw_expression, generate_rows

SEEDS = st.integers(min_value=0, max_value=2**32 - 1)


def value_by_python(text: str) -> bool:
    assert re.fullmatch(r"(?:(?:True|False|and|or|not|\(|\)) ?)+", text)
    value = eval(text, {"__builtins__": {}})  # the oracle; the line above leaves nothing but boolean words
    assert isinstance(value, bool)
    return value


def count_leaves(text: str) -> int:
    return len(re.findall("True|False", text))


@given(seed=SEEDS, num_leaves=st.integers(min_value=1, max_value=8))
def test_value_is_the_one_python_gives_the_words(seed: int, num_leaves: int) -> None:
    expression = draw_expression(random.Random(seed), num_leaves)
    text = " ".join(expression.words)

    assert expression.value is value_by_python(text)
    assert count_leaves(text) == num_leaves
    assert expression.to_row() == {"input": f"{text} is", "target": str(expression.value)}


@given(seed=SEEDS)
def test_parentheses_are_written_where_precedence_asks_for_them(seed: int) -> None:
    words = draw_expression(random.Random(seed), 4).words

    assert words.count("(") == words.count(")")
    assert not any(first in ("and", "or") and second in ("and", "or", ")") for first, second in pairwise(words))


@given(seed=SEEDS, rows=st.integers(min_value=1, max_value=60))
def test_rows_are_true_to_python_distinct_and_balanced(seed: int, rows: int) -> None:
    generated = generate_rows(seed, rows)

    assert [row["target"] for row in generated] == [str(value_by_python(row["input"][:-3])) for row in generated]
    assert len({row["input"] for row in generated}) == len(generated) == rows
    labels = Counter(row["target"] for row in generated)
    assert 0 <= labels["True"] - labels["False"] <= 1
    assert all(row["input"].endswith(" is") and count_leaves(row["input"]) in LEAF_WEIGHTS for row in generated)


@given(seed=SEEDS, rows=st.integers(min_value=1, max_value=20))
def test_fewer_rows_of_a_seed_are_a_prefix_of_more(seed: int, rows: int) -> None:
    assert generate_rows(seed, rows) == generate_rows(seed, rows + 20)[:rows]


def test_the_rows_of_the_built_in_task_never_change() -> None:
    generated = generate_rows(0, 1200)

    digest = hashlib.sha256(json.dumps(generated, sort_keys=True).encode()).hexdigest()
    assert digest == "9185c8da3b47266fdde9734911f6ec072f375828ae0f451c14068827c08c5d6c"
    assert {count_leaves(row["input"]) for row in generated} == {2, 3, 4}


def test_seeds_give_other_rows_and_leave_the_global_generator_alone() -> None:
    before = random.getstate()

    assert generate_rows(1, 20) != generate_rows(2, 20)
    assert random.getstate() == before


@pytest.mark.slow
def test_the_largest_request_can_be_met() -> None:
    assert len({row["input"] for row in generate_rows(0, MAX_ROWS)}) == MAX_ROWS


@pytest.mark.parametrize("rows", [0, -1, MAX_ROWS + 1])
def test_an_impossible_number_of_rows_is_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=rf"^{rows} rows cannot be generated: .* 1 to {MAX_ROWS} rows; set `rows`"):
        generate_rows(0, rows)
