"""A cluster that exists on paper: workers answer by a table, in any order, and fail when a seed says so.

`table_search` is the oracle: the search of the paper in plain lines on the same table.
"""

import hashlib
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from tale_ray.records import (
    CandidateAnswers,
    Example,
    Measurement,
    ModelInfo,
    Probe,
    PromptRow,
    RowAnswer,
    UnitResult,
    WorkUnit,
)
from tale_ray.search.executor import Questions, UnitDone, UnitFailed, WorkerEvent, WorkerJoined, WorkerLost
from tale_ray.search.instructions import Instruction, Submit
from tale_ray.search.scheduler import Scoring

MODEL = ModelInfo(num_layers=6, family="simulated", digest="0" * 64, dtype="float32", device="none", load_seconds=0.5)


@dataclass(frozen=True)
class Table:
    """Whether a model without some layers answers a row: a pure function of a seed. Fewer layers, fewer answers."""

    seed: int
    num_layers: int = 6
    ease: float = 0.8
    row_seconds: float = 0.01  # that a candidate takes

    def correct(self, row: int, removed: Collection[int]) -> bool:
        key = f"{self.seed}:{row}:{sorted(removed)}"
        draw = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
        return draw < self.ease - 0.04 * len(removed)

    def answer(self, row: int, removed: Collection[int]) -> RowAnswer:
        correct = self.correct(row, removed)
        prediction = "yes" if correct else ("no" if row % 3 else None)
        return RowAnswer(reply=str(prediction), prediction=prediction, correct=correct)

    def score(self, unit: WorkUnit, worker: str = "worker") -> UnitResult:
        candidates = tuple(
            CandidateAnswers(
                layer=layer,
                answers=tuple(self.answer(row, removed_by(unit, layer)) for row in unit.rows),
                seconds=self.row_seconds * len(unit.rows),
            )
            for layer in unit.candidates
        )
        applications = sum(self.num_layers - len(removed_by(unit, layer)) for layer in unit.candidates)
        return UnitResult(
            unit, candidates, applications * len(unit.rows), self.row_seconds * unit.candidate_rows, worker
        )


def measured(seed: int, probe: Probe) -> tuple[float, ...]:
    """A number for each layer of a probe: a pure function of a seed."""
    digests = (hashlib.sha256(f"{seed}:{probe}:{layer}".encode()).digest() for layer in probe.layers)
    return tuple(int.from_bytes(digest[:4], "big") / 2**32 for digest in digests)


def removed_by(unit: WorkUnit, layer: int | None) -> tuple[int, ...]:
    return unit.removed if layer is None else (*unit.removed, layer)


@dataclass
class SimulatedExecutor:
    """An executor on a table. `trouble` is the probability that a unit is lost with its worker or by an error."""

    table: Table
    num_workers: int = 2
    trouble: float = 0.0
    seed: int = 0
    poison: Collection[int] = ()  # rows whose units always fail
    scored: list[WorkUnit] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)  # that were measured
    units_per_worker: int = 2
    _queue: list[tuple[str, WorkUnit]] = field(default_factory=list)
    _absent: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._absent = [f"worker-{number}" for number in range(self.num_workers)]

    def connect(self) -> None: ...

    def load(self) -> ModelInfo:
        return MODEL

    def encode(self, examples: Sequence[Example]) -> tuple[PromptRow, ...]:
        return tuple(PromptRow(token_ids=(1, 2, 3), target=example.target) for example in examples)

    def measure(self, probe: Probe, rows: Sequence[tuple[int, ...]]) -> Measurement:
        self.probes.append(probe)
        return Measurement(probe, measured(self.table.seed, probe), len(rows), sum(map(len, rows)), 0.0)

    def share(self, questions: Questions) -> None: ...

    def submit(self, worker: str, unit: WorkUnit) -> None:
        assert worker not in self._absent, "a unit was sent to a worker that is gone"
        self._queue.append((worker, unit))

    def poll(self, timeout_seconds: float) -> tuple[WorkerEvent, ...]:
        if self._absent and (not self._queue or self._random.random() < 0.5):
            return (WorkerJoined(self._absent.pop()),)
        worker, unit = self._queue.pop(self._random.randrange(len(self._queue)))
        if set(unit.rows) & set(self.poison):
            return (UnitFailed(worker, unit, "Traceback ...\nRuntimeError: the row is poison"),)
        draw = self._random.random()
        if draw < self.trouble / 2:
            self._queue = [(other, queued) for other, queued in self._queue if other != worker]
            self._absent.append(worker)
            return (WorkerLost(worker, "it died"),)
        if draw < self.trouble:
            return (UnitFailed(worker, unit, "Traceback ...\nOSError: a passing cloud"),)
        self.scored.append(unit)
        return (UnitDone(worker, self.table.score(unit, worker)),)

    def close(self) -> None: ...


def examples(count: int, prefix: str = "row") -> tuple[Example, ...]:
    return tuple(
        Example(
            digest=hashlib.sha256(f"{prefix}{number}".encode()).hexdigest(),
            messages=({"role": "user", "content": f"{prefix} {number}"},),
            reply="yes",
            target="yes",
        )
        for number in range(count)
    )


def scoring(num_rows: int = 10, candidates: tuple[int | None, ...] = (0, 1, 2, 3)) -> Scoring:
    return Scoring(scope="round-0001", split="search", removed=(), candidates=candidates, num_rows=num_rows)


def submitted(instructions: list[Instruction]) -> list[Submit]:
    return [each for each in instructions if isinstance(each, Submit)]


@dataclass(frozen=True)
class TableRound:
    """A round as the oracle sees it."""

    removed_layer: int | None
    removed: tuple[int, ...]
    correct: int
    candidates: tuple[tuple[int | None, int], ...]


def table_search(
    table: Table, num_rows: int, epsilon: str = "0.08", max_removed: int | None = None
) -> tuple[list[TableRound], TableRound | None, str]:
    """The committed rounds, the rejected one, and why the search stopped."""

    def count(removed: Collection[int]) -> int:
        return sum(table.correct(row, removed) for row in range(num_rows))

    baseline = count(())
    rounds = [TableRound(None, (), baseline, ((None, baseline),))]
    if baseline == 0:
        return rounds, None, "baseline_zero"
    while True:
        removed = rounds[-1].removed
        if max_removed is not None and len(removed) >= max_removed:
            return rounds, None, "max_removed"
        if len(removed) == table.num_layers - 1:
            return rounds, None, "one_layer_left"
        counts = [(layer, count((*removed, layer))) for layer in range(table.num_layers) if layer not in removed]
        best = max(correct for _, correct in counts)
        winner = min(layer for layer, correct in counts if correct == best)
        found = TableRound(winner, (*removed, winner), best, tuple(counts))
        if Fraction(best) < baseline - Fraction(epsilon) * num_rows:
            return rounds, found, "below_floor"
        rounds.append(found)
