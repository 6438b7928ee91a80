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
        "without": pa.list_(
            pa.int32()
        ),  # what else it does without, in the order of removal; null: what all candidates do
    }
)
SCORE_FIELDS = ("layer", "correct", "seen", "invalid", "status", "seconds")
ANSWER_FIELDS = {
    "reply": pa.string(),
    "prediction": pa.string(),
    "correct": pa.bool_(),
    "log_likelihoods": pa.list_(pa.float64()),  # null where replies are decoded
}
UNIT_SCHEMA = pa.schema({"layer": pa.int32(), "row": pa.int64(), "row_digest": pa.string(), **ANSWER_FIELDS})
SHEET_SCHEMA = pa.schema(
    {
        **{"row": pa.int64(), "split": pa.string(), "row_digest": pa.string(), "target": pa.string(), **ANSWER_FIELDS},
        "candidates_seen": pa.int32(),  # of the round: how many were scored on the row
        "candidates_missed": pa.int32(),  # and how many of them got it wrong
    }
)
_LATER_COLUMNS = {
    "without",
    "candidates_seen",
    "candidates_missed",
    "log_likelihoods",
}  # that files of earlier versions do not have


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
    candidates: tuple[tuple[int, int], ...] = ()  # by row: how many were scored on it, and got it wrong; or empty

    @property
    def score(self) -> Score:
        """How many of the rows were answered correctly."""
        return Score(
            correct=sum(answer.correct for answer in self.answers),
            total=len(self.answers),
            invalid=sum(answer.prediction is None for answer in self.answers),
        )


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_round(round_: Round, parent: str) -> str:
    """Return the SHA-256 of what a round decided and on what counts; seconds and order of candidates are not in it."""
    counts = [
        [score.layer, score.correct, score.seen, score.invalid, score.status]
        + ([] if score.without is None else [list(score.without)])
        for score in round_.candidates
    ]
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
    scores = round_.candidates
    columns = {
        **{name: [getattr(score, name) for score in scores] for name in SCORE_FIELDS},
        "round": [round_.number] * len(scores),
        "attempt": [stored.attempt] * len(scores),
        "winner": [round_.is_won_by(score) for score in scores],
        "without": [score.without for score in scores],
        "committed": [round_.committed] * len(scores),
        "removed": [list(round_.removed)] * len(scores),
    }
    header = {
        "number": round_.number,
        "removed_layer": round_.removed_layer,
        "removed": list(round_.removed),
        "score": asdict(round_.score),
        "committed": round_.committed,
    }
    texts = {"run": run, "attempt": str(stored.attempt), "parent": stored.parent, "digest": stored.digest}
    return _dump(
        columns, ROUND_SCHEMA, {**texts, "round": canonical_json(header), "work": canonical_json(asdict(stored.work))}
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
        round_ = Round(
            number=header["number"],
            removed_layer=header["removed_layer"],
            removed=tuple(header["removed"]),
            score=Score(**header["score"]),
            candidates=tuple(
                CandidateScore(
                    **{name: row[name] for name in SCORE_FIELDS},
                    without=None if row["without"] is None else tuple(row["without"]),
                )
                for row in rows
            ),
            committed=header["committed"],
        )
        if digest_round(round_, texts["parent"]) != texts["digest"]:
            raise ValueError("its digest does not fit its content")
        work = Work(**json.loads(texts["work"]))
        return StoredRound(round_, int(texts["attempt"]), work, texts["digest"], texts["parent"])


def dump_unit(result: UnitResult, row_digests: Sequence[str], attempt: int, run: str) -> bytes:
    """Return the bytes of a unit's file: one row per candidate and row; `row_digests` belong to the unit's rows."""
    unit = result.unit
    columns: dict[str, list[Any]] = {
        "layer": [candidate.layer for candidate in result.candidates for _ in unit.rows],
        "row": [*unit.rows] * len(result.candidates),
        "row_digest": [*row_digests] * len(result.candidates),
        **_answer_columns([answer for candidate in result.candidates for answer in candidate.answers]),
    }
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
    return _dump(columns, UNIT_SCHEMA, texts)


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
    num_rows = len(sheet.answers)
    candidates = sheet.candidates or ((None, None),) * num_rows
    columns: dict[str, list[Any]] = {
        "row": list(range(num_rows)),
        "split": [sheet.split] * num_rows,
        "row_digest": list(sheet.row_digests),
        "target": list(sheet.targets),
        **_answer_columns(sheet.answers),
        "candidates_seen": [seen for seen, _ in candidates],
        "candidates_missed": [missed for _, missed in candidates],
    }
    texts = {"run": run, "attempt": str(attempt), "scope": sheet.scope, "split": sheet.split}
    return _dump(columns, SHEET_SCHEMA, texts)


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
            candidates=tuple(
                (row["candidates_seen"], row["candidates_missed"])
                for row in rows
                if row["candidates_seen"] is not None and row["candidates_missed"] is not None
            ),
        )


def _answer_columns(answers: Sequence[RowAnswer]) -> dict[str, list[Any]]:
    return {name: [getattr(answer, name) for answer in answers] for name in ANSWER_FIELDS}


def _answers(rows: Sequence[Mapping[str, Any]]) -> tuple[RowAnswer, ...]:
    return tuple(
        RowAnswer(
            row["reply"],
            row["prediction"],
            row["correct"],
            None if row["log_likelihoods"] is None else tuple(row["log_likelihoods"]),
        )
        for row in rows
    )


def _dump(columns: Mapping[str, list[Any]], schema: Any, texts: Mapping[str, str]) -> bytes:
    metadata = {"schema_version": str(SCHEMA_VERSION), **texts}
    metadata["checksum"] = _checksum(metadata)  # Parquet has its own for the columns
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    table = pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata))
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
    for name in _LATER_COLUMNS & (set(schema.names) - set(table.column_names)):
        table = table.append_column(schema.field(name), pa.nulls(len(table), schema.field(name).type))
    table = table.select(schema.names) if set(table.column_names) == set(schema.names) else table
    if not table.schema.equals(schema):
        raise ValueError(f"its columns are {', '.join(table.column_names)}, not {', '.join(schema.names)}")
    return table.to_pylist(), texts
