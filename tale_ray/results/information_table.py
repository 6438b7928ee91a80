"""What every layer adds to what can be read of the label, as a table for a person."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tale_ray.results.tables import count_text, layers_text, p_text


def information_table(values: Mapping[str, Any]) -> RenderableType:
    """Return what was measured, for a person; takes the JSON values, so it shows nothing that they do not have."""
    rows = values["rows"]
    splits = ", ".join(f"{count} {split}" for split, count in rows["splits"].items())
    head = (
        f"{values['task']} on {values['model']}, {count_text(values['num_layers'], 'layer')}, {values['dtype']}: "
        f"{count_text(rows['count'], 'row')} ({splits}), "
        f"{count_text(len(values['labels']), 'label')}, H(Y) = {values['entropy']:.3f} bits"
    )
    parts: list[RenderableType] = [Text(head), _table(values)]
    (low, high), (random_low, random_high) = values["controls"]["shuffled"], values["controls"]["random"]
    parts.append(
        Text(
            f"controls: shuffled labels {low:+.3f} to {high:+.3f} bits, random representations {random_low:+.3f} to "
            f"{random_high:+.3f}"
        )
    )
    if values["correlation"] is not None:
        parts.append(Text(correlation_text(values["correlation"])))
    parts.append(Text("bits are a lower bound: what a linear probe reads of the label from rows it was not fitted on"))
    return Group(*parts)


def correlation_text(found: Mapping[str, Any]) -> str:
    """Return in words how gains go with the change of accuracy without each layer."""
    of = f"{count_text(found['num_exact'], 'layer')} scored on all rows, {found['num_bounded_out']} bounded out"
    if found["spearman"] is None:
        return f"no rank correlation of gains with accuracy without each layer ({of}): {found['reason']}"
    low, high = found["interval"]
    advice = "; a search with --exhaustive scores all" if found["num_bounded_out"] else ""
    return (
        f"rank correlation of gains with the change of accuracy without each layer: {found['spearman']:+.2f} "
        f"[{low:+.2f}, {high:+.2f}], p = {p_text(found['p_value'])} ({of}{advice})"
    )


def _table(values: Mapping[str, Any]) -> Table:
    pruned = values["pruned"]
    without = f", without {layers_text(values['removed'])}" if values["removed"] else ""
    table = Table(title=f"bits about the label at the last token{without}; brackets: 95%")
    for name in ("after", "full model", "gain", "shuffled", *(("pruned", "gain") if pruned is not None else ())):
        table.add_column(name, justify="right")
    by_layer = {point["layer"]: point for point in pruned or ()}
    for point in values["full"]:
        name = "embedding" if point["layer"] is None else f"layer {point['layer']}"
        cells = [name, bits_text(point), gain_text(point), f"{point['shuffled']:+.3f}"]
        if pruned is not None:
            other = by_layer.get(point["layer"])
            cells += ["removed", "-"] if other is None else [bits_text(other), gain_text(other)]
        table.add_row(*cells)
    return table


def bits_text(point: Mapping[str, Any]) -> str:
    """Return the information at a place and its interval: `0.512 [0.441, 0.580]`."""
    low, high = point["interval"]
    return f"{point['bits']:.3f} [{low:.3f}, {high:.3f}]"


def gain_text(point: Mapping[str, Any]) -> str:
    """Return what a layer adds; of the embedding nothing is told."""
    return "-" if point["gain"] is None else f"{point['gain']:+.3f}"
