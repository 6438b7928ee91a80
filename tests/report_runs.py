"""A run with one of everything that a report shows, its replies written by somebody who means harm. No model is run."""

import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tale_ray.config import ModelSection, SearchConfig, StorageSection, StrategySection, TaskSection
from tale_ray.records import CandidateScore, Round, RowAnswer, Score, Work
from tale_ray.results.statistics import recommend
from tale_ray.search.driver import held_out_scope
from tale_ray.search.history import History
from tale_ray.store import AnswerSheet, Manifest, RunWriter
from tale_ray.tasks.data import load_rows
from tale_ray.tasks.spec import load_task
from tale_ray.tasks.splits import digest_rows, row_digest

NUM_LAYERS = 12
NUM_ROWS = {"search": 100, "select": 40, "test": 60}
TASK = "boolean_synthetic"
EVIL = (
    "<script>document.title='owned'</script><img src=http://127.0.0.1:9/x onerror=alert(1)>",
    "</pre></details></main><style>body{display:none}</style>&lt;b&gt;",
    "{{ 7 * 7 }}{% raw %}\x00\x1b[31mred\x07\u202eevil\r\n\ud7ff\ufffe\x85",
    "long " * 20_000,  # 100 kB
    "]]></svg><svg onload=alert(2)>",
)
LATENCY = {
    "batches": [
        {
            "batch_size": 8,
            "first_token": {
                "seconds": {
                    "base": {"median": 0.125, "low": 0.12, "high": 0.13},
                    "pruned": {"median": 0.1, "low": 0.09, "high": 0.11},
                },
                "saved": {"measured": {"median": 0.2, "low": 0.1, "high": 0.3}},
            },
            "decode": None,
        }
    ],
    "base": {"tokens_per_second": 80.0},
    "pruned": {"tokens_per_second": 100.0},
    "device": "cpu",
    "removed": [3, 7],
}
TRANSFER: dict[str, Any] = {
    "searched_on": [{"name": "a", "removed": [7, 3]}, {"name": "b", "removed": []}],
    "tested_on": [{"name": "a", "left_out": 0}, {"name": "b", "left_out": 1}],
    "num_tests": 2,
    "scores": [
        {
            "searched_on": searched,
            "tested_on": tested,
            "is_own": searched == tested,
            "baseline": {"correct": 50, "total": 100},
            "pruned": {"correct": correct, "total": 100, "invalid": 100 - 2 * correct if correct < 50 else 0},
            "difference_interval": [(correct - 60) / 100, (correct - 40) / 100],
            "p_value_holm": p_value,
        }
        for searched, tested, correct, p_value in (("a", "a", 60, 0.2), ("a", "b", 35, 0.0004), ("b", "b", 50, 1.0))
    ],
}


def _place(layer: int | None, bits: float, gain: float | None) -> dict[str, Any]:
    ends = {"interval": [bits - 0.05, bits + 0.05], "gain_interval": None if gain is None else [gain - 0.1, gain + 0.1]}
    return {"layer": layer, "bits": bits, "gain": gain, "accuracy": 0.5, "shuffled": -0.003, **ends}


INFORMATION = {
    "pick": "selected",
    "round": 2,
    "removed": [3, 7],
    "task": "boolean_synthetic",
    "model": "bundled",
    "rows": {"count": 600, "splits": {"select": 240, "test": 360}, "repeated": 0, "rare": 0},
    "labels": {"<i>True</i>": 310, "False": 290},
    "entropy": 0.9998,
    "full": [_place(None, 0.0, None), *(_place(layer, 0.06 * (layer + 1), 0.06) for layer in range(NUM_LAYERS))],
    "pruned": [
        _place(None, 0.0, None),
        *(_place(layer, 0.05 * (layer + 1), 0.05) for layer in range(NUM_LAYERS) if layer not in (3, 7)),
    ],
    "controls": {"shuffled": [-0.01, 0.004], "random": [-0.002, 0.001]},
    "correlation": {
        "spearman": -0.45,
        "p_value": 0.14,
        "interval": [-0.9, 0.2],
        "reason": None,
        "num_exact": 5,
        "num_bounded_out": 7,
        "layers": [],
    },
}


SYNERGY = {
    "regimes": [
        {
            "regime": name,
            "seeds": [
                {
                    **{"seed": 0, "correct": correct, "total": 200, "num_layers": layers},
                    **{"trainable_parameters": parameters, "training_seconds": seconds},
                }
            ],
        }
        for name, correct, layers, parameters, seconds in (
            ("base", 160, 12, 0, 0.0),
            ("ft", 180, 12, 408_576, 172.04),
        )
    ],
    "comparisons": [
        {
            "first": "ft",
            "second": "base",
            "seed": 0,
            "difference": 0.1,
            "difference_interval": [0.05, 0.15],
            "wins": 24,
            "losses": 4,
            "p_value_holm": 0.0002,
        }
    ],
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the run is to be like."""

    seed: int = 0
    rounds: int = 5  # committed
    splits: tuple[str, ...] = ("search", "select", "test")
    accuracies: tuple[float, ...] = (0.8, 0.8, 0.78, 0.75, 0.7, 0.6)  # on held-out rows, by round
    model: str = "bundled"
    model_digest: str = "0" * 64
    strategy: StrategySection = field(default_factory=StrategySection)
    first_row: int = 0  # of the task, from which rows are taken


def write_report_run(path: Path | str, shape: Shape = Shape(), *, how: str = "finished") -> None:
    """Write the run: two attempts, `rounds` committed rounds and a rejected one, answers on held-out rows."""
    dice = random.Random(shape.seed)
    rows = _digests(shape)
    history = _history(shape, dice)
    with RunWriter.claim(str(path)) as writer:
        writer.write_manifest(_manifest(shape, rows))
        writer.start_attempt({"workers": 2}, {})
        writer.update_attempt(how="interrupted", search_seconds=1.5, load_seconds=0.5, retries=2, wasted_rows=7)
    with RunWriter.claim(str(path)) as writer:
        writer.start_attempt({"workers": 2}, {})
        parent = ""
        for entry in (*history.rounds, *([history.rejected] if history.rejected and how == "finished" else [])):
            parent = writer.write_round(entry, Work(3, 1_000, 20_000), parent).digest
        if how == "finished":
            _write_held_out(writer, history, rows, shape, dice)
            writer.write_result("latency", LATENCY)
            writer.write_result("transfer", TRANSFER)
            writer.write_result("information", INFORMATION)
            writer.write_result("synergy", SYNERGY)
        error = "a worker said <b>no</b>" if how == "failed" else None
        writer.update_attempt(how=how, error=error, search_seconds=2.25, load_seconds=0.25)


def _digests(shape: Shape) -> dict[str, tuple[str, ...]]:
    digests = [row_digest(row) for row in load_rows(load_task(TASK), None)[shape.first_row :]]
    ends = {"search": (0, 100), "select": (100, 140), "test": (140, 200)}
    return {split: tuple(digests[slice(*ends[split])]) for split in shape.splits}


def _manifest(shape: Shape, rows: dict[str, tuple[str, ...]]) -> Manifest:
    config = SearchConfig(
        model=ModelSection(model=shape.model),
        task=TaskSection(task=TASK),
        strategy=shape.strategy,
        storage=StorageSection(run="r"),
    )
    spec = load_task(TASK)
    return Manifest(
        run="boolean-123",
        created="2026-01-02T03:04:05+00:00",
        config=json.loads(json.dumps(config.to_json())),
        identity={},
        model={"digest": shape.model_digest, "dtype": "float32", "num_layers": NUM_LAYERS},
        task=json.loads(json.dumps({"name": spec.name, **spec.identity()})),
        rows={split: {"count": len(found), "digest": digest_rows(found)} for split, found in rows.items()},
        tokens={},
        versions={"tale_ray": "0.1.0"},
    )


def _history(shape: Shape, dice: random.Random) -> History:
    history = History(num_layers=NUM_LAYERS)
    score = Score(80, 100, 1)
    history = history.with_round(Round(0, None, (), score, (CandidateScore(None, 80, 100, 1, "exact", 0.1),), True))
    for number in range(1, shape.rounds + 2):
        layers = list(history.surviving)
        counts = {layer: dice.randint(40, 84) for layer in layers}
        winner = max(layers, key=lambda layer: (counts[layer], -layer))
        best = 30 if number > shape.rounds else counts[winner]
        candidates = tuple(
            CandidateScore(layer, best if layer == winner else counts[layer] // 2, 100, 2, "exact", 0.1)
            if layer == winner or dice.random() < 0.4
            else CandidateScore(layer, counts[layer] // 3, 41, 1, "bounded_out", 0.1)
            for layer in layers
        )
        removed = (*history.removed, winner)
        entry = Round(number, winner, removed, Score(best, 100, 2), candidates, number <= shape.rounds)
        history = history.with_round(entry)
    return history


def _sheet(scope: str, split: str, digests: tuple[str, ...], accuracy: float, dice: random.Random) -> AnswerSheet:
    answers = tuple(
        RowAnswer(EVIL[number % len(EVIL)] if number % 3 else f"Answer {number}", "True", dice.random() < accuracy)
        for number in range(len(digests))
    )
    invalid = replace(answers[0], prediction=None, correct=False)
    return AnswerSheet(scope, split, digests, ("<i>True</i>",) * len(digests), (invalid, *answers[1:]))


def _write_held_out(
    writer: RunWriter, history: History, rows: dict[str, tuple[str, ...]], shape: Shape, dice: random.Random
) -> None:
    def score(split: Any, entry: Round) -> Score:
        scope = held_out_scope(split, entry.number)
        sheet = writer.reader.answers(scope)
        if sheet is None:
            sheet = _sheet(scope, split, rows[split], shape.accuracies[entry.number], dice)
            writer.write_answers(sheet)
        return sheet.score

    def result(entry: Round, found: Score) -> dict[str, Any]:
        counts = {"correct": found.correct, "total": found.total, "invalid": found.invalid}
        return {"round": entry.number, "removed": list(entry.removed), **counts}

    picks = history.picks
    if "select" in rows:
        scores = [score("select", entry) for entry in history.rounds]
        by_round = [result(entry, found) for entry, found in zip(history.rounds, scores, strict=True)]
        chosen = recommend(scores)
        writer.write_result("selected", {**by_round[chosen], "rounds": by_round})
        picks = {**picks, "selected": history.rounds[chosen]}
    if "test" in rows:
        writer.write_result("test", {name: result(entry, score("test", entry)) for name, entry in picks.items()})
