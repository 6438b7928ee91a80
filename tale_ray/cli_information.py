"""The command `information`: what can be read of the label at every layer."""

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from tale_ray.api_information import information_request
from tale_ray.attempt.information import run_information, store_information
from tale_ray.cli_options import (
    data_root_option,
    include_path_option,
    json_option,
    model_options,
    pick_option,
    seed_option,
    shots_option,
    splits_option,
    with_options,
    working_memory_options,
)
from tale_ray.errors import ConfigError
from tale_ray.output_file import check_figure
from tale_ray.progress import Display
from tale_ray.results.information_figure import write_information_figure
from tale_ray.results.information_table import information_table
from tale_ray.results.probe import FOLDS
from tale_ray.results.tables import output_console


@click.command()
@click.argument("run", required=False)
@pick_option
@model_options
@with_options(
    click.option("--task", metavar="T", help="Without RUN: built-in task, or path of a task file."),
    click.option("--remove", metavar="LAYERS", help="Without RUN: also probe the model without these, e.g. 3,7."),
    shots_option,
    splits_option,
    seed_option,
    data_root_option,
    include_path_option,
    click.option(
        "--split",
        metavar="LIST",
        help="Rows to probe, e.g. select,test.  [default: with RUN select,test; without all but finetune]",
    ),
    click.option("--rows", type=int, metavar="N", help="Probe N of these rows.  [default: all]"),
    click.option("--allow-search-rows", is_flag=True, help="Let --split name the rows that RUN chose its layers on."),
    click.option("--drop-rare-labels", is_flag=True, help="Leave out rows whose label has too few."),
    click.option("--folds", type=int, default=FOLDS, show_default=True, help="Of the cross-validation.", metavar="K"),
    click.option(
        "--probe-seed", type=int, default=0, show_default=True, help="Of folds, controls and intervals.", metavar="N"
    ),
    click.option("--gpus-per-worker", type=int, metavar="K", default=0, show_default=True, help="0 runs on CPU."),
    working_memory_options,
    click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Also draw the curves; .png or .svg."),
    click.option("--store", is_flag=True, help="With RUN: keep the result in its folder, for `report`."),
    json_option,
)
@click.pass_context
def information(
    context: click.Context,
    /,
    run: str | None,
    pick: str,
    plot: Path | None,
    store: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how much of the label can be read at every layer, in bits: a lower bound, by cross-validated probes.

    Of RUN: of its full model and of a result, on rows that the search has not seen, with --model saying where the model
    lies now. Or of any --model on a --task. The model is loaded in this process and passes over the rows once.
    """
    given = {
        name: value
        for name, value in options.items()
        if value is not None and context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if run is None and context.get_parameter_source("pick") is not ParameterSource.DEFAULT:
        raise ConfigError(f"pick {pick!r} is a result of a run: name the run too, or the layers in --remove instead")
    if store and run is None:
        raise ConfigError("--store keeps the result in a run: name it, or leave the option out")
    if plot is not None:
        check_figure(plot, "--plot")
    with Display(Console(stderr=True)):
        values = run_information(*information_request(run, **given), run=run, pick=pick)
    if as_json:
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        output_console().print(information_table(values), soft_wrap=True)
    if run is not None and store:
        store_information(run, values)
    if plot is not None:
        write_information_figure(values, plot)
