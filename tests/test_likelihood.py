"""Multiple choice by log-likelihood: against rebuilt models, one sequence at a time, for every family and path."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_oracle_search
import torch
from families import FAMILIES, VOCABULARY, tiny_loaded, tiny_prompts, tiny_tokenizer
from folders import Material, command, show
from folders import material_fixture as material_fixture
from oracles import log_likelihood, oracle_search, rebuild
from test_sweep import DEEP, NO_TREES, PREFIX, QUICK, unit, with_batches_of
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import tale_ray
from tale_ray.attempt.execution import token_digests
from tale_ray.engine.budget import Budget
from tale_ray.engine.choices import choose
from tale_ray.engine.layout import lay_lines
from tale_ray.engine.score import Scorer
from tale_ray.engine.streams import final_node
from tale_ray.engine.sweep import Portions
from tale_ray.errors import ConfigError, Interrupted, ModelError, TaskError
from tale_ray.model.digest import model_folder
from tale_ray.model.load import LoadedModel
from tale_ray.records import Choice, Example, PromptRow
from tale_ray.store.reader import RunReader
from tale_ray.tasks.description import describe_task
from tale_ray.tasks.prompts import (
    digest_tokens,
    encode,
    encode_choices,
    encode_example,
    encode_pair,
    render_rows,
)
from tale_ray.tasks.spec import AnswerSpec, load_task

ANSWER = AnswerSpec(type="likelihood", choices="options")


def choice_rows(prefix: tuple[int, ...] = PREFIX) -> list[PromptRow]:
    """Rows with 2 to 4 choices of 1 to 4 tokens; some contexts begin alike, and one row has two contexts."""
    first, *others = tiny_prompts(4, longest=14)
    contexts = [prefix + each for each in (first, *others, (*first[:9], 5, 6))]
    pool = tiny_prompts(16, seed=7, shortest=1, longest=4)
    rows = []
    for at, context in enumerate(contexts):
        texts = [pool[(3 * at + number) % 16][: 1 + number] for number in range(2 + at % 3)]
        choices = tuple(Choice("x" * (1 + 3 * number), context, tokens) for number, tokens in enumerate(texts))
        rows.append(PromptRow(context, str(at % 2), choices))
    first_choice, *rest = rows[1].choices
    rows[1] = replace(rows[1], choices=(first_choice, *(replace(each, context_ids=(*prefix, 9)) for each in rest)))
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
@pytest.mark.parametrize("prefix", [PREFIX, ()])
def test_log_likelihoods_equal_the_oracle_on_every_path(
    deep: LoadedModel, prefix: tuple[int, ...], removed: tuple[int, ...]
) -> None:
    rows = choice_rows(prefix)
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


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    torch.set_num_threads(1)
    return tiny_loaded("llama", num_layers=DEEP)


def long_rows() -> list[PromptRow]:
    """Rows whose choices alone would make a group that shares a long prefix."""
    contexts = [PREFIX + each for each in tiny_prompts(5, shortest=24, longest=24)]
    return [
        PromptRow(context, "0", tuple(Choice("x", context, (token, 7)) for token in (60, 61, 62, 63)))
        for context in contexts
    ]


def test_rows_are_scored_together_however_much_the_choices_of_each_share(llama: LoadedModel) -> None:
    scorer = Scorer(llama)
    ((prefix, keys),) = scorer._prompt_groups(long_rows())
    assert (prefix, len(keys)) == (PREFIX, 20)
    scorer.score(unit([None], range(5)), long_rows(), ANSWER, 1, "w")
    assert list(scorer._prefixes) == [PREFIX]


def log_likelihoods(result: Any) -> list[tuple[float, ...]]:
    return [answer.log_likelihoods for candidate in result.candidates for answer in candidate.answers]


@pytest.mark.parametrize("sweeps", [True, False])
def test_nothing_is_decoded_whatever_the_task_allows(llama: LoadedModel, sweeps: bool) -> None:
    work = unit([None, 2], range(5))
    one, nine = (Scorer(llama, sweeps=sweeps).score(work, long_rows(), ANSWER, new, "w") for new in (1, 9))
    assert log_likelihoods(one) == log_likelihoods(nine)


def test_a_later_round_goes_on_from_what_is_known(llama: LoadedModel) -> None:
    rows, remembering = choice_rows(), Scorer(llama)
    remembering.score(unit(range(DEEP), range(5)), rows, ANSWER, 1, "w")
    later = unit([layer for layer in range(DEEP) if layer != 3], range(5), (3,))
    found, fresh = (scorer.score(later, rows, ANSWER, 1, "w") for scorer in (remembering, Scorer(llama)))
    check(found, llama.model, (3,), rows)
    assert found.layer_applications < 0.8 * fresh.layer_applications


def test_the_plain_path_runs_the_head_where_something_is_predicted_only(llama: LoadedModel) -> None:
    rows, work = choice_rows(), unit([None, 2], range(5))
    shapes: list[tuple[int, ...]] = []
    handle = llama.model.lm_head.register_forward_hook(lambda _module, inputs, _output: shapes.append(inputs[0].shape))
    try:
        Scorer(llama, sweeps=False).score(work, rows, ANSWER, 1, "w")
    finally:
        handle.remove()
    predicted = sum(len(choice.continuation_ids) for row in rows for choice in row.choices)
    assert sum(shape[0] * shape[1] for shape in shapes) == 2 * predicted


def test_the_plain_path_takes_a_row_that_is_more_than_a_micro_batch(llama: LoadedModel) -> None:
    rows, work = choice_rows(), unit([None, 2], range(5))
    scorer = Scorer(llama, sweeps=False)
    scorer.budget = Budget(2**30, 99)
    check(scorer.score(work, rows, ANSWER, 1, "w"), llama.model, (), rows)
    with pytest.raises(ConfigError, match="batch bytes 99 are too few"):
        Scorer(llama, 99, sweeps=False).score(work, rows, ANSWER, 1, "w")


def test_the_head_runs_on_all_candidates_together(llama: LoadedModel) -> None:
    scorer, sizes = Scorer(llama), list[int]()
    row = PromptRow(PREFIX, "0", (Choice("x", PREFIX, (60,)), Choice("y", PREFIX, (61, 62))))
    handle = llama.model.lm_head.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    try:
        scorer.score(unit([None, 2, 3], [0]), [row], ANSWER, 1, "w")
    finally:
        handle.remove()
    assert sizes == [3 * 2], "the end of the context, which two choices share, and the first token of one of them"


@pytest.mark.parametrize("head_rows", [1, 2, 5])
def test_log_likelihoods_do_not_depend_on_portions(llama: LoadedModel, head_rows: int) -> None:
    sweep = Scorer(llama).fit.sweep
    assert sweep is not None
    choices = [choice for row in choice_rows() for choice in row.choices]
    layout = lay_lines([(*choice.context_ids, *choice.continuation_ids[:-1]) for choice in choices])
    wanted = [choice.continuation_ids for choice in choices]
    finals = [final_node((1,), layer) for layer in (None, 2, 4)]
    expected, others = (
        sweep.log_likelihoods(finals, layout, wanted, None, None, portions).tolist()
        for portions in (Portions(), Portions(nodes=2, head_rows=head_rows))
    )
    assert others == [pytest.approx(values, abs=1e-5) for values in expected]


@pytest.mark.parametrize("sweeps", [True, False])
def test_a_model_is_whole_again_after_an_interruption(sweeps: bool) -> None:
    loaded, rows, work = tiny_loaded("llama", num_layers=DEEP), choice_rows(), unit([None, 2, 4], range(5), (1,))
    scorer = Scorer(loaded, sweeps=sweeps)
    expected = log_likelihoods(scorer.score(work, rows, ANSWER, 1, "w"))
    norm = loaded.layers.full[3].input_layernorm

    def interrupt(_module: Any, _inputs: Any) -> None:
        raise Interrupted("asked to stop")

    handle = norm.register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupted):
        Scorer(loaded, sweeps=sweeps).score(work, rows, ANSWER, 1, "w")
    with pytest.raises(Interrupted):
        scorer.score(unit([None, 2, 4], range(5), (0,)), rows, ANSWER, 1, "w")
    handle.remove()
    assert not any("forward" in vars(layer) for layer in loaded.layers.full)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in loaded.model.modules())
    assert log_likelihoods(scorer.score(work, rows, ANSWER, 1, "w")) == [
        pytest.approx(each, abs=1e-5) for each in expected
    ]


def test_normalising_can_change_what_is_chosen(llama: LoadedModel) -> None:
    (row,) = choice_rows()[:1]
    (values,) = log_likelihoods(Scorer(llama).score(unit([None], [0]), [row], ANSWER, 1, "w"))
    best = values.index(max(values))
    lengths = [1 if at == best else 1000 for at in range(len(values))]
    choices = tuple(replace(each, text="x" * length) for each, length in zip(row.choices, lengths, strict=True))
    found = [
        Scorer(llama)
        .score(unit([None], [0]), [replace(row, choices=choices)], replace(ANSWER, normalised=normalised), 1, "w")
        .candidates[0]
        .answers[0]
        for normalised in (False, True)
    ]
    assert found[0].prediction == str(best)
    assert found[1].prediction != str(best)
    assert found[0].log_likelihoods == found[1].log_likelihoods


def test_rows_are_checked_and_told_apart_by_the_tokens_of_their_choices(llama: LoadedModel) -> None:
    (row,) = choice_rows()[:1]
    first, *rest = row.choices
    longer = replace(row, choices=(replace(first, continuation_ids=(5,) * 128), *rest))
    other = replace(row, choices=(replace(first, continuation_ids=(*first.continuation_ids, 5)), *rest))
    cut = replace(
        row,
        choices=(
            Choice(first.text, first.context_ids[:-1], (first.context_ids[-1], *first.continuation_ids)),
            *rest,
        ),
    )
    unknown = replace(row, choices=(*rest, replace(first, continuation_ids=(VOCABULARY,))))
    info = replace(llama.info, max_positions=128, num_embeddings=VOCABULARY)
    info.check_rows([row], 1)
    with pytest.raises(TaskError, match="up to 128 new ones, but the model has 128 positions"):
        info.check_rows([row, longer], 1)
    with pytest.raises(ModelError, match=f"token {VOCABULARY} is in a prompt"):
        info.check_rows([row, unknown], 1)
    assert len({token_digests({"search": [each]})["search"] for each in (row, longer, other, cut)}) == 4
    plain = PromptRow((1, 2), "A")
    assert token_digests({"search": [plain]})["search"] == digest_tokens([(1, 2)]), "as it always was"


def test_a_normalised_likelihood_is_that_of_a_character() -> None:
    choices = (Choice("no", (1,), (2,)), Choice("a long one", (1,), (2, 3)))
    row, by_character = PromptRow((1,), "1", choices), replace(ANSWER, normalised=True)
    plain = choose(ANSWER, row, [-2.0, -5.0])
    normalised = choose(by_character, row, [-2.0, -5.0])
    assert (plain.prediction, plain.correct, plain.reply) == ("0", False, "no")
    assert (normalised.prediction, normalised.correct, normalised.reply) == ("1", True, "a long one")
    assert choose(ANSWER, replace(row, target="0"), [-2.0, -2.0]).prediction == "0", "the first of equals"


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
        encode_pair(tokenizer, "t5", " ")


def joining_tokenizer() -> Any:
    """A tokenizer of letters that knows `bc` as one token, and starts and ends texts where it is let."""
    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "bc": 5, "Ġ": 6}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[("b", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ends = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_pairs_are_cut_as_lm_evaluation_harness_does() -> None:
    tokenizer = joining_tokenizer()
    assert encode_pair(tokenizer, "a", "ca") == ((2,), (4, 2))
    assert encode_pair(tokenizer, "ab", "ca") == ((2, 3), (2,)), "the context keeps its own tokens"
    assert encode_pair(tokenizer, "a  ", "b") == ((2,), (6, 6, 3)), "space belongs to what follows"
    assert encode_pair(tokenizer, "", "ab") == ((0,), (2, 3)), "something comes before the first token"
    assert encode_pair(tokenizer, "a", "b", add_special_tokens=True) == ((0, 2), (3,)), "no end after the context"
    with pytest.raises(TaskError, match="'c' after 'ab' has no tokens of its own, so it has no likelihood: let"):
        encode_pair(tokenizer, "ab", "c")


def test_choices_are_replies_to_the_chat() -> None:
    plain = tiny_tokenizer()
    messages = [{"role": "user", "content": "t4"}]
    shown = (Example("d", ({"role": "user", "content": "t8"},), "t9", "0", ("t9", "t7")),)
    choices = encode_choices(plain, messages, ["t5 t6", "t7"], shown)
    assert [(each.text, each.context_ids, each.continuation_ids) for each in choices] == [
        ("t5 t6", encode(plain, messages, shown), (5, 6)),
        ("t7", encode(plain, messages, shown), (7,)),
    ]
    assert choices[0].context_ids is choices[1].context_ids, "one tuple, which may be long"
    chat = tiny_tokenizer()
    chat.chat_template = "{% for message in messages %}{{ message.content }} t90 {% endfor %}"
    (first, _) = encode_choices(chat, messages, ["t5 t6", "t7"])
    assert (first.context_ids, first.continuation_ids, first.num_characters) == ((4, 90), (5, 6), 5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "t4", "options": ["t5", "t6"], "answer": "t7"}, "the target 't7' is none of the choices"),
        ({"question": "t4", "options": ["t5"], "answer": "t5"}, "it gives a list of at least two texts"),
        ({"question": "t4", "options": "t5", "answer": "t5"}, "it gives a list of at least two texts"),
        ({"question": "t4", "options": ["t5", " "], "answer": "t5"}, "none of them empty"),
        ({"question": "t4", "options": [5, 6], "answer": "5"}, r"numbers become texts with `\| map\('string'\)`"),
        ({"question": "t4", "options": ["t5", "\ud83d"], "answer": "t5"}, "half a character"),
        ({"question": "t4", "answer": "t5"}, "expression `answer.choices` 'options' .* columns answer, question"),
    ],
)
def test_rows_without_proper_choices_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    spec = load_task(str(write_task(tmp_path, [row])))
    with pytest.raises(TaskError, match=f"task pick, row [0-9a-f]{{12}}: .*{message}.*; the row is "):
        render_rows(spec, [row])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("choices: options,", "", "key `answer.choices` is missing: the key is required"),
        ("choices: options", "choices: 'options ['", "`answer.choices` is 'options \\[': the expression is not valid"),
        ("normalised: false", "normalised: 1", "`answer.normalised` is 1: it is true or false"),
        ("normalised: false", "stop: [x]", "`answer.stop` is not known"),
        ("name: pick", "name: pick\nmax_new_tokens: 3", "`max_new_tokens` is 3: nothing is decoded .*; remove the key"),
    ],
)
def test_a_task_file_that_breaks_a_rule_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write_task(tmp_path, [])
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(TaskError, match=message):
        load_task(str(path))


def test_what_a_task_is(tmp_path: Path) -> None:
    spec = load_task(str(write_task(tmp_path, [], "true")))
    assert spec.answer == AnswerSpec(type="likelihood", choices="options", normalised=True)
    assert spec.identity()["answer"] == {
        **{"type": "likelihood", "labels": [], "pattern": None},
        **{"choices": "options", "normalised": True},
    }
    assert "answer          likelihood of options, by the character\n" in describe_task(spec, None)
    (example,) = render_rows(spec, [{"question": "t4", "options": ["t5", " t6"], "answer": "t6 "}])
    assert (example.target, example.choices) == ("1", ("t5", " t6"))
    others = load_task("boolean_synthetic").identity()["answer"]
    assert set(others) == {"type", "labels", "pattern"}, "the identity of runs of before"


def oracle_count(folder: Path, rows: list[PromptRow], *, normalised: bool) -> Any:
    """How many rows a model gets right without some layers: rebuilt, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def count(removed: Any) -> int:
        pruned, right = rebuild(model, removed), 0
        for row in rows:
            values = [log_likelihood(pruned, each.context_ids, each.continuation_ids) for each in row.choices]
            if normalised:
                values = [value / len(each.text) for value, each in zip(values, row.choices, strict=True)]
            right += str(values.index(max(values))) == row.target
        return right

    return count


def test_a_search_by_likelihood_decides_as_the_oracle(tmp_path: Path, material: Material) -> None:
    task = write_task(tmp_path, picks(40), "true")
    run = tmp_path / "run"
    outcome = command(
        *("search", "--local", "--model", material.model, "--task", task, "--splits", "search=0.5,test=0.2"),
        *("--epsilon", "0.3", "--run", run),
    )
    assert outcome.code == 0, outcome.err
    sheet = RunReader(str(run)).answers("round-0000")
    assert sheet is not None
    assert all(answer.log_likelihoods is not None and len(answer.log_likelihoods) == 4 for answer in sheet.answers)
    examples = {example.digest: example for example in render_rows(load_task(str(task)), picks(40))}
    rows = [encode_example(tiny_tokenizer(), examples[digest]) for digest in sheet.row_digests]
    expected = oracle_search(oracle_count(material.model, rows, normalised=True), 6, len(rows), epsilon="0.3")
    summary = show(run)
    assert summary["baseline"]["correct"] == expected.baseline
    assert [entry["removed_layer"] for entry in summary["rounds"]] == [winner for winner, _ in expected.rounds]
    assert [entry["correct"] for entry in summary["rounds"]] == [counts[winner] for winner, counts in expected.rounds]
    assert summary["stop_reason"] == expected.stop


EXPRESSIONS = r"""
name: expressions
source: {path: json, data_files: expressions.jsonl}
messages: [{role: user, content: "Evaluate: {{ expression }}"}]
reply: "{{ value }}"
target: "{{ value }}"
answer: {type: likelihood, choices: "['True', 'False', 'It cannot be ' ~ word]"}
"""


def expressions(count: int) -> list[dict[str, str]]:
    pairs = itertools.islice(itertools.product(("True", "False"), ("and", "or"), ("True", "False"), "abcdefgh"), 64)
    texts = [(f"not ( {left} {middle} {right} )", number) for left, middle, right, number in pairs]
    return [{"expression": text, "value": str(eval(text)), "word": word} for text, word in texts[:: 64 // count]]


@pytest.mark.slow
@pytest.mark.parametrize("batch_bytes", [None, 2**20])
def test_an_exhaustive_search_of_the_bundled_model_equals_the_oracle(tmp_path: Path, batch_bytes: int | None) -> None:
    folder = model_folder("bundled")
    assert folder is not None
    written = expressions(16)
    (tmp_path / "expressions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    (tmp_path / "task.yaml").write_text(EXPRESSIONS)
    run = tale_ray.search(
        model="bundled",
        task=str(tmp_path / "task.yaml"),
        splits="search=1",
        max_removed=3,
        exhaustive=True,
        local=True,
        batch_bytes=batch_bytes,
        run=str(tmp_path / "run"),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [
        encode_example(tokenizer, example) for example in render_rows(load_task(str(tmp_path / "task.yaml")), written)
    ]
    expected = oracle_search(oracle_count(folder, rows, normalised=False), 12, len(rows), max_removed=3)
    assert test_oracle_search.found(run) == expected
    assert expected.rounds, "a search that removes nothing shows little"
