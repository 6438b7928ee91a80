"""What the rows say that the search has not seen: the round they recommend, and the results on test rows, compared.

Reads the store, writes nothing. Results that are not those of the rounds that are there are passed over: they belong
to a search that went on since.
"""

from collections.abc import Mapping
from typing import Any

from tale_ray.records import Score, SplitName
from tale_ray.results.statistics import PairedComparison, adjust_holm, compare, optimism, wilson_interval
from tale_ray.search.driver import held_out_scope
from tale_ray.search.history import History
from tale_ray.store.documents import check_fields
from tale_ray.store.layout import round_scope
from tale_ray.store.reader import RunReader
from tale_ray.store.tables import AnswerSheet

RESULTS = ("baseline", "best", "bsba", "final", "selected")  # of a search, in the order in which they are shown
_RESULT = {"round": int, "removed": list[int], "correct": int, "total": int, "invalid": int}


def selected_result(reader: RunReader, history: History) -> dict[str, Any] | None:
    """Return the recommended round and its score on the select rows, or None if its rounds are not those there are.

    Raises:
        StoreError: they cannot be read, or were changed.
    """
    found = reader.result("selected")
    if found is None or not history.rounds:
        return None
    place = (f"{reader.uri}/results/selected.json", "delete it: it is derived from the answers on the select rows")
    check_fields(found, {**_RESULT, "rounds": list[Mapping[str, Any]]}, *place)
    for entry in found["rounds"]:
        check_fields(entry, _RESULT, *place)
    if [_which(entry) for entry in found["rounds"]] != [(entry.number, entry.removed) for entry in history.rounds]:
        return None
    return {name: found[name] for name in _RESULT} if _which(found) in map(_which, found["rounds"]) else None


def held_out_results(reader: RunReader, history: History) -> dict[str, Any] | None:
    """Return the scores on test rows, or None if the results of the search are not those that were scored.

    Raises:
        StoreError: they cannot be read, or were changed.
    """
    found = reader.result("test")
    if found is None or not history.rounds:
        return None
    place = (f"{reader.uri}/results/test.json", "delete it: the test rows are scored again")
    check_fields(found, dict.fromkeys(found, Mapping[str, Any]), *place)
    for entry in found.values():
        check_fields(entry, _RESULT, *place)
    picks = {name: (entry.number, entry.removed) for name, entry in history.picks.items()}
    selected = selected_result(reader, history)
    expected = picks if selected is None else {**picks, "selected": _which(selected)}
    scored = {name: _which(entry) for name, entry in found.items() if name in expected}
    return {name: found[name] for name in expected} if scored == expected else None


def compared_results(reader: RunReader, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results on test rows with intervals, and compared with the full model as far as answers are stored.

    The p-values are corrected for the number of different rounds that are compared with the full model.
    """
    numbers = sorted({entry["round"] for entry in results.values()})
    answers = {number: reader.answers(held_out_scope("test", number)) for number in numbers}
    comparisons = {number: compare_sheets(answers[number], answers[0]) for number in numbers}
    p_values = {number: found.p_value for number, found in comparisons.items() if number and found}
    adjusted = dict(zip(p_values, adjust_holm([*p_values.values()]), strict=True))
    compared = {}
    for name, entry in results.items():
        interval = wilson_interval(entry["correct"], entry["total"])
        compared[name] = {**entry, "interval": [interval.low, interval.high]}
        if name != "baseline":
            comparison = comparisons[entry["round"]]
            holm = None if comparison is None else adjusted.get(entry["round"], 1.0)  # 1: it is the full model itself
            compared[name] |= {**comparison_json(comparison), "p_value_holm": holm}
    return compared


def optimism_by_result(history: History, results: Mapping[str, Any]) -> dict[str, float]:
    """Return by how much the gain of each result over the full model on search rows exceeds that on test rows."""
    baseline = _score(results["baseline"])
    return {
        name: optimism((history.rounds[entry["round"]].score, history.baseline), (_score(entry), baseline))
        for name, entry in results.items()
        if name != "baseline"
    }


def baseline_answers(reader: RunReader) -> dict[SplitName, AnswerSheet]:
    """Return what the full model said about the rows of a run, by split, as far as it is stored.

    Raises:
        StoreError: the answers cannot be read.
    """
    scopes: dict[SplitName, str] = {
        "search": round_scope(0),
        "select": held_out_scope("select", 0),
        "test": held_out_scope("test", 0),
    }
    sheets = {split: reader.answers(scope) for split, scope in scopes.items()}
    return {split: sheet for split, sheet in sheets.items() if sheet is not None}


def compare_sheets(sheet: AnswerSheet | None, other: AnswerSheet | None) -> PairedComparison | None:
    """Return how two models compare, or None where the answers of one are missing or of other rows."""
    if sheet is None or other is None or sheet.row_digests != other.row_digests:
        return None
    return compare([answer.correct for answer in sheet.answers], [answer.correct for answer in other.answers])


def comparison_json(comparison: PairedComparison | None) -> dict[str, Any]:
    """Return a comparison as JSON values, all of them null if there is none."""
    if comparison is None:
        return dict.fromkeys(("difference", "difference_interval", "wins", "losses", "ties", "p_value"))
    return {
        "difference": comparison.difference,
        "difference_interval": [comparison.interval.low, comparison.interval.high],
        "wins": comparison.wins,
        "losses": comparison.losses,
        "ties": comparison.ties,
        "p_value": comparison.p_value,
    }


def _which(entry: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    return entry["round"], tuple(entry["removed"])


def _score(entry: Mapping[str, Any]) -> Score:
    return Score(correct=entry["correct"], total=entry["total"], invalid=entry["invalid"])
