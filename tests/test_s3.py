"""Runs on S3-protocol storage: what a file costs, who gets the lease, and storage that fails."""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from faults import Fault, FaultKind
from places import S3Place
from s3_server import BUCKET, S3Server
from stored_runs import MANIFEST, Weather, make_round, make_unit, write_run

from tale_ray.errors import LeaseHeld, LeaseLost, StorageAway
from tale_ray.records import Work
from tale_ray.store import RunReader, RunWriter
from tale_ray.store import lease as store_lease
from tale_ray.store import s3 as store_s3
from tale_ray.store.documents import Lease, dump_json, load_lease
from tale_ray.store.files import RETRY_SECONDS, Files

DEADLINE_SECONDS = 60.0
HURTS: tuple[FaultKind, ...] = ("500", "503", "drop", "lose_reply", "slow")


@pytest.fixture
def without_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore.exceptions", None)
    monkeypatch.setitem(sys.modules, "boto3", None)


def asked(server: S3Server, s3_place: S3Place) -> list[str]:
    """The requests on a run: method, what of it, status if it is not as it should be."""
    lines = []
    for item in server.requests():
        name = item.key.removeprefix(f"{s3_place.key}/") if item.key != BUCKET else "?" + item.query.partition("&")[0]
        lines.append(f"{item.method} {name}" + ("" if item.status < 300 else f" {item.status}"))
    return lines


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 5 * 2**20, 8 * 2**20 - 1])
def test_a_file_is_one_put(s3_server: S3Server, s3_place: S3Place, size: int) -> None:
    files = Files(s3_place.uri)
    s3_server.forget()
    files.write("rounds/x", b"x" * size)
    assert asked(s3_server, s3_place) == ["PUT rounds/x"]
    assert len(s3_place.read("rounds/x")) == size


def test_a_stored_unit_is_one_look_at_the_lease_and_one_put(s3_server: S3Server, s3_place: S3Place) -> None:
    with RunWriter.claim(s3_place.uri) as writer:
        writer.write_manifest(MANIFEST)
        s3_server.forget()
        writer.write_unit(make_unit(3), ["a", "b"])
        assert asked(s3_server, s3_place) == [
            "GET lease.json",
            "PUT partial/round-0001/attempt-0001-unit-000003.parquet",
        ]
        s3_server.forget()
        writer.write_round(make_round(0), Work(), "")
        assert asked(s3_server, s3_place) == ["GET lease.json", "PUT rounds/round-0000.parquet"]
        s3_server.forget()
        writer._lease.renew()
        assert asked(s3_server, s3_place) == ["GET lease.json", "PUT lease.json"]
        s3_server.forget()
    assert asked(s3_server, s3_place) == ["GET lease.json", "DELETE lease.json"]


def test_without_boto3_a_look_is_two_requests(s3_server: S3Server, s3_place: S3Place, without_boto3: None) -> None:
    with RunWriter.claim(s3_place.uri, clock=Weather().clock) as writer:
        s3_server.forget()
        writer.write_result("x", {})
        assert asked(s3_server, s3_place) == ["HEAD lease.json", "GET lease.json", "PUT results/x.json"]


@pytest.mark.slow
def test_a_folder_of_many_units_is_deleted(s3_server: S3Server, s3_place: S3Place) -> None:
    """A listing has 1000 names, and so has a deletion."""
    with RunWriter.claim(s3_place.uri) as writer:
        files = Files(s3_place.uri)
        for number in range(1_001):
            files.put(f"partial/round-0001/attempt-0001-unit-{number:06d}.parquet", b"")
        s3_place.write("partial/round-0002/attempt-0001-unit-000001.parquet", b"")
        assert len(files.list("partial/round-0001")) == 1_001
        writer.drop_partials("round-0001")
        assert writer.reader.partial_scopes() == ("round-0002",)
    assert s3_place.names() == ["partial/round-0002/attempt-0001-unit-000001.parquet"]


def test_markers_of_folders_are_no_files(s3_server: S3Server, s3_place: S3Place) -> None:
    for name in ("", "rounds/", "partial/round-0001/"):
        s3_place.write(name, b"")
    reader = RunReader(s3_place.uri)
    reader.check()
    assert reader.rounds() == ()
    assert reader.unit_results("round-0001") == ()
    with RunWriter.claim(s3_place.uri) as writer:
        assert writer.attempt == 1
        writer.clean()
    write_run(s3_place.uri)
    RunReader(s3_place.uri).check()


# --- the lease -------------------------------------------------------------------------------------------------------


def put_lease(s3_place: S3Place, lease: Lease) -> None:
    s3_place.write("lease.json", dump_json(lease))


def lease_of(s3_place: S3Place) -> Lease:
    return load_lease(s3_place.read("lease.json"), "lease.json")


def elsewhere(lease: Lease) -> Lease:
    return replace(lease, host="node-7", machine="another boot", nonce="rival", attempt=7)


@pytest.mark.parametrize("stale", [False, True], ids=["free", "stale"])
@pytest.mark.parametrize("repetition", range(3))
def test_of_claims_at_the_same_time_one_wins(
    s3_server: S3Server, s3_place: S3Place, stale: bool, repetition: int, caplog: pytest.LogCaptureFixture
) -> None:
    if stale:
        with RunWriter.claim(s3_place.uri) as writer:
            lease = replace(elsewhere(writer._lease.lease), expires=time.time() - 1)
        put_lease(s3_place, lease)
    barrier = threading.Barrier(6)
    won: list[RunWriter] = []
    held: list[LeaseHeld] = []

    def claim() -> None:
        barrier.wait()
        try:
            won.append(RunWriter.claim(s3_place.uri, wait=False))
        except LeaseHeld as error:
            held.append(error)

    threads = [threading.Thread(target=claim) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
    assert (len(won), len(held)) == (1, 5)
    won[0].write_result("x", {})
    won[0].close()
    assert "best effort" not in caplog.text


def test_a_rival_between_look_and_claim_is_not_overwritten(
    s3_server: S3Server, s3_place: S3Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunWriter.claim(s3_place.uri) as writer:
        mine = writer._lease.lease
    rival = replace(elsewhere(mine), expires=time.time() + 50)
    real = store_lease.process_start

    def arrive(pid: int) -> float:
        put_lease(s3_place, rival)
        return real(pid)

    for before in (None, replace(elsewhere(mine), nonce="dead", expires=time.time() - 1)):
        if before is None:
            assert s3_place.names() == []
        else:
            put_lease(s3_place, before)
        with monkeypatch.context() as patch:
            patch.setattr(store_lease, "process_start", arrive)
            with pytest.raises(LeaseHeld, match=r"process .* on host node-7"):
                RunWriter.claim(s3_place.uri, wait=False)
        assert lease_of(s3_place) == rival


def test_a_renewal_and_a_release_leave_the_lease_of_a_rival(
    s3_server: S3Server, s3_place: S3Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RunWriter.claim(s3_place.uri)
    rival = elsewhere(writer._lease.lease)
    look = writer._lease._own

    def arrive() -> object:
        found = look()
        put_lease(s3_place, rival)
        return found

    for act in (writer._lease.renew, writer.close):
        put_lease(s3_place, writer._lease.lease)
        with monkeypatch.context() as patch:
            patch.setattr(writer._lease, "_own", arrive)
            if act == writer.close:
                act()
            else:
                looks = iter([arrive, look])
                patch.setattr(writer._lease, "_own", lambda looks=looks: next(looks)())
                with pytest.raises(LeaseLost, match=r"taken over by process .* on host node-7"):
                    act()
        assert lease_of(s3_place) == rival


def test_the_reply_to_a_claim_a_renewal_and_a_release_may_be_lost(s3_server: S3Server, s3_place: S3Place) -> None:
    s3_server.plan(Fault(kind="lose_reply", methods=("PUT",), key="lease.json", count=1))
    writer = RunWriter.claim(s3_place.uri, wait=False)
    assert writer.attempt == 1
    assert [item.status for item in s3_server.requests("PUT", f"{s3_place.key}/lease.json")] == [0, 412]
    s3_server.plan(Fault(kind="lose_reply", methods=("PUT",), key="lease.json", count=1))
    writer._lease.renew()
    assert lease_of(s3_place) == writer._lease.lease
    s3_server.plan(Fault(kind="lose_reply", methods=("DELETE",), key="lease.json", count=1))
    writer.close()
    assert s3_place.names() == []


FALLBACKS: dict[str, tuple[Fault, ...]] = {
    "not implemented": (
        Fault(kind="501", header="If-None-Match"),
        Fault(kind="501", header="If-Match"),
    ),
    "passed over": (Fault(kind="unconditional"),),
    "takeover only": (Fault(kind="501", header="If-Match"),),
}


@pytest.mark.parametrize("faults", FALLBACKS.values(), ids=FALLBACKS)
def test_a_store_without_conditions_gets_the_best_effort_and_that_is_said_once(
    s3_server: S3Server, s3_place: S3Place, faults: tuple[Fault, ...], caplog: pytest.LogCaptureFixture
) -> None:
    s3_server.plan(*faults)
    weather = Weather()
    with RunWriter.claim(s3_place.uri, clock=weather.clock) as writer:
        assert weather.slept == [store_lease.SETTLE_SECONDS]
        writer.write_result("x", {})
        writer._lease.renew()
    assert s3_place.names() == ["results/x.json"]
    assert caplog.text.count("the lease is best effort, since the storage does not keep to conditions") == 1


def test_without_boto3_the_best_effort_is_said(
    s3_server: S3Server, s3_place: S3Place, without_boto3: None, caplog: pytest.LogCaptureFixture
) -> None:
    weather = Weather()
    with RunWriter.claim(s3_place.uri, clock=weather.clock):
        assert weather.slept == [store_lease.SETTLE_SECONDS]
        assert caplog.text.count("boto3 1.36 is not installed (pip install 'tale-ray[s3]')") == 1
        with pytest.raises(LeaseHeld):
            RunWriter.claim(s3_place.uri, clock=weather.clock)
    assert s3_place.names() == []


def test_a_boto3_that_knows_no_conditions_is_none(
    s3_server: S3Server, s3_place: S3Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("boto3.__version__", "1.34.162")
    with RunWriter.claim(s3_place.uri, clock=Weather().clock):
        assert "boto3 1.36 is not installed" in caplog.text


def test_a_writer_that_lost_its_lease_starts_no_further_write(s3_server: S3Server, s3_place: S3Place) -> None:
    writer = RunWriter.claim(s3_place.uri)
    writer.write_manifest(MANIFEST)
    lost: list[LeaseLost] = []
    stored: list[int] = []

    def work() -> None:
        number = 0
        try:
            while True:
                number += 1
                writer.write_unit(make_unit(number), ["a", "b"])
                stored.append(number)
        except LeaseLost as error:
            lost.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while len(stored) < 10:
        assert time.monotonic() < deadline
        assert thread.is_alive()
        time.sleep(0.005)
    put_lease(s3_place, elsewhere(writer._lease.lease))  # by a rival that found it expired
    thread.join(DEADLINE_SECONDS)
    assert len(lost) == 1
    for act in (lambda: writer.write_result("x", {}), lambda: writer.drop_partials("round-0001")):
        with pytest.raises(LeaseLost):
            act()
    with pytest.raises(LeaseLost):
        writer._lease.renew()
    writer.close()
    after = asked(s3_server, s3_place)
    taken = len(after) - 1 - after[::-1].index("PUT lease.json")
    after = after[taken + 1 :]
    look = after.index("GET lease.json")
    assert look <= 1, "at most the write that was under way"
    assert set(after[look:]) == {"GET lease.json"}, "no PUT, no DELETE"


def test_a_writer_overtaken_in_the_middle_of_a_write_replaces_no_round(
    s3_server: S3Server, s3_place: S3Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunWriter.claim(s3_place.uri) as writer:
        writer.write_manifest(MANIFEST)
        monkeypatch.setattr(writer._lease, "check", lambda: s3_place.write("rounds/round-0000.parquet", b"the rival's"))
        writer.write_round(make_round(0), Work(), "")
    assert s3_place.read("rounds/round-0000.parquet") == b"the rival's"
    assert "rounds/round-0000-attempt-0001.parquet" in s3_place.names()


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", HURTS)
def test_a_fault_is_survived_by_every_kind_of_request(s3_server: S3Server, s3_place: S3Place, kind: FaultKind) -> None:
    """Of the requests of a claim and of all writes a third meets the fault."""
    s3_server.plan(Fault(kind=kind, probability=0.3, seconds=0.2), seed=HURTS.index(kind))
    stored = write_run(s3_place.uri)
    reader = RunReader(s3_place.uri)
    s3_server.plan()
    reader.check()
    assert reader.rounds() == tuple(stored)
    assert reader.manifest() == MANIFEST
    assert reader.unit_results("round-0003") == (make_unit(scope="round-0003"),)
    happened = [item for item in s3_server.requests() if item.fault]
    assert {item.fault for item in happened} == {kind}
    assert {"PUT", "GET"} <= {item.method for item in happened}
    if kind != "lose_reply":  # whoever does not hear that it is stored stores it again
        for number in range(3):
            puts = s3_server.requests("PUT", f"{s3_place.key}/rounds/round-{number:04d}.parquet")
            assert [item.status for item in puts].count(200) == 1


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients do not try again by themselves: less to wait for."""
    monkeypatch.setattr(store_s3, "ATTEMPTS", 1)


ACTS: dict[str, Callable[[RunWriter], object]] = {
    "write": lambda writer: writer.write_result("x", {"a": 1}),
    "read": lambda writer: writer.reader.rounds(),
    "list": lambda writer: writer.reader.partial_scopes(),
    "look": lambda writer: writer.write_round(make_round(3), Work(), ""),
    "drop": lambda writer: writer.drop_partials("round-0003"),
}


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
@pytest.mark.parametrize("kind", ["drop", "503"])
def test_storage_that_is_away_stops_the_run_with_nothing_torn(
    s3_server: S3Server, s3_place: S3Place, one_attempt: None, kind: FaultKind, act: Callable[[RunWriter], object]
) -> None:
    stored = write_run(s3_place.uri)
    weather = Weather()
    writer = RunWriter.claim(s3_place.uri, clock=weather.clock)
    writer.reader.manifest()
    before = {name: s3_place.read(name) for name in s3_place.names()}
    s3_server.plan(Fault(kind=kind))
    with pytest.raises(StorageAway, match=r"failed 7 times.*go on with `tale-ray resume`"):
        act(writer)
    assert StorageAway.exit_code == 75
    assert tuple(weather.slept) == RETRY_SECONDS
    s3_server.plan()
    assert {name: s3_place.read(name) for name in s3_place.names()} == before
    act(writer)
    writer.close()
    assert RunReader(s3_place.uri).rounds()[:3] == tuple(stored)


def test_a_short_outage_is_waited_for(s3_server: S3Server, s3_place: S3Place, one_attempt: None) -> None:
    weather = Weather()
    with RunWriter.claim(s3_place.uri, clock=weather.clock) as writer:
        s3_server.plan(Fault(kind="503", count=3))
        writer.write_result("x", {"a": 1})
        assert tuple(weather.slept) == RETRY_SECONDS[:3]
        assert writer.reader.result("x") == {"a": 1}


def test_the_thread_that_renews_survives_an_outage(
    s3_server: S3Server,
    s3_place: S3Place,
    one_attempt: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(store_lease, "RENEW_SECONDS", 0.01)
    s3_server.plan(Fault(kind="drop", methods=("PUT",), key="lease.json", after=1, count=3))
    with RunWriter.claim(s3_place.uri) as writer:
        first = writer._lease.lease.renewed
        deadline = time.monotonic() + DEADLINE_SECONDS
        while caplog.text.count("the lease could not be renewed") < 3 or lease_of(s3_place).renewed == first:
            assert time.monotonic() < deadline
        assert writer._lease._thread.is_alive()
