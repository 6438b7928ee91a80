"""Searches with one real worker and with two, beside what the simulation says of them.

The simulation is given the times of the units of the run with one worker, the answers found in it, and what that run
took before its first unit; nothing of the run with two.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import click
from simulated import Costs, Plan, Searched, Workload, simulate
from unit_times import UnitTimes, fit_unit_times

import tale_ray
from tale_ray.config import StrategySection
from tale_ray.records import UnitResult
from tale_ray.store.run import RunWriter

MOST_DIFFERENCE = 0.10
_COMMIT = ("write_answers", "write_round", "drop_partials", "update_attempt")


@dataclass(slots=True)
class Observed:
    """A real search."""

    summary: dict[str, Any] = field(default_factory=dict)
    results: list[UnitResult] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)  # of units: when the driver began to write them
    write_seconds: list[float] = field(default_factory=list)  # of units
    commit_seconds: float = 0.0  # of all else that was written
    committed_at: float = 0.0

    @property
    def seconds(self) -> float:
        """`seconds.search`."""
        return float(self.summary["seconds"]["search"])

    @property
    def setup_seconds(self) -> float:
        """From the first worker's having loaded to the first unit: tokenising, and giving out the rows."""
        first = self.ends[0] - self.results[0].seconds
        return max(0.0, self.seconds - (self.committed_at - first))

    @property
    def gap_seconds(self) -> float:
        """Between two units of one worker that follow each other, in the median: the call itself."""
        pairs = zip(self.results, self.results[1:], self.ends, self.ends[1:], strict=False)
        gaps = [
            end - before - late.seconds for early, late, before, end in pairs if early.unit.scope == late.unit.scope
        ]
        return max(0.0, statistics.median(gaps)) if gaps else 0.0

    @property
    def costs(self) -> Costs:
        """What the driver's writing took."""
        rounds = len({result.unit.scope for result in self.results})
        return Costs(unit_write=statistics.median(self.write_seconds), round_commit=self.commit_seconds / rounds)

    def correct(self) -> Callable[[int, tuple[int, ...]], bool]:
        """Return the table of all answers."""
        table: dict[tuple[int, tuple[int, ...]], bool] = {}
        for result in self.results:
            for candidate in result.candidates:
                removed = result.unit.removed if candidate.layer is None else (*result.unit.removed, candidate.layer)
                for row, answer in zip(result.unit.rows, candidate.answers, strict=True):
                    table[row, removed] = answer.correct
        return lambda row, removed: table[row, removed]


@contextmanager
def _observing() -> Iterator[Observed]:
    """Note what the driver writes; it runs in this process, the workers do not."""
    found = Observed()
    write_unit = RunWriter.write_unit

    def unit(writer: RunWriter, result: UnitResult, digests: Any) -> None:
        started = time.monotonic()
        write_unit(writer, result, digests)
        found.results.append(result)
        found.ends.append(started)
        found.write_seconds.append(time.monotonic() - started)

    def other(name: str) -> Callable[..., Any]:
        method = getattr(RunWriter, name)

        def write(*arguments: Any, **named: Any) -> Any:
            started = time.monotonic()
            try:
                return method(*arguments, **named)
            finally:
                if found.results:
                    found.commit_seconds += time.monotonic() - started
                if name == "write_round":
                    found.committed_at = time.monotonic()

        return write

    with mock.patch.multiple(RunWriter, write_unit=unit, **{name: other(name) for name in _COMMIT}):
        yield found


def search(options: dict[str, Any], workers: int) -> Observed:
    """Return what one search by so many workers, on a private cluster, came to."""
    with tempfile.TemporaryDirectory() as folder, _observing() as found:
        run = tale_ray.search(**options, workers=workers, cpus_per_worker=1, run=str(Path(folder) / "run"))
        found.summary = run.summary
    return found


def predict(observed: Observed, times: UnitTimes, workers: int, rounds: int) -> Searched:
    """Return the simulation of an observed search on so many workers."""
    workload = Workload(
        num_rows=observed.summary["rows"]["search"],
        times=times,
        correct=observed.correct(),
        strategy=StrategySection(epsilon=str(observed.summary["epsilon"]), exhaustive=True, max_removed=rounds),
    )
    return simulate(workload, Plan(num_workers=workers), observed.costs)


def validate(
    rows: int, rounds: int, smollm2: Path, data_root: Path | None, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Return real seconds beside simulated ones, for 1 and 2 workers."""
    options: dict[str, Any] = {"rows": rows, "max_removed": rounds, "splits": "search=0.5", "exhaustive": True}
    if data_root is not None and (smollm2 / "config.json").is_file():
        options |= {"model": str(smollm2), "task": "boolean_expressions", "data_root": str(data_root)}
        title = "SmolLM2-135M, boolean_expressions"
    else:
        options |= {"model": "bundled", "task": "boolean_synthetic"}
        title = "bundled model, boolean_synthetic (SmolLM2 or real rows are not here)"
    real = {number: search(options, number) for number in (1, 2)}
    if decided(real[1]) != decided(real[2]):
        raise click.ClickException("one worker and two decided differently")
    num_layers = real[1].summary["num_layers"]
    gap = real[1].gap_seconds
    times = {
        number: replace(fitted, fixed_seconds=fitted.fixed_seconds + gap)
        for number, found in real.items()
        if (fitted := fit_unit_times(found.results, num_layers))
    }
    setup = real[1].setup_seconds
    found = []
    for number, observed in real.items():
        predicted = predict(real[1], times[1], number, rounds).seconds + setup
        own = predict(real[1], times[number], number, rounds).seconds + setup
        difference = predicted / observed.seconds - 1
        found.append(
            {
                "workers": number,
                "seconds": observed.seconds,
                "predicted_seconds": predicted,
                "difference": difference,
                "predicted_with_own_times": own,
                "units": len(observed.results),
                "unit_seconds": sum(result.seconds for result in observed.results),
            }
        )
        tell(
            f"{number} workers: {observed.seconds:.1f} s, simulated {predicted:.1f} s ({difference:+.1%}); with the "
            f"unit times of this very run {own:.1f} s"
        )
    return {
        "title": title,
        "rows": rows,
        "rounds": rounds,
        "setup_seconds": setup,
        "most_difference": MOST_DIFFERENCE,
        "times": asdict(times[1]),
        "runs": found,
    }


def decided(observed: Observed) -> list[Any]:
    """Return what a search decided, and on what counts."""
    return [observed.summary[name] for name in ("baseline", "rounds", "rejected_round", "stop_reason")]
