"""What a run folder says of itself: the fields of `tale-ray show --json`, read from storage alone."""

import time
from collections.abc import Sequence
from typing import Any

from tale_ray.config import SearchConfig
from tale_ray.records import CandidateScore, Measurement, Round, Score, SplitName, StopReason, Work
from tale_ray.results.held_out import compared_results, held_out_results, optimism_by_result, selected_result
from tale_ray.search.history import History
from tale_ray.search.strategy import make_strategy
from tale_ray.store.documents import Manifest
from tale_ray.store.layout import round_of
from tale_ray.store.lease import holder_state
from tale_ray.store.reader import RunReader
from tale_ray.store.tables import StoredRound

_PICK = ("round", "removed", "correct", "total")
SHOWN_SPLITS: tuple[SplitName, ...] = ("shots", "search", "select", "test")


def stored_history(reader: RunReader, manifest: Manifest) -> History:
    """Return the finished rounds of a run, and what was measured for them."""
    return _history(reader.rounds(), manifest, reader.measurements())


def _history(rounds: Sequence[StoredRound], manifest: Manifest, measurements: tuple[Measurement, ...] = ()) -> History:
    return History.of(
        (stored.round for stored in rounds),
        num_layers=manifest.model["num_layers"],
        start=SearchConfig.from_json(manifest.config).strategy.remove,
        measurements=measurements,
    )


def stop_reason(history: History, config: SearchConfig) -> StopReason | None:
    """Return why no round follows, or None if one does."""
    if not history.rounds:
        return None
    proposal = make_strategy(config.strategy, config.task.seed).propose(history)
    return proposal if isinstance(proposal, StopReason) else None


def summarize(reader: RunReader) -> dict[str, Any]:
    """Return the summary of a run, at any time of its life, as JSON values.

    Raises:
        StoreError: there is no run, or a file of it is damaged.
    """
    lease = reader.lease()
    is_held = lease is not None and holder_state(lease, time.time()) in ("alive", "unknown")
    if is_held and not reader.exists():
        return _skeleton(reader.uri)
    manifest = reader.manifest()
    config = SearchConfig.from_json(manifest.config)
    rounds = reader.rounds()
    history = _history(rounds, manifest)
    attempts = reader.attempts()
    reason = stop_reason(history, config)
    failed = bool(attempts) and attempts[-1].how == "failed"
    if is_held:
        state = "running"
    elif reason is not None and reason is not StopReason.BASELINE_ZERO:
        state = "finished"
    else:
        state = "failed" if failed or reason is StopReason.BASELINE_ZERO else "interrupted"
    if reason is None and not is_held:
        reason = StopReason.ERROR if failed else StopReason.INTERRUPTED
    selected, results = selected_result(reader, history), held_out_results(reader, history)
    work = sum((stored.work for stored in rounds), _partial_work(reader, history))
    return {
        **_skeleton(reader.uri),
        "state": state,
        "model": manifest.config["model"]["model"],
        "task": manifest.task["name"],
        "num_layers": history.num_layers,
        "epsilon": float(config.strategy.epsilon),
        "rows": {split: manifest.rows.get(split, {}).get("count", 0) for split in SHOWN_SPLITS},
        "baseline": _score(history.baseline) if history.rounds else None,
        "rounds": [_round(entry) for entry in history.rounds[1:]],
        "rejected_round": _round(history.rejected) if history.rejected else None,
        **({name: _pick(getattr(history, name)) for name in ("best", "bsba", "final")} if history.rounds else {}),
        "selected": None if selected is None else {name: selected[name] for name in _PICK},
        "test": None if results is None else compared_results(reader, results),
        "optimism": None if results is None else optimism_by_result(history, results),
        "stop_reason": None if reason is None else str(reason),
        "attempts": len(attempts),
        "seconds": {
            "load": round(sum(attempt.load_seconds for attempt in attempts), 3),
            "search": round(sum(attempt.search_seconds for attempt in attempts), 3),
        },
        "work": {
            "units": work.units,
            "candidate_rows": work.candidate_rows,
            "layer_applications": work.layer_applications,
            "retries": sum(attempt.retries for attempt in attempts),
            "wasted_rows": sum(attempt.wasted_rows for attempt in attempts),
        },
    }


def _skeleton(uri: str) -> dict[str, Any]:
    """Return every field as it is before anything is known."""
    return {
        "run": uri,
        "state": "running",
        "model": None,
        "task": None,
        "num_layers": None,
        "epsilon": None,
        "rows": dict.fromkeys(SHOWN_SPLITS, 0),
        "baseline": None,
        "rounds": [],
        "rejected_round": None,
        **dict.fromkeys(("best", "bsba", "final", "selected", "test", "optimism", "stop_reason")),
        "attempts": 0,
        "seconds": {"load": 0.0, "search": 0.0},
        "work": dict.fromkeys(("units", "candidate_rows", "layer_applications", "retries", "wasted_rows"), 0),
    }


def _partial_work(reader: RunReader, history: History) -> Work:
    """Return the work of units whose round is not finished yet."""
    finished = len(history.rounds) + (history.rejected is not None)
    work = Work()
    for scope in reader.partial_scopes():
        number = round_of(scope)
        if number is not None and number >= finished:
            for result in reader.unit_results(scope):
                cells = result.unit.candidate_rows if number else 0
                work += Work(units=1, candidate_rows=cells, layer_applications=result.layer_applications)
    return work


def _score(score: Score) -> dict[str, int]:
    return {"correct": score.correct, "total": score.total, "invalid": score.invalid}


def _round(entry: Round) -> dict[str, Any]:
    return {
        "round": entry.number,
        "removed_layer": entry.removed_layer,
        "removed": list(entry.removed),
        **_score(entry.score),
        "candidates": [_candidate(candidate) for candidate in entry.candidates],
    }


def _candidate(candidate: CandidateScore) -> dict[str, Any]:
    return {
        "layer": candidate.layer,
        "correct": candidate.correct,
        "seen": candidate.seen,
        "status": candidate.status,
        **({} if candidate.without is None else {"without": list(candidate.without)}),
    }


def _pick(entry: Round) -> dict[str, Any]:
    return {
        "round": entry.number,
        "removed": list(entry.removed),
        "correct": entry.score.correct,
        "total": entry.score.total,
    }
