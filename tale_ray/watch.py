"""A run or a study as its folder says it is, once or again and again: what `tale-ray show` prints.

Reads storage alone. Knows neither the process that searches nor the cluster.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.live import Live

from tale_ray.results.study import summarize_study
from tale_ray.results.study_tables import study_table
from tale_ray.results.summary import summarize
from tale_ray.results.tables import output_console, run_table
from tale_ray.store.reader import RunReader
from tale_ray.store.study import StudyFolder

INTERVAL_SECONDS = 2.0
_ENDED = ("finished", "failed")  # an interrupted run may go on at any time


def show(run: str, as_json: bool) -> None:
    """Print what a run, or a study, has found so far.

    Raises:
        StoreError: there is none, or a file of it is damaged.
    """
    summary = summary_of(run)
    if as_json:
        click.echo(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        output_console().print(_table(summary), soft_wrap=True)


def watch(run: str, as_json: bool) -> None:
    """Print what a run, or a study, has found, whenever that has changed, until it has ended or Ctrl-C is pressed.

    On a terminal the table is replaced, elsewhere the next one follows; as JSON, each is an object on a line.

    Raises:
        StoreError: there is none, or a file of it is damaged.
    """
    with suppress(KeyboardInterrupt):
        console = output_console()
        if as_json:
            for summary in changes(run):
                click.echo(json.dumps(summary, ensure_ascii=False))
        elif console.is_terminal:
            _watch_live(run, console)
        else:
            for number, summary in enumerate(changes(run)):
                if number:
                    console.print()
                console.print(_table(summary), soft_wrap=True)
                console.file.flush()


def summary_of(run: str) -> dict[str, Any]:
    """Return what a run, or a study, has found so far.

    Raises:
        StoreError: there is none, or a file of it is damaged.
    """
    study = StudyFolder(run)
    return summarize_study(study) if study.exists() else summarize(RunReader(run))


def changes(run: str, sleep: Callable[[float], None] = time.sleep) -> Iterator[dict[str, Any]]:
    """Yield the summary of a run, or a study, and again whenever it is another one, up to that of its end."""
    latest = None
    while True:
        summary = summary_of(run)
        if summary != latest:
            latest = summary
            yield summary
        if summary["state"] in _ENDED:
            return
        sleep(INTERVAL_SECONDS)


def _watch_live(run: str, console: Console) -> None:
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for summary in changes(run):
            live.update(_table(summary), refresh=True)


def _table(summary: dict[str, Any]) -> RenderableType:
    return study_table(summary) if "study" in summary else run_table(summary)
