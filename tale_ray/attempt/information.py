"""What can be read of the label at every layer of a model, and of a result of a run: rows, labels, one pass, probes."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np

from tale_ray.annotations import fits
from tale_ray.attempt.evaluate import picked_round, stored_identity
from tale_ray.attempt.export import found_model, hub_id
from tale_ray.attempt.identity import check_same_model, with_absolute_paths
from tale_ray.attempt.request import check_request
from tale_ray.attempt.rows import PreparedRows, prepare_rows
from tale_ray.cluster.local import LocalExecutor
from tale_ray.cluster.machine import installed_versions
from tale_ray.config import SearchConfig, StrategySection
from tale_ray.errors import ConfigError, TaskError
from tale_ray.records import Example, ModelInfo, SplitName
from tale_ray.results.information import RESULT, correlation_json, curve_json, random_control, rule_json
from tale_ray.results.probe import ProbeRule, check_scikit_learn, entropy_bits
from tale_ray.results.summary import stored_history
from tale_ray.results.tables import count_text
from tale_ray.search.history import History
from tale_ray.store.reader import RunReader
from tale_ray.store.run import RunWriter
from tale_ray.tasks.shots import question_of

logger = logging.getLogger("tale_ray.information")

_UNSEEN: tuple[SplitName, ...] = ("select", "test")  # by a search
_ANY: tuple[SplitName, ...] = ("search", "select", "test")  # where nothing was searched
_WITHOUT_LABELS = ("likelihood", "harness")  # types of answers that are not chosen by the logits after the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class InformationOptions:
    """Which rows are probed, and how."""

    splits: tuple[SplitName, ...] | None = None  # None: all that a search has not decided on
    rows: int | None = None  # so many of them; None: all
    allow_search_rows: bool = False
    drop_rare_labels: bool = False
    rule: ProbeRule = field(default_factory=ProbeRule)

    def __post_init__(self) -> None:
        if not fits(self.rows, int | None):
            raise ConfigError(f"rows {self.rows!r} is not a whole number: write one")
        for name in ("allow_search_rows", "drop_rare_labels"):
            if not fits(value := getattr(self, name), bool):
                raise ConfigError(f"{name.replace('_', ' ')} {value!r} is neither true nor false: write one of them")
        if self.rows is not None and self.rows < 1:
            raise ConfigError(f"rows {self.rows} are too few: leave the option out to use all rows of the splits")
        known = [split for split in get_args(SplitName) if split != "shots"]
        if self.splits is not None and (wrong := [split for split in self.splits if split not in known]):
            raise ConfigError(
                f"split {wrong[0]!r} is not known: choose some of {', '.join(known)}, such as select,test"
            )
        if self.splits is not None and len(set(self.splits)) < max(1, len(self.splits)):
            raise ConfigError(f"split {','.join(self.splits)!r} names none, or one twice: write it like select,test")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedRows:
    """The rows that are probed, each question once, and what was left out."""

    examples: tuple[Example, ...]
    splits: dict[SplitName, int]  # rows by split
    repeated: int  # rows left out as others ask the same
    rare: dict[str, int]  # labels left out as they have too few rows

    @property
    def labels(self) -> list[str]:
        """Their labels: the targets."""
        return [example.target for example in self.examples]


def run_information(
    config: SearchConfig, options: InformationOptions, *, run: str | None = None, pick: str = "best"
) -> dict[str, Any]:
    """Return what probes read of the label at every layer, in this process, as JSON values.

    With a run: of its full model and of one of its results, beside what removing each layer alone has cost. Without:
    of the model as it is, and without `config.strategy.remove` if that names layers.

    Args:
        config: model and rows; of a run those of the run, wherever they lie now.
        options: which rows, and how they are probed.
        run: its folder or URI.
        pick: best, bsba, final, selected, or the number of a committed round.

    Raises:
        UsageError: the request cannot be met, or model or rows are not those of the run.
    """
    check_scikit_learn()
    asked = _asked(config, options, run, pick)
    started = time.monotonic()
    info, full_knd, pruned_knd = _gather(asked)
    gathered = time.monotonic()
    removed, labels_n = asked.removed, np.array(asked.probed.labels)
    logger.info("probing %d layers of the full model%s", info.num_layers, " and the pruned one" * bool(removed))
    full = curve_json(full_knd, range(info.num_layers), labels_n, options.rule, model=0)
    surviving = [layer for layer in range(info.num_layers) if layer not in removed]
    pruned = None if pruned_knd is None else curve_json(pruned_knd, surviving, labels_n, options.rule, model=1)
    random = random_control(labels_n, full_knd.shape[2], options.rule)
    shuffled = [point["shuffled"] for point in (*full, *(pruned or ()))]
    return {
        **_facts(asked, pick),
        "num_layers": info.num_layers,
        "hidden_size": int(full_knd.shape[2]),
        "dtype": info.dtype,
        "device": info.device,
        "entropy": entropy_bits(labels_n),
        "probe": rule_json(options.rule),
        "full": full,
        "pruned": pruned,
        "controls": {"shuffled": [min(shuffled), max(shuffled)], "random": [min(random), max(random)]},
        "correlation": None if asked.history is None else correlation_json(asked.history, full, options.rule.seed),
        "seconds": {"gather": gathered - started, "probe": time.monotonic() - gathered},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A request that needs nothing but the model now."""

    config: SearchConfig
    task: str
    probed: ProbedRows
    removed: tuple[int, ...]
    reader: RunReader | None  # None: no run
    round: int | None
    history: History | None


def _asked(config: SearchConfig, options: InformationOptions, run: str | None, pick: str) -> _Asked:
    """Return the request, or refuse it, before a model is loaded."""
    config = with_absolute_paths(config)
    prepared = prepare_rows(config.task)
    removed, number, reader, history = config.strategy.remove, None, None, None
    if run is not None:
        reader = RunReader(run)
        stored_identity(reader, {}).check_task(prepared)
        entry = picked_round(reader, pick)
        number, removed = entry.number, entry.removed
        history = stored_history(reader, reader.manifest())
        found_model(config.model, None, reader.uri)
    check_request(config)
    probed = probed_rows(prepared, options, was_searched=reader is not None)
    options.rule.check_labels(probed.labels)
    logger.info("task %s: %s", prepared.spec.name, _counted(probed))
    return _Asked(
        config=config,
        task=prepared.spec.name,
        probed=probed,
        removed=removed,
        reader=reader,
        round=number,
        history=history,
    )


def _gather(asked: _Asked) -> tuple[ModelInfo, np.ndarray, np.ndarray | None]:
    """Return what the rows' last tokens hold at every boundary of the full model, and of the one without layers."""
    config, reader = asked.config, asked.reader
    dtype = config.dtype
    if reader is not None and config.model.dtype == "auto":
        dtype = str(reader.manifest().model["dtype"])
    resources = replace(config.resources, local=True, address=None, workers=None, tensor_parallel=1)
    executor = LocalExecutor(replace(config.model, dtype="auto"), dtype, resources)
    executor.connect()
    try:
        info = executor.load()
        if reader is not None:
            check_same_model(reader.manifest(), info, config.model.model, reader.uri)
        StrategySection(remove=asked.removed).check_layers(info.num_layers)
        logger.info("model: %s, %d layers, %s on %s", info.family, info.num_layers, info.dtype, info.device)
        rows = executor.encode(asked.probed.examples)
        info.check_rows(rows, max_new_tokens=1)
        token_ids = [row.token_ids for row in rows]
        full_knd = executor.last_states((), token_ids)
        return info, full_knd, executor.last_states(asked.removed, token_ids) if asked.removed else None
    finally:
        executor.close()


def _facts(asked: _Asked, pick: str) -> dict[str, Any]:
    probed, model, versions = asked.probed, asked.config.model, installed_versions()
    return {
        "run": None if asked.reader is None else asked.reader.uri,
        "pick": None if asked.reader is None else pick,
        "round": asked.round,
        "removed": list(asked.removed),
        "task": asked.task,
        "model": hub_id(model, model) or Path(model.model).name,
        "rows": {
            "count": len(probed.examples),
            "splits": probed.splits,
            "repeated": probed.repeated,
            "rare": sum(probed.rare.values()),
        },
        "labels": dict(sorted(Counter(probed.labels).items())),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: versions[name] for name in ("torch", "transformers", "tale-ray")},
    }


def store_information(run: str, values: dict[str, Any]) -> None:
    """Keep what was measured in the run's folder, in place of what was measured before.

    Raises:
        LeaseHeld: another process writes to the run.
        StoreError: the folder cannot be written.
    """
    with RunWriter.claim(run, wait=False) as writer:
        writer.write_result(RESULT, values)


def probed_rows(prepared: PreparedRows, options: InformationOptions, *, was_searched: bool) -> ProbedRows:
    """Return the rows that are asked for, each question once: on both sides of a fold it would be learned by heart.

    Rows ask the same where an `id` or another column that is not asked differs, too.

    Raises:
        TaskError: the task has no labels, or a split has no rows.
        ConfigError: rows that a search decided on are asked for without saying so.
    """
    kind = prepared.spec.answer.type
    if kind in _WITHOUT_LABELS:
        raise TaskError(
            f"task {prepared.spec.name} has answers of type {kind}, which are not labels that a reply begins with: "
            "take a task of answer type choice or word"
        )
    by_split = {**prepared.examples, "finetune": prepared.finetune}
    splits = options.splits or tuple(split for split in (_UNSEEN if was_searched else _ANY) if by_split.get(split))
    if was_searched and not options.allow_search_rows and "search" in splits:
        raise ConfigError(
            "split 'search' holds the rows that the search chose its layers on, so that what is measured on them is "
            "chosen, too: take select,test, or say --allow-search-rows"
        )
    if empty := [split for split in splits or _UNSEEN if not by_split.get(split)]:
        raise TaskError(
            f"split {empty[0]} of task {prepared.spec.name} is empty: its rows are {prepared.counts}; choose another "
            "with --split" + (", or search rows with --allow-search-rows" if was_searched else "")
        )
    chosen: dict[str, tuple[SplitName, Example]] = {}
    for split in splits:
        for example in by_split[split]:
            chosen.setdefault(question_of(example), (split, example))
    repeated = sum(len(by_split[split]) for split in splits) - len(chosen)
    kept = _first(list(chosen.values()), options.rows)
    rare = options.rule.rare_labels([example.target for _, example in kept]) if options.drop_rare_labels else {}
    kept = [(split, example) for split, example in kept if example.target not in rare]
    counts = Counter(split for split, _ in kept)
    return ProbedRows(
        examples=tuple(example for _, example in kept),
        splits={split: counts[split] for split in splits},
        repeated=repeated,
        rare=rare,
    )


def _first(rows: Sequence[tuple[SplitName, Example]], limit: int | None) -> list[tuple[SplitName, Example]]:
    """Return so many rows, in their order: those with the lowest digests, whatever their order and their split."""
    if limit is None or limit >= len(rows):
        return list(rows)
    order = sorted(range(len(rows)), key=lambda at: rows[at][1].digest)
    return [rows[at] for at in sorted(order[:limit])]


def _counted(probed: ProbedRows) -> str:
    parts = [count_text(len(probed.examples), "row"), count_text(len(set(probed.labels)), "label")]
    if probed.repeated:
        parts.append(f"{count_text(probed.repeated, 'row')} left out that others repeat")
    if probed.rare:
        parts.append(
            f"{count_text(sum(probed.rare.values()), 'row')} left out with rare labels ({', '.join(probed.rare)})"
        )
    return ", ".join(parts)
