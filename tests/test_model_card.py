"""What a checkpoint says of itself: nothing that the run has not stored."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from tale_ray.api import make_config
from tale_ray.results.model_card import (
    CardFacts,
    left_ranges,
    mergekit_text,
    model_card,
    prune_text,
    search_command,
)
from tale_ray.results.tables import interval_text

TESTED = {
    **{"round": 2, "removed": [5, 1], "correct": 70, "total": 100, "invalid": 0, "difference": -0.05, "p_value": 0.25},
    **{"difference_interval": [-0.1, 0.01], "wins": 3, "losses": 8, "ties": 89, "p_value_holm": 0.5},
}
SUMMARY: dict[str, Any] = {
    **{"state": "finished", "task": "arc_easy", "num_layers": 8},
    "rows": {"shots": 0, "search": 40, "select": 0, "test": 100},
    "baseline": {"correct": 30, "total": 40, "invalid": 1},
    "rounds": [
        {"round": 1, "removed": [5], "correct": 31, "total": 40, "invalid": 0},
        {"round": 2, "removed": [5, 1], "correct": 33, "total": 40, "invalid": 0},
    ],
    "test": {"baseline": {"round": 0, "correct": 75, "total": 100, "invalid": 0}, "final": TESTED},
}
SEARCHED = {
    **{"difference": 0.075, "difference_interval": [-0.02, 0.15], "wins": 4, "losses": 1, "ties": 35, "p_value": 0.375}
}
FACTS = CardFacts(
    summary=SUMMARY,
    config=make_config(model="meta-llama/X", task="arc_easy"),
    pick="final",
    round=2,
    model="meta-llama/X",
    base_model="meta-llama/X",
    digest="ab" * 32,
    searched_dtype="float32",
    dtype="bfloat16",
    num_parameters=750,
    full_parameters=1000,
    search_comparison=SEARCHED,
    versions={"torch": "2.9"},
    license={"license": "mit"},
)


def front_matter(card: str) -> Any:
    _, block, _ = card.split("---\n", 2)
    return yaml.safe_load(block)


def test_front_matter_is_what_the_hub_reads() -> None:
    found = front_matter(model_card(FACTS))
    assert found["base_model"] == "meta-llama/X"
    assert (found["library_name"], found["license"]) == ("transformers", "mit")
    assert "tale-ray" in found["tags"]
    assert "base_model" not in front_matter(model_card(replace(FACTS, base_model=None, model="folder")))
    assert "license" not in front_matter(model_card(replace(FACTS, license={})))


def test_the_card_says_what_was_removed_and_how_accurate_it_is() -> None:
    card = model_card(FACTS)
    assert "**5, 1**" in card
    assert "ab" * 32 in card
    assert "| parameters | 1,000 | 750 (-25.0%) |" in card
    for split, correct, total in (("search", 33, 40), ("test", 70, 100)):
        interval = interval_text(proportion_confint(correct, total, method="wilson"))
        line = next(line for line in card.splitlines() if line.startswith(f"| {split} |"))
        assert f"{correct}/{total} = {100 * correct / total:.1f}% {interval}" in line
    assert "-5.0 [-10.0, +1.0] | 3 | 8 | 0.250" in card
    assert "+7.5 [-2.0, +15.0] | 4 | 1 | 0.375" in card
    assert "Holm), p on the test rows is 0.500" in card
    assert "12.5 points worse there than on the search rows" in card
    assert "had not ended" not in card


def test_the_card_says_what_is_not_known() -> None:
    untested = model_card(replace(FACTS, round=1, search_comparison=None))
    assert "**5**" in untested
    assert "not scored on test rows" in untested
    assert "| search | 30/40 = 75.0% [59.8, 85.8] | 31/40 = 77.5% [62.5, 87.7] | - | - | - | - |" in untested
    running = model_card(replace(FACTS, summary={**SUMMARY, "state": "interrupted", "test": None}))
    assert "**The search had not ended** when this was exported (it was interrupted after 2 rounds)" in running
    assert "not scored on test rows" in running


def test_code_is_named() -> None:
    card = model_card(replace(FACTS, code_files=("modeling_x.py",)))
    assert "`modeling_x.py`" in card
    assert "trust_remote_code=True" in card
    assert "trust_remote_code" not in model_card(FACTS)


def test_the_command_has_every_option_that_decides() -> None:
    config = make_config(
        **{"model": "/here/model", "task": "/here/task.yaml", "data_root": "/here/data", "epsilon": "0.02"},
        **{"splits": {"search": "0.6"}, "remove": [3, 7], "exhaustive": True, "rows": 40, "gguf": "q8.gguf"},
        **{"workers": 3, "shots": 2},
    )
    command = search_command(replace(FACTS, config=config, model="folder name"))
    assert command == (
        "tale-ray search --model 'folder name' --task task.yaml --gguf q8.gguf --rows 40 --shots 2 "
        "--splits search=0.6 --epsilon 0.02 --remove 3,7 --exhaustive --dtype float32"
    )
    assert "/here" not in model_card(replace(FACTS, config=config, model="folder name", base_model=None))


@given(st.integers(1, 12).flatmap(lambda total: st.tuples(st.just(total), st.sets(st.integers(0, total - 1)))))
def test_ranges_cover_what_is_left(case: tuple[int, set[int]]) -> None:
    total, removed = case
    ranges = left_ranges(removed, total)
    assert [layer for start, end in ranges for layer in range(start, end)] == sorted(set(range(total)) - removed)
    assert all(late[0] > early[1] for early, late in pairwise(ranges)), "there are no fewer"


def test_other_tools_cut_the_same_layers() -> None:
    found = yaml.safe_load(mergekit_text("org/model", (5, 1), 8, "bfloat16"))
    assert found["merge_method"] == "passthrough"
    assert found["dtype"] == "bfloat16"
    assert [part["sources"][0]["layer_range"] for part in found["slices"]] == [[0, 1], [2, 5], [6, 8]]
    assert {part["sources"][0]["model"] for part in found["slices"]} == {"org/model"}
    assert prune_text((5, 1)) == "1,5\n"


def test_a_card_is_one_document() -> None:
    card = model_card(FACTS)
    assert card.startswith("---\n")
    assert card.endswith("\n")
    assert "None" not in card
