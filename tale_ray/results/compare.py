"""Runs side by side, on the same test rows and at equal numbers of removed layers, from storage alone.

Only answers that are stored are compared; what is not scored on test rows is named, with the command that scores it.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import PurePosixPath
from typing import Any

from tale_ray.config import SearchConfig
from tale_ray.errors import ConfigError
from tale_ray.results.held_out import compare_sheets, comparison_json
from tale_ray.results.statistics import adjust_holm, wilson_interval
from tale_ray.results.summary import stored_history, summarize
from tale_ray.search.driver import held_out_scope
from tale_ray.search.history import History
from tale_ray.store.documents import Manifest
from tale_ray.store.reader import RunReader
from tale_ray.store.study import StudyFolder, seed_uri
from tale_ray.store.tables import AnswerSheet


@dataclass(frozen=True, slots=True)
class _Side:
    """A run, as far as it is compared."""

    reader: RunReader
    manifest: Manifest
    config: SearchConfig
    history: History
    summary: Mapping[str, Any]
    rounds: Mapping[int, int]  # round by number of removed layers
    sheets: Mapping[int, AnswerSheet]  # on test rows, by round

    @property
    def what_is_asked(self) -> tuple[Any, ...]:
        """What two runs have in common that give the same answers without the same layers."""
        return self.manifest.model["digest"], self.manifest.model["dtype"], self.manifest.task, self.config.task.shots


def compare_runs(uris: Sequence[str]) -> dict[str, Any]:
    """Return the comparison of two runs or more as JSON values; runs are named by their positions.

    `numbers` has for each number of removed layers a cell for each run: null if it has no such round; `correct` null
    and a command in `evaluate` if that round's answers to test rows are not stored. `pairs` has every pair of cells
    that are stored, the first run against the second one. `p_value_holm` is corrected for all pairs but those of
    the same model without the same layers (`is_same`), whose answers cannot differ.

    Raises:
        ConfigError: there are fewer than two runs, one twice, a study, or they do not have the same test rows.
        StoreError: there is no run, or a file of it is damaged.
    """
    _check_studies(uris)
    if len(uris) < 2:
        raise ConfigError(f"{len(uris)} run is nothing to compare: name two at least")
    readers = [RunReader(uri) for uri in uris]
    places = [reader.uri.rstrip("/") for reader in readers]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise ConfigError(f"{twice} is named twice: name each run once")
    manifests = [reader.manifest() for reader in readers]
    _check_rows(readers, manifests)
    sides = [_side(reader, manifest) for reader, manifest in zip(readers, manifests, strict=True)]
    numbers = sorted({number for side in sides for number in side.rounds})
    rows = manifests[0].rows["test"]
    return {
        "test_rows": {"count": rows["count"], "digest": rows["digest"]},
        "runs": [{"label": label, **_cost(side)} for label, side in zip(_labels(sides), sides, strict=True)],
        "numbers": [
            {"num_removed": number, "cells": [_cell(side, side.rounds.get(number)) for side in sides]}
            for number in numbers
        ],
        "pairs": _pairs(sides, numbers),
        "notes": _notes(sides),
    }


def _check_studies(uris: Sequence[str]) -> None:
    """Refuse studies: each of their runs has test rows of its own, so they cannot stand beside one another here."""
    folders = [StudyFolder(uri) for uri in uris]
    studies = [folder for folder in folders if folder.exists()]
    if not studies:
        return
    seeds = [folder.manifest().seeds for folder in studies]
    readers = [RunReader(uri) for uri, folder in zip(uris, folders, strict=True) if folder not in studies]
    of_runs = {reader.manifest().config["task"]["seed"] for reader in readers if reader.exists()}
    common = [seed for seed in seeds[0] if all(seed in others for others in seeds) and of_runs <= {seed}]
    seed = next(iter(common), seeds[0][0])
    named = [seed_uri(folder.uri, seed) if folder in studies else folder.uri for folder in folders]
    example = f"name a run of one seed of each, e.g. `tale-ray compare {shlex.join(named)}`; " if len(named) > 1 else ""
    raise ConfigError(
        f"{studies[0].uri} is a study of the seeds {', '.join(map(str, seeds[0]))}: each of its runs has other test "
        f"rows, and runs are compared on the same ones; {example}`tale-ray show {shlex.quote(studies[0].uri)}` has all "
        "its runs in one table"
    )


def _check_rows(readers: Sequence[RunReader], manifests: Sequence[Manifest]) -> None:
    """Refuse runs that were not tested on the same rows."""
    for reader, manifest in zip(readers, manifests, strict=True):
        if not manifest.rows.get("test", {}).get("count"):
            raise ConfigError(
                f"{reader.uri} has no test rows, and only on these runs can be compared: search again with a share for "
                "them, such as --splits search=0.5,select=0.2,test=0.3"
            )
    first, digest = readers[0], manifests[0].rows["test"]["digest"]
    for reader, manifest in zip(readers[1:], manifests[1:], strict=True):
        if (other := manifest.rows["test"]["digest"]) != digest:
            differing = _differing(manifests[0], manifest)
            raise ConfigError(
                f"{first.uri} and {reader.uri} have other test rows (SHA-256 {digest[:12]} and {other[:12]}"
                f"{differing}): accuracies on different rows are not comparable; search both with the same --task, "
                "--seed, --splits and --shots"
            )


def _differing(one: Manifest, other: Manifest) -> str:
    """Return which options of the rows differ, for the message."""
    found = [
        f"{name} {one.config['task'].get(name)} and {other.config['task'].get(name)}"
        for name in ("task", "seed", "splits", "shots")
        if one.config["task"].get(name) != other.config["task"].get(name)
    ]
    return f"; {', '.join(found)}" if found else ""


def _side(reader: RunReader, manifest: Manifest) -> _Side:
    history = stored_history(reader, manifest)
    found = {entry.number: reader.answers(held_out_scope("test", entry.number)) for entry in history.rounds}
    return _Side(
        reader=reader,
        manifest=manifest,
        config=SearchConfig.from_json(manifest.config),
        history=history,
        summary=summarize(reader),
        rounds={len(entry.removed): entry.number for entry in history.rounds},
        sheets={number: sheet for number, sheet in found.items() if sheet is not None},
    )


def _labels(sides: Sequence[_Side]) -> list[str]:
    """Return a label for each run, strategy and model; where two have the same, with the name of the run's folder."""
    labels = [f"{side.config.strategy.strategy}/{PurePosixPath(side.config.model.model).name}" for side in sides]
    names = [PurePosixPath(side.reader.uri).name for side in sides]
    told = [
        f"{label} ({name})" if labels.count(label) > 1 else label for label, name in zip(labels, names, strict=True)
    ]
    return [
        f"{label} {told[:at].count(label) + 1}" if told.count(label) > 1 else label for at, label in enumerate(told)
    ]


def _cost(side: _Side) -> dict[str, Any]:
    summary = side.summary
    names = ("run", "state", "model", "task", "num_layers", "attempts", "seconds", "work")
    return {**{name: summary[name] for name in names}, "strategy": side.config.strategy.strategy}


def _cell(side: _Side, number: int | None) -> dict[str, Any] | None:
    if number is None:
        return None
    cell: dict[str, Any] = {"round": number, "removed": list(side.history.rounds[number].removed)}
    sheet = side.sheets.get(number)
    if sheet is None:
        run = shlex.quote(side.reader.uri)
        command = f"tale-ray evaluate --run {run} --pick {number} --split test --store"
        return {**cell, "correct": None, "total": None, "interval": None, "evaluate": command}
    score = sheet.score
    interval = wilson_interval(score.correct, score.total)
    counts = {"correct": score.correct, "total": score.total, "interval": [interval.low, interval.high]}
    return {**cell, **counts, "evaluate": None}


def _pairs(sides: Sequence[_Side], numbers: Sequence[int]) -> list[dict[str, Any]]:
    pairs = []
    for number in numbers:
        for one, other in combinations(range(len(sides)), 2):
            rounds = [sides[at].rounds.get(number) for at in (one, other)]
            sheets = [
                None if at is None else side.sheets.get(at)
                for at, side in zip(rounds, (sides[one], sides[other]), strict=True)
            ]
            comparison = compare_sheets(*sheets)
            if comparison is not None:
                is_same = sides[one].what_is_asked == sides[other].what_is_asked and _removed(
                    sides[one], number
                ) == _removed(sides[other], number)
                names = {"num_removed": number, "runs": [one, other], "is_same": is_same}
                pairs.append({**names, **comparison_json(comparison)})
    tested = [pair for pair in pairs if not pair["is_same"]]
    adjusted = adjust_holm([pair["p_value"] for pair in tested])
    for pair in pairs:
        pair["p_value_holm"] = 1.0 if pair["is_same"] else adjusted[tested.index(pair)]
    return pairs


def _removed(side: _Side, number: int) -> set[int]:
    return set(side.history.rounds[side.rounds[number]].removed)


def _notes(sides: Sequence[_Side]) -> list[str]:
    """Return what runs with the same test rows may still differ in."""
    notes = []
    if len({str(side.manifest.task) + str(side.config.task.shots) for side in sides}) > 1:
        notes.append("the runs ask the same rows in other words, or with other demonstrations")
    if len({side.manifest.rows.get("search", {}).get("digest") for side in sides}) > 1:
        notes.append("the runs searched on other rows")
    if len({side.manifest.model["num_layers"] for side in sides}) > 1:
        notes.append("the models have different numbers of layers: an equal number removed is not an equal share")
    notes += [f"{side.reader.uri} is {side.summary['state']}" for side in sides if side.summary["state"] != "finished"]
    return notes
