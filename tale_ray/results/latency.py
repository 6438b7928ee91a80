"""What removed layers save: medians and quartiles of measured passes, beside what the layers' own times promise.

Pure functions of measured seconds. Shares are in [0, 1]: `saved` is the share of the full model's time that the pruned
one does not need.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tale_ray.records import BatchTimes, PassTime
from tale_ray.results.tables import count_text, layers_text, percent

RESULT = "latency"  # its name in a run's folder


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Return the median of some samples and their quartiles (linear between neighbours), by name."""
    low, median, high = np.quantile(np.asarray(samples, dtype=float), [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def batch_json(times: BatchTimes, removed: Collection[int], new_tokens: int) -> dict[str, Any]:
    """Return what the passes over one batch come to, as JSON values; `decode` is null where one token was asked for.

    `saved.measured` is taken from pairs of passes that followed one another, so that a machine that grows slower
    meanwhile does not show in it. `saved.expected` is the removed layers' share of the full model's time.
    """
    found: dict[str, Any] = {"batch_size": times.batch_size}
    found["first_token"] = {
        "seconds": _both(times, lambda each: each.first_seconds),
        "saved": _saved(times, removed, "first"),
        "layer_shares": _shares(times.layered, "first"),
    }
    if new_tokens == 1:
        return {**found, "decode": None}
    decoded = times.batch_size * (new_tokens - 1)
    found["decode"] = {
        "tokens_per_second": _both(times, lambda each: decoded / each.decode_seconds),
        "saved": _saved(times, removed, "decode"),
        "layer_shares": _shares(times.layered, "decode"),
    }
    return found


def _both(times: BatchTimes, value: Callable[[PassTime], float]) -> dict[str, Any]:
    return {name: spread([value(each) for each in passes]) for name, passes in _sides(times).items()}


def _sides(times: BatchTimes) -> dict[str, tuple[PassTime, ...]]:
    return {"base": times.base, "pruned": times.pruned}


def _saved(times: BatchTimes, removed: Collection[int], phase: str) -> dict[str, Any]:
    pairs = zip(times.base, times.pruned, strict=True)
    return {
        "measured": spread([1 - _whole(pruned, phase) / _whole(base, phase) for base, pruned in pairs]),
        "expected": spread(
            [sum(_layers(each, phase)[layer] for layer in removed) / _whole(each, phase) for each in times.layered]
        ),
    }


def _shares(passes: Sequence[PassTime], phase: str) -> list[float]:
    """Return the median share of the whole that each layer takes, by layer."""
    shares = np.array([np.array(_layers(each, phase)) / _whole(each, phase) for each in passes])
    return [float(share) for share in np.median(shares, axis=0)]


def _whole(each: PassTime, phase: str) -> float:
    return each.first_seconds if phase == "first" else each.decode_seconds


def _layers(each: PassTime, phase: str) -> tuple[float, ...]:
    return each.first_layer_seconds if phase == "first" else each.decode_layer_seconds


def latency_table(values: Mapping[str, Any]) -> RenderableType:
    """Return what was measured, for a person."""
    total = values["num_layers"]
    left = total - len(values["removed"])
    head = (
        f"{values['model']}, {left} of {count_text(total, 'layer')} (without {layers_text(values['removed'])}), "
        f"{values['dtype']} on {values['device']}, {count_text(values['threads'], 'thread')}: prompts of "
        f"{count_text(values['prompt_tokens'], 'token')}, {values['new_tokens']} new"
    )
    table = Table(title=f"medians and quartiles of {count_text(values['repeats'], 'pass', 'passes')} in turns")
    for name in ("batch", "", "full model", "pruned", "time saved", "expected"):
        table.add_column(name, justify="left" if not name else "right")
    for batch in values["batches"]:
        for phase, quantity, unit, scale in (
            ("first_token", "seconds", "first token, ms", 1000.0),
            ("decode", "tokens_per_second", "tokens per second", 1.0),
        ):
            if (found := batch[phase]) is None:
                continue
            sides, saved = found[quantity], found["saved"]
            table.add_row(
                str(batch["batch_size"]),
                unit,
                *(_spread_text(sides[side], lambda value: f"{scale * value:.1f}") for side in ("base", "pruned")),  # noqa: B023  called at once
                *(_spread_text(saved[kind], percent) for kind in ("measured", "expected")),
            )
    note = "expected: the removed layers' share of the full model's time, timed layer by layer"
    return Group(Text(head), table, Text(note))


def _spread_text(found: Mapping[str, float], shown: Callable[[float], str]) -> str:
    return f"{shown(found['median'])} [{shown(found['low'])}, {shown(found['high'])}]"
