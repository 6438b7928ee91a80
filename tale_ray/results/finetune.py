"""What came of a training, for a person. Takes its record, so it can show nothing that JSON does not have."""

import shlex
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tale_ray.option_texts import splits_text
from tale_ray.results.tables import count_text, layers_text, percent


def finetune_table(out: str, record: Mapping[str, Any]) -> RenderableType:
    """Return what was trained, how its loss went, what it took, and where it is."""
    seconds = record["seconds"]
    share = record["trainable_parameters"] / record["parameters"]
    shots = f" --shots {record['identity']['shots']}" if record["identity"]["shots"] else ""
    parts: list[RenderableType] = [
        Text(f"{record['task']} on {trained_text(record)}"),
        Text(
            f"{record['trainable_parameters']:,} parameters trained ({percent(share)} of {record['parameters']:,}), on "
            f"{count_text(record['rows']['finetune']['count'], 'finetune row')}"
        ),
    ]
    if record["evaluations"]:
        parts.append(_evaluations(record))
    parts += [
        Text(
            f"{why_text(record)}; {seconds['training']:.1f} s in steps ({seconds['training_cpu']:.1f} s of CPU), "
            f"{1000 * seconds['training'] / record['steps_done']:.0f} ms each, by "
            f"{count_text(record['workers'], 'worker')}"
        ),
        Text(f"model: {out}/model, adapter: {out}/adapter"),
        Text(
            f"score it with: tale-ray evaluate --local --model {shlex.quote(f'{out}/model')} --task T{shots} "
            f"--splits {splits_text(record['splits'])} --seed {record['seed']}"
        ),
    ]
    return Group(*parts)


def trained_text(record: Mapping[str, Any]) -> str:
    """Return what was trained, in words."""
    if not record["removed"]:
        return f"{record['model']}, all {count_text(record['num_layers'], 'layer')}"
    left = record["num_layers"] - len(record["removed"])
    return f"{record['model']}, {left} of {record['num_layers']} layers (without {layers_text(record['removed'])})"


def why_text(record: Mapping[str, Any]) -> str:
    """Return why training ended, and which weights are kept, in words."""
    done = f"{record['steps_done']} of {count_text(record['steps'], 'step')}"
    early = " (the loss on select rows fell no more)" if record["why"] == "patience" else ""
    kept = f", the weights after step {record['kept_step']} are kept" if record["kept"] else ""
    unchanged = ": the model is as it was" if record["kept"] and not record["kept_step"] else ""
    return f"{done}{early}{kept}{unchanged}"


def _evaluations(record: Mapping[str, Any]) -> Table:
    table = Table(title=f"loss in nats per token, {count_text(record['rows']['select']['count'], 'select row')}")
    for name in ("step", "training loss", "select loss", "replies right"):
        table.add_column(name, justify="right")
    table.add_column("")
    for each in record["evaluations"]:
        train = "-" if each["train_loss"] is None else f"{each['train_loss']:.4f}"
        kept = "kept" if each["step"] == record["kept_step"] else ""
        table.add_row(str(each["step"]), train, f"{each['loss']:.4f}", percent(each["exact"]), kept)
    return table
