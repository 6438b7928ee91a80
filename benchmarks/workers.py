"""Two Ray workers of one thread each beside one: the same exhaustive search, in turns, on private clusters.

python benchmarks/workers.py --pairs 3
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import click
from circumstances import circumstances

import tale_ray

HERE = Path(__file__).parent
LEAST_RATIO = 1.8
LEAST_SECONDS = 60.0  # with one worker: less says little


def search(options: dict[str, Any], workers: int) -> dict[str, Any]:
    """Return the summary of one search by so many workers on a cluster of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return tale_ray.search(**options, workers=workers, cpus_per_worker=1, run=str(Path(folder) / "run")).summary


def decided(summary: dict[str, Any]) -> list[Any]:
    """Return what a search decided, and on what counts."""
    return [summary["baseline"], summary["rounds"], summary["rejected_round"], summary["stop_reason"]]


@click.command()
@click.option("--pairs", type=click.IntRange(min=1), default=3, show_default=True, help="One worker and two, in turns.")
@click.option("--rows", type=click.IntRange(min=1), default=96, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--smollm2", type=click.Path(path_type=Path), default=".cache/smollm2", show_default=True)
@click.option("--data-root", type=click.Path(path_type=Path), envvar="TALE_RAY_DATA_ROOT")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "measured" / "workers.json")
def main(pairs: int, rows: int, rounds: int, smollm2: Path, data_root: Path | None, out: Path) -> None:
    """Measure searches of SmolLM2 with one worker and with two."""
    about = circumstances(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"circumstances": about, "least_ratio": LEAST_RATIO, "rows": rows, "rounds": rounds}
    if data_root is None or not (smollm2 / "config.json").is_file():
        found["left_out"] = "SmolLM2 or real rows are not there (make .cache/smollm2/config.json, TALE_RAY_DATA_ROOT)"
        click.echo(f"left out: {found['left_out']}", err=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    options = {
        "model": str(smollm2),
        "task": "boolean_expressions",
        "data_root": str(data_root),
        "rows": rows,
        "max_removed": rounds,
        "splits": "search=0.5",
        "exhaustive": True,
    }
    found["pairs"] = []
    for number in range(pairs):
        one, two = search(options, 1), search(options, 2)
        if decided(one) != decided(two):
            raise click.ClickException("one worker and two decided differently")
        seconds = {"one": one["seconds"]["search"], "two": two["seconds"]["search"]}
        ratio = seconds["one"] / seconds["two"]
        found["pairs"].append({**seconds, "ratio": ratio, "work": {"one": one["work"], "two": two["work"]}})
        click.echo(f"pair {number + 1}: {seconds['one']:.1f} s, {seconds['two']:.1f} s, {ratio:.2f}x", err=True)
        if seconds["one"] < LEAST_SECONDS:
            click.echo(f"one worker took less than {LEAST_SECONDS:.0f} s: raise --rows", err=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
