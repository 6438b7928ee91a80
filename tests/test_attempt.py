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


def test_rows_for_training_are_kept_apart_and_stored(material: Material, tmp_path: Path) -> None:
    splits = {"search": "0.4", "select": "0.1", "test": "0.2", "finetune": "0.25"}
    prepared = prepare_rows(TaskSection(task=str(material.task), splits=splits))  # type: ignore[arg-type]
    assert prepared.counts == {"search": 40, "select": 10, "test": 20, "finetune": 25}
    digests = [{example.digest for example in examples} for examples in prepared.splits.values()]
    assert len(set.union(*digests)) == sum(map(len, digests)) == 95
    run = tmp_path / "run"
    asked = ",".join(f"{name}={share}" for name, share in splits.items())
    assert material.search(run, "--splits", asked, "--max-removed", "0").code == 0
    assert RunReader(str(run)).manifest().rows["finetune"]["count"] == 25
    fewer = material.search(run, "--splits", asked.replace("0.25", "0.2"), "--max-removed", "1")
    assert fewer.code == 2
    assert "keeps other rows apart for training: the run has 25" in fewer.err
