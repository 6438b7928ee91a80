"""Calibration text from files, and whole searches that measure a real model: local, on Ray, resumed, refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from folders import DECISIONS, Material, command, show
from folders import material_fixture as material_fixture
from oracles import log_likelihood, rebuild
from transformers import AutoModelForCausalLM, AutoTokenizer

import tale_ray
from tale_ray.attempt.rows import prepare_rows
from tale_ray.config import TaskSection
from tale_ray.errors import TaskError
from tale_ray.store.reader import RunReader
from tale_ray.tasks.calibration import load_calibration
from tale_ray.tasks.prompts import encode

TEXT = "t3 t4 t5 t6\nt7 t8\n\n  \nt9 t10 t11\n\n\nt5\n"


def decided(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: summary[name] for name in DECISIONS}


def without_seconds(summary: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(decided(summary)), object_hook=lambda each: {**each, "seconds": 0})  # type: ignore[no-any-return]


def test_plain_text_has_a_row_in_every_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    assert [row.prompt for row in load_calibration(str(path))] == ["t3 t4 t5 t6\nt7 t8", "t9 t10 t11", "t5"]


def test_json_lines_have_a_row_each(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "t3\\n\\nt4", "other": 1}\n\n{"text": " "}\n{"text": "t5"}\n')
    assert [row.prompt for row in load_calibration(str(path))] == ["t3\n\nt4", "t5"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b" \n\n ", "is empty: it holds text"),
        ("empty.jsonl", b'{"text": ""}\n', "is empty: it holds text"),
        ("bytes.txt", b"\xff\xfe\x00", "cannot be read"),
        ("broken.jsonl", b'{"text": "t"}\n{"text"', "line 2 is no JSON"),
        ("list.jsonl", b'["t"]\n', "line 1 has no text"),
        ("number.jsonl", b'{"text": 3}\n', "line 1 has no text"),
    ],
)
def test_files_that_hold_no_text(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=words):
        load_calibration(str(tmp_path / name))
    with pytest.raises(TaskError, match=r"cannot be read .*name a text file"):
        load_calibration(str(tmp_path / "missing.txt"))


def sleb_order(model: Any, rows: list[tuple[int, ...]], num_rounds: int) -> tuple[list[int], list[list[float]]]:
    """The plain loop: every round rebuilds the model without each layer left, one row at a time."""
    removed: list[int] = []
    by_round = []
    num_tokens = sum(len(row) - 1 for row in rows)
    for _ in range(num_rounds):
        left = [layer for layer in range(model.config.num_hidden_layers) if layer not in removed]
        found = []
        for layer in left:
            pruned = rebuild(model, {*removed, layer})
            found.append(math.exp(-sum(log_likelihood(pruned, row[:1], row[1:]) for row in rows) / num_tokens))
        by_round.append(found)
        removed.append(left[found.index(min(found))])
    return removed, by_round


def test_sleb_is_the_greedy_choice_of_a_plain_loop(material: Material, tmp_path: Path) -> None:
    """On the prompts of the search rows, which are the calibration text by default."""
    found = material.search(tmp_path / "run", "--strategy", "sleb", "--epsilon", "1", "--max-removed", "3")
    assert found.code == 0, found.err
    model = AutoModelForCausalLM.from_pretrained(material.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(material.model)
    asked = prepare_rows(TaskSection(task=str(material.task))).examples["search"]
    rows = [tuple(encode(tokenizer, example.messages)) for example in asked]
    order, by_round = sleb_order(model, rows, 3)
    assert show(tmp_path / "run")["rounds"][-1]["removed"] == order
    stored = RunReader(str(tmp_path / "run")).measurements()
    for measurement, expected in zip(stored, by_round, strict=True):
        assert [math.exp(value or 0) for value in measurement.values] == pytest.approx(expected, rel=1e-5)
        assert measurement.num_rows == 50


def test_calibration_text_decides_and_is_part_of_what_a_run_is(material: Material, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    options = ("--strategy", "sleb", "--epsilon", "1", "--max-removed", "2", "--calibration", path)
    assert material.search(tmp_path / "run", *options).code == 0
    model = AutoModelForCausalLM.from_pretrained(material.model).eval()
    rows = [(3, 4, 5, 6, 7, 8), (9, 10, 11)]  # a row of one token predicts nothing
    order, by_round = sleb_order(model, rows, 2)
    assert show(tmp_path / "run")["rounds"][-1]["removed"] == order
    (first, _) = RunReader(str(tmp_path / "run")).measurements()
    assert [math.exp(value or 0) for value in first.values] == pytest.approx(by_round[0], rel=1e-5)
    assert (first.num_rows, first.num_tokens) == (2, 9)
    path.write_text(TEXT + "\nt6 t7")
    refused = material.search(tmp_path / "run", *options)
    assert refused.code == 2
    assert "calibration: the run has" in refused.err
    moved = tmp_path / "moved.txt"
    moved.write_text(TEXT)
    assert command("resume", tmp_path / "run", "--calibration", moved).code == 0
    refused = material.search(tmp_path / "run", *options[:-2])
    assert refused.code == 2
    assert "asked for is null" in refused.err


def test_a_larger_limit_goes_on_but_not_with_another_block(material: Material, tmp_path: Path) -> None:
    for strategy in ("block_influence", "contiguous"):
        options = ("--strategy", strategy, "--epsilon", "1")
        assert material.search(tmp_path / strategy, *options, "--max-removed", "2").code == 0
        more = material.search(tmp_path / strategy, *options, "--max-removed", "3")
        assert more.code == (2 if strategy == "contiguous" else 0), more.err
        assert ("block: the run has 2, asked for is 3" in more.err) == (strategy == "contiguous")


@pytest.mark.ray
@pytest.mark.parametrize("strategy", ["sleb", "block_influence", "contiguous"])
def test_ray_and_this_process_decide_the_same(
    material: Material, ray_address: str, tmp_path: Path, strategy: str
) -> None:
    options: dict[str, Any] = {
        "model": material.model,
        "task": material.task,
        "strategy": strategy,
        "epsilon": "1",
        "max_removed": 3,
    }
    here = tale_ray.search(**options, local=True, run=tmp_path / "local")
    there = tale_ray.search(**options, address=ray_address, workers=2, run=tmp_path / "ray")
    assert len(here.summary["rounds"]) == 3
    assert without_seconds(there.summary) == without_seconds(here.summary)
    one, other = (RunReader(run.uri).measurements() for run in (here, there))
    assert [each.probe for each in one] == [each.probe for each in other]
    for first, second in zip(one, other, strict=True):
        assert first.values == pytest.approx(second.values, abs=1e-6)
