"""Multiple choice by log-likelihood: against rebuilt models, one sequence at a time, for every family and path."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_loaded, tiny_prompts, tiny_tokenizer
from folders import Material, command, show
from folders import material_fixture as material_fixture
from oracles import log_likelihood, oracle_search, rebuild
from test_sweep import DEEP, NO_TREES, PREFIX, QUICK, unit, with_batches_of

from tale_ray.cluster.worker import _encoded
from tale_ray.engine.choices import choose
from tale_ray.engine.score import Scorer
from tale_ray.engine.streams import final_node
from tale_ray.errors import ConfigError, TaskError
from tale_ray.model.load import LoadedModel
from tale_ray.records import Choice, PromptRow
from tale_ray.store.reader import RunReader
from tale_ray.tasks.prompts import encode_pair, render_rows
from tale_ray.tasks.spec import AnswerSpec, load_task

ANSWER = AnswerSpec(type="likelihood", choices="options")


def choice_rows() -> list[PromptRow]:
    """Rows with 2 to 4 choices of 1 to 4 tokens; some contexts begin alike, and one row has two contexts."""
    first, *others = tiny_prompts(4, longest=14)
    contexts = [PREFIX + each for each in (first, *others, (*first[:9], 5, 6))]
    pool = tiny_prompts(16, seed=7, shortest=1, longest=4)
    rows = []
    for at, context in enumerate(contexts):
        texts = [pool[(3 * at + number) % 16][: 1 + number] for number in range(2 + at % 3)]
        choices = tuple(Choice("x" * (1 + 3 * number), context, tokens) for number, tokens in enumerate(texts))
        rows.append(PromptRow(context, str(at % 2), choices))
    first_choice, *rest = rows[1].choices
    rows[1] = replace(rows[1], choices=(first_choice, *(replace(each, context_ids=(*PREFIX, 9)) for each in rest)))
    return rows


def check(found: Any, model: Any, removed: tuple[int, ...], rows: list[PromptRow]) -> None:
    for candidate in found.candidates:
        pruned = rebuild(model, final_node(removed, candidate.layer))
        for row, answer in zip(rows, candidate.answers, strict=True):
            expected = [log_likelihood(pruned, each.context_ids, each.continuation_ids) for each in row.choices]
            assert answer.log_likelihoods == pytest.approx(expected, abs=1e-4)
            best = max(range(len(expected)), key=lambda at: (expected[at], -at))
            assert answer.prediction == str(best)
            assert answer.correct == (str(best) == row.target)
            assert answer.reply == row.choices[best].text


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def deep(request: pytest.FixtureRequest) -> LoadedModel:
    torch.set_num_threads(1)
    return tiny_loaded(request.param, num_layers=DEEP)


@pytest.mark.parametrize("removed", [(), (1,), (4, 0, 2, 5)])
def test_log_likelihoods_equal_the_oracle_on_every_path(deep: LoadedModel, removed: tuple[int, ...]) -> None:
    rows = choice_rows()
    candidates = [None, *(layer for layer in range(DEEP) if layer not in removed)]
    work = unit(candidates, range(len(rows)), removed)
    scorer = Scorer(deep)
    assert scorer.fit.trees == (deep.info.family not in NO_TREES)
    for trees, num_lines in itertools.product({scorer.fit.trees, False}, (1, 3, 20)):
        scorer.fit = replace(scorer.fit, trees=trees)
        check(with_batches_of(scorer, num_lines, 32).score(work, rows, ANSWER, 1, "w"), deep.model, removed, rows)
    check(Scorer(deep, sweeps=False).score(work, rows, ANSWER, 1, "w"), deep.model, removed, rows)


def test_contexts_are_computed_once_for_all_choices() -> None:
    loaded = tiny_loaded("llama", num_layers=DEEP)
    context = PREFIX + tuple(range(40, 52))
    choices = tuple(Choice("x", context, (token, 7)) for token in (60, 61, 62, 63))
    rows = [PromptRow(context, "0", choices), PromptRow((*PREFIX, 5), "0", choices[:2])]
    tokens: list[int] = []
    scorer = Scorer(loaded)
    norm = loaded.layers.full[0].input_layernorm
    norm.register_forward_pre_hook(lambda _module, inputs: tokens.append(inputs[0].shape[0] * inputs[0].shape[1]))
    scorer.score(unit([None], [0]), rows, ANSWER, 1, "w")
    assert sum(tokens) == len(context) + len(choices)


def test_a_normalised_likelihood_is_that_of_a_character() -> None:
    choices = (Choice("no", (1,), (2,)), Choice("a long one", (1,), (2, 3)))
    plain = choose(choices, [-2.0, -5.0], "1", normalised=False)
    normalised = choose(choices, [-2.0, -5.0], "1", normalised=True)
    assert (plain.prediction, plain.correct, plain.reply) == ("0", False, "no")
    assert (normalised.prediction, normalised.correct, normalised.reply) == ("1", True, "a long one")
    assert choose(choices, [-2.0, -2.0], "0", normalised=False).prediction == "0", "the first of equals"


def test_a_small_budget_is_refused_or_made_do_with() -> None:
    loaded, rows = tiny_loaded("llama", num_layers=DEEP), choice_rows()
    work = unit([None, *range(DEEP)], range(len(rows)))
    expected = [each.answers for each in Scorer(loaded).score(work, rows, ANSWER, 1, "w").candidates]
    needed = Scorer(loaded)._cost.sweep_bytes(28, 0, 1)
    for found in (Scorer(loaded, each * needed).score(work, rows, ANSWER, 1, "w") for each in (2, 8)):
        for answers, others in zip(expected, (each.answers for each in found.candidates), strict=True):
            assert [each.prediction for each in answers] == [each.prediction for each in others]
    with pytest.raises(ConfigError, match="batch bytes 99 are too few"):
        Scorer(loaded, 99).check_budget(rows)


# Tasks.

TASK = r"""
name: pick
source: {path: json, data_files: pick.jsonl}
messages: [{role: user, content: "{{ question }}"}]
reply: "{{ answer }}"
target: "{{ answer }}"
answer: {type: likelihood, choices: options, normalised: NORMALISED}
max_new_tokens: 1
"""


def write_task(folder: Path, rows: list[dict[str, Any]], normalised: str = "false") -> Path:
    (folder / "pick.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pick.yaml").write_text(TASK.replace("NORMALISED", normalised))
    return folder / "pick.yaml"


def picks(count: int) -> list[dict[str, Any]]:
    words = [[f"t{word}" for word in prompt] for prompt in tiny_prompts(count, seed=3, shortest=6, longest=6)]
    return [
        {"question": " ".join(each[:4]), "options": each[2:6], "answer": each[2 + at % 3]}
        for at, each in enumerate(words)
    ]


def test_a_context_and_what_follows_it_are_encoded_together() -> None:
    tokenizer = tiny_tokenizer()
    assert encode_pair(tokenizer, "t5 t6 ", "t7 t8", add_special_tokens=False) == ((5, 6), (7, 8))
    with pytest.raises(TaskError, match="has no tokens of its own"):
        encode_pair(tokenizer, "t5", " ", add_special_tokens=False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "t4", "options": ["t5", "t6"], "answer": "t7"}, "the target 't7' is none of the choices"),
        ({"question": "t4", "options": ["t5"], "answer": "t5"}, "it gives a list of at least two texts"),
        ({"question": "t4", "options": "t5", "answer": "t5"}, "it gives a list of at least two texts"),
        ({"question": "t4", "answer": "t5"}, "expression `answer.choices` 'options' "),
    ],
)
def test_rows_without_proper_choices_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    spec = load_task(str(write_task(tmp_path, [row])))
    with pytest.raises(TaskError, match=message):
        render_rows(spec, [row])


def test_a_search_by_likelihood_decides_as_the_oracle(tmp_path: Path, material: Material) -> None:
    task = write_task(tmp_path, picks(40), "true")
    run = tmp_path / "run"
    outcome = command(
        *("search", "--local", "--model", material.model, "--task", task, "--splits", "search=0.5,test=0.2"),
        *("--epsilon", "0.3", "--run", run),
    )
    assert outcome.code == 0, outcome.err
    import transformers as tf

    model = tf.AutoModelForCausalLM.from_pretrained(material.model, dtype=torch.float32)
    sheet = RunReader(str(run)).answers("round-0000")
    assert sheet is not None
    assert all(answer.log_likelihoods is not None and len(answer.log_likelihoods) == 4 for answer in sheet.answers)
    examples = {example.digest: example for example in render_rows(load_task(str(task)), picks(40))}
    rows = [_encoded(tiny_tokenizer(), examples[digest]) for digest in sheet.row_digests]

    def count(removed: Any) -> int:
        pruned = rebuild(model, removed)
        return sum(
            choose(
                row.choices,
                [log_likelihood(pruned, each.context_ids, each.continuation_ids) for each in row.choices],
                row.target,
                normalised=True,
            ).correct
            for row in rows
        )

    expected = oracle_search(count, 6, len(rows), epsilon="0.3")
    summary = show(run)
    assert summary["baseline"]["correct"] == expected.baseline
    assert [entry["removed_layer"] for entry in summary["rounds"]] == [winner for winner, _ in expected.rounds]
    assert [entry["correct"] for entry in summary["rounds"]] == [counts[winner] for winner, counts in expected.rounds]
    assert summary["stop_reason"] == expected.stop
