"""The benchmarks themselves: required FLOPs by hand, a yardstick that tells differences, a document of any data."""

from dataclasses import replace
from pathlib import Path

import document
import pytest
import recording
import torch
import workloads
from flops import Required, Shape, required
from random_models import loaded, random_llama, random_words
from scaling import AXES, Point
from yardstick import Disagreement, Yardstick

from tale_ray.engine.score import Scorer
from tale_ray.records import PromptRow, WorkUnit
from tale_ray.tasks.spec import AnswerSpec

SHAPE = Shape(num_layers=2, hidden_size=3, heads=2, key_heads=1, head_size=2, intermediate_size=5, vocabulary=7)
# Of one token in one layer, 2 FLOPs a product:
KEYS = 2 * (2 * 3 * 2)  # keys and values: hidden x (one head of 2), twice
REST = 2 * (2 * 3 * 4 + 3 * 3 * 5)  # queries and output: hidden x (two heads of 2), twice; three feed-forward matrices
PAIR = 2 * 2 * 4  # a score and a weighted value, over two heads of 2
HEAD = 2 * 3 * 7


def unit(candidates, rows, removed=()):
    return WorkUnit(0, "round-0001", "search", removed, candidates, rows)


def test_a_layer_counts_causal_pairs_only():
    assert SHAPE.layer(4) == 4 * (KEYS + REST) + 10 * PAIR
    assert SHAPE.layer(4, before=5) == 4 * (KEYS + REST) + (4 * 5 + 10) * PAIR
    assert SHAPE.last(4, before=5) == 4 * KEYS + REST + 9 * PAIR


def test_the_full_model_needs_its_last_position_only_in_the_last_layer():
    needed = required(SHAPE, [unit((None,), (0,))], [(1, 2, 3), (4, 5, 6)])
    assert needed == Required(0, SHAPE.layer(3) + SHAPE.last(3), 0, HEAD, 2)


def test_candidates_share_what_they_have_in_common():
    """Of 2 layers: candidate 1 runs layer 0, candidate 0 runs layer 1; nothing runs twice."""
    needed = required(SHAPE, [unit((0, 1), (0, 1))], [(1, 2, 3), (4, 5)])
    first = SHAPE.last(3) + SHAPE.last(3), SHAPE.last(2) + SHAPE.last(2)
    assert needed == Required(0, sum(first), 0, 4 * HEAD, 4)


def test_a_prefix_counts_once_in_the_whole_search_and_its_last_layer_for_keys_only():
    prompts = [(1, 2, 3, 4), (1, 2, 3, 5, 6)]
    units = [unit((None,), (0,)), unit((None,), (1,))]
    needed = required(SHAPE, units, prompts)
    assert needed.prefix == SHAPE.layer(3) + SHAPE.keys(3)
    assert needed.prompts == sum(SHAPE.layer(own, 3) + SHAPE.last(own, 3) for own in (1, 2))
    assert needed.applications == 2 + 2 * 2


def test_later_new_tokens_take_a_step_in_every_surviving_layer():
    needed = required(SHAPE, [unit((0,), (0,))], [(1, 2, 3), (4, 5)], new_tokens=3)
    assert needed.replies == SHAPE.layer(1, 3) + SHAPE.layer(1, 4)
    assert needed.head == 3 * HEAD
    assert needed.applications == 1 + 2


@pytest.mark.parametrize("point", [Point(rows=3, layers=4), Point(rows=2, layers=3, shots=1, new_tokens=3)])
def test_formula_plan_and_scorer_count_the_same_applications(point):
    torch.set_num_threads(1)
    model = loaded(random_llama(point.layers, 64))
    generator = torch.Generator().manual_seed(0)
    prefix, *_ = random_words(1, point.prefix_tokens, generator)
    prompts = [(*prefix, *own) for own in random_words(point.rows, 5, generator)]
    work = unit(tuple(range(point.layers)), tuple(range(point.rows)))
    rows = [PromptRow(prompt, "t") for prompt in prompts]
    result = Scorer(model).score(work, rows, AnswerSpec(type="regex", pattern="(t)"), point.new_tokens, "")
    planned = required(Shape.of(model.model.config), [work], prompts, point.new_tokens).applications
    assert result.layer_applications == planned == point.applications


def test_axes_change_what_they_are_named_for():
    for axis, points in AXES.items():
        assert len({getattr(point, axis) for point in points}) == len(points)
        assert len({replace(point, **{axis: getattr(points[0], axis)}) for point in points}) == 1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[recording.Recorded, Yardstick, list[tuple[int, ...]]]:
    torch.set_num_threads(1)
    folder: Path = tmp_path_factory.mktemp("bench")
    workload = replace(workloads.WORKLOADS[0], max_removed=1)
    options = workloads.search_options(workload, workloads.Places(folder, None, folder), rows=6)
    model, tokenizer, questions = workloads.load(options)
    recorded = recording.search({**options, "exhaustive": True}, folder / "run")
    prompts = [row.token_ids for row in questions.rows["search"]]
    return recorded, Yardstick(model, tokenizer, questions, 1), prompts


def test_units_of_a_search_are_all_recorded(small):
    recorded, _, prompts = small
    assert recorded.candidate_rows == recorded.summary["work"]["candidate_rows"] == 12 * 6
    assert recorded.layer_applications == recorded.summary["work"]["layer_applications"]
    assert len(recorded.cells) == 13 * 6
    assert recorded.scorer_seconds > 0
    needed = required(Shape.of(loaded(random_llama(1, 64)).model.config), recorded.units, prompts)
    assert needed.prefix > 0


def test_the_yardstick_agrees_and_scales(small):
    recorded, yardstick, _ = small
    timed = yardstick.full(recorded)
    assert (timed.forwards, timed.compare(recorded)) == (13 * 6, 13 * 6)
    sampled = yardstick.sampled(recorded, 1e9)
    assert (sampled.forwards, sampled.compare(recorded)) == (13 * 4, 13 * 4)
    assert "4 of 6 rows, all candidates" in sampled.method
    few = yardstick.sampled(recorded, 1e-9)
    assert few.forwards == (1 + 4) * 4
    assert few.compare(recorded) == few.forwards


def test_the_yardstick_tells_other_answers_and_decisions(small):
    recorded, yardstick, _ = small
    timed = yardstick.full(recorded)
    answers = {removed: [not correct for correct in found] for removed, found in timed.answers.items()}
    with pytest.raises(Disagreement, match="row 0"):
        replace(timed, answers=answers).compare(recorded)
    summary = {**recorded.summary, "baseline": {**recorded.summary["baseline"], "correct": -1}}
    with pytest.raises(Disagreement, match="baseline=-1"):
        yardstick.full(replace(recorded, summary=summary))


def test_a_workload_without_its_model_is_left_out(tmp_path):
    places = workloads.Places(tmp_path / "nowhere", None, tmp_path)
    with pytest.raises(workloads.Missing, match="SmolLM2"):
        workloads.search_options(workloads.WORKLOADS[1], places)


ABOUT = {
    "command": "python benchmarks/engine.py",
    "date": "2026-01-02 03:04 UTC",
    "commit": "abc",
    "versions": {"torch": "2"},
    "machine": {"cpu": "CPU", "cores": 2, "memory_gib": 8.0},
    "threads": 2,
    "load": 0.1,
}


def measured_pair(ratio: float) -> dict[str, object]:
    ours = {
        **{"seconds": 2.0, "scorer_seconds": 1.0, "gemm_rate": 1e11, "share": 0.5, "scorer_share": 0.9, "units": 3},
        **{"candidate_rows": 10, "layer_applications": 70, "required": {"applications": 100, "total": 10**11}},
    }
    published = {"seconds": 2.0 * ratio, "forwards": 9, "method": "in full", "same_answers": 8}
    return {"ours": ours, "published": published, "ratio": ratio}


ENGINE = {
    "one": {
        **{"circumstances": ABOUT, "title": "first", "rows": 5, "least_ratio": 12.0, "least_share": 0.7},
        "decisions": {"baseline": 4, "rounds": [[3, 4]], "rejected": None},
        "pairs": [measured_pair(ratio) for ratio in (10.0, 13.0, 14.0)],
        "exhaustive": {"ours": measured_pair(10.0)["ours"], "same_answers": 9},
        "scaled": None,
    },
    "two": {"title": "second", "left_out": "no model"},
}


def test_the_document_says_medians_spread_and_what_was_reached():
    page = document.page(ENGINE, {}, {}, "A note.")
    assert "**13.0 (10.0 to 14.0)** | yes | 2.00 (2.00 to 2.00)" in page
    assert "70 (no)" in page
    assert "second: no model" in page
    assert "A note." in page
    assert "(2026-01-02)" in page.splitlines()[0]


def test_figures_are_the_same_for_the_same_numbers(tmp_path):
    pytest.importorskip("matplotlib", reason="figures are drawn by matplotlib, of the extra dev")
    from figures import draw_ratios

    for name in ("one.svg", "two.svg"):
        draw_ratios(ENGINE, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
