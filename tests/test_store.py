"""The run folder: what was written is read back exactly, damage is named, and no secret is stored."""

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.dataset
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored_runs import MANIFEST, SHEET, files_of, link, make_round, make_unit, write_run

from tale_ray.config import ModelSection, ResourceSection, SearchConfig, StorageSection, TaskSection
from tale_ray.errors import StoreError
from tale_ray.records import CandidateAnswers, CandidateScore, Round, RowAnswer, Score, UnitResult, Work, WorkUnit
from tale_ray.store import AnswerSheet, RunReader, RunWriter, StoredRound
from tale_ray.store.documents import SCHEMA_VERSION
from tale_ray.store.reader import longest_chain
from tale_ray.store.tables import digest_round, dump_round, dump_sheet, dump_unit, load_round, load_sheet, load_unit
from tale_ray.store.uris import strip_credentials

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


def test_other_tools_read_the_rounds(tmp_path: Path) -> None:
    write_run(tmp_path)
    frame = pd.read_parquet(tmp_path / "rounds")
    names = "round attempt layer correct seen invalid status seconds winner committed removed without"
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
