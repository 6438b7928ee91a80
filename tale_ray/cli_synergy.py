"""The command `synergy`: pruning and fine-tuning in every order, on the same test rows."""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from tale_ray.api_tuning import synergy_request
from tale_ray.attempt.synergy import PICKS, run_synergy
from tale_ray.attempt.synergy_folder import REGIMES, SynergyFolder
from tale_ray.attempt.synergy_result import conclude_study
from tale_ray.cli_finetune import resumable, tuning_options
from tale_ray.cli_options import (
    data_root_option,
    include_path_option,
    json_option,
    model_options,
    place_options,
    shots_option,
    strategy_options,
    time_limit_option,
    with_options,
)
from tale_ray.cli_shown import given
from tale_ray.errors import Interrupted
from tale_ray.option_texts import splits_text
from tale_ray.output_file import check_figure
from tale_ray.progress import Display
from tale_ray.results.synergy_tables import synergy_table, write_synergy_figure
from tale_ray.results.tables import output_console
from tale_ray.search.interruption import Interruption
from tale_ray.tuning.options import TUNED_SPLITS


@click.command()
@model_options
@click.option("--task", metavar="T", help="Built-in task, path of a task file, or lm-eval:NAME.")
@click.option("--rows", type=int, metavar="N", help="Use the first N search rows.  [default: all]")
@shots_option
@click.option(
    "--splits", metavar="SHARES", default=splits_text(TUNED_SPLITS), show_default=True, help="Shares of the rows."
)
@data_root_option
@include_path_option
@click.option("--seeds", metavar="LIST", default="0", show_default=True, help="Of rows and trainings, e.g. 0,1,2.")
@with_options(
    click.option("--regimes", metavar="LIST", default=",".join(REGIMES), show_default=True, help="Those to compare."),
    click.option(
        "--pick",
        type=click.Choice(PICKS),
        default="selected",
        show_default=True,
        help="Result of a search that is trained, and reported.",
    ),
)
@strategy_options
@tuning_options
@place_options
@time_limit_option
@click.option("--study", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder of the study.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Also draw the accuracies; .png or .svg.")
@json_option
def synergy(
    seeds: str,
    regimes: str,
    pick: str,
    study: Path,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare pruning, fine-tuning and both, in either order, on the same test rows.

    The regimes are the model itself (base), pruned (tale), fine-tuned (ft), pruned and then fine-tuned (tale-ft), the
    other way round (ft-tale), and pruned once more (tale-ft-tale). Searches and trainings are ordinary ones in the
    folder of the study. The same command goes on with what is not done yet, and prints the table of a finished study
    again.
    """
    if plot is not None:
        check_figure(plot, "--plot")
    asked = synergy_request(study, seeds=seeds, regimes=regimes, pick=pick, **given(options))
    interruption = Interruption()
    limit = asked.config.storage.time_limit_seconds
    with interruption.on_signals(limit), Display(Console(stderr=True)) as display:
        try:
            for event in run_synergy(asked, interruption):
                display.show(event)
        except Interrupted as error:
            raise resumable(error) from error
    found = conclude_study(SynergyFolder(Path(asked.study)), asked.regimes)
    if plot is not None:
        write_synergy_figure(found, plot)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    output_console().print(synergy_table(found), soft_wrap=True)
    click.echo(f"study: {found['study']}")
    if plot is not None:
        click.echo(f"figure: {plot}")
