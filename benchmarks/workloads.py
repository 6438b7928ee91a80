"""What is searched to compare the engine with the published procedure: frozen, and asked as the product asks it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import random_models
import torch

from tale_ray.api import make_config
from tale_ray.attempt.execution import encode_questions
from tale_ray.attempt.rows import prepare_rows
from tale_ray.cluster.local import LocalExecutor
from tale_ray.model.load import load_model
from tale_ray.search.executor import Questions

EPSILON = "0.08"
ModelName: TypeAlias = Literal["bundled", "smollm2", "random"]

# The answer is in the last word of the reply, and about every other word is right: each row is a toss of a coin that
# depends on all of its new tokens.
LONG_REPLIES = """\
name: long_replies
source: {path: json, data_files: rows.jsonl}
messages:
  - {role: user, content: "{{ question }}"}
reply: "{{ answer }}"
target: "{{ answer }}"
answer: {type: regex, pattern: '(t)\\d*[0-4]\\W*$'}
max_new_tokens: 64
"""
_LAYERS, _HIDDEN_SIZE, _QUESTIONS, _WORDS = 12, 192, 64, 24  # of the random model and what it is asked


class Missing(Exception):
    """A model or rows that a workload needs are not on this machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One search, and what the engine is to reach on it."""

    name: str
    title: str
    model: ModelName
    task: str
    rows: int
    least_ratio: float  # published seconds by ours
    least_share: float | None = None  # of the GEMM rate on the required FLOPs
    max_removed: int | None = None  # rounds at most; None: to the end
    shots: int = 0
    seed: int = 0  # of the rows: the full model answers some of them


@dataclass(frozen=True, slots=True)
class Places:
    """Where models and rows are on this machine."""

    smollm2: Path
    data_root: Path | None
    folder: Path  # for what is made on the spot


WORKLOADS = (
    Workload(
        name="bundled",
        title="bundled model, boolean_synthetic, 200 rows, whole search",
        model="bundled",
        task="boolean_synthetic",
        rows=200,
        least_ratio=25,
        least_share=0.45,
    ),
    Workload(
        name="smollm2_1",
        title="SmolLM2-135M, boolean_expressions, 24 rows, round 1",
        model="smollm2",
        task="boolean_expressions",
        rows=24,
        max_removed=1,
        least_ratio=12,
        least_share=0.70,
    ),
    Workload(
        name="smollm2_4",
        title="SmolLM2-135M, boolean_expressions, 24 rows, 4 rounds",
        model="smollm2",
        task="boolean_expressions",
        rows=24,
        max_removed=4,
        least_ratio=15,
    ),
    Workload(
        name="shots",
        title="SmolLM2-135M, arc_easy, 5 shots, 8 rows, round 1",
        model="smollm2",
        task="arc_easy",
        rows=8,
        shots=5,
        seed=1,
        max_removed=1,
        least_ratio=40,
    ),
    Workload(
        name="long_replies",
        title="random Llama of 12 layers and 5.4 M parameters, 64 new tokens, 16 rows, round 1",
        model="random",
        task="long_replies",
        rows=16,
        max_removed=1,
        least_ratio=60,
    ),
)


def search_options(workload: Workload, places: Places, rows: int | None = None) -> dict[str, Any]:
    """Return the options of `tale_ray.search` for a workload; `rows` replaces its number of rows.

    Raises:
        Missing: its model or its rows are not here.
    """
    options: dict[str, Any] = {
        "task": workload.task,
        "rows": rows or workload.rows,
        "splits": "search=0.5",  # no test rows: scoring them is not part of what is timed
        "epsilon": EPSILON,
        "seed": workload.seed,
        "max_removed": workload.max_removed,
        "local": True,
    }
    if workload.shots:
        options["shots"] = workload.shots
    match workload.model:
        case "bundled":
            options["model"] = "bundled"
        case "smollm2":
            if not (places.smollm2 / "config.json").is_file():
                raise Missing("SmolLM2 is not there: make .cache/smollm2/config.json prepares it")
            if places.data_root is None:
                raise Missing("real rows are not there: TALE_RAY_DATA_ROOT names a mirror of hub data sets")
            options.update(model=str(places.smollm2), data_root=str(places.data_root))
        case "random":
            options.update(_made(places.folder))
    return options


def _made(folder: Path) -> Mapping[str, str]:
    """Write the random model and its task, unless they are there, and return where they are."""
    task = folder / "long_replies.yaml"
    if not task.exists():
        model = random_models.random_llama(_LAYERS, _HIDDEN_SIZE)
        random_models.save(model, folder / "random")
        asked = random_models.random_words(_QUESTIONS, _WORDS, torch.Generator().manual_seed(0))
        rows = [{"question": " ".join(f"t{word}" for word in words), "answer": "t"} for words in asked]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        task.write_text(LONG_REPLIES, encoding="utf-8")
    return {"model": str(folder / "random"), "task": str(task)}


def load(options: Mapping[str, Any]) -> tuple[Any, Any, Questions]:
    """Return model, tokenizer and questions of a search, prepared by the product's own code."""
    config = make_config(**options)
    prepared = prepare_rows(config.task)
    executor = LocalExecutor(config.model, config.dtype, config.resources)
    executor.connect()
    info = executor.load()
    questions = encode_questions(executor, prepared, info)
    executor.close()
    own = load_model(config.model, config.dtype)
    return own.model, own.tokenizer, questions
