"""Whole searches on real models against the oracle: every decision and every count of every candidate.

The oracle renders prompts with the tokenizer's own chat template, rebuilds a new model for every candidate, runs one
row at a time without padding or cache, and reads replies by itself.
"""

import os
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import OracleSearch, oracle_replies, oracle_search
from transformers import AutoModelForCausalLM, AutoTokenizer

import tale_ray
from tale_ray.api import Run
from tale_ray.attempt.rows import prepare_rows
from tale_ray.config import TaskSection
from tale_ray.engine.budget import row_cost
from tale_ray.model.digest import model_folder

BUNDLED_ROWS = int(os.environ.get("TALE_RAY_ORACLE_ROWS", "40"))  # `make test-oracle` takes 120
SEARCH: dict[str, Any] = {"task": "boolean_synthetic", "rows": BUNDLED_ROWS, "splits": "search=0.5", "exhaustive": True}
SMOLLM2_ROWS = 12
SMOLLM2 = Path(os.environ.get("TALE_RAY_SMOLLM2", ".cache/smollm2"))


class Counter:
    """How many of the first rows of boolean_synthetic a model answers without some layers: the slow, plain way."""

    def __init__(self, folder: str, num_rows: int) -> None:
        self.num_rows = num_rows
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        examples = prepare_rows(TaskSection(task="boolean_synthetic", rows=num_rows)).examples["search"]
        self.targets = [example.target for example in examples]
        self.prompts = [
            self.tokenizer.apply_chat_template(
                [dict(message) for message in example.messages], add_generation_prompt=True, return_dict=False
            )
            for example in examples
        ]
        self.count = cache(self._count)

    def __call__(self, removed: Collection[int]) -> int:
        return self.count(frozenset(removed))

    @torch.inference_mode()
    def _count(self, removed: frozenset[int]) -> int:
        replies = oracle_replies(self.model, self.tokenizer, removed, self.prompts, 1)
        words = [re.search(r"\b(true|false)\b", reply.lower()) for reply in replies]
        pairs = zip(words, self.targets, strict=True)
        return sum(word is not None and word.group() == target.lower() for word, target in pairs)


@pytest.fixture(scope="module")
def bundled() -> tuple[str, OracleSearch, Counter]:
    folder = str(model_folder("bundled"))
    counter = Counter(folder, BUNDLED_ROWS)
    return folder, oracle_search(counter, 12, BUNDLED_ROWS), counter


def found(run: Run) -> OracleSearch:
    """A run in the oracle's form."""
    summary = run.summary

    def counts(entry: dict[str, Any]) -> dict[int, int]:
        assert all(each["status"] == "exact" for each in entry["candidates"])
        return {each["layer"]: each["correct"] for each in entry["candidates"]}

    rejected = summary["rejected_round"]
    return OracleSearch(
        total=summary["baseline"]["total"],
        baseline=summary["baseline"]["correct"],
        rounds=[(entry["removed_layer"], counts(entry)) for entry in summary["rounds"]],
        rejected=counts(rejected) if rejected else None,
        stop=summary["stop_reason"],
        best=summary["best"]["removed"],
        bsba=summary["bsba"]["removed"],
        final=summary["final"]["removed"],
    )


def one_row_bytes(model: Any, longest: int) -> int:
    return row_cost(model).sweep_bytes(longest, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("batch_rows", [1, 7, None])
def test_bundled_in_process(bundled: tuple[str, OracleSearch, Counter], tmp_path: Path, batch_rows: int | None) -> None:
    folder, oracle, counter = bundled
    batch_bytes = (batch_rows or BUNDLED_ROWS) * one_row_bytes(counter.model, max(map(len, counter.prompts)))
    run = tale_ray.search(
        model=folder,
        **SEARCH,
        local=True,
        batch_bytes=batch_bytes,
        run=str(tmp_path / "run"),
    )
    assert found(run) == oracle
    assert oracle.rounds, "a search that removes nothing shows little"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_bundled_on_ray(
    bundled: tuple[str, OracleSearch, Counter], ray_address: str, tmp_path: Path, workers: int
) -> None:
    folder, oracle, _ = bundled
    run = tale_ray.search(
        model=folder,
        **SEARCH,
        address=ray_address,
        workers=workers,
        run=str(tmp_path / "run"),
    )
    assert found(run) == oracle


@pytest.mark.slow
@pytest.mark.skipif(not (SMOLLM2 / "config.json").exists(), reason="make smollm2 prepares this model")
def test_smollm2_round_1(tmp_path: Path) -> None:
    counter = Counter(str(SMOLLM2), SMOLLM2_ROWS)
    run = tale_ray.search(
        model=str(SMOLLM2),
        task="boolean_synthetic",
        rows=SMOLLM2_ROWS,
        splits="search=0.5",
        max_removed=1,
        exhaustive=True,
        local=True,
        run=str(tmp_path / "run"),
    )
    assert found(run) == oracle_search(counter, 30, SMOLLM2_ROWS, max_removed=1)
