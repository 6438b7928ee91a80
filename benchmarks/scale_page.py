"""The document of `scale.py` and its figure, from what was simulated and measured. Nothing in it is written by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from document import about_section, reached, table
from scale_scenarios import (
    LAYERS,
    LEAST_EFFICIENCY,
    MOST_COMMIT_MILLISECONDS,
    MOST_UNIT_MILLISECONDS,
    ROWS,
    scenarios,
)

from tale_ray.search.pace import row_applications


def write_page(found: Mapping[str, Any], path: Path) -> None:
    """Write the document, and its figure beside it."""
    parts = []
    about = {}
    if "curves" in found:
        from figures import draw_efficiency  # nothing else here needs matplotlib

        draw_efficiency(found["curves"], path.with_suffix(".svg"))
        parts += [targets(found), curves(found, path.with_suffix(".svg").name), troubles(found)]
        about["simulation"] = found["circumstances"]
    if "validation" in found:
        parts.append(validation(found["validation"]))
        about["real runs"] = found["validation"]["circumstances"]
    day = max(each["date"] for each in about.values()).split()[0]
    head = f"# From 1 worker to 1,024, simulated ({day})\n\nWritten by `benchmarks/scale.py`."
    path.write_text("\n\n".join([head, *parts, about_section(about) + "\n"]), encoding="utf-8")


def targets(found: Mapping[str, Any]) -> str:
    """Return what was to be reached."""
    first = found["curves"][0]
    points = {point["workers"]: point for point in first["points"]}
    most = max(points)
    rows = [
        (f"efficiency of {workers} workers, at least", least, f"{value:.3f}", reached(value, least))
        for workers, least in LEAST_EFFICIENCY.items()
        if workers in points and (value := points[workers]["efficiency"])
    ]
    commits = found["commits"]
    for name, limit, value in (
        (f"scheduler, ms per unit at {most} workers", MOST_UNIT_MILLISECONDS, points[most]["scheduler_ms_per_unit"]),
        ("writing a unit on local disk, ms", MOST_COMMIT_MILLISECONDS, commits["unit_ms"]),
        ("committing a round on local disk, ms", MOST_COMMIT_MILLISECONDS, commits["round_ms"]),
    ):
        rows.append((f"{name}, at most", limit, f"{value:.2f}", reached(limit, value)))
    free = {point["workers"]: point for point in found["if_writing_were_free"]["points"]}
    row_seconds = scenarios()[0].workload.times.application_seconds * row_applications(LAYERS, (), range(LAYERS))
    worker_seconds = first["points"][0]["seconds"] / 256 / (first["rounds"] + 2)
    return f"""## Targets

Of the first scenario below ({first["says"]}); medians of {commits["repeats"]} writes.

{table(("what", "target", "found", "reached"), rows)}

Of 256 workers each has {worker_seconds:.1f} s of work in a scoring, and one row with all candidates takes
{row_seconds:.1f} s: towards the end rows are cut between candidates, each part computing again what lies below it.
The driver writes {1000 / commits["unit_ms"]:.0f} units a second here; were they written in no time, 256 workers would
reach {free[256]["efficiency"]:.3f} and 64 workers {free[64]["efficiency"]:.3f}."""


def curves(found: Mapping[str, Any], figure: str) -> str:
    """Return all curves."""
    parts = [
        f"""## Efficiency

{ROWS} rows, {LAYERS} layers, whole searches: baseline, every round, the rejected one. Efficiency: what one worker
takes, by the seconds of all workers from the first one's joining to the last commit. The driver, pool, scheduler and
pace are the product's own, on a clock of the simulation; the driver's writes are on that clock as they were measured
here. Unit times are not measured but of the arithmetic of an 8B model on an A100 at half of its peak, with a log-normal
noise of 10%: in a unit every layer is read once and applied to every row.

![efficiency]({figure})"""
    ]
    times = {each.name: each.workload.times for each in scenarios()}
    for curve in found["curves"]:
        its = times[curve["name"]]
        rows = [
            (
                point["workers"],
                f"{point['seconds']:.1f}",
                f"{point['efficiency']:.3f}",
                point["units"],
                f"{point['median_unit_seconds']:.2f}",
                f"{point['scheduler_ms_per_unit']:.2f}",
            )
            for point in curve["points"]
        ]
        header = ("workers", "seconds", "efficiency", "units", "median unit, s", "scheduler, ms per unit")
        parts.append(
            f"**{curve['name']}**: {curve['says']}; {curve['rounds']} layers removed. A unit: "
            f"{its.fixed_seconds:.2f} s, {1000 * its.layer_seconds:.2f} ms a layer, "
            f"{1000 * its.application_seconds:.2f} ms a layer and row, {1000 * its.reply_seconds:.1f} ms a reply.\n\n"
            f"{table(header, rows)}"
        )
    return "\n\n".join(parts)


def troubles(found: Mapping[str, Any]) -> str:
    """Return what goes wrong, and what it costs."""
    rows = [
        (
            each["name"],
            f"{each['seconds']:.1f}",
            f"{each['efficiency']:.3f}",
            each["retries"],
            each["wasted_rows"],
        )
        for each in found["troubles"]
    ]
    header = ("what", "seconds", "efficiency", "retries", "candidate-rows lost")
    return f"""## Trouble

The first scenario on {found["troubles"][0]["workers"]} workers. All decided the same as one undisturbed worker. Only
the seconds count in which a worker was there.

{table(header, rows)}"""


def validation(found: Mapping[str, Any]) -> str:
    """Return real runs beside simulated ones."""
    rows = [
        (
            each["workers"],
            f"{each['seconds']:.1f}",
            f"{each['predicted_seconds']:.1f}",
            f"{100 * each['difference']:+.1f}",
            reached(found["most_difference"], abs(each["difference"])),
            f"{each['predicted_with_own_times']:.1f}",
            each["units"],
        )
        for each in found["runs"]
    ]
    header = ("workers", "`seconds.search`", "simulated", "difference, %", "within 10%", "with own times", "units")
    times = found["times"]
    return f"""## Beside real runs

{found["title"]}, {found["rows"]} rows, {found["rounds"]} rounds, exhaustive, on private Ray clusters, workers of one
thread. The simulation knows the unit times and the answers of the run with one worker, and the
{found["setup_seconds"]:.2f} s that it took before its first unit. "With own times": with the unit times of that very
run, which are longer where two workers share caches and memory.

{table(header, rows)}

Fitted: {times["fixed_seconds"]:.3f} s a unit, {1000 * times["layer_seconds"]:.3f} ms a layer,
{1000 * times["application_seconds"]:.3f} ms a layer and row, {1000 * times["opening_seconds"]:.3f} ms a layer more in a
worker's first unit of a scoring; noise {100 * times["noise"]:.0f}%."""
