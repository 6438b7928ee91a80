"""What a run folder promises wherever it lies: every test runs on a local folder and on object storage."""

import os
from dataclasses import replace

import pytest
from places import Place
from stored_runs import CONFIG, MANIFEST, SHEET, WRITES, make_round, make_unit, write_run

from tale_ray.config import SearchConfig
from tale_ray.errors import LeaseLost, StoreError
from tale_ray.records import Work
from tale_ray.store import RunReader, RunWriter
from tale_ray.store.documents import dump_json


def contents(place: Place) -> dict[str, bytes]:
    return {name: place.read(name) for name in place.names() if name != "lease.json"}


def test_a_run_is_read_back_exactly(place: Place) -> None:
    stored = write_run(place.uri)
    reader = RunReader(place.uri)
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
    assert (attempt.attempt, attempt.pid, attempt.how) == (1, os.getpid(), "interrupted")
    assert (attempt.options, attempt.versions) == ({"workers": 2}, {"torch": "2"})
    assert reader.lease() is None
    assert (reader.answers("none"), reader.result("none"), reader.unit_results("none")) == (None, None, ())
    assert place.names() == [
        "answers/round-0001.parquet",
        "attempts/attempt-0001.json",
        "partial/round-0003/attempt-0001-unit-000017.parquet",
        "results/test.json",
        *(f"rounds/round-000{number}.parquet" for number in range(3)),
        "run.json",
    ]


def test_a_reader_creates_nothing(place: Place) -> None:
    reader = RunReader(place.uri)
    assert reader.is_empty()
    assert not reader.exists()
    assert (reader.rounds(), reader.attempts(), reader.partial_scopes(), reader.lease()) == ((), (), (), None)
    reader.check()
    reader.check_place()
    with pytest.raises(StoreError, match=r"is not a run: run\.json is missing"):
        reader.manifest()
    assert place.names() == []


def test_a_rejected_round_is_kept_and_superseded(place: Place) -> None:
    stored = write_run(place.uri)
    with RunWriter.claim(place.uri) as writer:
        rejected = writer.write_round(make_round(3, committed=False), Work(), stored[-1].digest)
    assert RunReader(place.uri).rounds() == (*stored, rejected)
    before = contents(place)
    with RunWriter.claim(place.uri) as writer:
        accepted = writer.write_round(make_round(3), Work(), stored[-1].digest)
    assert RunReader(place.uri).rounds() == (*stored, accepted)
    after = contents(place)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {f"rounds/round-0003-attempt-000{writer.attempt}.parquet"}


def test_folders_of_units_are_dropped_and_clean_keeps_what_is_needed(place: Place) -> None:
    stored = write_run(place.uri)
    with RunWriter.claim(place.uri) as writer:
        rejected = writer.write_round(make_round(3, committed=False), Work(), stored[-1].digest)
        writer.write_answers(replace(SHEET, scope="round-0003"))
        for scope in ("round-0001", "round-0002", "round-0003", "test"):
            for number in range(3):
                writer.write_unit(make_unit(number, scope), ["a", "b"])
        place.write("rounds/_tmp-1-x.part", b"x")
        writer.clean()
        assert writer.reader.partial_scopes() == ("round-0002", "round-0003", "test")
        for scope in ("round-0003", "round-0003", "round-0002", "test"):
            writer.drop_partials(scope)
        assert writer.reader.partial_scopes() == ()
        assert writer.reader.rounds() == (*stored, rejected)
    with pytest.raises((FileNotFoundError, Exception), match=r"No such file|NoSuchKey"):
        place.read("rounds/_tmp-1-x.part")
    RunReader(place.uri).check()


@pytest.mark.parametrize("name", ["notes.txt", "data/x", "rounds/x", "partial/round-0003/unit-1.parquet"])
def test_foreign_files_are_named(place: Place, name: str) -> None:
    write_run(place.uri)
    place.write(name, b"x")
    shown = name if name != "data/x" else "data"
    for act in (RunReader(place.uri).check, lambda: RunWriter.claim(place.uri)):
        with pytest.raises(StoreError, match=f"{shown} is foreign.*move it elsewhere"):
            act()
    assert "lease.json" not in place.names()


def test_a_truncated_file_is_named(place: Place) -> None:
    write_run(place.uri)
    for name in place.names():
        whole = place.read(name)
        place.write(name, whole[: len(whole) // 2])
        with pytest.raises(StoreError, match=f"{name} is truncated"):
            RunReader(place.uri).check()
        place.write(name, whole)
    RunReader(place.uri).check()


def test_a_writer_whose_lease_was_taken_writes_nothing(place: Place) -> None:
    write_run(place.uri)
    with RunWriter.claim(place.uri) as writer:
        writer.reader.manifest()
        lease = writer.reader.lease()
        assert lease is not None
        place.write("lease.json", dump_json(replace(lease, nonce="other", attempt=9)))
        before = contents(place)
        for act in (*WRITES.values(), lambda writer: writer.drop_partials("round-0003"), RunWriter.clean):
            with pytest.raises(LeaseLost, match=r"taken over by process \d+ .*attempt 9"):
                act(writer)
    assert contents(place) == before
    assert b'"other"' in place.read("lease.json")


def test_a_deleted_lease_is_lost(place: Place) -> None:
    with RunWriter.claim(place.uri) as writer:
        place.delete("lease.json")
        with pytest.raises(LeaseLost, match=r"lease\.json was deleted"):
            writer.write_result("x", {})
    assert place.names() == []
