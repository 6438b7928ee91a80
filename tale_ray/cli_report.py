"""The commands `report` and `compare`: what runs have found, as a page and side by side, from storage alone."""

import json
from pathlib import Path

import click

from tale_ray.cli_options import data_root_option, json_option, with_options
from tale_ray.output_file import check_figure
from tale_ray.report_file import write_report
from tale_ray.results.compare import compare_runs
from tale_ray.results.compare_tables import comparison_table, write_comparison_figure
from tale_ray.results.tables import output_console


@click.command()
@click.argument("run")
@with_options(
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        default="report.html",
        show_default=True,
        metavar="FILE",
        help="The page.",
    ),
    click.option(
        "--plots", type=click.Path(path_type=Path), metavar="DIR", help="Also write the figures there, as PNG and SVG."
    ),
    data_root_option,
)
def report(run: str, output: Path, plots: Path | None, data_root: str | None) -> None:
    """Write what a run has found as one page of HTML that needs no network, no script and no other file.

    Reads the run's storage alone, while it runs, too. Prompts are not stored in a run: they are shown where the rows of
    the task are at hand (generated, in files, or under --data-root).
    """
    page, *figures = write_report(run, output, plots, data_root)
    click.echo(f"report: {page}")
    for path in figures:
        click.echo(f"figure: {path}")


@click.command()
@click.argument("runs", nargs=-1, metavar="RUN...")
@with_options(
    json_option,
    click.option(
        "--figure",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Also draw accuracy over removed layers; .png or .svg.",
    ),
)
def compare(runs: tuple[str, ...], as_json: bool, figure: Path | None) -> None:
    """Compare runs on the same test rows, at equal numbers of removed layers: accuracy, paired tests, search cost.

    Reads their storage alone. Refuses runs whose test rows differ, and studies, whose runs differ in theirs. Rounds
    whose answers to test rows are not stored are marked, with the command that scores them.
    """
    if figure is not None:
        check_figure(figure, "--figure")
    found = compare_runs(runs)
    if figure is not None:
        write_comparison_figure(found, figure)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        output_console().print(comparison_table(found), soft_wrap=True)


COMMANDS = (report, compare)
