"""What a study of pruning and fine-tuning has found, as tables and as a figure. Takes its summary, as JSON has it."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tale_ray.results.report.plots import new_figure, save_figure
from tale_ray.results.synergy import TITLES
from tale_ray.results.tables import count_text, difference_text, interval_text, p_text, percent

_STYLES = (("o", "#0b5fa5"), ("s", "#b34a0a"), ("D", "#7b2d8b"), ("^", "#0b6b3a"), ("v", "#51585f"))


def synergy_table(found: Mapping[str, Any]) -> RenderableType:
    """Return the regimes side by side, how they compare on the same rows, and what training took."""
    tests = ", ".join(str(rows["test"]) for rows in found["rows"].values())
    parts: list[RenderableType] = [
        Text(f"{found['task']} on {found['model']}, {count_text(found['num_layers'], 'layer')}; test rows: {tests}"),
        _regimes(found),
    ]
    if found["comparisons"]:
        parts.append(_comparisons(found))
    parts += [Text(_training_text(each)) for each in found["training"]]
    if len(found["training"]) > 1:
        parts.append(Text(_all_trainings_text(found["training"])))
    return Group(*parts)


def _regimes(found: Mapping[str, Any]) -> Table:
    seeds = found["seeds"]
    table = Table(title="accuracy on the same test rows, with 95% intervals")
    table.add_column("")
    table.add_column("layers", justify="right")
    for seed in seeds:
        table.add_column(f"seed {seed}", justify="right")
    if len(seeds) > 1:
        table.add_column("mean ± SD", justify="right")
    for name in ("parameters trained", "training, s"):
        table.add_column(name, justify="right")
    for regime in found["regimes"]:
        each = regime["seeds"]
        spread = regime["accuracy"]
        mean = [f"{percent(spread['mean'])} ± {100 * spread['standard_deviation']:.1f}"] if len(seeds) > 1 else []
        is_trained = regime["regime"] not in ("base", "tale")
        table.add_row(
            TITLES[regime["regime"]],
            ", ".join(str(entry["num_layers"]) for entry in each),
            *(f"{percent(entry['accuracy'])} {interval_text(entry['interval'])}" for entry in each),
            *mean,
            _span([entry["trainable_parameters"] for entry in each], ",") if is_trained else "-",
            _span([entry["training_seconds"] for entry in each], ".1f") if is_trained else "-",
        )
    return table


def _span(values: Sequence[float], form: str) -> str:
    """Return the lowest and the highest of some values, once if they are shown alike."""
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _comparisons(found: Mapping[str, Any]) -> Table:
    table = Table(title="the first against the second on the same test rows")
    for name in ("first", "second"):
        table.add_column(name)
    for name in ("seed", "difference", "wins", "losses", "p", "p (Holm)"):
        table.add_column(name, justify="right")
    for each in found["comparisons"]:
        table.add_row(
            TITLES[each["first"]],
            TITLES[each["second"]],
            str(each["seed"]),
            difference_text(each),
            str(each["wins"]),
            str(each["losses"]),
            p_text(each["p_value"]),
            p_text(each["p_value_holm"]),
        )
    return table


def _training_text(each: Mapping[str, Any]) -> str:
    full, pruned = each["full"], each["pruned"]
    return (
        f"seed {each['seed']}: a step of training takes {1000 * pruned['seconds_per_step']:.0f} ms with "
        f"{pruned['num_layers']} layers and {1000 * full['seconds_per_step']:.0f} ms with {full['num_layers']}: "
        f"{each['seconds_per_step_ratio']:.2f} of the time, {each['cpu_seconds_per_step_ratio']:.2f} of the CPU time "
        f"({pruned['steps']} and {full['steps']} steps)"
    )


def _all_trainings_text(trainings: Sequence[Mapping[str, Any]]) -> str:
    """Return what all seeds took together: what a machine's other work did to one of them weighs less in it."""
    clock, cpu = (
        _mean(trainings, "pruned", name) / _mean(trainings, "full", name)
        for name in ("seconds_per_step", "cpu_seconds_per_step")
    )
    return f"all seeds: a step of the pruned models takes {clock:.2f} of the time, {cpu:.2f} of the CPU time"


def _mean(trainings: Sequence[Mapping[str, Any]], model: str, name: str) -> float:
    """Return what a step took, of all steps of a model, full or pruned, with all seeds."""
    steps = [each[model]["steps"] for each in trainings]
    total = sum(each[model][name] * count for each, count in zip(trainings, steps, strict=True))
    return float(total / sum(steps))


def write_synergy_figure(found: Mapping[str, Any], path: Path) -> None:
    """Draw the accuracy of every regime and seed with its interval; PNG or SVG by the ending.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(6.5, 3.6)
    axes = figure.subplots()
    names = [regime["regime"] for regime in found["regimes"]]
    for number, (seed, (marker, colour)) in enumerate(zip(found["seeds"], cycle(_STYLES), strict=False)):
        entries = [regime["seeds"][number] for regime in found["regimes"]]
        shares = [100 * entry["accuracy"] for entry in entries]
        errors = [
            [share - 100 * entry["interval"][0] for share, entry in zip(shares, entries, strict=True)],
            [100 * entry["interval"][1] - share for share, entry in zip(shares, entries, strict=True)],
        ]
        offset = 0.15 * (number - (len(found["seeds"]) - 1) / 2)
        places = [at + offset for at in range(len(names))]
        axes.errorbar(
            places, shares, yerr=errors, fmt=marker, color=colour, label=f"seed {seed}", markersize=5, elinewidth=1
        )
    axes.set_xticks(range(len(names)), [TITLES[name].replace(" then ", "\nthen ") for name in names])
    axes.set_ylabel("accuracy on test rows, %")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=min(len(found["seeds"]), 6), frameon=False)
    save_figure(figure, path)
