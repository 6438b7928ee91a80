"""The order of one attempt: what is refused before anything is scored."""

import json
from pathlib import Path

import pytest
from folders import Material
from folders import material_fixture as material_fixture

from tale_ray.attempt.rows import prepare_rows
from tale_ray.config import TaskSection
from tale_ray.store.reader import RunReader


@pytest.fixture
def task_with_a_long_row(material: Material, tmp_path: Path) -> Path:
    """The last row has more tokens than the model has positions, and is a test row."""
    spec = material.task.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (material.task.parent / "rows.jsonl").read_text().splitlines()[:20]]
    for number in range(100):
        long = {**rows[0], "question": f"{number} " + rows[0]["question"] * 200}
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, long])))
        (tmp_path / "task.yaml").write_text(spec)
        examples = prepare_rows(TaskSection(task=str(tmp_path / "task.yaml"))).examples
        if any(len(example.messages[0]["content"]) > 1000 for example in examples["test"]):
            return tmp_path / "task.yaml"
    raise AssertionError("no such row fell into the test split")


def test_a_test_row_that_is_too_long_is_refused_before_the_search(
    material: Material,
    task_with_a_long_row: Path,
    tmp_path: Path,
) -> None:
    outcome = material.search(tmp_path / "run", "--task", task_with_a_long_row)
    assert outcome.code == 2
    assert "positions" in outcome.err
    assert RunReader(str(tmp_path / "run")).is_empty()


def test_a_user_is_told_how_prompts_were_made(material: Material, tmp_path: Path) -> None:
    outcome = material.search(tmp_path / "run", "--max-removed", "0")
    assert "note: the tokenizer has no chat template" in outcome.err
