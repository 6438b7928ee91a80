"""The command `transfer`: layers that runs found on their tasks, tested on each other's tasks."""

import contextlib
import json
from typing import Any

import click

from tale_ray.api_several import transfer_request
from tale_ray.attempt.transfer import TransferFinished, run_transfer
from tale_ray.cli_options import (
    data_root_option,
    include_path_option,
    json_option,
    log_json_option,
    resource_options,
    seed_option,
    shots_option,
    splits_option,
    with_options,
)
from tale_ray.cli_shown import changed, shown
from tale_ray.errors import Interrupted
from tale_ray.results.tables import output_console
from tale_ray.results.transfer import transfer_table
from tale_ray.search.interruption import Interruption


@click.command()
@click.argument("runs", nargs=-1, metavar="RUN...")
@with_options(
    click.option("--task", "tasks", multiple=True, metavar="T", help="Test on this task, too; may be given again."),
    click.option(
        "--pick",
        metavar="P",
        help="best, bsba, final, selected, or a round.  [default: selected; of runs without select rows, best]",
    ),
    click.option("--model", metavar="PATH", help="Where the same model lies now."),
    shots_option,
    splits_option,
    seed_option,
    data_root_option,
    include_path_option,
)
@resource_options
@log_json_option
@json_option
@click.pass_context
def transfer(
    context: click.Context,
    /,
    runs: tuple[str, ...],
    tasks: tuple[str, ...],
    pick: str | None,
    log_json: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Test layers that were searched on one task on the others: a matrix of runs by tasks.

    RUNs are finished searches of one model. Each result is scored on the test rows of every run's task, and on those
    of --task, whose rows --shots, --splits and --seed choose. Rows that any run was searched on are left out. Answers
    are kept in the runs, and only what is missing is scored; the matrix is kept in each, for `report`.
    """
    request = transfer_request(runs, tasks=tasks, pick=pick, **changed(context, options))
    interruption = Interruption()
    values: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(interruption.on_signals())
        display = stack.enter_context(shown(log_json))
        try:
            for event in run_transfer(request, interruption):
                if isinstance(event, TransferFinished):
                    values = event.values
                else:
                    display.show(event)
        except Interrupted as error:
            if type(error) is not Interrupted:  # the others say what to do
                raise
            raise Interrupted(f"{error}: what is scored is stored; run the same command again") from error
    if as_json:
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        output_console().print(transfer_table(values), soft_wrap=True)
