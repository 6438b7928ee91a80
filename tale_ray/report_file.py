"""A run's report as a file for people, with the prompts of its rows where they are at hand."""

from pathlib import Path

from tale_ray.output_file import check_file, check_place, write_text
from tale_ray.results.report.data import gather
from tale_ray.results.report.page import render_page
from tale_ray.results.report.plots import check_matplotlib, write_plots
from tale_ray.results.report.prompts import find_prompts
from tale_ray.store.reader import RunReader


def write_report(run: str, output: Path, plots: Path | None = None, data_root: str | None = None) -> tuple[Path, ...]:
    """Write what a run has found as one page of HTML, and return its path and those of the figures.

    Args:
        run: its folder or URI.
        output: the page.
        plots: folder of the figures, as PNG and SVG; None: none are written.
        data_root: local mirror of hub data sets, where prompts are looked up.

    Raises:
        ConfigError: a file cannot be written there, or matplotlib is missing for figures.
        StoreError: there is no run, or a file of it is damaged.
    """
    check_file(output, "--output")
    if plots is not None:
        check_place(plots / "trajectory.png", "--plots")
        check_matplotlib()
    data = gather(RunReader(run))
    digests = {change.digest for each in data.row_by_row for change in (*each.wins, *each.losses)}
    prompts = find_prompts(data.manifest, digests, data_root) if data.manifest and digests else None
    write_text(output, render_page(data, prompts), "--output")
    return (output, *(() if plots is None else write_plots(data, plots)))
