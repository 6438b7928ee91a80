"""The command `doctor`: what stands in the way of a search, and what to do about it."""

import json
import os
import sys
from dataclasses import asdict

import click

from tale_ray.attempt.doctor import Examined, examine


@click.command()
@click.option("--address", metavar="A", help="Ray cluster to look at.  [default: $RAY_ADDRESS, else none]")
@click.option("--run", metavar="DIR_OR_URI", help="Run folder to write a probe to.")
@click.option("--model", metavar="M", help="Model to look for.")
@click.option("--task", metavar="T", help="Task whose rows are read.")
@click.option("--data-root", metavar="DIR", envvar="TALE_RAY_DATA_ROOT", help="Local mirror of hub data sets.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool, address: str | None, **options: str | None) -> None:
    """Look for what stands in the way of a search: versions, cluster, storage, model and data.

    Each line is `ok`, or `problem` with its remedy. Exit code 1 if there is a problem. Takes 20 seconds at most where
    nothing answers.
    """
    asked = Examined(address=address or os.environ.get("RAY_ADDRESS") or None, **options)
    checks = []
    for check in examine(asked):
        checks.append(check)
        if not as_json:
            click.echo(f"{'ok     ' if check.is_ok else 'problem'} {check.name}: {check.found}")
            if check.remedy is not None:
                click.echo(f"        -> {check.remedy}")
    if as_json:
        click.echo(json.dumps([{**asdict(check), "ok": check.is_ok} for check in checks], indent=2))
    if not all(check.is_ok for check in checks):
        sys.exit(1)
