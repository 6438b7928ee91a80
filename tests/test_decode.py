"""Decoding all candidates together: the tokens of the plain path and of the oracle, whatever the batch."""

import logging
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, tiny_loaded, tiny_prompts
from hypothesis import given
from hypothesis import strategies as st
from oracles import end_tokens, greedy_tokens, rebuild
from signals import Signal, struck_at

from tale_ray.engine.decode import Decoder
from tale_ray.engine.fit import fit_decoder, fit_sweep
from tale_ray.engine.prefix import PrefixStates
from tale_ray.engine.ring import Ring, ring_order
from tale_ray.engine.score import Scorer
from tale_ray.engine.streams import applications, final_node, plan_sweep
from tale_ray.engine.sweep import Portions, Sweep
from tale_ray.engine.view import Ending, view_tokens
from tale_ray.errors import ConfigError
from tale_ray.records import PromptRow, WorkUnit
from tale_ray.tasks.answers import cut_reply, parse_answer
from tale_ray.tasks.spec import AnswerSpec

pytestmark = pytest.mark.slow

ANSWER = AnswerSpec(type="regex", pattern=r"(t\d+)")
BYTES = 2**30
UNFIT = {"lfm2"}  # convolutions keep states that are not keys and values
NEW_TOKENS = 9  # with 18 prompt tokens and a window of 6: all of a window is decoded


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def decode(decoder, loaded, removed, candidates, prompts, new_tokens, *, prefills=None, ends=None, prefix=None):
    """New tokens by candidate and row."""
    finals = [final_node(removed, layer) for layer in candidates]
    plan = [(rows, Portions(nodes=2, head_rows=7)) for rows in prefills or [range(len(prompts))]]
    ends = end_tokens(loaded.model) if ends is None else ends
    return decoder.new_tokens(finals, prompts, prefix, new_tokens, Ending(frozenset(ends)), plan)


def plain(loaded, removed, candidates, prompts, new_tokens):
    return [view_tokens(loaded, final_node(removed, layer), prompts, new_tokens, BYTES) for layer in candidates]


def score(scorer, unit, rows, new_tokens):
    result = scorer.score(unit, rows, ANSWER, new_tokens, "w")
    return {found.layer: [answer.reply for answer in found.answers] for found in result.candidates}, result


def as_rows(prompts):
    return [PromptRow(prompt, "t9") for prompt in prompts]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - UNFIT))
def test_every_family_gives_the_tokens_of_the_plain_path_and_the_oracle(family):
    loaded = tiny_loaded(family)
    decoder, note = fit_decoder(loaded, Sweep(loaded))
    assert (decoder is None, note) == (False, "")
    prompts, total = tiny_prompts(4), loaded.layers.num_layers
    for removed in ((), (1,), (0, total - 1)):
        candidates = [None, *(layer for layer in range(total) if layer not in removed)]
        found = decode(decoder, loaded, removed, candidates, prompts, NEW_TOKENS)
        assert found == plain(loaded, removed, candidates, prompts, NEW_TOKENS)
        pruned = rebuild(loaded.model, final_node(removed, candidates[-1]))
        assert found[-1] == [greedy_tokens(pruned, prompt, NEW_TOKENS, end_tokens(loaded.model)) for prompt in prompts]


@pytest.fixture(scope="module")
def gemma():
    """Windows in every other layer, attention that adds its masks itself, soft-caps."""
    return tiny_loaded("gemma2")


@pytest.fixture(scope="module")
def llama():
    return tiny_loaded("llama")


def test_the_order_and_choice_of_candidates_do_not_matter(gemma):
    decoder = Decoder(gemma, Sweep(gemma))
    prompts = tiny_prompts(3)
    by_layer = dict(zip((None, 0, 1, 2, 3), plain(gemma, (), (None, 0, 1, 2, 3), prompts, 5), strict=True))
    for candidates in [(3, None, 0), (None,), (2,), (0, 3), (1, 1, 2)]:
        assert decode(decoder, gemma, (), candidates, prompts, 5) == [by_layer[layer] for layer in candidates]


@pytest.mark.parametrize("family", ["gemma2", "llama", "bloom", "deepseek_v3"])
def test_micro_batches_of_the_prompts_do_not_matter(family):
    loaded = tiny_loaded(family)
    decoder, prompts = Decoder(loaded, Sweep(loaded)), tiny_prompts(7)
    expected = plain(loaded, (2,), (None, 0, 3), prompts, 6)
    for prefills in ([[row] for row in range(7)], [[6, 0, 3], [5, 1, 2], [4]], [range(7)]):
        assert decode(decoder, loaded, (2,), (None, 0, 3), prompts, 6, prefills=prefills) == expected


def test_rows_of_equal_length_need_no_mask_and_one_row_no_batch(llama):
    decoder = Decoder(llama, Sweep(llama))
    for count, length in ((3, 9), (1, 5), (1, 1)):
        prompts = tiny_prompts(count, shortest=length, longest=length)
        assert decode(decoder, llama, (), (1, None), prompts, 6) == plain(llama, (), (1, None), prompts, 6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "gpt_oss"])
def test_rows_leave_at_their_end_tokens(family):
    loaded = tiny_loaded(family, seed=3)
    decoder, prompts, candidates = Decoder(loaded, Sweep(loaded)), tiny_prompts(6), (None, 0, 1, 2, 3)
    loaded.model.generation_config.eos_token_id = None
    free = plain(loaded, (), candidates, prompts, 12)
    tokens = sorted({token for rows in free for row in rows for token in row})
    for ends in (tokens[::9], tokens[::3], free[0][0][:1], free[2][1][5:6]):
        loaded.model.generation_config.eos_token_id = list(ends)
        found = decode(decoder, loaded, (), candidates, prompts, 12)
        assert found == plain(loaded, (), candidates, prompts, 12)
        assert len({len(row) for rows in found for row in rows}) > 1
    loaded.model.generation_config.eos_token_id = tokens
    assert decode(decoder, loaded, (), candidates, prompts, 12) == [[row[:1] for row in rows] for rows in free]


def test_rows_that_have_ended_stop_costing_anything(llama):
    decoder, prompts = Decoder(llama, Sweep(llama)), tiny_prompts(8)
    free = decode(decoder, llama, (), (None, 1), prompts, 12, ends=())
    assert decoder.layer_applications == 11 * 8 * (4 + 3)
    first = {rows[at][0] for rows in free for at in range(1, 8)} - {free[0][0][0], free[1][0][0]}
    before = decoder.layer_applications
    ended = decode(decoder, llama, (), (None, 1), prompts, 12, ends=first)
    going = [sum(len(row) > 1 for row in rows) for rows in ended]
    assert 0 < sum(going) < 12  # so that they leave before the first step
    assert decoder.layer_applications - before <= 11 * (4 * going[0] + 3 * going[1])


@pytest.mark.parametrize("family", ["llama", "qwen2_window", "gemma2", "deepseek_v3", "bloom"])
def test_a_shared_prefix_does_not_matter(family):
    loaded = tiny_loaded(family)
    prefix = tiny_prompts(1, seed=9)[0][:10]
    prompts = [prefix + prompt for prompt in tiny_prompts(5, longest=8)]
    sweep = Sweep(loaded)
    decoder, states = Decoder(loaded, sweep), PrefixStates(len(prefix))
    candidates = (0, 2, None)
    steps = plan_sweep(loaded.layers.num_layers, [final_node((1,), layer) for layer in candidates])
    sweep.run_prefix(states, prefix, {(at, node) for at, step in enumerate(steps) for node in step.runs})
    own = [prompt[len(prefix) :] for prompt in prompts]
    found = decode(decoder, loaded, (1,), candidates, own, 7, prefix=states, prefills=[[0, 4], [1, 2, 3]])
    assert found == plain(loaded, (1,), candidates, prompts, 7)


def test_scores_are_those_of_the_plain_path_at_every_budget(llama):
    prefix = tiny_prompts(1, seed=5)[0]
    rows = as_rows([prefix + prompt for prompt in tiny_prompts(5, longest=9)] + tiny_prompts(4, seed=3))
    unit = WorkUnit(1, "round-0001", "search", (2,), (None, 0, 1, 3), (8, 0, 1, 2, 3, 5, 6))
    expected, _ = score(Scorer(llama, sweeps=False), unit, rows, 6)
    least = least_bytes(llama, unit, rows, 6)
    for budget in (least, 2 * least, 5 * least, None):
        found, _ = score(Scorer(llama, budget), unit, rows, 6)
        assert found == expected
        assert list(found) == list(unit.candidates)


def least_bytes(loaded, unit, rows, new_tokens):
    with pytest.raises(ConfigError, match="batch bytes 9 are too few") as refused:
        score(Scorer(loaded, 9), unit, rows, new_tokens)
    return int(str(refused.value).split("needs ")[1].split()[0])


def test_a_budget_too_small_for_one_row_is_refused_before_anything_runs(llama, monkeypatch):
    rows, unit = as_rows(tiny_prompts(3)), WorkUnit(1, "round-0001", "search", (), (None, 1), (0, 1))
    least = least_bytes(llama, unit, rows, 8)
    assert least > least_bytes(llama, unit, rows, 4)
    score(Scorer(llama, least), unit, rows, 8)
    scorer = Scorer(llama, least - 1)
    scorer._fitted_decoder(scorer.fit.sweep)
    monkeypatch.setattr(Sweep, "next_tokens", None)
    with pytest.raises(ConfigError, match=rf"bytes {least - 1} .*18 tokens and 8 new ones\) needs {least} .*raise"):
        score(scorer, unit, rows, 8)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "deepseek_v3"])
def test_the_estimate_of_a_row_is_from_above(family):
    loaded = tiny_loaded(family)
    decoder, prompts = Decoder(loaded, Sweep(loaded)), tiny_prompts(3, shortest=18)
    held = []
    step = decoder._step

    def noting(batch):
        held.append(sum(part.nbytes for states in batch.cache.states.values() for part in states))
        return step(batch)

    decoder._step = noting
    decode(decoder, loaded, (), (None, 0), prompts, 4, ends=())
    cost = Scorer(loaded, sweeps=False)._cost
    assert 0 < held[0] <= 6 * cost.decode_bytes(18, 0, 4, 1)


def test_layer_applications_are_those_of_the_sweep_and_one_a_row_and_step(llama):
    rows, unit = as_rows(tiny_prompts(3, longest=4)), WorkUnit(1, "r", "search", (1,), (None, 3), (0, 1, 2))
    scorer = Scorer(llama)
    end, llama.model.generation_config.eos_token_id = llama.model.generation_config.eos_token_id, None
    try:
        _, result = score(scorer, unit, rows, 5)
    finally:
        llama.model.generation_config.eos_token_id = end
    sweep = applications(plan_sweep(4, [(1,), (1, 3)]))
    assert sweep == 3  # the candidate is the last layer: nothing forks below it
    assert result.layer_applications == 3 * sweep + 4 * 3 * (3 + 2)


def test_what_does_not_fit_takes_the_plain_path(caplog):
    loaded = tiny_loaded("lfm2")
    rows, unit = as_rows(tiny_prompts(3)), WorkUnit(1, "r", "search", (), (None, 1, 2), (0, 1, 2))
    scorer = Scorer(loaded)
    assert scorer.fit.sweep is not None
    with caplog.at_level(logging.WARNING, "tale_ray.engine"):
        found, _ = score(scorer, unit, rows, 4)
        again, _ = score(scorer, unit, rows, 4)
    expected, _ = score(Scorer(loaded, sweeps=False), unit, rows, 4)
    assert found == again == expected
    said = [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and record.name == "tale_ray.engine"
    ]
    assert len(said) == 1
    assert "one candidate after another" in said[0]


def test_a_decoder_that_is_wrong_is_found_out(llama, monkeypatch):
    assert fit_sweep(llama).note == ""
    monkeypatch.setattr(Decoder, "_cut", lambda self, batch, stretch, value, place: value)
    decoder, note = fit_decoder(llama, Sweep(llama))
    assert decoder is None
    assert "longer replies" in note


@pytest.mark.parametrize("calls", [0, 1, 5, 9, 14])
def test_an_exception_while_decoding_leaves_the_model_whole(llama, calls):
    decoder, prompts = Decoder(llama, Sweep(llama)), tiny_prompts(3)
    expected = decode(decoder, llama, (), (None, 1), prompts, 5)
    layer = llama.layers.full[2]
    left = calls

    def strike(*_arguments):
        nonlocal left
        left -= 1
        if left == -1:
            raise Signal

    hook = layer.mlp.register_forward_hook(strike)
    try:
        if calls < 5:
            with pytest.raises(Signal):
                decode(decoder, llama, (), (None, 1), prompts, 5, ends=())
        else:
            decode(decoder, llama, (), (None, 1), prompts, 5, ends=())
    finally:
        hook.remove()
    assert not any("forward" in vars(module) for module in llama.layers.full)
    assert not any(module._forward_pre_hooks for module in llama.model.modules())
    assert decode(decoder, llama, (), (None, 1), prompts, 5) == expected


@pytest.mark.slow
def test_a_signal_at_any_line_of_ours_leaves_the_model_whole(llama):
    rows, unit = as_rows(tiny_prompts(2)), WorkUnit(1, "r", "search", (), (None, 2), (0, 1))
    scorer = Scorer(llama)
    expected, _ = score(scorer, unit, rows, 3)
    config, full = llama.model.config.to_dict(), llama.layers.full
    line, was_struck = 0, True
    while was_struck:
        was_struck = struck_at(line, lambda: score(scorer, unit, rows, 3))
        assert llama.model.model.layers is full
        assert llama.model.config.to_dict() == config
        assert not any("forward" in vars(module) for module in full)
        assert not any(module._forward_pre_hooks for module in llama.model.modules())
        line += 13
    assert line > 500
    assert score(scorer, unit, rows, 3)[0] == expected


# The ring.


@given(st.data())
def test_a_ring_runs_every_layer_on_the_rows_that_have_it(data):
    num_layers = data.draw(st.integers(1, 6))
    removed = data.draw(st.sets(st.integers(0, num_layers - 1), max_size=num_layers - 1))
    rest = sorted(set(range(num_layers)) - removed)
    candidates = data.draw(st.lists(st.sampled_from([None, *rest]), min_size=1, unique=True))
    finals = ring_order([final_node(removed, layer) for layer in candidates])
    every = [(final, at) for final in range(len(finals)) for at in range(3)]
    rows = sorted(data.draw(st.sets(st.sampled_from(every), min_size=1)))
    ring = Ring(finals, rows, num_layers)
    order = list(rows)
    for layer in range(num_layers):
        runs = [row for row in order if layer not in finals[row[0]]]
        if layer not in ring.stretches:
            assert not runs
            continue
        assert ring.running(layer) == runs
        skipping = ring.stretches[layer].skipping
        order = [*order[skipping:], *order[:skipping]]
        assert order[: len(runs)] == runs
    assert order == [*rows[ring.turned :], *rows[: ring.turned]]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "answer",
    [
        AnswerSpec(type="word", labels=tuple(f"t{number}" for number in range(10, 60))),
        AnswerSpec(type="regex", pattern=r"(t\d+)", stop=("t4", "t9 ", "t2")),
    ],
)
def test_rows_leave_once_their_answer_is_settled(family, answer):
    """The same answers as from whole replies, with fewer steps; both paths cut replies at the same token."""
    loaded = tiny_loaded(family)
    rows = [PromptRow(prompt, f"t{40 + at}") for at, prompt in enumerate(tiny_prompts(8))]
    unit = WorkUnit(1, "round-0001", "search", (1,), (None, 0, 2, 3), tuple(range(8)))
    whole = AnswerSpec(type="regex", pattern="(.*)")
    swept, plain_path = Scorer(loaded), Scorer(loaded, sweeps=False)
    found = swept.score(unit, rows, answer, 9, "w")
    assert found.candidates == replace_seconds(plain_path.score(unit, rows, answer, 9, "w"), found)
    everything = swept.score(unit, rows, whole, 9, "w")
    shorter = 0
    for candidate, all_of_it in zip(found.candidates, everything.candidates, strict=True):
        for answered, full in zip(candidate.answers, all_of_it.answers, strict=True):
            assert full.reply.startswith(answered.reply)
            assert answered.prediction == parse_answer(answer, cut_reply(answer, full.reply))
            shorter += len(answered.reply) < len(full.reply)
    assert shorter > 8
    assert found.layer_applications < everything.layer_applications


def replace_seconds(result, like):
    """The candidates of a result, as long as those of another one took."""
    return tuple(
        replace(each, seconds=other.seconds) for each, other in zip(result.candidates, like.candidates, strict=True)
    )
