"""Scoring a unit: order, counts, budgets, and a model that is whole afterwards. Numbers per family: test_families."""

import signal

import pytest
import torch
from families import score_unit, tiny_loaded, tiny_prompts
from hypothesis import given
from hypothesis import strategies as st
from oracles import end_tokens, greedy_tokens, oracle_replies, oracle_search
from signals import Signal, struck_at

from tale_ray.engine import view
from tale_ray.engine.budget import Budget, RowCost, batches, make_budget, row_cost
from tale_ray.errors import ConfigError, ModelError, TaskError
from tale_ray.records import PromptRow, WorkUnit
from tale_ray.tasks.spec import AnswerSpec

ANSWER = AnswerSpec(type="regex", pattern=r"(t\d+)")
COST = RowCost(
    hidden_size=8, widest=16, layer_cache_values=8, num_layers=4, score_heads=0, vocabulary=100, value_bytes=4
)


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(1)
    return tiny_loaded("gemma2")


@pytest.fixture(scope="module")
def rows():
    return [PromptRow(prompt, "t9") for prompt in tiny_prompts(5)]


def unit(candidates=(None, 1), rows=(0, 1, 2), removed=()):
    return WorkUnit(1, "round-0001", "search", removed, candidates, rows)


@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 9), st.integers(40_000, 300_000))
def test_batches_hold_every_row_once_within_the_budget(lengths, new_tokens, budget_bytes):
    found = batches(lengths, budget_bytes, lambda tokens: COST.row_bytes(tokens, new_tokens))
    assert sorted(row for batch in found for row in batch) == list(range(len(lengths)))
    for batch in found:
        longest = max(lengths[row] for row in batch)
        assert len(batch) * COST.row_bytes(longest, new_tokens) <= budget_bytes
    in_order = [lengths[row] for batch in found for row in batch]
    assert in_order == sorted(lengths, reverse=True)


def test_a_row_that_does_not_fit_is_refused_with_what_it_needs():
    needed = COST.row_bytes(40, 1)
    assert batches([40, 2], needed, lambda tokens: COST.row_bytes(tokens, 1)) == [[0], [1]]
    with pytest.raises(ConfigError, match=rf"batch bytes {needed - 1} .*40 tokens\) needs {needed}; raise"):
        batches([2, 40], needed - 1, lambda tokens: COST.row_bytes(tokens, 1))


def test_the_cost_of_a_row_grows_with_its_tokens_and_with_decoding(loaded):
    cost = row_cost(loaded.model)
    assert (cost.hidden_size, cost.vocabulary, cost.value_bytes) == (32, 97, 4)
    assert (cost.layer_cache_values, cost.num_layers) == (2 * 2 * 8, 4)
    assert cost.row_bytes(10, 1) < cost.row_bytes(11, 1) < cost.row_bytes(11, 2) < cost.row_bytes(11, 3)
    assert make_budget({torch.device("cpu")}, 77) == Budget(77, 77)
    assert make_budget({torch.device("cpu")}, None).batch == 32 * 2**20


def test_results_follow_the_order_of_the_unit(loaded, rows):
    forwards = score_unit(loaded, unit((None, 0, 2), (0, 1, 2, 3)), rows, ANSWER, 1, None, "w")
    backwards = score_unit(loaded, unit((2, None, 0), (3, 2, 1, 0)), rows, ANSWER, 1, None, "w")
    mine = {candidate.layer: candidate.answers for candidate in forwards.candidates}
    for candidate in backwards.candidates:
        assert candidate.answers == mine[candidate.layer][::-1]
    assert [candidate.layer for candidate in backwards.candidates] == [2, None, 0]


def test_one_new_token_applies_every_layer_once_per_row(loaded, rows):
    result = score_unit(loaded, unit((None, 1, 3), removed=(0,)), rows, ANSWER, 1, None, "w")
    assert result.layer_applications == 3 * (3 + 2 + 2)


def test_layer_applications_count_decoded_tokens_not_padding(loaded, rows):
    result = score_unit(loaded, unit((None,), (0, 1, 2, 3, 4)), rows, ANSWER, 6, None, "w")
    ends = end_tokens(loaded.model)
    decoded = [len(greedy_tokens(loaded.model, row.token_ids, 6, ends)) for row in rows]
    assert result.layer_applications == 4 * sum(decoded)


def test_a_reply_ends_at_its_end_token(rows):
    loaded = tiny_loaded("llama", seed=3)
    first = score_unit(loaded, unit((None,), (0,)), rows, ANSWER, 4, None, "w")
    second_token = int(first.candidates[0].answers[0].reply.split()[1][1:])
    loaded.model.generation_config.eos_token_id = [90, second_token]
    ended = score_unit(loaded, unit((None,), (0, 1)), rows, ANSWER, 4, None, "w")
    written = first.candidates[0].answers[0].reply.split()
    assert ended.candidates[0].answers[0].reply.split() == written[:2]
    assert ended.layer_applications % 4 == 0


def test_the_head_runs_on_last_tokens_only(loaded, rows):
    seen = []
    handle = loaded.model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    try:
        score_unit(loaded, unit((None,)), rows, ANSWER, 1, None, "w")
    finally:
        handle.remove()
    assert seen == [(3, 1, 97)]
    assert not loaded.model.lm_head._forward_pre_hooks


def test_refusals(loaded, rows):
    with pytest.raises(ModelError, match="layer 4 cannot be removed: the model has 4 layers, numbered 0 to 3"):
        score_unit(loaded, unit((4,)), rows, ANSWER, 1, None, "w")
    with pytest.raises(ConfigError, match="batch bytes 10 are too few"):
        score_unit(loaded, unit(), rows, ANSWER, 1, 10, "w")
    with pytest.raises(TaskError, match="a row has no tokens"):
        score_unit(loaded, unit(rows=(0,)), [PromptRow((), "A")], ANSWER, 1, None, "w")
    with pytest.raises(
        TaskError, match="18 prompt tokens and gets up to 200 new ones, but the model has 128 positions"
    ):
        score_unit(loaded, unit(rows=(0,)), rows, ANSWER, 200, None, "w")


@pytest.mark.slow
@pytest.mark.parametrize("new_tokens", [1, 3])
def test_a_signal_at_any_line_of_ours_leaves_the_model_whole(rows, new_tokens):
    loaded = tiny_loaded("llama")
    small = unit((None, 2), (0, 1))
    expected = score_unit(loaded, small, rows, ANSWER, new_tokens, None, "w").candidates
    config, full = loaded.model.config.to_dict(), loaded.layers.full
    line, step = 0, 11  # every eleventh line: which ones differs between the two parameters
    while True:
        was_struck = struck_at(
            line + new_tokens, lambda: score_unit(loaded, small, rows, ANSWER, new_tokens, None, "w")
        )
        assert loaded.model.model.layers is full
        assert loaded.model.config.to_dict() == config
        assert not loaded.model.lm_head._forward_pre_hooks
        if not was_struck:
            break
        line += step
    assert line > 20 * step
    again = score_unit(loaded, small, rows, ANSWER, new_tokens, None, "w").candidates
    assert [candidate.answers for candidate in again] == [candidate.answers for candidate in expected]


def test_a_real_signal_inside_generate(rows):
    loaded = tiny_loaded("llama")

    def handler(_number, _frame):
        raise Signal

    def strike(*_arguments):
        signal.raise_signal(signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, handler)
    hook = loaded.model.model.layers[3].register_forward_hook(strike)
    try:
        with pytest.raises(Signal):
            score_unit(loaded, unit((1,)), rows, ANSWER, 4, None, "w")
    finally:
        hook.remove()
        signal.signal(signal.SIGUSR1, previous)
    assert loaded.model.model.layers is loaded.layers.full
    assert loaded.model.config.num_hidden_layers == 4


def test_scores_do_not_build_graphs(loaded, rows, monkeypatch):
    modes = []
    original = view._next_tokens
    monkeypatch.setattr(
        view, "_next_tokens", lambda *a: modes.append(torch.is_inference_mode_enabled()) or original(*a)
    )
    score_unit(loaded, unit(), rows, ANSWER, 1, None, "w")
    assert modes == [True, True]


@pytest.mark.parametrize("new_tokens", [1, 3])
def test_a_whole_search_over_scores_is_the_oracle_search(rows, new_tokens):
    """Row by row the targets are replies of different depths, so that removals win and lose rows."""
    loaded = tiny_loaded("llama")
    depths = [(), (2,), (2, 0), (2,), ()]
    wanted = [
        oracle_replies(loaded.model, loaded.tokenizer, depth, [row.token_ids], new_tokens)[0]
        for depth, row in zip(depths, rows, strict=True)
    ]
    whole = AnswerSpec(type="regex", pattern=r"^(.*)$")
    targeted = [PromptRow(row.token_ids, reply) for row, reply in zip(rows, wanted, strict=True)]

    def by_engine(removed):
        work = unit((None,), (0, 1, 2, 3, 4), tuple(removed))
        answers = score_unit(loaded, work, targeted, whole, new_tokens, None, "w").candidates[0].answers
        return sum(answer.correct for answer in answers)

    def by_oracle(removed):
        prompts = [row.token_ids for row in targeted]
        replies = oracle_replies(loaded.model, loaded.tokenizer, removed, prompts, new_tokens)
        return sum(reply == row.target for reply, row in zip(replies, targeted, strict=True))

    mine = oracle_search(by_engine, 4, 5, epsilon="0.5")
    assert mine == oracle_search(by_oracle, 4, 5, epsilon="0.5")
    assert mine.baseline >= 2
    assert mine.rounds
    assert mine.rounds[0][0] == 2
