"""The built-in tasks on their real rows: what is asked, what is correct, and what demonstrations come before it."""

import json
import os
import threading
from functools import cache
from typing import Any

import pytest
from test_prompts import NORMAL, make_tokenizer

from tale_ray.attempt.rows import prepare_rows
from tale_ray.config import TaskSection
from tale_ray.engine.groups import group_prompts
from tale_ray.errors import TaskError
from tale_ray.records import Example
from tale_ray.tasks.answers import is_correct, parse_answer
from tale_ray.tasks.data import Row, load_rows, load_shots
from tale_ray.tasks.prompts import encode, render_rows
from tale_ray.tasks.shots import question_of
from tale_ray.tasks.spec import HubSource, TaskSpec, builtin_tasks, load_task
from tale_ray.tasks.splits import digest_rows, row_digest

RECORDED = {  # number of rows, and the start of the digest of their digests, in the mirror that tests are run with
    "arc_challenge": (700, "e1179f9ffb68"),
    "arc_easy": (900, "973ccc71ffb1"),
    "boolean_expressions": (150, "e14de995d0c0"),
    "boolean_synthetic": (1200, "5dd2d5147112"),
    "boolq": (700, "0b2a6321b5f8"),
    "commonsense_qa": (700, "6dd1c4a4dd45"),
    "gsm8k": (700, "8a769970cea8"),
    "gsm8k_hard": (700, "9a4208f80ec0"),
    "math500": (300, "59ea2b419405"),
    "mmlu": (1400, "5cfc2def1521"),
    "winogrande": (700, "d22f4cf9170c"),
}
MATHEMATICS = ("gsm8k", "gsm8k_hard", "math500")

every_task = pytest.mark.parametrize("name", builtin_tasks())


def data_root(name: str) -> str | None:
    """The mirror; None for a task that needs none."""
    if not isinstance(load_task(name).source, HubSource):
        return None
    if "TALE_RAY_DATA_ROOT" not in os.environ:
        pytest.skip("TALE_RAY_DATA_ROOT is not set: no real rows")
    return os.environ["TALE_RAY_DATA_ROOT"]


@cache
def rows_of(name: str) -> tuple[TaskSpec, list[Row], tuple[Example, ...]]:
    spec = load_task(name)
    rows = load_rows(spec, data_root(name))
    return spec, rows, render_rows(spec, rows)


def test_all_are_recorded() -> None:
    assert sorted(RECORDED) == list(builtin_tasks())


@every_task
def test_the_reference_reply_of_every_row_is_read_as_its_target(name: str) -> None:
    spec, rows, examples = rows_of(name)
    assert len(examples) == len(rows) >= 100
    assert not [
        example
        for example in examples
        if not is_correct(spec.answer, parse_answer(spec.answer, example.reply), example.target)
    ]
    if spec.answer.labels:
        assert {example.target for example in examples} <= set(spec.answer.labels)
        assert len({example.target for example in examples}) > 1
    assert all(message["content"].strip() for example in examples for message in example.messages)


def test_mathematics_in_a_thread_as_ray_scores_it() -> None:
    spec, _, examples = rows_of("math500")
    correct: list[bool] = []

    def score() -> None:
        for example in examples:
            correct.append(is_correct(spec.answer, parse_answer(spec.answer, example.reply), example.target))

    thread = threading.Thread(target=score)
    thread.start()
    thread.join()
    assert correct == [True] * len(examples)


@every_task
def test_another_reply_is_not_correct(name: str) -> None:
    spec, _, examples = rows_of(name)
    replies = {example.target: example.reply for example in examples[:50]}
    first, second = list(replies)[:2]
    assert not is_correct(spec.answer, parse_answer(spec.answer, replies[second]), first)
    assert not is_correct(spec.answer, parse_answer(spec.answer, "I do not know."), first)


@every_task
def test_the_rows_are_those_recorded(name: str) -> None:
    _, rows, examples = rows_of(name)
    digests = [example.digest for example in examples]
    count, digest = RECORDED[name]
    if len(rows) != count:
        pytest.skip(f"the mirror holds {len(rows)} rows of {name}, not the {count} that are recorded")
    assert digest_rows(digests)[:12] == digest
    again = [json.loads(json.dumps(dict(reversed(row.items())))) for row in rows]
    assert [row_digest(row) for row in again] == digests, "neither file nor order of columns matters"


@every_task
def test_what_a_task_says_of_itself(name: str) -> None:
    spec = load_task(name)
    assert spec.name == name
    assert spec.description.endswith(".")
    assert (spec.max_new_tokens == 512) == (name in MATHEMATICS)
    assert spec.metric == "accuracy"


@every_task
def test_five_demonstrations_are_scored_nowhere_and_computed_once(name: str) -> None:
    """The rows share their demonstrations as tokens: with `group_by` the rows of every group that is large enough."""
    root, spec = data_root(name), load_task(name)
    prepared = prepare_rows(TaskSection(task=name, shots=5, data_root=root))
    shown = {question_of(example) for example in prepared.shots}
    scored = [example for examples in prepared.examples.values() for example in examples]
    assert not shown & {question_of(example) for example in scored}
    assert not {example.digest for example in prepared.shots} & {example.digest for example in scored}
    assert all(len(example.demonstrations) == 5 for example in scored)
    if load_shots(spec, root) is None:
        assert len(scored) == len(rows_of(name)[1]) - 5
        assert "carved out of the rows" in prepared.notes[0]
    else:
        assert len(scored) == len(rows_of(name)[1])

    tokenizer = make_tokenizer(NORMAL)
    search = prepared.examples["search"]
    if spec.group_by is None:
        search = search[:40]
    prompts = [encode(tokenizer, example.messages, example.demonstrations) for example in search]
    alone = []
    for group in group_prompts(prompts, range(len(search))):
        prefix = tokenizer.decode(list(group.prefix))
        first = search[group.rows[0]]
        if all(demonstration.reply in prefix for demonstration in first.demonstrations):
            assert prefix.count("<|assistant|>") == 5
            assert all(search[row].demonstrations == first.demonstrations for row in group.rows)
        else:
            alone += [search[row].demonstrations[0].digest for row in group.rows]
    assert not alone or spec.group_by is not None
    assert max((alone.count(digest) for digest in alone), default=0) < 4


def test_mmlu_shows_questions_of_the_row_s_own_subject() -> None:
    spec, rows, _ = rows_of("mmlu")
    subject_of = {row_digest(row): row["subject"] for row in rows}
    shots = load_shots(spec, data_root("mmlu"))
    if shots is None:
        pytest.skip("the mirror does not hold the split dev of cais/mmlu: no demonstrations of its own")
    subject_of |= {row_digest(row): row["subject"] for row in shots}
    prepared = prepare_rows(TaskSection(task="mmlu", shots=5, data_root=data_root("mmlu")))
    for examples in prepared.examples.values():
        for example in examples:
            subjects = {subject_of[demonstration.digest] for demonstration in example.demonstrations}
            assert subjects == {subject_of[example.digest]}
    some = prepare_rows(TaskSection(task="mmlu", rows=57, data_root=data_root("mmlu"))).examples["search"]
    assert len({subject_of[example.digest] for example in some}) == 57


ARC: dict[str, Any] = {"id": "1", "question": "Which?", "answerKey": "3"}


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_options_that_are_numbered_get_letters(name: str) -> None:
    row = {**ARC, "choices": {"text": ["one", "two", "three", "four"], "label": ["1", "2", "3", "4"]}}
    (example,) = render_rows(load_task(name), [row])
    assert example.target == example.reply == "C"
    assert example.messages[1]["content"] == "Which?\n\nA. one\nB. two\nC. three\nD. four"
    lettered = {**row, "answerKey": "C", "choices": {**row["choices"], "label": ["A", "B", "C", "D"]}}
    assert render_rows(load_task(name), [lettered])[0].messages == example.messages


def test_a_target_that_is_no_option_is_refused() -> None:
    row = {"sentence": "The _ fell.", "option1": "cup", "option2": "jug", "answer": ""}  # as in splits without answers
    with pytest.raises(TaskError, match="has no attribute ''"):
        render_rows(load_task("winogrande"), [row])
    with pytest.raises(TaskError, match="'' is not in list"):
        choices = {"label": ["A", "B"], "text": ["cup", "jug"]}
        render_rows(load_task("commonsense_qa"), [{"question": "What fell?", "choices": choices, "answerKey": ""}])


def test_what_mathematics_shows_as_a_reply() -> None:
    row = {
        "question": "How many?",
        "answer": "Two and three is 2+3=<<2+3=5>>5.\nTwice that is 5*2=<<5*2=10>>10.\n#### 10",
    }
    (example,) = render_rows(load_task("gsm8k"), [row])
    assert example.reply == "Two and three is 2+3=5.\nTwice that is 5*2=10.\n#### 10"
    assert example.target == "10"
    hard = [{"input": "How many?", "target": target} for target in (4710109.0, 2.5, -3.0)]
    assert [example.reply for example in render_rows(load_task("gsm8k_hard"), hard)] == [
        "#### 4710109",
        "#### 2.5",
        "#### -3",
    ]
