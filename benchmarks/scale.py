"""From 1 worker to 1,024: the product's scheduler on a simulated cluster, and the simulation beside real runs.

    python benchmarks/scale.py              simulate, time the scheduler and the writing of units; write scale.md
    python benchmarks/scale.py --validate   also search with 1 and 2 real workers, and compare

Unit times come from the arithmetic of a model of 8 billion parameters on one GPU (`scale_scenarios.py`), unmeasured;
those of `--validate` are fitted to the units of the real run with one worker.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import click
from circumstances import circumstances
from commit_times import commit_times
from real_workers import validate
from scale_page import write_page
from scale_scenarios import Scenario, scenarios
from simulated import Costs, Plan, Searched, Workload, simulate

from tale_ray.search.scheduler import Scheduler

HERE = Path(__file__).parent
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(slots=True)
class SchedulerTime:
    """Seconds that this process spent in the scheduler."""

    seconds: float = 0.0
    calls: list[float] = field(default_factory=list)


@contextmanager
def timed_scheduler() -> Iterator[SchedulerTime]:
    """Measure what the scheduler itself takes: making it, starting, and handling events."""
    found = SchedulerTime()

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                found.calls.append(time.perf_counter() - started)
                found.seconds += found.calls[-1]

        return call

    with mock.patch.multiple(
        Scheduler, **{name: timed(getattr(Scheduler, name)) for name in ("__init__", "start", "handle")}
    ):
        yield found


def efficiency(one: Searched, many: Searched) -> float:
    """Return what one worker takes, by what all workers together were there for."""
    return one.seconds / many.available_seconds


def describe(one: Searched, many: Searched, num_workers: int, scheduler: SchedulerTime) -> dict[str, Any]:
    """Return what a simulated search came to, as JSON."""
    units = [result.seconds for result in many.stored]
    return {
        "workers": num_workers,
        "seconds": many.seconds,
        "efficiency": efficiency(one, many),
        "units": len(units),
        "median_unit_seconds": statistics.median(units),
        "retries": many.retries,
        "wasted_rows": many.wasted_rows,
        "scheduler_ms_per_unit": 1000 * scheduler.seconds / len(units),
        "most_scheduler_ms": 1000 * max(scheduler.calls),
    }


def curve(scenario: Scenario, costs: Costs, workers: Sequence[int], tell: Callable[[str], None]) -> dict[str, Any]:
    """Return the efficiency of a scenario over numbers of workers.

    Raises:
        click.ClickException: another number of workers decided differently.
    """
    points, one = [], None
    for number in workers:
        with timed_scheduler() as scheduler:
            many = simulate(scenario.workload, Plan(num_workers=number), costs)
        one = one or many
        if decisions(many) != decisions(one):
            raise click.ClickException(f"{number} workers decided differently from {workers[0]}")
        points.append(describe(one, many, number, scheduler))
        tell(f"{scenario.name}, {number} workers: {many.seconds:.1f} s, efficiency {points[-1]['efficiency']:.3f}")
    return {"name": scenario.name, "says": scenario.says, "rounds": len(one.history.rounds) - 1, "points": points}


def decisions(searched: Searched) -> list[Any]:
    """Return what a search decided, and on what counts of its winners."""
    history = searched.history
    rounds = [*history.rounds, *([history.rejected] if history.rejected else [])]
    return [(entry.removed_layer, entry.removed, entry.score, entry.committed) for entry in rounds]


def troubles(workload: Workload, costs: Costs, num_workers: int, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return what losses, slow workers, slow units and late workers do to the first scenario."""
    one = simulate(workload, Plan(num_workers=1), costs)
    quiet = simulate(workload, Plan(num_workers=num_workers), costs).seconds
    plans = {
        "nothing goes wrong": Plan(num_workers=num_workers),
        "workers live five times as long as the search, on average": Plan(
            num_workers=num_workers, mean_lifetime_seconds=5 * quiet, rejoin_seconds=30.0
        ),
        "one worker four times as slow": Plan(num_workers=num_workers, slow_workers=1, slowness=4.0),
        "every hundredth unit four times as slow": Plan(num_workers=num_workers, slow_units=0.01, slowness=4.0),
        "half of the workers join in the middle": Plan(
            num_workers=num_workers, late_workers=num_workers // 2, late_seconds=quiet / 2
        ),
    }
    found = []
    for name, plan in plans.items():
        with timed_scheduler() as scheduler:
            many = simulate(workload, plan, costs)
        if decisions(many) != decisions(one):
            raise click.ClickException(f"{name}: decided differently")
        found.append({"name": name, **describe(one, many, num_workers, scheduler)})
        tell(f"{num_workers} workers, {name}: efficiency {found[-1]['efficiency']:.3f}")
    return found


@click.command()
@click.option("--validate", "is_validated", is_flag=True, help="Also search with 1 and 2 real workers.")
@click.option("--only-validate", is_flag=True, help="Do nothing else; the rest of the document stays as it is.")
@click.option("--quick", is_flag=True, help="Fewer numbers of workers, to try it out.")
@click.option("--rows", type=click.IntRange(min=1), default=96, show_default=True, help="Of the real searches.")
@click.option("--rounds", type=click.IntRange(min=1), default=2, show_default=True, help="Of the real searches.")
@click.option("--smollm2", type=click.Path(path_type=Path), default=".cache/smollm2", show_default=True)
@click.option("--data-root", type=click.Path(path_type=Path), envvar="TALE_RAY_DATA_ROOT")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "measured" / "scale.json")
@click.option("--page", type=click.Path(path_type=Path), default=HERE / "scale.md", help="With its figure beside it.")
def main(is_validated: bool, only_validate: bool, quick: bool, rows: int, rounds: int, out: Path, **more: Any) -> None:
    """Simulate a search on 1 to 1,024 workers."""

    def tell(line: str) -> None:
        click.echo(line, err=True)

    about = circumstances(1)
    found: dict[str, Any] = {}
    if only_validate and out.exists():
        found = json.loads(out.read_text(encoding="utf-8"))
    if not only_validate:
        commits = commit_times()
        tell(f"a unit is written in {commits['unit_ms']:.1f} ms, a round committed in {commits['round_ms']:.1f} ms")
        costs = Costs(unit_write=commits["unit_ms"] / 1000, round_commit=commits["round_ms"] / 1000)
        workers = (1, 16, 64, 256) if quick else WORKERS
        chosen = scenarios()
        found |= {
            "circumstances": about,
            "commits": commits,
            "curves": [curve(each, costs, workers, tell) for each in chosen],
            "troubles": troubles(chosen[0].workload, costs, 64, tell),
            "if_writing_were_free": curve(
                replace(chosen[0], name="long, units written in no time"), Costs(unit_write=0.0), (1, 64, 256), tell
            ),
        }
    if is_validated or only_validate:
        found["validation"] = validate(rows, rounds, more["smollm2"], more["data_root"], tell) | {
            "circumstances": about
        }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_page(found, more["page"])


if __name__ == "__main__":
    main()
