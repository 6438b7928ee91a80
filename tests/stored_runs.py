"""Runs as the store writes them, with one of everything; and what lies in their folders."""

import json
from dataclasses import replace
from pathlib import Path

from tale_ray.config import ModelSection, SearchConfig, StorageSection, TaskSection
from tale_ray.records import CandidateAnswers, CandidateScore, Round, RowAnswer, Score, UnitResult, Work, WorkUnit
from tale_ray.store import AnswerSheet, Manifest, RunReader, RunWriter, StoredRound
from tale_ray.store.files import Clock
from tale_ray.store.tables import digest_round

CONFIG = SearchConfig(
    model=ModelSection(model="bundled"), task=TaskSection(task="boolean_synthetic"), storage=StorageSection(run="r")
)
MANIFEST = Manifest(
    run="boolean-123",
    created="2026-01-02T03:04:05+00:00",
    config=json.loads(json.dumps(CONFIG.to_json())),  # lists, as they are read back
    identity={"seed": 0},
    model={"digest": "d", "dtype": "float32", "num_layers": 12},
    task={"name": "boolean"},
    rows={"search": {"count": 4, "digest": "e"}},
    tokens={"search": "f"},
    versions={"tale_ray": "0.1.0"},
)


def make_round(number: int, *, committed: bool = True, correct: int = 3) -> Round:
    removed = tuple(range(10, 10 + number))
    layer = removed[-1] if removed else None
    rival = () if layer is None else (CandidateScore(2, 1, 2, 0, "bounded_out", 0.125),)
    winner = CandidateScore(layer, correct, 4, 1, "exact", 0.25)
    return Round(number, layer, removed, Score(correct, 4, 1), (*rival, winner), committed)


def make_unit(number: int = 17, scope: str = "round-0001") -> UnitResult:
    unit = WorkUnit(number, scope, "search", (), (2, 10), (0, 3))
    right, wrong = RowAnswer("True.", "True", True), RowAnswer("hm", None, False)
    candidates = (CandidateAnswers(2, (right, wrong), 0.5), CandidateAnswers(10, (right, right), 0.25))
    return UnitResult(unit, candidates, 44, 0.75, "worker-1")


SHEET = AnswerSheet(
    "round-0001", "search", ("a", "b"), ("True", "False"), (RowAnswer("é\n", None, False), RowAnswer("", "False", True))
)


def write_run(path: Path | str, rounds: int = 3) -> list[StoredRound]:
    """A run of `rounds` committed rounds, with one of everything."""
    with RunWriter.claim(str(path)) as writer:
        writer.write_manifest(MANIFEST)
        writer.start_attempt({"workers": 2}, {"torch": "2"})
        stored: list[StoredRound] = []
        for number in range(rounds):
            stored.append(writer.write_round(make_round(number), Work(1, 4, 44), stored[-1].digest if stored else ""))
        writer.write_unit(make_unit(scope=f"round-{rounds:04d}"), ["a", "b"])
        writer.write_answers(SHEET)
        writer.write_result("test", {"best": {"correct": 3}})
        writer.update_attempt(how="interrupted")
    return stored


def link(round_: Round, parent: str = "", attempt: int = 1) -> StoredRound:
    return StoredRound(round_, attempt, Work(), digest_round(round_, parent), parent)


def files_of(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.name[0] != "_")


def contents(run: Path) -> dict[str, bytes]:
    """What a reader sees: lease and temporary files apart."""
    return {name: (run / name).read_bytes() for name in files_of(run) if name != "lease.json"}


WRITES = {
    "manifest": lambda writer: writer.write_manifest(replace(MANIFEST, run="second")),
    "attempt": lambda writer: writer.start_attempt({}, {}),
    "unit": lambda writer: writer.write_unit(make_unit(18, "round-0003"), ["a", "b"]),
    "round": lambda writer: writer.write_round(make_round(3), Work(), RunReader(writer.reader.uri).rounds()[-1].digest),
    "answers": lambda writer: writer.write_answers(replace(SHEET, targets=("x", "y"))),
    "result": lambda writer: writer.write_result("test", {"best": 1}),
}


class Weather:
    """A clock whose sleeps are noted and take no time."""

    def __init__(self) -> None:
        self.seconds = 1_000_000.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.seconds, self.sleep)
