"""Rounds, units and answers as Parquet: records to bytes and back, exactly.

Columns are for whoever reads the folder with pandas or duckdb; what they cannot hold is in the key-value metadata, as
JSON. All files of one kind have one schema. Does not know where the files are.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tale_ray.errors import StoreError
from tale_ray.records import CandidateAnswers, CandidateScore, Round, RowAnswer, Score, UnitResult, Work, WorkUnit
from tale_ray.store.documents import SCHEMA_VERSION, check_version

ROUND_SCHEMA = pa.schema(
    {
        "round": pa.int32(),
        "attempt": pa.int32(),
        "layer": pa.int32(),  # null: the baseline
        "correct": pa.int64(),
        "seen": pa.int64(),
        "invalid": pa.int64(),
        "status": pa.string(),
        "seconds": pa.float64(),
        "winner": pa.bool_(),
        "committed": pa.bool_(),
        "removed": pa.list_(pa.int32()),  # cumulative, in order of removal, the winner included
    }
)
ANSWER_FIELDS = {"reply": pa.string(), "prediction": pa.string(), "correct": pa.bool_()}
UNIT_SCHEMA = pa.schema({"layer": pa.int32(), "row": pa.int64(), "row_digest": pa.string(), **ANSWER_FIELDS})
SHEET_SCHEMA = pa.schema(
    {"row": pa.int64(), "split": pa.string(), "row_digest": pa.string(), "target": pa.string(), **ANSWER_FIELDS}
)


@dataclass(frozen=True, slots=True)
class StoredRound:
    """A round as it was stored."""

    round: Round
    attempt: int
    work: Work  # durable work of this round
    digest: str  # of what was decided, and on what
    parent: str  # digest of the round before; "" for round 0


@dataclass(frozen=True, slots=True)
class AnswerSheet:
    """What one configuration said about the rows of a split."""

    scope: str
    split: str
    row_digests: tuple[str, ...]
    targets: tuple[str, ...]
    answers: tuple[RowAnswer, ...]


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_round(round_: Round, parent: str) -> str:
    """Return the SHA-256 of what a round decided and on what counts; seconds and order of candidates are not in it."""
    counts = [[score.layer, score.correct, score.seen, score.invalid, score.status] for score in round_.candidates]
    content = {
        "number": round_.number,
        "removed": list(round_.removed),
        "winner": round_.removed_layer,
        "score": asdict(round_.score),
        "candidates": sorted(counts, key=lambda count: -1 if count[0] is None else count[0]),
        "committed": round_.committed,
        "parent": parent,
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def dump_round(stored: StoredRound, run: str) -> bytes:
    """Return the bytes of a round's file: one row per candidate."""
    round_ = stored.round
    rows = [
        {
            **asdict(score),
            "round": round_.number,
            "attempt": stored.attempt,
            "winner": score.layer == round_.removed_layer,
            "committed": round_.committed,
            "removed": list(round_.removed),
        }
        for score in round_.candidates
    ]
    header = {
        "number": round_.number,
        "removed_layer": round_.removed_layer,
        "removed": list(round_.removed),
        "score": asdict(round_.score),
        "committed": round_.committed,
    }
    texts = {"run": run, "attempt": str(stored.attempt), "parent": stored.parent, "digest": stored.digest}
    return _dump(
        rows, ROUND_SCHEMA, {**texts, "round": canonical_json(header), "work": canonical_json(asdict(stored.work))}
    )


def load_round(data: bytes, path: str) -> StoredRound:
    """Return the round in a file.

    Raises:
        StoreError: truncated, not ours, changed, or written by a newer version.
    """
    remedy = "delete it and resume: earlier rounds stay as they are, this one is computed again"
    with _damage_named(path, remedy):
        rows, texts = _load(data, ROUND_SCHEMA, path)
        header = json.loads(texts["round"])
        names = ("layer", "correct", "seen", "invalid", "status", "seconds")
        round_ = Round(
            number=header["number"],
            removed_layer=header["removed_layer"],
            removed=tuple(header["removed"]),
            score=Score(**header["score"]),
            candidates=tuple(CandidateScore(**{name: row[name] for name in names}) for row in rows),
            committed=header["committed"],
        )
        if digest_round(round_, texts["parent"]) != texts["digest"]:
            raise ValueError("its digest does not fit its content")
        work = Work(**json.loads(texts["work"]))
        return StoredRound(round_, int(texts["attempt"]), work, texts["digest"], texts["parent"])


def dump_unit(result: UnitResult, row_digests: Sequence[str], attempt: int, run: str) -> bytes:
    """Return the bytes of a unit's file: one row per candidate and row; `row_digests` belong to the unit's rows."""
    unit = result.unit
    rows = [
        {"layer": candidate.layer, "row": row, "row_digest": digest, **asdict(answer)}
        for candidate in result.candidates
        for row, digest, answer in zip(unit.rows, row_digests, candidate.answers, strict=True)
    ]
    header = {
        "layer_applications": result.layer_applications,
        "seconds": result.seconds,
        "worker": result.worker,
        "candidates": [[candidate.layer, candidate.seconds] for candidate in result.candidates],
    }
    texts = {
        "run": run,
        "attempt": str(attempt),
        "unit": canonical_json(asdict(unit)),
        "result": canonical_json(header),
    }
    return _dump(rows, UNIT_SCHEMA, texts)


def load_unit(data: bytes, path: str) -> UnitResult:
    """Return the unit's result in a file.

    Raises:
        StoreError: truncated, not ours, or written by a newer version.
    """
    remedy = "delete it and resume: its rows are scored again"
    with _damage_named(path, remedy):
        rows, texts = _load(data, UNIT_SCHEMA, path)
        fields = json.loads(texts["unit"])
        sequences: dict[str, Any] = {name: tuple(fields[name]) for name in ("removed", "candidates", "rows")}
        unit = WorkUnit(number=fields["number"], scope=fields["scope"], split=fields["split"], **sequences)
        header = json.loads(texts["result"])
        answers = _answers(rows)
        width = len(unit.rows)
        if len(answers) != len(header["candidates"]) * width:
            raise ValueError(f"{len(answers)} answers of {len(header['candidates'])} candidates on {width} rows")
        candidates = tuple(
            CandidateAnswers(layer, answers[index * width : (index + 1) * width], seconds)
            for index, (layer, seconds) in enumerate(header["candidates"])
        )
        return UnitResult(unit, candidates, header["layer_applications"], header["seconds"], header["worker"])


def dump_sheet(sheet: AnswerSheet, attempt: int, run: str) -> bytes:
    """Return the bytes of an answer sheet's file: one row per row of the split."""
    rows = [
        {"row": row, "split": sheet.split, "row_digest": digest, "target": target, **asdict(answer)}
        for row, (digest, target, answer) in enumerate(
            zip(sheet.row_digests, sheet.targets, sheet.answers, strict=True)
        )
    ]
    texts = {"run": run, "attempt": str(attempt), "scope": sheet.scope, "split": sheet.split}
    return _dump(rows, SHEET_SCHEMA, texts)


def load_sheet(data: bytes, path: str) -> AnswerSheet:
    """Return the answer sheet in a file.

    Raises:
        StoreError: truncated, not ours, or written by a newer version.
    """
    remedy = "delete it: no decision of the search depends on it"
    with _damage_named(path, remedy):
        rows, texts = _load(data, SHEET_SCHEMA, path)
        return AnswerSheet(
            scope=texts["scope"],
            split=texts["split"],
            row_digests=tuple(row["row_digest"] for row in rows),
            targets=tuple(row["target"] for row in rows),
            answers=_answers(rows),
        )


def _answers(rows: Sequence[Mapping[str, Any]]) -> tuple[RowAnswer, ...]:
    return tuple(RowAnswer(row["reply"], row["prediction"], row["correct"]) for row in rows)


def _dump(rows: list[dict[str, Any]], schema: Any, texts: Mapping[str, str]) -> bytes:
    metadata = {"schema_version": str(SCHEMA_VERSION), **texts}
    metadata["checksum"] = _checksum(metadata)  # Parquet has its own for the columns
    table = pa.Table.from_pylist(rows, schema=schema.with_metadata(metadata))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def _checksum(texts: Mapping[str, str]) -> str:
    return hashlib.sha256(canonical_json(texts).encode()).hexdigest()


@contextmanager
def _damage_named(path: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"{path} is truncated or was changed ({error}): files stay as tale_ray wrote them; {remedy}"
        ) from error


def _load(data: bytes, schema: Any, path: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)
    texts = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if "schema_version" not in texts:
        raise ValueError("it has no schema version, so tale_ray did not write it")
    check_version(int(texts["schema_version"]), path)
    if texts.pop("checksum") != _checksum(texts):
        raise ValueError("its checksum does not fit its metadata")
    if not table.schema.equals(schema):
        raise ValueError(f"its columns are {', '.join(table.column_names)}, not {', '.join(schema.names)}")
    return table.to_pylist(), texts
