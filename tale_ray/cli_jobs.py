"""The commands about jobs on a cluster: submit, status, logs, stop. Parse, call, print."""

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import click
import yaml

from tale_ray.cluster.job_state import JobState, describe_state
from tale_ray.cluster.submission import (
    JobEnded,
    JobPrinted,
    JobRequest,
    JobServer,
    JobSubmitted,
    forgotten,
    submit_to_end,
)
from tale_ray.errors import ConfigError, InfeasibleError, Interrupted, TaleRayError
from tale_ray.job_file import read_job_file

STOP_PATIENCE_SECONDS = 90.0  # for the driver to store what it has, and for Ray to notice

address_option = click.option(
    "--address",
    metavar="URL",
    envvar="RAY_API_SERVER_ADDRESS",
    help="Of the cluster's dashboard: http://HOST:8265.  [default: $RAY_API_SERVER_ADDRESS]",
)
job_argument = click.argument("job", metavar="ID|JOB")


@click.command()
@click.argument("job", metavar="JOB")
@address_option
@click.option("--wait", is_flag=True, help="Wait for its end, and exit as the search does.")
@click.option("--follow", is_flag=True, help="Print its log meanwhile.")
@click.option("--attempts", type=int, metavar="N", help="Submit it up to N times.  [default: as the file says]")
@click.option("--dry-run", is_flag=True, help="Check the file, print what would be submitted, and stop.")
def submit(job: str, address: str | None, wait: bool, follow: bool, attempts: int | None, dry_run: bool) -> None:
    """Submit a search to a Ray cluster, as the file JOB describes it.

    Prints the id of the submission. With --wait or --follow the exit code is that of the search, and a search that
    is interrupted, or loses its driver, is submitted again while attempts are left: it goes on where it was.
    """
    described = read_job_file(job)
    if attempts is not None:
        described = replace(described, attempts=attempts)
    if attempts is not None and attempts > 1 and not (wait or follow):
        raise ConfigError(f"attempts {attempts} needs somebody who submits again: add --wait or --follow")
    if dry_run:
        click.echo(described.entrypoint)
        click.echo(yaml.safe_dump({"runtime_env": described.sent_runtime_env}, sort_keys=False).rstrip())
        return
    server = _server(address)
    request = JobRequest(
        name=described.name,
        run=described.run,
        entrypoint=described.entrypoint,
        runtime_env=described.sent_runtime_env,
        metadata=described.metadata,
        num_cpus=described.entrypoint_num_cpus,
    )
    if not (wait or follow):
        click.echo(server.submit(request))
        return
    _submit_to_end(server, request, described.attempts, follow)


@click.command()
@job_argument
@address_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(job: str, address: str | None, as_json: bool) -> None:
    """Say how a submission is doing: one ID, or the latest of a file JOB."""
    state = _found(_server(address), job)
    if as_json:
        click.echo(json.dumps({**asdict(state), "exit_code": state.exit_code}, indent=2))
        return
    click.echo(describe_state(state))
    if state.start_seconds:
        end = f" to {_time(state.end_seconds)}" if state.end_seconds else ""
        click.echo(f"from {_time(state.start_seconds)}{end}")
    if state.run:
        click.echo(f"run {state.run}: see `tale-ray show {shlex.quote(state.run)}`")
    if state.status == "FAILED" and state.message:
        click.echo(state.message)


@click.command()
@job_argument
@address_option
@click.option("--follow", is_flag=True, help="Go on until its end, and exit as the search does.")
def logs(job: str, address: str | None, follow: bool) -> None:
    """Print what a submission has printed: one ID, or the latest of a file JOB."""
    server = _server(address)
    state = _found(server, job)
    if not follow:
        click.echo(server.logs(state.id), nl=False)
        return
    with _going_on_after_interrupt(server, [state.id]):
        for text in server.follow(state.id):
            click.echo(text, nl=False)
        _exit(server.await_end(state.id) or forgotten(state.id), followed=True)


@click.command()
@job_argument
@address_option
def stop(job: str, address: str | None) -> None:
    """Stop a submission: one ID, or the latest of a file JOB.

    The search stores what it has. It goes on when the job is submitted again.
    """
    server = _server(address)
    state: JobState | None = _found(server, job)
    assert state is not None
    if not state.ended:
        server.stop(state.id)
        state = server.await_end(state.id, STOP_PATIENCE_SECONDS) or forgotten(state.id)
    if not state.ended:
        raise TaleRayError(
            f"{state.id} has not ended after {STOP_PATIENCE_SECONDS:g} s: look at it with `ray job list`"
        )
    click.echo(describe_state(state))


def _server(address: str | None) -> JobServer:
    if address is None:
        raise ConfigError("address is missing: name the cluster's dashboard with --address http://HOST:8265")
    from tale_ray.cluster.jobs import Jobs  # ray is wanted in this process only now

    return Jobs(address)


def _found(server: JobServer, job: str) -> JobState:
    """Return the state of the submission with this id, or of the latest one of a job file's run.

    Raises:
        InfeasibleError: the cluster does not know it.
    """
    if Path(job).suffix in (".yaml", ".yml"):
        described = read_job_file(job)
        of_run = server.submissions(described.run)
        if not of_run:
            raise InfeasibleError(f"nothing of the run {described.run} was submitted to {server.address}")
        return of_run[-1]
    state = server.state(job)
    if state is None:
        known = ", ".join(each.id for each in server.submissions()) or "none"
        raise InfeasibleError(f"job {job!r} is not known at {server.address}: name one of its submissions: {known}")
    return state


def _submit_to_end(server: JobServer, request: JobRequest, attempts: int, follow: bool) -> None:
    """Submit until the end, print what happens, and exit as the last submission does."""
    ids: list[str] = []
    with _going_on_after_interrupt(server, ids):
        for event in submit_to_end(server, request, attempts, follow):
            if isinstance(event, JobSubmitted):
                ids.append(event.id)
                of = f" (attempt {event.attempt} of {attempts})" if attempts > 1 else ""
                click.echo(f"submitted {event.id}{of}", err=True)
            elif isinstance(event, JobPrinted):
                click.echo(event.text, nl=False)
            elif isinstance(event, JobEnded) and event.again:
                click.echo(f"{describe_state(event.state)}; submitting it again", err=True)
            else:
                _exit(event.state, followed=follow)


def _exit(state: JobState, followed: bool) -> None:
    """Say how a submission ended, and exit as the search did."""
    click.echo(describe_state(state), err=True)
    if state.status == "FAILED" and state.message and not (followed and state.driver_exit_code is not None):
        click.echo(state.message, err=True)
    sys.exit(state.exit_code)


@contextmanager
def _going_on_after_interrupt(server: JobServer, ids: list[str]) -> Iterator[None]:
    """Let Ctrl-C end this command, and not the job, and say how to come back to it."""
    try:
        yield
    except KeyboardInterrupt:
        if not ids:
            raise
        at = f"{ids[-1]} --address {shlex.quote(server.address)}"
        raise Interrupted(
            f"{ids[-1]} goes on without this command: follow it with `tale-ray logs {at} --follow`, "
            f"stop it with `tale-ray stop {at}`"
        ) from None


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


COMMANDS: tuple[click.Command, ...] = (submit, status, logs, stop)
