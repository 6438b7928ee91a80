"""The run folder: what was written is read back exactly, damage is named, and nothing is ever half there."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pyarrow.dataset
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tale_ray.config import ModelSection, ResourceSection, SearchConfig, StorageSection, TaskSection
from tale_ray.errors import LeaseLost, StorageAway, StoreError
from tale_ray.records import CandidateAnswers, CandidateScore, Round, RowAnswer, Score, UnitResult, Work, WorkUnit
from tale_ray.store import AnswerSheet, Manifest, RunReader, RunWriter, StoredRound
from tale_ray.store import files as store_files
from tale_ray.store.documents import SCHEMA_VERSION
from tale_ray.store.files import RETRY_SECONDS, Clock, Files
from tale_ray.store.reader import longest_chain
from tale_ray.store.tables import digest_round, dump_round, dump_sheet, dump_unit, load_round, load_sheet, load_unit
from tale_ray.store.uris import strip_credentials

CONFIG = SearchConfig(
    model=ModelSection(model="bundled"), task=TaskSection(task="boolean_synthetic"), storage=StorageSection(run="r")
)
MANIFEST = Manifest(
    run="boolean-123",
    created="2026-01-02T03:04:05+00:00",
    config=json.loads(json.dumps(CONFIG.to_json())),  # lists, as they are read back
    identity={"seed": 0},
    model={"digest": "d", "dtype": "float32", "num_layers": 12},
    task={"name": "boolean"},
    rows={"search": {"count": 4, "digest": "e"}},
    tokens={"search": "f"},
    versions={"tale_ray": "0.1.0"},
)

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
COUNTS = st.integers(min_value=0, max_value=2**40)
LAYERS = st.integers(min_value=0, max_value=200)
SECONDS = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
ANSWERS = st.builds(
    RowAnswer,
    reply=st.text(),
    prediction=st.none() | st.text(),
    correct=st.booleans(),
    log_likelihoods=st.none() | st.lists(st.floats(max_value=0, allow_nan=False), max_size=4).map(tuple),
)
REMOVED = st.lists(LAYERS, unique=True, max_size=5).map(tuple)
SCORES = st.builds(
    CandidateScore,
    layer=st.none() | LAYERS,
    correct=COUNTS,
    seen=COUNTS,
    invalid=COUNTS,
    status=st.sampled_from(["exact", "bounded_out"]),
    seconds=SECONDS,
)
ROUNDS = st.builds(
    Round,
    number=st.integers(min_value=0, max_value=20_000),
    removed_layer=st.none() | LAYERS,
    removed=REMOVED,
    score=st.builds(Score, correct=COUNTS, total=COUNTS, invalid=COUNTS),
    candidates=st.lists(SCORES, max_size=5).map(tuple),
    committed=st.booleans(),
)
WORKS = st.builds(Work, COUNTS, COUNTS, COUNTS)


@st.composite
def unit_results(draw: st.DrawFn) -> UnitResult:
    unit = WorkUnit(
        number=draw(st.integers(min_value=0, max_value=10**7)),
        scope=draw(st.sampled_from(["round-0000", "round-0003", "test"])),
        split=draw(st.sampled_from(["search", "select", "test"])),
        removed=draw(REMOVED),
        candidates=draw(st.lists(st.none() | LAYERS, max_size=3).map(tuple)),
        rows=draw(st.lists(COUNTS, max_size=3).map(tuple)),
    )
    width = len(unit.rows)
    candidates = tuple(
        CandidateAnswers(layer, tuple(draw(st.lists(ANSWERS, min_size=width, max_size=width))), draw(SECONDS))
        for layer in unit.candidates
    )
    return UnitResult(unit, candidates, draw(COUNTS), draw(SECONDS), draw(st.text()))


def make_round(number: int, *, committed: bool = True, correct: int = 3) -> Round:
    removed = tuple(range(10, 10 + number))
    layer = removed[-1] if removed else None
    rival = () if layer is None else (CandidateScore(2, 1, 2, 0, "bounded_out", 0.125),)
    winner = CandidateScore(layer, correct, 4, 1, "exact", 0.25)
    return Round(number, layer, removed, Score(correct, 4, 1), (*rival, winner), committed)


def make_unit(number: int = 17, scope: str = "round-0001") -> UnitResult:
    unit = WorkUnit(number, scope, "search", (), (2, 10), (0, 3))
    right, wrong = RowAnswer("True.", "True", True), RowAnswer("hm", None, False)
    candidates = (CandidateAnswers(2, (right, wrong), 0.5), CandidateAnswers(10, (right, right), 0.25))
    return UnitResult(unit, candidates, 44, 0.75, "worker-1")


SHEET = AnswerSheet(
    "round-0001", "search", ("a", "b"), ("True", "False"), (RowAnswer("é\n", None, False), RowAnswer("", "False", True))
)


def write_run(path: Path, rounds: int = 3) -> list[StoredRound]:
    """A run of `rounds` committed rounds, with one of everything."""
    with RunWriter.claim(str(path)) as writer:
        writer.write_manifest(MANIFEST)
        writer.start_attempt({"workers": 2}, {"torch": "2"})
        stored: list[StoredRound] = []
        for number in range(rounds):
            stored.append(writer.write_round(make_round(number), Work(1, 4, 44), stored[-1].digest if stored else ""))
        writer.write_unit(make_unit(scope=f"round-{rounds:04d}"), ["a", "b"])
        writer.write_answers(SHEET)
        writer.write_result("test", {"best": {"correct": 3}})
        writer.update_attempt(how="interrupted")
    return stored


# --- round trips -----------------------------------------------------------------------------------------------------


@FEW
@given(round_=ROUNDS, work=WORKS, parent=st.text(), attempt=st.integers(min_value=1, max_value=10**6))
def test_a_round_is_read_back_exactly(round_: Round, work: Work, parent: str, attempt: int) -> None:
    stored = StoredRound(round_, attempt, work, digest_round(round_, parent), parent)
    assert load_round(dump_round(stored, "run"), "f") == stored


@FEW
@given(result=unit_results())
def test_a_unit_is_read_back_exactly(result: UnitResult) -> None:
    assert load_unit(dump_unit(result, ["d"] * len(result.unit.rows), 1, "run"), "f") == result


@FEW
@given(rows=st.lists(st.tuples(st.text(), st.text(), ANSWERS), max_size=5))
def test_a_sheet_is_read_back_exactly(rows: list[tuple[str, str, RowAnswer]]) -> None:
    digests, targets, answers = zip(*rows, strict=True) if rows else ((), (), ())
    sheet = AnswerSheet("best", "test", digests, targets, answers)
    assert load_sheet(dump_sheet(sheet, 1, "run"), "f") == sheet


def without_column(data: bytes, name: str) -> bytes:
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).drop_columns([name])
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return bytes(sink.getvalue())


def test_files_from_before_log_likelihoods_are_read() -> None:
    unit, sheet = make_unit(), SHEET
    assert load_unit(without_column(dump_unit(unit, ["a", "b"], 1, "run"), "log_likelihoods"), "f") == unit
    assert load_sheet(without_column(dump_sheet(sheet, 1, "run"), "log_likelihoods"), "f") == sheet
    with pytest.raises(StoreError, match="its columns are"):
        load_sheet(without_column(dump_sheet(sheet, 1, "run"), "reply"), "f")


def test_reading_tables_leaves_no_threads(tmp_path: Path) -> None:
    # A thread of pyarrow that lets go of bytes of Python while the interpreter ends aborts the process.
    write_run(tmp_path / "run")
    program = (
        "import os, sys\n"
        "from tale_ray.store import RunReader\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "assert RunReader(sys.argv[1]).rounds()\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "run"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_a_run_is_read_back_exactly(tmp_path: Path) -> None:
    stored = write_run(tmp_path / "deep" / "run")
    reader = RunReader(str(tmp_path / "deep" / "run"))
    reader.check()
    assert reader.exists()
    assert reader.manifest() == MANIFEST
    assert SearchConfig.from_json(reader.manifest().config) == CONFIG
    assert reader.rounds() == tuple(stored)
    assert [item.round for item in stored] == [make_round(number) for number in range(3)]
    assert reader.partial_scopes() == ("round-0003",)
    assert reader.unit_results("round-0003") == (make_unit(scope="round-0003"),)
    assert reader.answers("round-0001") == SHEET
    assert reader.result("test") == {"best": {"correct": 3}}
    (attempt,) = reader.attempts()
    assert (attempt.attempt, attempt.pid, attempt.how) == (1, psutil.Process().pid, "interrupted")
    assert (attempt.options, attempt.versions) == ({"workers": 2}, {"torch": "2"})
    assert reader.lease() is None
    assert (reader.answers("none"), reader.result("none"), reader.unit_results("none")) == (None, None, ())


def test_units_are_ordered_by_attempt_and_number(tmp_path: Path) -> None:
    order = []
    for _ in range(2):
        with RunWriter.claim(str(tmp_path)) as writer:
            writer.write_manifest(MANIFEST)
            for number in (1_000_001, 999_999, 3):
                writer.write_unit(replace(make_unit(number), worker=f"{writer.attempt}"), ["a", "b"])
    for result in RunReader(str(tmp_path)).unit_results("round-0001"):
        order.append((result.worker, result.unit.number))
    assert order == [(attempt, number) for attempt in "12" for number in (3, 999_999, 1_000_001)]


def test_a_reader_creates_nothing(tmp_path: Path) -> None:
    reader = RunReader(str(tmp_path / "absent"))
    assert reader.is_empty()
    assert not reader.exists()
    assert (reader.rounds(), reader.attempts(), reader.partial_scopes(), reader.lease()) == ((), (), (), None)
    reader.check()
    with pytest.raises(StoreError, match=r"is not a run: run\.json is missing"):
        reader.manifest()
    assert list(tmp_path.iterdir()) == []


def test_other_tools_read_the_rounds(tmp_path: Path) -> None:
    write_run(tmp_path)
    frame = pd.read_parquet(tmp_path / "rounds")
    names = "round attempt layer correct seen invalid status seconds winner committed removed"
    assert list(frame.columns) == names.split()
    assert frame[frame.winner].layer.isna().tolist() == [True, False, False]
    assert [list(removed) for removed in frame[frame.winner].removed] == [[], [10], [10, 11]]
    table = pyarrow.dataset.dataset(tmp_path / "rounds").to_table()
    assert table.num_rows == len(frame) == 5
    schemas = {
        str(pyarrow.parquet.read_schema(path).remove_metadata()) for path in (tmp_path / "rounds").glob("*.parquet")
    }
    assert len(schemas) == 1


def test_the_digest_ignores_seconds_and_order() -> None:
    round_ = make_round(2)
    slower = replace(round_, candidates=tuple(replace(c, seconds=9.0) for c in reversed(round_.candidates)))
    assert digest_round(slower, "p") == digest_round(round_, "p")
    assert digest_round(round_, "q") != digest_round(round_, "p")
    assert digest_round(make_round(2, correct=2), "p") != digest_round(round_, "p")
    assert digest_round(make_round(2, committed=False), "p") != digest_round(round_, "p")


def test_json_is_sorted_indented_and_utf8(tmp_path: Path) -> None:
    with RunWriter.claim(str(tmp_path)) as writer:
        writer.write_result("x", {"b": "é", "a": [1]})
    assert (tmp_path / "results" / "x.json").read_text(encoding="utf-8") == (
        f'{{\n  "a": [\n    1\n  ],\n  "b": "é",\n  "schema_version": {SCHEMA_VERSION}\n}}\n'
    )


# --- nothing secret --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("s3://KEY:SECRET@bucket/a?region=x", "s3://bucket/a?region=x"),
        ("s3://KEY:SE/CR+ET@bucket/a", "s3://bucket/a"),
        ("s3://KEY:SE@CRET@bucket/a", "s3://bucket/a"),
        ("https://SECRET@host/a@b", "https://host/a@b"),
        ("see http://a:SECRET@h, and ftp://b:SECRET@i", "see http://h, and ftp://i"),
        ("https://h/x?token=SECRET&a=1", "https://h/x?token=***&a=1"),
        ("https://h/x?a=1&X-Amz-Signature=SECRET#f", "https://h/x?a=1&X-Amz-Signature=***#f"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("ray://host:10001", "ray://host:10001"),
        ("http://host:8265/a@b", "http://host:8265/a@b"),
        ("name@place: a:b@c", "name@place: a:b@c"),
    ],
)
def test_credentials_are_stripped(text: str, stripped: str) -> None:
    assert strip_credentials(text) == stripped


def test_no_credentials_in_any_file(tmp_path: Path) -> None:
    config = SearchConfig(
        model=ModelSection(model="https://u:SECRET@hub/model"),
        task=TaskSection(task="t", data_root="s3://k:SECRET@bucket/data"),
        resources=ResourceSection(address="ray://u:SECRET@head:10001"),
        storage=StorageSection(run="s3://k:SECRET@bucket/run"),
    )
    with RunWriter.claim(str(tmp_path)) as writer:
        writer.write_manifest(
            replace(MANIFEST, config=config.to_json(), model={**MANIFEST.model, "path": "https://u:SECRET@hub"})
        )
        writer.start_attempt(config.to_json()["storage"], {})
        writer.update_attempt(how="failed", error="cannot reach s3://k:SECRET@bucket/run")
        writer.write_result("r", {"from": ["s3://k:SECRET@bucket"]})
        texts = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.json")]
    assert len(texts) == 4
    assert not any("SECRET" in text for text in texts)
    assert RunReader(str(tmp_path)).manifest().config["resources"]["address"] == "ray://head:10001"


def test_messages_do_not_show_credentials() -> None:
    with pytest.raises(StoreError) as caught:
        RunReader("bogus://user:SECRET@host/run")
    assert "SECRET" not in str(caught.value)
    assert "bogus://host/run" in str(caught.value)
    assert RunReader("s3://key:SECRET@bucket/run?region=eu-north-1").uri == "s3://bucket/run?region=eu-north-1"


# --- damage ----------------------------------------------------------------------------------------------------------


def files_of(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.name[0] != "_")


def test_every_truncated_file_is_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    names = files_of(tmp_path)
    assert len(names) == 8
    for name in names:
        path = tmp_path / name
        whole = path.read_bytes()
        for length in (0, 1, 4, len(whole) // 2, len(whole) - 9, len(whole) - 2):
            path.write_bytes(whole[:length])
            with pytest.raises(StoreError) as caught:
                RunReader(str(tmp_path)).check()
            assert name in str(caught.value)
            assert "delete it" in str(caught.value) or "put back a copy" in str(caught.value)
        path.write_bytes(whole)
    RunReader(str(tmp_path)).check()


@pytest.mark.slow
def test_every_flipped_byte_is_noticed_or_harmless() -> None:
    round_, unit = link(make_round(2)), make_unit()
    for read, whole, expected in (
        (load_round, dump_round(round_, "run"), round_),
        (load_unit, dump_unit(unit, ["a", "b"], 1, "run"), unit),
        (load_sheet, dump_sheet(SHEET, 1, "run"), SHEET),
    ):
        for position in range(len(whole)):
            with contextlib.suppress(StoreError):
                found = read(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :], "f")
                assert found == expected, position


def test_a_run_goes_on_after_the_way_out(tmp_path: Path) -> None:
    stored = write_run(tmp_path)
    last = tmp_path / "rounds" / "round-0002.parquet"
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"round-0002.*delete it and resume"):
        RunReader(str(tmp_path)).rounds()
    last.unlink()
    assert RunReader(str(tmp_path)).rounds() == tuple(stored[:2])
    with RunWriter.claim(str(tmp_path)) as writer:
        again = writer.write_round(make_round(2), Work(), stored[1].digest)
    assert again.digest == stored[2].digest
    assert RunReader(str(tmp_path)).rounds() == (*stored[:2], again)


@pytest.mark.parametrize(
    "name",
    [
        *("notes.txt", "lease", "data/x", "rounds/round-3.parquet", "rounds/x", "rounds/round-0009.parquet/x"),
        *("partial/x.parquet", "partial/round-0003/unit-1.parquet"),
        *("answers/a.csv", "attempts/attempt-1.json", "results/x.txt"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, name: str) -> None:
    write_run(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    top = Path(name).parts
    shown = "data" if top[0] == "data" else "rounds/round-0009.parquet" if "round-0009.parquet" in top else name
    for act in (RunReader(str(tmp_path)).check, lambda: RunWriter.claim(str(tmp_path))):
        with pytest.raises(StoreError, match=f"{shown} is foreign.*move it elsewhere"):
            act()
    assert not (tmp_path / "lease.json").exists()


def test_names_of_other_tools_are_passed_over(tmp_path: Path) -> None:
    write_run(tmp_path)
    for name in (".DS_Store", "_SUCCESS", "rounds/_x", "partial/.x", "partial/round-0003/_y"):
        (tmp_path / name).write_text("x")
    RunReader(str(tmp_path)).check()
    assert pd.read_parquet(tmp_path / "rounds").shape[0] == 5


def test_a_folder_of_something_else_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    reader = RunReader(str(tmp_path))
    assert not reader.is_empty()
    for act in (reader.check, lambda: RunWriter.claim(str(tmp_path))):
        with pytest.raises(StoreError, match=r"is not a run folder: it holds thesis\.tex; choose another --run"):
            act()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_rounds_without_a_manifest_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(StoreError, match=r"run\.json is missing although round-0000\.parquet is there"):
        RunReader(str(tmp_path)).check()


def test_a_foreign_table_under_our_name_is_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "rounds" / "round-0007.parquet")
    with pytest.raises(StoreError, match=r"round-0007\.parquet .*tale_ray did not write it"):
        RunReader(str(tmp_path)).check()


def test_a_changed_round_is_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "rounds" / "round-0001.parquet"
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.set_column(3, "correct", [pyarrow.array([4, 4])]), path)
    with pytest.raises(StoreError, match=r"round-0001\.parquet .*was changed"):
        RunReader(str(tmp_path)).rounds()


@pytest.mark.parametrize(
    "name", ["run.json", "attempts/attempt-0001.json", "results/test.json", "rounds/round-0001.parquet"]
)
def test_a_newer_schema_is_refused_in_plain_words(tmp_path: Path, name: str) -> None:
    write_run(tmp_path)
    path = tmp_path / name
    if name.endswith(".json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": SCHEMA_VERSION + 1}))
    else:
        table = pyarrow.parquet.read_table(path)
        newer = {**table.schema.metadata, b"schema_version": str(SCHEMA_VERSION + 1).encode()}
        pyarrow.parquet.write_table(table.replace_schema_metadata(newer), path)
    with pytest.raises(StoreError, match=f"{name} was written by a newer tale_ray .*update tale_ray"):
        RunReader(str(tmp_path)).check()


def test_fields_of_other_versions_do_not_matter(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "attempts" / "attempt-0001.json"
    content = json.loads(path.read_text())
    del content["wasted_rows"]
    path.write_text(json.dumps({**content, "colour": "red"}))
    assert RunReader(str(tmp_path)).attempts()[0].wasted_rows == 0


# --- the chain of rounds ---------------------------------------------------------------------------------------------


def link(round_: Round, parent: str = "", attempt: int = 1) -> StoredRound:
    return StoredRound(round_, attempt, Work(), digest_round(round_, parent), parent)


def test_a_rejected_round_is_kept_and_superseded(tmp_path: Path) -> None:
    stored = write_run(tmp_path)
    with RunWriter.claim(str(tmp_path)) as writer:
        writer.start_attempt({}, {})
        rejected = writer.write_round(make_round(3, committed=False), Work(), stored[-1].digest)
    assert RunReader(str(tmp_path)).rounds() == (*stored, rejected)
    before = (tmp_path / "rounds" / "round-0003.parquet").read_bytes()
    with RunWriter.claim(str(tmp_path)) as writer:
        assert writer.attempt == 3
        accepted = writer.write_round(make_round(3), Work(), stored[-1].digest)
        assert RunReader(str(tmp_path)).rounds() == (*stored, accepted)
        further = writer.write_round(make_round(4, committed=False), Work(), accepted.digest)
    assert RunReader(str(tmp_path)).rounds() == (*stored, accepted, further)
    assert (tmp_path / "rounds" / "round-0003.parquet").read_bytes() == before
    assert (tmp_path / "rounds" / "round-0003-attempt-0003.parquet").exists()
    assert set(pd.read_parquet(tmp_path / "rounds")["round"]) == {0, 1, 2, 3, 4}


def test_the_longest_chain_wins_then_the_later_attempt() -> None:
    zero = link(make_round(0))
    one, one_again = link(make_round(1), zero.digest), link(make_round(1, correct=2), zero.digest, attempt=2)
    two = link(make_round(2), one.digest)
    orphan = link(make_round(3), "unknown")
    assert longest_chain([two, one, orphan, zero, one_again]) == (zero, one, two)
    assert longest_chain([one_again, one, zero]) == (zero, one_again)
    assert longest_chain([one, one_again, zero]) == (zero, one_again)
    assert longest_chain([one, two]) == ()
    same = link(make_round(1), zero.digest, attempt=2)
    assert longest_chain([same, zero, one, two]) == (zero, same, two)
    rejected = link(make_round(1, committed=False), zero.digest)
    assert longest_chain([zero, rejected, link(make_round(2), rejected.digest)]) == (zero, rejected)


# --- writing: complete or absent -------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a process that ends here."""


WRITES = {
    "manifest": lambda writer: writer.write_manifest(replace(MANIFEST, run="second")),
    "attempt": lambda writer: writer.start_attempt({}, {}),
    "unit": lambda writer: writer.write_unit(make_unit(18, "round-0003"), ["a", "b"]),
    "round": lambda writer: writer.write_round(make_round(3), Work(), RunReader(writer.reader.uri).rounds()[-1].digest),
    "answers": lambda writer: writer.write_answers(replace(SHEET, targets=("x", "y"))),
    "result": lambda writer: writer.write_result("test", {"best": 1}),
}
STEPS = ["before_open", "half_written", "before_sync", "before_rename", "after_rename"]


def contents(run: Path) -> dict[str, bytes]:
    """What a reader sees: lease and temporary files apart."""
    return {name: (run / name).read_bytes() for name in files_of(run) if name != "lease.json"}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("write", WRITES)
def test_a_kill_at_any_step_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str, step: str
) -> None:
    write_run(tmp_path)
    writer = RunWriter.claim(str(tmp_path))
    before = contents(tmp_path)
    real_open, real_replace, real_fsync = Path.open, Path.replace, store_files.os.fsync

    def end(*args: object, **keywords: object) -> None:
        raise Killed

    def write_half(path: Path, mode: str = "r", *args: object, **keywords: object) -> object:
        if mode != "xb":
            return real_open(path, mode)
        with real_open(path, mode) as file:
            file.write(b"PAR1{")
        raise Killed

    def replace_then_end(path: Path, target: Path) -> None:
        real_replace(path, target)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", end)  # a killed process does not tidy up
        match step:
            case "before_open":
                patch.setattr(Path, "open", end)
            case "half_written":
                patch.setattr(Path, "open", write_half)
            case "before_sync":
                patch.setattr(store_files.os, "fsync", end)
            case "before_rename":
                patch.setattr(Path, "replace", end)
            case "after_rename":
                patch.setattr(Path, "replace", replace_then_end)
        with pytest.raises(Killed):
            WRITES[write](writer)
    assert store_files.os.fsync is real_fsync
    after = contents(tmp_path)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert len(changed) == (1 if step == "after_rename" else 0)
    assert {path.suffix for path in tmp_path.rglob("_*")} <= {".part", ".lock"}  # no pattern like *.parquet fits
    RunReader(str(tmp_path)).check()
    writer.close()
    with RunWriter.claim(str(tmp_path)) as writer:
        WRITES[write](writer)
        writer.clean()
        RunReader(str(tmp_path)).check()
    assert [path for path in tmp_path.rglob("_*") if path.name != "_lease.lock"] == []


class Weather:
    """A clock whose sleeps are noted and take no time."""

    def __init__(self) -> None:
        self.seconds = 1_000_000.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.seconds, self.sleep)


@pytest.mark.parametrize("number", [28, 13, 122, 5])  # no space, permission, quota, input/output
def test_a_full_disk_is_waited_for_then_the_run_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    weather = Weather()
    writer = RunWriter.claim(str(tmp_path), clock=weather.clock)
    writer.write_manifest(MANIFEST)
    before = contents(tmp_path)

    def fail(*args: object) -> None:
        raise OSError(number, "it failed")

    with monkeypatch.context() as patch:
        patch.setattr(store_files.os, "fsync", fail)
        with pytest.raises(StorageAway, match=r"writing results/x\.json failed 7 times.*it failed.*tale-ray resume"):
            writer.write_result("x", {})
    assert tuple(weather.slept) == RETRY_SECONDS
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.rglob("_*")] == ["_lease.lock"]
    writer.write_result("x", {})
    writer.close()


def test_a_short_outage_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weather = Weather()
    writer = RunWriter.claim(str(tmp_path), clock=weather.clock)
    real, failures = store_files.os.fsync, [OSError(28, "full"), OSError(5, "away")]

    def fail_twice(descriptor: int) -> None:
        if failures:
            raise failures.pop()
        real(descriptor)

    monkeypatch.setattr(store_files.os, "fsync", fail_twice)
    writer.write_result("x", {"a": 1})
    assert tuple(weather.slept) == RETRY_SECONDS[:2]
    assert writer.reader.result("x") == {"a": 1}
    writer.close()


@pytest.mark.parametrize("run", ["file", "file/run", "/proc/run", "/sys/run"])
def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path, run: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"cannot be (written|read) .*(choose another --run|check the path)"):
        RunWriter.claim(str(tmp_path / run))
    assert RunReader(str(tmp_path / "file/run")).is_empty()


def test_where_a_run_can_be_is_told_without_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("folder", "new", "folder/new/newer"):
        RunReader(str(tmp_path / name)).check_place()
    for name in ("file", "file/run", "x" * 300):
        with pytest.raises(StoreError, match=r"cannot be (read|written) "):
            RunReader(str(tmp_path / name)).check_place()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "folder")
    with pytest.raises(StoreError, match=r"cannot be written \(.*Permission denied.*change its permissions"):
        RunReader(str(tmp_path / "folder" / "run")).check_place()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_names_that_would_leave_the_folder_are_refused(tmp_path: Path) -> None:
    with RunWriter.claim(str(tmp_path / "run")) as writer:
        for name in ("../x", "a/b", "", ".x", "_x"):
            with pytest.raises(StoreError, match="cannot name a file"):
                writer.write_result(name, {})


def test_clean_keeps_what_is_needed(tmp_path: Path) -> None:
    stored = write_run(tmp_path)
    with RunWriter.claim(str(tmp_path)) as writer:
        rejected = writer.write_round(make_round(3, committed=False), Work(), stored[-1].digest)
        writer.write_answers(replace(SHEET, scope="round-0003"))  # rejected: its units serve a higher epsilon
        for scope in ("round-0001", "round-0002", "round-0003", "test"):  # round 2 lacks answers
            writer.write_unit(make_unit(scope=scope), ["a", "b"])
        writer.clean()
        assert writer.reader.partial_scopes() == ("round-0002", "round-0003", "test")
        writer.drop_partials("round-0003")
        writer.drop_partials("round-0003")
        assert writer.reader.partial_scopes() == ("round-0002", "test")
        assert writer.reader.rounds() == (*stored, rejected)


def test_a_write_after_the_lease_is_lost_leaves_nothing(tmp_path: Path) -> None:
    for write in WRITES:
        run = tmp_path / write
        write_run(run)
        with RunWriter.claim(str(run)) as writer:
            writer.reader.manifest()
            lease = json.loads((run / "lease.json").read_text())
            (run / "lease.json").write_text(json.dumps({**lease, "nonce": "other", "attempt": 9}))
            before = contents(run)
            for act in (WRITES[write], lambda writer: writer.drop_partials("round-0003"), RunWriter.clean):
                with pytest.raises(LeaseLost, match=r"taken over by process \d+ .*attempt 9"):
                    act(writer)
            assert contents(run) == before
        assert json.loads((run / "lease.json").read_text())["nonce"] == "other"


def test_files_on_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither rename nor lock, as on an object store: one write, and the lease settles."""
    elsewhere = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())

    class Elsewhere:
        @staticmethod
        def from_uri(uri: str) -> tuple[object, str]:
            return elsewhere, uri.partition("://")[2]

    monkeypatch.setattr(store_files.pa.fs, "FileSystem", Elsewhere)
    weather = Weather()
    with RunWriter.claim("mem://run", clock=weather.clock) as writer:
        assert weather.slept == [2.0]
        writer.write_manifest(MANIFEST)
        writer.start_attempt({}, {})
        first = writer.write_round(make_round(0), Work(), "")
        writer.write_answers(SHEET)
        assert Files("mem://run").shown == "mem://run"
    reader = RunReader("mem://run")
    reader.check()
    assert (reader.manifest(), reader.rounds(), reader.answers("round-0001")) == (MANIFEST, (first,), SHEET)
    assert reader.lease() is None
    assert list((tmp_path / "run").rglob("_*")) == []


class Churning:
    """A file system in which a listing fails so many times, as when the folder is made or emptied meanwhile."""

    def __init__(self, system: Any, failures: int) -> None:
        self._system = system
        self.failures = failures

    def get_file_info(self, selector: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise FileNotFoundError("Cannot list directory")
        return self._system.get_file_info(selector)


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_folder_that_changes_while_it_is_listed_is_listed_again(tmp_path: Path, failures: int) -> None:
    (tmp_path / "file").touch()
    files = Files(str(tmp_path))
    files._system = Churning(files._system, failures)
    assert [entry.name for entry in files.list()] == ["file"]


def test_a_folder_that_never_stands_still_is_named(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    files._system = Churning(files._system, 99)
    with pytest.raises(StoreError, match=str(tmp_path)):
        files.list()
