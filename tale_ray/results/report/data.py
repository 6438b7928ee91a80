"""What a report shows, gathered from storage alone: the summary of `tale-ray show --json`, and what stands behind it.

Shares are in [0, 1], layers are numbered from 0. Does not know how anything looks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tale_ray.config import SearchConfig
from tale_ray.records import Round, RowAnswer, Score, SplitName
from tale_ray.results.held_out import RESULTS
from tale_ray.results.report.information import StoredInformation, stored_information
from tale_ray.results.report.latency import Latency, stored_latency
from tale_ray.results.report.synergy import StoredSynergy, stored_synergy
from tale_ray.results.report.transfer import Transfer, stored_transfer
from tale_ray.results.statistics import Interval, wilson_interval
from tale_ray.results.summary import stored_history, summarize
from tale_ray.search.driver import held_out_scope
from tale_ray.search.history import History
from tale_ray.store.documents import AttemptRecord, Manifest
from tale_ray.store.reader import RunReader
from tale_ray.store.tables import AnswerSheet

Fate: TypeAlias = Literal["win", "loss", "both_right", "both_wrong"]
CellKind: TypeAlias = Literal["exact", "bounded_out", "removed", "not_scored"]
REPORTED_SPLITS: tuple[SplitName, ...] = ("search", "select", "test")


@dataclass(frozen=True, slots=True)
class Point:
    """The accuracy of a round on the rows of a split."""

    round: int
    num_removed: int
    score: Score
    interval: Interval  # Wilson, 95%


@dataclass(frozen=True, slots=True)
class Series:
    """The rounds of a search on one split, as far as they are scored there."""

    split: SplitName
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """A layer in a round: what became of the model without it."""

    layer: int
    round: int
    kind: CellKind  # removed: before this round; not_scored: the layer was no candidate
    correct: int = 0
    seen: int = 0
    is_winner: bool = False

    @property
    def share(self) -> float:
        """Share of the seen rows that were answered correctly; only of a candidate."""
        return self.correct / self.seen


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Layers by rounds; `cells[layer][column]`, where `rounds[column]` numbers the column. Accuracies in [0, 1]."""

    rounds: tuple[int, ...]
    cells: tuple[tuple[Cell, ...], ...]
    baseline: float
    rejected: int | None  # the number of the round whose winner was not removed


@dataclass(frozen=True, slots=True)
class RowChange:
    """A test row that one of the two models answers correctly and the other one does not."""

    number: int  # position in the test split
    digest: str
    target: str
    base: RowAnswer
    pruned: RowAnswer


@dataclass(frozen=True, slots=True)
class RowByRow:
    """A result beside the full model on every test row."""

    names: tuple[str, ...]  # of the results that are this round
    round: int
    removed: tuple[int, ...]
    fates: tuple[Fate, ...]  # by row, in the order of the split
    wins: tuple[RowChange, ...]
    losses: tuple[RowChange, ...]


@dataclass(frozen=True, slots=True)
class ReportData:
    """All that a report shows of a run."""

    summary: Mapping[str, Any]  # `tale-ray show --json`
    manifest: Manifest | None  # None: the model is being loaded, nothing is stored
    config: SearchConfig | None
    attempts: tuple[AttemptRecord, ...]
    trajectory: tuple[Series, ...]
    heat_map: HeatMap | None
    row_by_row: tuple[RowByRow, ...]
    latency: Latency | None
    transfer: Transfer | None
    information: StoredInformation | None = None
    synergy: StoredSynergy | None = None

    @property
    def pick(self) -> str | None:
        """The result that the report is about: what the select rows recommend, else the best; None before round 0."""
        if self.summary["baseline"] is None:
            return None
        return "best" if self.summary["selected"] is None else "selected"


def gather(reader: RunReader) -> ReportData:
    """Return what a report shows of a run, at any time of its life.

    Raises:
        StoreError: there is no run, or a file of it is damaged.
    """
    summary = summarize(reader)
    if summary["task"] is None:
        return ReportData(summary, None, None, (), (), None, (), None, None)
    manifest = reader.manifest()
    history = stored_history(reader, manifest)
    sheets = _held_out_sheets(reader, history)
    return ReportData(
        summary=summary,
        manifest=manifest,
        config=SearchConfig.from_json(manifest.config),
        attempts=reader.attempts(),
        trajectory=_trajectory(history, sheets),
        heat_map=heat_map(history),
        row_by_row=_row_by_row(summary, history, sheets["test"]),
        latency=stored_latency(reader),
        transfer=stored_transfer(reader),
        information=stored_information(reader),
        synergy=stored_synergy(reader),
    )


def _held_out_sheets(reader: RunReader, history: History) -> dict[SplitName, dict[int, AnswerSheet]]:
    """Return the answers of the rounds on select and test rows, by split and round, as far as they are stored."""
    splits: tuple[SplitName, ...] = ("select", "test")
    found = {
        split: {entry.number: reader.answers(held_out_scope(split, entry.number)) for entry in history.rounds}
        for split in splits
    }
    return {
        split: {number: sheet for number, sheet in by_round.items() if sheet is not None}
        for split, by_round in found.items()
    }


def _trajectory(history: History, sheets: Mapping[SplitName, Mapping[int, AnswerSheet]]) -> tuple[Series, ...]:
    series = [Series("search", tuple(_point(entry, entry.score) for entry in history.rounds))]
    for split in REPORTED_SPLITS[1:]:
        scored = [entry for entry in history.rounds if entry.number in sheets[split]]
        series.append(Series(split, tuple(_point(entry, sheets[split][entry.number].score) for entry in scored)))
    return tuple(each for each in series if each.points)


def _point(entry: Round, score: Score) -> Point:
    return Point(entry.number, len(entry.removed), score, wilson_interval(score.correct, score.total))


def heat_map(history: History) -> HeatMap | None:
    """Return what became of every candidate of every finished round; None before round 1 is finished."""
    rounds = [*history.rounds[1:], *([history.rejected] if history.rejected else [])]
    if not rounds:
        return None
    before = [history.start, *(entry.removed for entry in history.rounds[1:])]
    cells = tuple(
        tuple(_cell(layer, entry, gone) for entry, gone in zip(rounds, before, strict=False))
        for layer in range(history.num_layers)
    )
    return HeatMap(
        rounds=tuple(entry.number for entry in rounds),
        cells=cells,
        baseline=history.baseline.accuracy,
        rejected=history.rejected.number if history.rejected else None,
    )


def _cell(layer: int, entry: Round, removed_before: Sequence[int]) -> Cell:
    candidates = [each for each in entry.candidates if each.layer == layer]  # several, where a beam has branches
    if layer in removed_before and not candidates:
        return Cell(layer, entry.number, "removed")
    found = max(candidates, key=lambda each: (entry.is_won_by(each), each.correct), default=None)
    if found is None or not found.seen:
        return Cell(layer, entry.number, "not_scored")
    return Cell(layer, entry.number, found.status, found.correct, found.seen, entry.is_won_by(found))


def _row_by_row(
    summary: Mapping[str, Any], history: History, sheets: Mapping[int, AnswerSheet]
) -> tuple[RowByRow, ...]:
    """Return each result but the full model beside it, once for each round, the one that is reported first."""
    names: dict[int, list[str]] = {}
    for name in RESULTS[:0:-1]:  # selected comes first
        if (summary["test"] or {}).get(name) is not None:
            names.setdefault(summary["test"][name]["round"], []).append(name)
    base = sheets.get(0)
    compared = {number: sheet for number, sheet in sheets.items() if number in names and number}
    if base is None:
        return ()
    return tuple(
        _beside(tuple(names[number]), history.rounds[number], compared[number], base)
        for number in names
        if number in compared and compared[number].row_digests == base.row_digests
    )


def _beside(names: tuple[str, ...], entry: Round, sheet: AnswerSheet, base: AnswerSheet) -> RowByRow:
    fates = tuple(_fate(pruned, full) for pruned, full in zip(sheet.answers, base.answers, strict=True))

    def changes(fate: Fate) -> tuple[RowChange, ...]:
        return tuple(
            RowChange(
                number, base.row_digests[number], base.targets[number], base.answers[number], sheet.answers[number]
            )
            for number, each in enumerate(fates)
            if each == fate
        )

    return RowByRow(names, entry.number, entry.removed, fates, changes("win"), changes("loss"))


def _fate(pruned: RowAnswer, base: RowAnswer) -> Fate:
    if pruned.correct == base.correct:
        return "both_right" if base.correct else "both_wrong"
    return "win" if pruned.correct else "loss"
