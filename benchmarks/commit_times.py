"""What it takes to make a unit and a round durable on local disk."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tale_ray.records import CandidateAnswers, CandidateScore, Round, RowAnswer, Score, UnitResult, Work, WorkUnit
from tale_ray.store.run import RunWriter
from tale_ray.store.tables import AnswerSheet

_ANSWER = RowAnswer(reply="yes", prediction="yes", correct=True)
_SCOPE = "round-0001"


def commit_times(repeats: int = 30, layers: int = 32, unit_rows: int = 8, rows: int = 550) -> dict[str, float]:
    """Return medians and extremes in milliseconds: of writing a unit, and of all that a round's commit writes."""
    digests = [f"{row:064x}" for row in range(rows)]
    unit_seconds, round_seconds = [], []
    with (
        tempfile.TemporaryDirectory(dir=Path.cwd()) as folder,  # that of the system may be in memory
        RunWriter.claim(str(Path(folder) / "run")) as writer,
    ):
        writer._run = "timed"  # the name that run.json would give it
        writer.start_attempt({}, {})
        parent = ""
        for number in range(repeats):
            result = _result(number, layers, unit_rows)
            unit_seconds.append(_timed(lambda result=result: writer.write_unit(result, digests[:unit_rows])))
            finished = _round(number, layers, rows)
            sheet = AnswerSheet(
                _SCOPE, "search", tuple(digests), ("yes",) * rows, (_ANSWER,) * rows, ((layers, 3),) * rows
            )

            def commit(finished: Round = finished, sheet: AnswerSheet = sheet) -> None:
                writer.write_answers(sheet)
                writer.write_round(finished, Work(), parent)
                writer.update_attempt(search_seconds=1.0)

            round_seconds.append(_timed(commit))
    return {
        "unit_ms": 1000 * statistics.median(unit_seconds),
        "most_unit_ms": 1000 * max(unit_seconds),
        "round_ms": 1000 * statistics.median(round_seconds),
        "most_round_ms": 1000 * max(round_seconds),
        "repeats": repeats,
    }


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _result(number: int, layers: int, rows: int) -> UnitResult:
    unit = WorkUnit(number, _SCOPE, "search", (), tuple(range(layers)), tuple(range(rows)))
    answers = tuple(CandidateAnswers(layer, (_ANSWER,) * rows, 0.1) for layer in unit.candidates)
    return UnitResult(unit, answers, 1, 1.0, "worker-0")


def _round(number: int, layers: int, rows: int) -> Round:
    scores = tuple(CandidateScore(layer, rows, rows, 0, "exact", 1.0) for layer in range(layers))
    return Round(number, layers - 1, tuple(range(number + 1)), Score(rows, rows, 0), scores, True)
