"""The sweep: every candidate at once is every candidate alone, in predictions, memory and work."""

import itertools
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, score_unit, tiny_loaded, tiny_prompts
from hypothesis import given
from hypothesis import strategies as st
from oracles import oracle_answers

from tale_ray.engine.budget import Budget, row_cost
from tale_ray.engine.fit import fit_sweep
from tale_ray.engine.groups import group_prompts
from tale_ray.engine.layout import lay_lines, lay_packs, pack_rows
from tale_ray.engine.memory import StateMemory
from tale_ray.engine.score import Scorer
from tale_ray.engine.streams import applications, final_node, most_nodes, plan_sweep
from tale_ray.errors import ConfigError
from tale_ray.model.load import LoadedModel
from tale_ray.records import PromptRow, WorkUnit
from tale_ray.tasks.answers import is_correct, parse_answer
from tale_ray.tasks.spec import AnswerSpec

ANSWER = AnswerSpec(type="regex", pattern=r"(t\d+)")
PREFIX = tuple(range(30, 39))  # longer than the windows of the families
DEEP = 6  # layers
NO_TREES = ("bloom", "lfm2")  # ALiBi is made of masks, convolutions go from slot to slot
QUICK = ("llama", "gpt2", "gemma3")  # the others take their time


def rows_of(prompts: Any) -> list[PromptRow]:
    return [PromptRow(prompt, f"t{30 + number}") for number, prompt in enumerate(prompts)]


def unit(candidates: Any, rows: Any, removed: Any = ()) -> WorkUnit:
    return WorkUnit(1, "round-0001", "search", tuple(removed), tuple(candidates), tuple(rows))


def answers_of(result: Any) -> dict[int | None, list[tuple[str, str | None, bool]]]:
    return {
        each.layer: [(answer.reply, answer.prediction, answer.correct) for answer in each.answers]
        for each in result.candidates
    }


def with_batches_of(scorer: Scorer, num_lines: int, longest: int) -> Scorer:
    """The scorer with room for a layer's work on so many lines at once, of one node."""
    scorer.budget = Budget(2**40, num_lines * row_cost(scorer._loaded.model).work_bytes(longest, len(PREFIX)))
    return scorer


def alike_prompts() -> list[tuple[int, ...]]:
    """Prompts of which some begin alike, one is the beginning of another, and two are equal."""
    first, *others = tiny_prompts(5)
    return [first, *others, (*first[:11], 5, 6, 7), first[:11], first, (*others[1][:2], 9)]


# The plan.


def brute_force(num_layers: int, finals: list[tuple[int, ...]]) -> int:
    """How many different (layer, layers passed by below it) pairs the final models apply."""
    return len(
        {(at, tuple(k for k in node if k < at)) for node in finals for at in range(num_layers) if at not in node}
    )


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=n - 1))))
def test_a_plan_computes_everything_once(shape: tuple[int, set[int]]) -> None:
    num_layers, removed = shape
    surviving = [layer for layer in range(num_layers) if layer not in removed]
    finals = [final_node(removed, layer) for layer in surviving if len(surviving) > 1]
    steps = plan_sweep(num_layers, finals)
    assert applications(steps) == brute_force(num_layers, finals)
    num = len(surviving)
    assert applications(steps) == (num - 1 + num * (num - 1) // 2 if num > 1 else 0)
    assert most_nodes(steps) <= num + 1
    with_none = [*finals, final_node(removed, None)]
    assert applications(plan_sweep(num_layers, with_none)) == brute_force(num_layers, with_none)


@given(st.integers(2, 9), st.data())
def test_a_plan_for_some_candidates_and_known_states(num_layers: int, data: st.DataObject) -> None:
    removed = data.draw(st.sets(st.integers(0, num_layers - 1), max_size=num_layers - 2))
    surviving = [layer for layer in range(num_layers) if layer not in removed]
    chosen = data.draw(st.sets(st.sampled_from(surviving), min_size=1))
    finals = [final_node(removed, layer) for layer in sorted(chosen)]
    assert applications(plan_sweep(num_layers, finals)) == brute_force(num_layers, finals)
    boundary = data.draw(st.integers(1, num_layers))
    steps = plan_sweep(num_layers, finals, known=lambda at, _node: at == boundary)
    assert not any(step.runs for step in steps[:boundary])
    assert [step.runs for step in steps[boundary:]] == [step.runs for step in plan_sweep(num_layers, finals)[boundary:]]
    assert set(steps[boundary - 1].loads) == {node[: sum(k < boundary for k in node)] for node in finals}


def test_only_last_positions_are_needed_in_the_last_layer() -> None:
    assert [step.last_only for step in plan_sweep(4, [(0,), (1,), (2,)])] == [False, False, False, True]
    assert [step.last_only for step in plan_sweep(4, [(3,)])] == [False, False, True, True]
    assert [step.last_only for step in plan_sweep(4, [], [(0, ()), (2, ())])][2] is True


# Predictions.


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def deep(request: pytest.FixtureRequest) -> LoadedModel:
    torch.set_num_threads(1)
    return tiny_loaded(request.param, num_layers=DEEP)


@pytest.mark.parametrize("removed", [(), (1,), (4, 0, 2, 5)])
def test_predictions_equal_the_oracle_whatever_the_batch(deep: LoadedModel, removed: tuple[int, ...]) -> None:
    rows = rows_of(PREFIX + prompt for prompt in alike_prompts())
    candidates = [None, *(layer for layer in range(DEEP) if layer not in removed)]
    expected = {
        layer: oracle_answers(
            deep.model,
            deep.tokenizer,
            final_node(removed, layer),
            rows,
            1,
            lambda reply: parse_answer(ANSWER, reply),
            lambda prediction, target: is_correct(ANSWER, prediction, target),
        )
        for layer in candidates
    }
    scorer = Scorer(deep)
    assert scorer.fit.sweep is not None, scorer.fit.note
    assert (scorer.fit.note == "") == (deep.info.family != "lfm2"), "only convolutions cannot share a prefix"
    assert scorer.fit.trees == (deep.info.family not in NO_TREES)
    before = deep.model.config.to_dict()
    work = unit(candidates, range(len(rows)), removed)
    for trees, num_lines in itertools.product({scorer.fit.trees, False}, (1, 3, len(rows))):
        scorer.fit = replace(scorer.fit, trees=trees)
        found = with_batches_of(scorer, num_lines, 32).score(work, rows, ANSWER, 1, "w")
        assert answers_of(found) == expected
        assert [each.layer for each in found.candidates] == candidates
    assert deep.model.config.to_dict() == before
    assert not any("forward" in vars(layer) for layer in deep.layers.full)


def test_logits_of_padded_rows_are_those_of_rows_alone(deep: LoadedModel) -> None:
    sweep = fit_sweep(deep).sweep
    assert sweep is not None
    finals = [final_node((2,), layer) for layer in (0, 3, 5)]
    prompts = tiny_prompts(4)
    together = sweep.next_logits(finals, lay_lines(prompts), None)
    for at, prompt in enumerate(prompts):
        alone = sweep.next_logits(finals, lay_lines([prompt]), None)
        torch.testing.assert_close(together[:, at], alone[:, 0], atol=2e-5, rtol=1e-4)


def test_logits_of_rows_that_share_a_line_are_those_of_rows_alone(deep: LoadedModel) -> None:
    if deep.info.family in NO_TREES:
        return
    sweep = fit_sweep(deep).sweep
    assert sweep is not None
    finals = [final_node((2,), layer) for layer in (0, 3, 5)]
    prompts = alike_prompts()
    packs = pack_rows(prompts, 40)
    together = sweep.next_logits(finals, lay_packs(packs), None)
    for at, row in enumerate(row for pack in packs for row in pack.rows):
        alone = sweep.next_logits(finals, lay_lines([prompts[row]]), None)
        torch.testing.assert_close(together[:, at], alone[:, 0], atol=2e-5, rtol=1e-4)


# Work.


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    torch.set_num_threads(1)
    return tiny_loaded("llama", num_layers=DEEP)


def test_work_is_half_of_one_after_another_and_the_prefix_is_computed_once(llama: LoadedModel) -> None:
    rows = rows_of(PREFIX + prompt for prompt in tiny_prompts(7))
    scorer = Scorer(llama)
    per_row = DEEP - 1 + DEEP * (DEEP - 1) // 2
    first = scorer.score(unit(range(DEEP), range(4)), rows, ANSWER, 1, "w")
    assert first.layer_applications == per_row * (4 + 1)
    second = scorer.score(unit(range(DEEP), range(4, 7)), rows, ANSWER, 1, "w")
    assert second.layer_applications == per_row * 3, "the prefix is kept from one unit to the next"
    fewer = Scorer(llama).score(unit([2, 4], range(4, 7)), rows, ANSWER, 1, "w")
    assert fewer.layer_applications == (3 + 1) * applications(plan_sweep(DEEP, [(2,), (4,)]))
    plain = score_unit(llama, unit(range(DEEP), range(7)), rows, ANSWER, 1, None, "w")
    assert plain.layer_applications == DEEP * (DEEP - 1) * 7


def test_a_prefix_is_computed_once_a_round_however_candidates_are_cut(llama: LoadedModel) -> None:
    rows = rows_of(PREFIX + prompt for prompt in tiny_prompts(6))
    whole = Scorer(llama).score(unit(range(DEEP), range(6)), rows, ANSWER, 1, "w")
    scorer = Scorer(llama)
    halves = [range(DEEP // 2), range(DEEP // 2, DEEP)]
    results = [
        scorer.score(unit(half, some), rows, ANSWER, 1, "w") for some in (range(3), range(3, 6)) for half in halves
    ]
    found: dict[int | None, list[Any]] = {}
    for result in results:
        for layer, answers in answers_of(result).items():
            found.setdefault(layer, []).extend(answers)
    assert found == answers_of(whole)
    per_row = DEEP - 1 + DEEP * (DEEP - 1) // 2
    assert whole.layer_applications == per_row * (6 + 1)
    assert sum(result.layer_applications for result in results) == whole.layer_applications
    later = scorer.score(unit([4], range(6), removed=[2]), rows, ANSWER, 1, "w")
    assert later.layer_applications == (6 + 1) * 1, "but for layer 5 the next round's places were those of candidate 2"


def test_rows_with_demonstrations_of_their_own_share_longer_prefixes() -> None:
    common, maths, law = (1, 2), tuple(range(10, 40)), tuple(range(50, 90))
    prompts = [*(common + maths + (number,) for number in range(100, 105)), (*common, 7, 8)]
    prompts += [common + law + (number, 3) for number in range(100, 104)] + [(*common, 9)]
    groups = group_prompts(prompts, range(len(prompts)))
    assert {(group.prefix, group.rows) for group in groups} == {
        (common + maths, (0, 1, 2, 3, 4)),
        (common + law, (6, 7, 8, 9)),
        (common, (5, 10)),
    }


def test_groups_whose_names_begin_alike_are_told_apart() -> None:
    """The subjects of a task may be `high school biology` and `high school chemistry`."""
    names = {(1, 2, 3): 5, (1, 2, 4): 6, (1, 5): 4, (6,): 7, (1, 2, 7): 2}
    prompts = [(0, *name, *range(10, 40), row) for name, count in names.items() for row in range(50, 50 + count)]
    groups = group_prompts(prompts, range(len(prompts)))
    assert {(group.prefix, len(group.rows)) for group in groups} == {
        ((0, *name, *range(10, 40)), count) for name, count in names.items() if count >= 4
    } | {((0,), 2)}


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=12))
def test_groups_are_a_partition_with_true_prefixes(prompts: list[list[int]]) -> None:
    groups = group_prompts(prompts, range(len(prompts)))
    assert sorted(itertools.chain.from_iterable(group.rows for group in groups)) == list(range(len(prompts)))
    for group in groups:
        for row in group.rows:
            assert tuple(prompts[row][: len(group.prefix)]) == group.prefix
            assert len(prompts[row]) > len(group.prefix)


# Memory.


def test_blocks_of_candidates_when_memory_is_short(llama: LoadedModel) -> None:
    rows = rows_of(PREFIX + prompt for prompt in tiny_prompts(4))
    whole = unit([None, *range(DEEP)], range(4))
    expected = answers_of(Scorer(llama).score(whole, rows, ANSWER, 1, "w"))
    cost = row_cost(llama.model)
    needed = cost.sweep_bytes(27, 0, 1)  # one candidate, one row, no prefix
    works = []
    for batch_bytes in (needed, 2 * needed, 4 * needed, 40 * needed):
        found = Scorer(llama, batch_bytes).score(whole, rows, ANSWER, 1, "w")
        assert answers_of(found) == expected
        works.append(found.layer_applications)
    assert works == sorted(works, reverse=True)
    assert works[0] > 1.5 * works[-1]
    small = Scorer(llama, needed // 3)
    refusal = rf"batch bytes {needed // 3} are too few: the longest row \(27 tokens\) needs {needed} .*; raise"
    with pytest.raises(ConfigError, match=refusal):
        small.score(whole, rows, ANSWER, 1, "w")
    with pytest.raises(ConfigError, match=refusal):
        small.check_budget(rows)
    Scorer(llama, needed).check_budget(rows)


def test_a_line_may_need_more_than_a_micro_batch_has(llama: LoadedModel) -> None:
    rows = rows_of(PREFIX + prompt for prompt in tiny_prompts(4))
    whole = unit(range(DEEP), range(4))
    large = Scorer(llama)
    large.budget = Budget(2**30, 1)
    expected = Scorer(llama).score(whole, rows, ANSWER, 1, "w")
    assert answers_of(large.score(whole, rows, ANSWER, 1, "w")) == answers_of(expected)
    assert answers_of(large.score(whole, rows, ANSWER, 4, "w")).keys() == answers_of(expected).keys()


PEAK = """
import resource, sys, torch, transformers
sys.path.insert(0, {tests!r})
from families import tiny_tokenizer
from tale_ray.cluster.worker import keep_heap
from tale_ray.engine.score import Scorer
from tale_ray.model.layers import find_layers
from tale_ray.model.load import LoadedModel, neutral_generation
from tale_ray.records import ModelInfo, PromptRow, WorkUnit
from tale_ray.tasks.spec import AnswerSpec
torch.set_num_threads(1)
keep_heap()  # as a worker does
sizes = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4, vocab_size=97)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, eos_token_id=2, pad_token_id=0)).eval()
model.requires_grad_(False)
tokenizer = tiny_tokenizer()
model.generation_config = neutral_generation(model, tokenizer)
layers = find_layers(model)
loaded = LoadedModel(model, tokenizer, layers, ModelInfo(8, "llama", "0" * 64, "float32", "cpu", 0.0))
answer = AnswerSpec(type="regex", pattern="(t)")
prefix = tuple(range(3, 93)) * 2
rows = [PromptRow(prefix + tuple((row * 7 + at) % 90 + 3 for at in range(120)), "t") for row in range(24)]
def score(budget):
    unit = WorkUnit(1, "round-0001", "search", (), tuple(range(8)), tuple(range(24)))
    Scorer(loaded, budget).score(unit, rows, answer, 1, "w")
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024
score(8 * 2**20)
before = peak()
score({budget})
print(peak() - before + 8 * 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mebibytes", [96, 192])
def test_peak_memory_stays_within_the_budget(mebibytes: int) -> None:
    """Measured from outside, over a warm run in 8 MiB, whose own working memory is counted in."""
    budget = mebibytes * 2**20
    program = PEAK.format(tests=str(__file__).rpartition("/")[0], budget=budget)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    peak = int(done.stdout.split()[-1])
    assert 0.3 * budget < peak < 1.2 * budget, f"{peak / 2**20:.0f} MiB of {mebibytes}"


# From round to round.


@pytest.mark.parametrize("order", [(3, 1, 4), (5, 0, 2), (0, 1, 2)])
def test_a_later_round_goes_on_from_what_is_known(llama: LoadedModel, order: tuple[int, ...]) -> None:
    """The same answers, for rows in any batches, with a fraction of the work."""
    rows = rows_of(PREFIX + prompt for prompt in tiny_prompts(6))
    remembering = Scorer(llama)
    for depth in range(len(order) + 1):
        removed = order[:depth]
        candidates = [layer for layer in range(DEEP) if layer not in removed]
        fresh, known = Scorer(llama), 0
        for chunk in ((4, 0, 5), (1, 2, 3)) if depth % 2 else ((0, 1), (2, 3, 4, 5)):
            work = unit(candidates, chunk, removed)
            found = remembering.score(work, rows, ANSWER, 1, "w")
            expected = fresh.score(work, rows, ANSWER, 1, "w")
            assert answers_of(found) == answers_of(expected)
            known += expected.layer_applications - found.layer_applications
        per_row = applications(plan_sweep(DEEP, [final_node(removed, layer) for layer in candidates]))
        if depth:
            below = sum(k < order[depth - 1] for k in candidates)  # layers below the one removed last: all known
            assert known >= len(rows) * (below * (below + 1) // 2), (
                "states below the removed layer are not computed again"
            )
            assert known <= (len(rows) + 1) * per_row


def test_remembered_states_are_found_on_other_lines() -> None:
    """Each slot's state is its token, so that what is loaded can be read off."""
    rows = alike_prompts()
    memory = StateMemory(2**30)
    for chosen in ((0, 2, 4, 6), (8, 1), (3, 5, 7)):
        packs = pack_rows([rows[at] for at in chosen], 30)
        layout = lay_packs(packs)
        names = [chosen[row] for pack in packs for row in pack.rows]
        memory.of(names, layout).add(3, [(1,)], torch.tensor(layout.tokens, dtype=torch.float32)[None, ..., None])
    for layout, names in (
        (lay_lines(rows), list(range(len(rows)))),
        (lay_packs(packs := pack_rows(rows, 50)), [row for pack in packs for row in pack.rows]),
    ):
        loaded = memory.of(names, layout).load(3, (1,)).flatten()
        for name, slots in zip(names, layout.slots, strict=True):
            assert loaded[list(slots)].tolist() == list(rows[name])


def test_memory_for_later_rounds_has_a_limit(llama: LoadedModel) -> None:
    block = torch.zeros(2, 3, 4, 5)
    memory = StateMemory(2 * block.nbytes)
    batch = memory.of(["a", "b", "c"], lay_lines([(1, 2, 3, 4), (1, 2, 3), (1, 2)]))
    for boundary in (1, 2, 3):
        batch.add(boundary, [(), (0,)], block + boundary)
    assert [memory.has(["a", "c"], boundary, (0,)) for boundary in (1, 2, 3)] == [True, True, False]
    assert memory.held == memory.limit
    loaded = memory.of(["c", "a"], lay_lines([(1, 2), (1, 2, 3, 4)])).load(2, ())
    assert torch.equal(
        loaded, torch.stack([torch.cat([torch.full((2, 5), 2.0), torch.zeros(2, 5)]), torch.full((4, 5), 2.0)])[None]
    )
    memory.start([0])
    assert not memory.has(["a"], 1, ())
    assert memory.has(["a"], 1, (0,)), "the state without layer 0 is the new model's"
    memory.allow(0)
    assert memory.held == 0
    assert not memory.has(["a"], 1, (0,))


# What does not fit.


def test_a_model_whose_layers_do_more_takes_another_way(llama: LoadedModel) -> None:
    """Something between the layers that a sweep does not see: noticed before anything is scored."""
    loaded = tiny_loaded("llama", num_layers=DEEP)
    decoder = loaded.model.get_decoder()
    original = decoder.norm.forward
    decoder.norm.forward = lambda hidden: original(hidden) + hidden.mean(dim=1, keepdim=True)
    scorer = Scorer(loaded)
    assert scorer.fit.sweep is None
    assert "candidates are scored one after another, as the sweep does not fit: its logits differ by" in scorer.fit.note
    rows = rows_of(tiny_prompts(3))
    work = unit([None, 0, 5], range(3), (2,))
    found = scorer.score(work, rows, ANSWER, 1, "w")
    assert answers_of(found) == answers_of(score_unit(loaded, work, rows, ANSWER, 1, None, "w"))


def test_a_layer_that_raises_on_stacked_rows_takes_another_way(llama: LoadedModel) -> None:
    loaded = tiny_loaded("llama", num_layers=DEEP)
    first = loaded.layers.full[0]
    original = first.forward

    def picky(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden.shape[0] > 4:
            raise RuntimeError("too many rows")
        return original(hidden, *args, **kwargs)

    first.forward = picky  # type: ignore[method-assign]
    scorer = Scorer(loaded)
    assert vars(first)["forward"] is picky, "what was there is put back"
    loaded.layers.full[1].forward = picky  # type: ignore[method-assign]
    assert Scorer(loaded).fit.sweep is None
    assert "RuntimeError: too many rows" in Scorer(loaded).fit.note
    assert scorer.fit.sweep is not None
