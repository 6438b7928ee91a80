"""The model card of a fine-tuned checkpoint: what was trained, on what, and how. A pure function of its record."""

from collections.abc import Mapping
from typing import Any

import yaml

from tale_ray.results.finetune import why_text
from tale_ray.results.tables import count_text, layers_text, percent

_SHOWN = (
    *("rank", "alpha", "dropout", "learning_rate", "batch_size", "accumulate", "warmup_steps", "weight_decay"),
    *("max_grad_norm", "seed"),
)


def tuned_card(record: Mapping[str, Any], license: Mapping[str, Any]) -> str:
    """Return the text of README.md.

    Args:
        record: of the finished training.
        license: what the full model's card says of its license.
    """
    removed = record["removed"]
    without = f" without {count_text(len(removed), 'layer')}" if removed else ""
    base = {"base_model": record["model"]} if "/" in record["model"] else {}
    tags = ["tale-ray", "lora", *(["layer-pruning", "pruned"] if removed else [])]
    front = {**license, **base, "library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    share = record["trainable_parameters"] / record["parameters"]
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {record['model']}{without}, fine-tuned on {record['task']}",
        _cut(record),
        f"A low-rank adapter (LoRA) was trained on {count_text(record['rows']['finetune']['count'], 'row')} of the "
        f"task `{record['task']}`, on their replies only, and merged into the weights, which are stored in "
        f"{record['merged']['dtype']}: {record['trainable_parameters']:,} parameters ({percent(share)} of "
        f"{record['parameters']:,}), on {', '.join(f'`{name}`' for name in record['adapted'])}.",
        f"Training did {why_text(record)}. {_losses(record)}",
        "| option | value |\n| --- | --- |\n" + "\n".join(f"| {name} | {record['options'][name]} |" for name in _SHOWN),
        "No accuracy was measured while it was trained: score the model on rows that are neither finetune nor select "
        "rows, with `tale-ray evaluate`.",
        f"The full model's files have the SHA-256 `{record['identity']['model']}`, as `tale-ray` computes it; the "
        f"training has the digest `{record['digest']}`.",
        "Trained with " + ", ".join(f"{name} {number}" for name, number in sorted(record["versions"].items())) + ".",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _cut(record: Mapping[str, Any]) -> str:
    if not record["removed"]:
        return ""
    left = record["num_layers"] - len(record["removed"])
    return (
        f"{left} of {record['num_layers']} layers are left. Removed before it was trained, numbered from 0 in the full "
        f"model: **{layers_text(record['removed'])}**."
    )


def _losses(record: Mapping[str, Any]) -> str:
    if not record["kept"]:
        return "There were no select rows to choose weights by: the last ones are kept."
    first = record["evaluations"][0]
    return (
        f"The loss on {count_text(record['rows']['select']['count'], 'select row')}, by which the weights were chosen, "
        f"was {first['loss']:.4f} nats per scored token before and {record['kept']['loss']:.4f} after."
    )
