"""Runs side by side, as tables for a person and as a figure. Takes the comparison, so it shows nothing JSON lacks."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tale_ray.results.report.plots import new_figure, save_figure
from tale_ray.results.tables import count_text, difference_text, interval_text, p_text, percent

_STYLES = (("o-", "#0b5fa5"), ("s--", "#b34a0a"), ("D:", "#7b2d8b"), ("^-.", "#0b6b3a"), ("v-", "#51585f"))


def comparison_table(found: Mapping[str, Any]) -> RenderableType:
    """Return accuracies, paired tests and costs of the runs, and the commands that score what is missing."""
    labels = [run["label"] for run in found["runs"]]
    parts: list[RenderableType] = [_accuracies(found, labels)]
    if found["pairs"]:
        parts.append(_tests(found, labels))
    parts.append(_costs(found))
    parts += [Text(f"note: {note}") for note in found["notes"]]
    for at, label in enumerate(labels):
        cells = [row["cells"][at] for row in found["numbers"]]
        if missing := [cell for cell in cells if cell is not None and cell["evaluate"]]:
            rounds = ", ".join(str(cell["round"]) for cell in missing)
            parts.append(Text(f"{label}: {count_text(len(missing), 'round')} not scored on test rows ({rounds}), e.g."))
            parts.append(Text(f"  {missing[0]['evaluate']}"))
    return Group(*parts)


def _accuracies(found: Mapping[str, Any], labels: list[str]) -> Table:
    title = f"accuracy on the same {count_text(found['test_rows']['count'], 'test row')}, with 95% intervals"
    table = Table(title=title)
    table.add_column("layers removed", justify="right")
    for label in labels:
        table.add_column(Text(label), justify="right")
    for row in found["numbers"]:
        table.add_row(str(row["num_removed"]), *map(_cell_text, row["cells"]))
    return table


def _cell_text(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "-"
    if cell["correct"] is None:
        return "not scored"
    return f"{percent(cell['correct'] / cell['total'])} {interval_text(cell['interval'])}"


def _tests(found: Mapping[str, Any], labels: list[str]) -> Table:
    table = Table(title="the first against the second on the same rows")
    for name in ("layers removed", "first", "second", "difference", "wins", "losses", "p", "p (Holm)"):
        table.add_column(name, justify="left" if name in ("first", "second") else "right")
    for pair in found["pairs"]:
        one, other = pair["runs"]
        tested = (
            ["-", "-"] if pair["is_same"] else [p_text(pair["p_value"]), p_text(pair["p_value_holm"])]
        )  # the same model without the same layers is not tested
        counts = (
            "the same layers" if pair["is_same"] else difference_text(pair),
            str(pair["wins"]),
            str(pair["losses"]),
        )
        table.add_row(str(pair["num_removed"]), Text(labels[one]), Text(labels[other]), *counts, *tested)
    return table


def _costs(found: Mapping[str, Any]) -> Table:
    table = Table(title="what the searches took")
    table.add_column("run")
    for name in ("state", "candidate-rows", "layer applications", "units", "searching", "loading"):
        table.add_column(name, justify="right")
    for run in found["runs"]:
        work, seconds = run["work"], run["seconds"]
        counts = [f"{work[name]:,}" for name in ("candidate_rows", "layer_applications", "units")]
        times = [f"{seconds[name]:.1f} s" for name in ("search", "load")]
        table.add_row(Text(run["label"]), run["state"], *counts, *times)
    return table


def write_comparison_figure(found: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy on test rows over the number of removed layers, a curve for each run; PNG or SVG by the ending.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(6.5, 3.8)
    axes = figure.subplots()
    for at, (run, (style, colour)) in enumerate(zip(found["runs"], cycle(_STYLES), strict=False)):
        cells = [(row["num_removed"], row["cells"][at]) for row in found["numbers"]]
        scored = [(number, cell) for number, cell in cells if cell is not None and cell["correct"] is not None]
        shares = [100 * cell["correct"] / cell["total"] for _, cell in scored]
        ends = [[100 * end for end in cell["interval"]] for _, cell in scored]
        errors = [
            [share - low for share, (low, _) in zip(shares, ends, strict=True)],
            [high - share for share, (_, high) in zip(shares, ends, strict=True)],
        ]
        offset = 0.08 * (at - (len(found["runs"]) - 1) / 2)  # keeps intervals apart
        numbers = [number + offset for number, _ in scored]
        axes.errorbar(
            numbers, shares, yerr=errors, fmt=style, color=colour, label=run["label"], markersize=4, elinewidth=0.8
        )
    axes.set_xlabel("layers removed")
    axes.set_ylabel(f"accuracy on {count_text(found['test_rows']['count'], 'test row')}, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, path)
