"""One search by the engine, in this process, with every unit that it scored and the time spent on scoring."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import tale_ray
from tale_ray.cluster.worker import Worker
from tale_ray.engine.streams import Node, final_node
from tale_ray.records import UnitResult, WorkUnit


@dataclass(frozen=True, slots=True)
class Recorded:
    """A finished search: what it says of itself, and its units."""

    summary: Mapping[str, Any]  # `show --json`
    results: tuple[UnitResult, ...]  # of baseline and rounds
    scorer_seconds: float  # in the scorer: without storage, scheduling and tokenising

    @property
    def seconds(self) -> float:
        """`seconds.search`: tokenising, prefix, baseline and storage are in it."""
        return float(self.summary["seconds"]["search"])

    @property
    def units(self) -> tuple[WorkUnit, ...]:
        """The units that were scored."""
        return tuple(result.unit for result in self.results)

    @property
    def layer_applications(self) -> int:
        """What the scorer counted."""
        return sum(result.layer_applications for result in self.results)

    @property
    def candidate_rows(self) -> int:
        """(candidate, row) pairs that were scored, without the baseline."""
        return sum(result.unit.candidate_rows for result in self.results if result.unit.candidates != (None,))

    @property
    def cells(self) -> dict[tuple[Node, int], bool]:
        """Whether the model without some layers answered a row (its position) correctly."""
        return {
            (final_node(result.unit.removed, candidate.layer), row): answer.correct
            for result in self.results
            for candidate in result.candidates
            for row, answer in zip(result.unit.rows, candidate.answers, strict=True)
        }

    @property
    def rounds(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(layers removed before, candidates) of every round that was scored, the rejected one too."""
        found = [*self.summary["rounds"], *([self.summary["rejected_round"]] if self.summary["rejected_round"] else [])]
        return [
            (tuple(each["removed"][:-1]), tuple(candidate["layer"] for candidate in each["candidates"]))
            for each in found
        ]


def search(options: Mapping[str, Any], run: Path) -> Recorded:
    """Search into a new folder and return what was done."""
    results: list[UnitResult] = []
    seconds: list[float] = []
    with _recording(results, seconds):
        summary = tale_ray.search(**options, run=str(run)).summary
    return Recorded(summary, tuple(results), sum(seconds))


@contextmanager
def _recording(results: list[UnitResult], seconds: list[float]) -> Iterator[None]:
    score = Worker.score

    def recorded(worker: Worker, unit: WorkUnit) -> UnitResult:
        started = time.perf_counter()
        result = score(worker, unit)
        if unit.split == "search":
            seconds.append(time.perf_counter() - started)
            results.append(result)
        return result

    with mock.patch.object(Worker, "score", recorded):
        yield
