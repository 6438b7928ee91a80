"""Every family: the model without some layers is the model rebuilt without them, in all that the engine does."""

import pytest
import torch
from families import FAMILIES, score_unit, tiny_loaded, tiny_prompts
from oracles import end_tokens, greedy_tokens, next_logits, oracle_answers, rebuild

from tale_ray.engine.budget import row_cost
from tale_ray.model.layers import LayerStack, cut_config
from tale_ray.records import PromptRow, WorkUnit
from tale_ray.tasks.answers import is_correct, parse_answer
from tale_ray.tasks.spec import AnswerSpec

ANSWER = AnswerSpec(type="regex", pattern=r"(t\d+)")
NEW_TOKENS = 5


@pytest.fixture(scope="module", params=FAMILIES, autouse=True)
def loaded(request):
    torch.set_num_threads(1)
    return tiny_loaded(request.param)


def removals(layers: LayerStack) -> list[tuple[int, ...]]:
    """First, last, middle, two apart, all but the first, all but the last."""
    last = layers.num_layers - 1
    return [(0,), (last,), (1,), (last - 1, 0), tuple(range(1, last + 1)), tuple(range(last))]


def state(loaded):
    """All that `without` may touch and must put back: by value, and by identity."""
    model = loaded.model
    values = (
        model.config.to_dict(),
        {name: tensor.data_ptr() for name, tensor in model.state_dict().items()},
        [(name, module.layer_idx) for name, module in model.named_modules() if hasattr(module, "layer_idx")],
    )
    objects = [id(module) for module in model.modules()] + [id(value) for value in vars(model.config).values()]
    return values, objects


def test_removing_nothing_changes_nothing(loaded):
    before = state(loaded)
    with loaded.layers.without(()):
        assert state(loaded) == before


def test_without_equals_the_rebuilt_model(loaded):
    model, prompts = loaded.model, tiny_prompts(4)
    full = [next_logits(model, prompt) for prompt in prompts]
    for removed in removals(loaded.layers):
        rebuilt = rebuild(model, removed)
        before = state(loaded)
        with loaded.layers.without(removed):
            pruned = [next_logits(model, prompt) for prompt in prompts]
        assert state(loaded) == before
        for prompt, mine, whole in zip(prompts, pruned, full, strict=True):
            truth = next_logits(rebuilt, prompt)
            torch.testing.assert_close(mine, truth, atol=1e-5, rtol=1e-5)
            assert mine.argmax() == truth.argmax()
            assert not torch.allclose(mine, whole, atol=1e-3)  # else this test could not fail
    for prompt, whole in zip(prompts, full, strict=True):
        assert torch.equal(next_logits(model, prompt), whole)


@pytest.mark.slow
def test_a_cut_configuration_and_the_cut_state_make_the_same_model(loaded):
    """What an exported checkpoint is: a configuration that went through JSON, and the state of the pruned model."""
    model, prompt = loaded.model, tiny_prompts(1)[0]
    for removed in removals(loaded.layers):
        fields = cut_config(model.config, removed).to_dict()
        again = type(model)(type(model.config).from_dict(fields)).eval()
        with loaded.layers.without(removed):
            again.load_state_dict(model.state_dict(), strict=True)
            here = next_logits(model, prompt)
        torch.testing.assert_close(next_logits(again, prompt), here, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_cached_generation_equals_a_loop_without_cache(loaded):
    model, prompts = loaded.model, tiny_prompts(2)
    for removed in removals(loaded.layers)[2:5]:
        with loaded.layers.without(removed):
            kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
            if set(kinds) == {"conv"}:
                continue  # `generate` itself cannot cache a model without attention; the engine then does without
            for prompt in prompts:
                tokens = torch.tensor([prompt])
                ones = torch.ones_like(tokens)
                written = model.generate(tokens, attention_mask=ones, max_new_tokens=8, do_sample=False)
                expected = greedy_tokens(model, prompt, 8, end_tokens(model))
                assert written[0, len(prompt) :].tolist() == expected


@pytest.mark.parametrize("new_tokens", [1, pytest.param(NEW_TOKENS, marks=pytest.mark.slow)])
def test_scores_equal_the_oracle_whatever_the_batch(loaded, new_tokens):
    rows = [PromptRow(prompt, f"t{30 + number}") for number, prompt in enumerate(tiny_prompts(7))]
    last = loaded.layers.num_layers - 1
    unit = WorkUnit(7, "round-0002", "search", (1,), (None, 0, last), (6, 0, 3, 2, 5))
    expected = {}
    for layer in unit.candidates:
        removed = (1,) if layer is None else (1, layer)
        expected[layer] = oracle_answers(
            loaded.model,
            loaded.tokenizer,
            removed,
            [rows[position] for position in unit.rows],
            new_tokens,
            lambda reply: parse_answer(ANSWER, reply),
            lambda prediction, target: is_correct(ANSWER, prediction, target),
        )
    before = state(loaded)
    one_row = row_cost(loaded.model).row_bytes(18, new_tokens)
    for batch_bytes in (one_row, 2 * one_row, None):
        result = score_unit(loaded, unit, rows, ANSWER, new_tokens, batch_bytes, "worker-0")
        assert (result.unit, result.worker) == (unit, "worker-0")
        assert [candidate.layer for candidate in result.candidates] == list(unit.candidates)
        for candidate in result.candidates:
            answers = [(answer.reply, answer.prediction, answer.correct) for answer in candidate.answers]
            assert answers == expected[candidate.layer]
    assert state(loaded) == before
