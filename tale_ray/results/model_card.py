"""What a checkpoint says of itself: its model card, and what other tools need to cut the same layers.

Pure functions of what a run has stored. Shares are in [0, 1], percent only in the text.
"""

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

from tale_ray.config import SearchConfig
from tale_ray.option_texts import splits_text
from tale_ray.results.statistics import wilson_interval
from tale_ray.results.tables import (
    accuracy_text,
    count_text,
    difference_text,
    interval_text,
    layers_text,
    p_text,
    percent,
)

MERGEKIT_FILE = "mergekit.yaml"
PRUNE_FILE = "prune-layers.txt"

_LOCAL_PATHS = ("data_root", "include_path")  # mean nothing elsewhere
_OWN_WORDS = ("model", "task", "dtype")


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """All that a model card says."""

    summary: Mapping[str, Any]  # of the run, as `tale-ray show --json` prints it
    config: SearchConfig
    pick: str
    round: int
    model: str  # as people find it: the hub's id, or the folder's name
    base_model: str | None  # the hub's id
    digest: str  # of the full model's files
    searched_dtype: str
    dtype: str  # of the checkpoint
    num_parameters: int
    full_parameters: int
    search_comparison: Mapping[str, Any] | None  # with the full model on the search rows; None: no answers are stored
    versions: Mapping[str, str]  # of the packages that searched
    license: Mapping[str, Any] = field(default_factory=dict)  # front matter of the full model's card
    code_files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def removed(self) -> tuple[int, ...]:
        """The removed layers, in the order of their removal."""
        return tuple(self.summary["rounds"][self.round - 1]["removed"])


def model_card(facts: CardFacts) -> str:
    """Return the text of README.md: front matter as the hub reads it, and what was removed, why and how."""
    total = facts.summary["num_layers"]
    left = total - len(facts.removed)
    saved = 1 - facts.num_parameters / facts.full_parameters
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)}---",
        f"# {facts.model} without {count_text(len(facts.removed), 'layer')}",
        f"[`{facts.model}`](https://huggingface.co/{facts.base_model})" if facts.base_model else f"`{facts.model}`",
        f"{left} of {total} layers are left: those that a search on the task `{facts.summary['task']}` removed are "
        "gone. Nothing was trained; every weight that is left is as it was.",
        _table(
            ("", "full model", "this model"),
            [
                ("layers", str(total), str(left)),
                ("parameters", f"{facts.full_parameters:,}", f"{facts.num_parameters:,} (-{percent(saved)})"),
            ],
        ),
        f"Layers removed, numbered from 0 in the full model, in the order of their removal: "
        f"**{layers_text(facts.removed)}**. The weights are stored in {facts.dtype}.",
        f"The full model's files (configuration, tokenizer, weights) have the SHA-256 `{facts.digest}`, as `tale-ray` "
        "computes it.",
        *(f"Note: {note}." for note in facts.notes),
        "## How accurate it is",
        *_accuracies(facts),
        "## How to load it",
        _loading(facts),
        "## How to make it again",
        *_reproduction(facts),
        f"`{MERGEKIT_FILE}` is the same cut for mergekit, and `{PRUNE_FILE}` the list of removed layers for llama.cpp "
        f'(`llama-quantize --prune-layers "$(cat {PRUNE_FILE})" FULL.gguf CUT.gguf F16`). Both cut weights only: they '
        "are right for models whose layers are all of one kind. Where layers differ (sliding windows, dense and sparse "
        "layers), take the checkpoint in this folder, whose configuration was cut, too.",
    ]
    sections[2:4] = [f"{sections[2]}: {sections[3]}"]
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    return {
        **facts.license,
        **({"base_model": facts.base_model} if facts.base_model else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tale-ray", "layer-pruning", "pruned"],
    }


def _accuracies(facts: CardFacts) -> list[str]:
    summary = facts.summary
    entry, tested = summary["rounds"][facts.round - 1], _tested(facts)
    rows = [("search", summary["baseline"], entry, facts.search_comparison)]
    if tested is not None:
        rows.append(("test", summary["test"]["baseline"], tested, tested))
    parts = [
        f"Answers of the task `{summary['task']}`, exact match, greedy decoding, computed in {facts.searched_dtype}; "
        "95% intervals (Wilson for accuracies, paired bootstrap for differences in points), exact McNemar tests.",
        _table(
            ("rows", "full model", "this model", "difference", "wins", "losses", "p"),
            [
                (split, _accuracy(full), _accuracy(cut), *_comparison(comparison))
                for split, full, cut, comparison in rows
            ],
        ),
        "Wins are rows that only this model answers correctly, losses those that only the full model does.",
        "The layers were chosen by the search rows, so the accuracy there is too high; no decision has seen the test "
        "rows."
        + (
            f" Against the full model it does {_optimism_text(entry, tested, summary)} there than on the search rows."
            if tested is not None
            else " **This round was not scored on test rows**: score it with `tale-ray evaluate` before relying on it."
        ),
    ]
    if tested is not None and tested["p_value"] is not None and tested["p_value"] != tested["p_value_holm"]:
        parts.append(
            f"Corrected for the results compared (Holm), p on the test rows is {p_text(tested['p_value_holm'])}."
        )
    return parts


def _tested(facts: CardFacts) -> Mapping[str, Any] | None:
    """Return the stored result of this round on the test rows, by whatever name it was scored."""
    results = facts.summary["test"] or {}
    found = (entry for name, entry in results.items() if name != "baseline")
    return next((entry for entry in found if entry["round"] == facts.round), None)


def _optimism_text(entry: Mapping[str, Any], tested: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    def gain(score: Mapping[str, Any], full: Mapping[str, Any]) -> float:
        return float(score["correct"] / score["total"] - full["correct"] / full["total"])

    optimism = gain(entry, summary["baseline"]) - gain(tested, summary["test"]["baseline"])
    return f"{100 * abs(optimism):.1f} points {'worse' if optimism >= 0 else 'better'}"


def _accuracy(score: Mapping[str, Any]) -> str:
    found = wilson_interval(score["correct"], score["total"])
    return f"{accuracy_text(score)} {interval_text([found.low, found.high])}"


def _comparison(comparison: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    if comparison is None or comparison["p_value"] is None:
        return ("-", "-", "-", "-")
    wins, losses = str(comparison["wins"]), str(comparison["losses"])
    return difference_text(comparison), wins, losses, p_text(comparison["p_value"])


def _loading(facts: CardFacts) -> str:
    trusted = ", trust_remote_code=True" if facts.code_files else ""
    code = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID"{trusted})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID"{trusted})\n```'
    )
    if not facts.code_files:
        return f"It is a standard checkpoint; nothing of `tale-ray` is needed.\n\n{code}"
    names = ", ".join(f"`{name}`" for name in facts.code_files)
    return (
        f"It needs the full model's own code, which was copied and is run on loading: {names}. Read it first.\n\n{code}"
    )


def _reproduction(facts: CardFacts) -> list[str]:
    summary = facts.summary
    number = len(summary["rounds"])
    parts = [
        f"```\n{search_command(facts)}\ntale-ray export RUN OUT --pick {facts.round}\n```",
        f"This is round {facts.round} of {number}, picked as `{facts.pick}`. Rows: "
        + ", ".join(f"{count} {split}" for split, count in summary["rows"].items() if count)
        + ". Searched with "
        + ", ".join(f"{name} {number}" for name, number in sorted(facts.versions.items()))
        + ".",
    ]
    if summary["state"] != "finished":
        parts.append(
            f"**The search had not ended** when this was exported (it was {summary['state']} after "
            f"{count_text(number, 'round')}): what it would have come to may be better."
        )
    return parts


def search_command(facts: CardFacts) -> str:
    """Return the command that makes the same decisions: options at their defaults and local paths are left out."""
    words = ["tale-ray", "search", "--model", facts.model, "--task", facts.config.task.task.rpartition("/")[2]]
    for section in (facts.config.model, facts.config.task, facts.config.strategy):
        for item in fields(section):
            value = getattr(section, item.name)
            if item.name in (*_LOCAL_PATHS, *_OWN_WORDS) or value == _default(section, item.name):
                continue
            words.append(f"--{item.name.replace('_', '-')}")
            if value is not True:
                words.append(_word(value))
    return shlex.join([*words, "--dtype", facts.searched_dtype])


def _default(section: Any, name: str) -> Any:
    known = {"model": "m", "task": "t"}
    needed = {item.name: known[item.name] for item in fields(section) if item.name in known}
    return getattr(type(section)(**needed), name)


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return splits_text(value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _table(head: Sequence[str], rows: Collection[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mergekit_text(model: str, removed: Collection[int], num_layers: int, dtype: str) -> str:
    """Return a configuration of mergekit: the ranges of layers that are left, passed through as they are."""
    slices = [
        {"sources": [{"model": model, "layer_range": [start, end]}]} for start, end in left_ranges(removed, num_layers)
    ]
    return yaml.safe_dump({"merge_method": "passthrough", "slices": slices, "dtype": dtype}, sort_keys=False)


def left_ranges(removed: Collection[int], num_layers: int) -> list[tuple[int, int]]:
    """Return the fewest (first, after the last) that cover the layers that are left."""
    ranges: list[tuple[int, int]] = []
    for layer in (layer for layer in range(num_layers) if layer not in set(removed)):
        if ranges and ranges[-1][1] == layer:
            ranges[-1] = (ranges[-1][0], layer + 1)
        else:
            ranges.append((layer, layer + 1))
    return ranges


def prune_text(removed: Collection[int]) -> str:
    """Return the removed layers as llama.cpp's `llama-quantize --prune-layers` takes them."""
    return ",".join(map(str, sorted(removed))) + "\n"
