"""How long a whole search takes, and where the work goes, on this machine.

    python benchmarks/search_time.py --repeats 3 --out benchmarks/search_time.md

Searches the bundled model in process, on one thread, a few times over, into folders of their own, and writes the
medians with their spread, the work counts, and the versions. Work counts are exact and do not depend on the machine.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click


def search_once(rows: int, folder: Path) -> dict[str, Any]:
    """Return the summary of one search in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = str(folder / "run")
    command = [sys.executable, "-m", "tale_ray", "search", "--model", "bundled", "--task", "boolean_synthetic"]
    subprocess.run([*command, "--rows", str(rows), "--local", "--run", run], check=True, env=environment)
    shown = subprocess.run(
        [sys.executable, "-m", "tale_ray", "show", run, "--json"], check=True, stdout=subprocess.PIPE
    )
    summary: dict[str, Any] = json.loads(shown.stdout)
    return summary


def spread(values: list[float], digits: int) -> str:
    """Return median, least and most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def page(rows: int, summaries: list[dict[str, Any]]) -> str:
    """Return the document."""
    seconds = [summary["seconds"]["search"] for summary in summaries]
    work = summaries[0]["work"]
    cells = work["candidate_rows"]
    rates = [cells / each for each in seconds]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("tale-ray", "torch", "transformers"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], stdout=subprocess.PIPE, text=True, check=False)
    return f"""# Time of a whole search

- command: `python benchmarks/search_time.py --rows {rows} --repeats {len(summaries)}`
- date: {datetime.now(UTC):%Y-%m-%d}; commit {commit.stdout.strip() or "unknown"}; {versions}
- machine: {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; one thread, in process

| bundled model, boolean_synthetic | {rows} search rows |
|---|---|
| rounds scored | {len(summaries[0]["rounds"]) + (summaries[0]["rejected_round"] is not None)} |
| candidate-rows | {cells} |
| layer applications | {work["layer_applications"]} |
| seconds, median of {len(seconds)} (least to most) | {spread(seconds, 1)} |
| candidate-rows per second, median (least to most) | {spread(rates, 0)} |

Candidates are scored one after another, each row's whole prompt for each of them.
"""


@click.command()
@click.option("--rows", type=int, default=200, show_default=True)
@click.option("--repeats", type=int, default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the document there instead of to stdout.")
def main(rows: int, repeats: int, out: Path | None) -> None:
    """Time whole searches of the bundled model."""
    with tempfile.TemporaryDirectory() as folder:
        summaries = [search_once(rows, Path(folder) / str(number)) for number in range(repeats)]
    if out is None:
        click.echo(page(rows, summaries))
    else:
        out.write_text(page(rows, summaries), encoding="utf-8")


if __name__ == "__main__":
    main()
