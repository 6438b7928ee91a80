"""One writer at a time: who gets the lease, who waits, and who stops. No test sleeps; clocks are given."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from places import Place

from tale_ray.errors import LeaseHeld, LeaseLost, StorageAway, StoreError
from tale_ray.store import Lease, RunReader, RunWriter, holder_state
from tale_ray.store import files as store_files
from tale_ray.store import lease as store_lease
from tale_ray.store import local as store_local
from tale_ray.store.documents import dump_json
from tale_ray.store.files import Clock
from tale_ray.store.lease import LEASE_SECONDS, machine_name, process_start

NOW = 1_800_000_000.0
ME = Lease(
    host=socket.gethostname(),
    pid=os.getpid(),
    process_start=process_start(os.getpid()),
    attempt=4,
    nonce="n",
    expires=NOW + 30,
    renewed=NOW - 30,
    machine=machine_name(),
)
ELSEWHERE = replace(ME, host="node-7", pid=12, machine="another boot")
DEADLINE_SECONDS = 60


class FakeClock:
    """A clock that moves when somebody sleeps; `on_sleep` is what the rest of the world does meanwhile."""

    def __init__(self) -> None:
        self.seconds = NOW
        self.slept = 0
        self.events: list[tuple[float, object]] = []

    def at(self, seconds: float, event: object) -> None:
        self.events.append((seconds, event))

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.seconds += seconds
        self.slept += 1
        for due, event in list(self.events):
            if due <= self.seconds:
                self.events.remove((due, event))
                event()  # type: ignore[operator]

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.seconds, self.sleep)


@pytest.fixture
def time_() -> FakeClock:
    return FakeClock()


def put_lease(run: Path, lease: Lease) -> None:
    (run / "lease.json").write_bytes(dump_json(lease))


# --- what is known of a holder ---------------------------------------------------------------------------------------


def gone_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_state_of_a_holder() -> None:
    assert holder_state(ME, NOW) == "alive"
    assert holder_state(ME, NOW + 30) == "expired"
    assert holder_state(ELSEWHERE, NOW) == "unknown"
    assert holder_state(ELSEWHERE, NOW + 30) == "expired"
    assert holder_state(replace(ME, pid=gone_pid()), NOW) == "dead"
    assert holder_state(replace(ME, pid=2**31 - 1), NOW + 30) == "dead"
    assert holder_state(replace(ME, pid=2**70), NOW) == "dead"
    assert holder_state(replace(ME, machine="another boot, or another container"), NOW) == "unknown"
    assert holder_state(replace(ME, expires=time.time() + 30)) == "alive"
    assert holder_state(replace(ME, expires=time.time() - 1)) == "expired"


def test_a_process_number_used_again_is_another_process() -> None:
    assert holder_state(replace(ME, process_start=ME.process_start - 60), NOW) == "dead"


def test_a_step_of_the_clock_changes_no_process_start(monkeypatch: pytest.MonkeyPatch) -> None:
    boot = psutil.boot_time()
    create = psutil.Process.create_time
    monkeypatch.setattr(psutil, "boot_time", lambda: boot + 3600)
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: create(process) + 3600)
    assert holder_state(ME, NOW) == "alive"


def test_a_killed_child_that_nobody_waited_for_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    lease = replace(ME, pid=process.pid, process_start=process_start(process.pid))
    assert holder_state(lease, NOW) == "alive"
    process.kill()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while holder_state(lease, NOW) != "dead":
        assert time.monotonic() < deadline
    process.wait()


def test_a_hidden_process_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    def hide(pid: int) -> None:
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(psutil, "Process", hide)
    assert holder_state(ME, NOW) == "alive"


# --- claiming --------------------------------------------------------------------------------------------------------


def test_the_lease_says_who_and_until_when(tmp_path: Path, time_: FakeClock) -> None:
    with RunWriter.claim(str(tmp_path), clock=time_.clock) as writer:
        lease = writer.reader.lease()
        assert lease is not None
        assert (lease.host, lease.pid, lease.attempt) == (socket.gethostname(), os.getpid(), 1)
        assert (lease.renewed, lease.expires) == (NOW, NOW + LEASE_SECONDS)
        assert LEASE_SECONDS <= 60
        assert holder_state(lease, NOW) == "alive"
    assert RunReader(str(tmp_path)).lease() is None
    writer.close()


def test_a_live_holder_here_is_refused_at_once(tmp_path: Path, time_: FakeClock) -> None:
    put_lease(tmp_path, ME)
    with pytest.raises(LeaseHeld) as caught:
        RunWriter.claim(str(tmp_path), clock=time_.clock)
    for part in (f"process {os.getpid()}", ME.host, "attempt 4", "2027-01-15T08:00:30+00:00", "wait for it or stop it"):
        assert part in str(caught.value)
    assert time_.slept == 0
    assert RunReader(str(tmp_path)).lease() == ME


def test_a_dead_holder_here_is_replaced_at_once(tmp_path: Path, time_: FakeClock) -> None:
    put_lease(tmp_path, replace(ME, pid=gone_pid()))
    with RunWriter.claim(str(tmp_path), clock=time_.clock) as writer:
        assert writer.attempt == 5
    assert time_.slept == 0


@pytest.mark.parametrize("holder", [ME, ELSEWHERE])
def test_an_expired_lease_is_replaced_at_once(tmp_path: Path, time_: FakeClock, holder: Lease) -> None:
    put_lease(tmp_path, replace(holder, expires=NOW))
    with RunWriter.claim(str(tmp_path), clock=time_.clock, wait=False) as writer:
        assert writer.attempt == 5
    assert time_.slept == 0


def test_a_holder_elsewhere_is_waited_for(tmp_path: Path, time_: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    put_lease(tmp_path, ELSEWHERE)
    with RunWriter.claim(str(tmp_path), clock=time_.clock) as writer:
        assert writer.attempt == 5
    assert NOW + 30 <= time_.seconds < NOW + 32
    assert "held by process 12 on host node-7 (attempt 4)" in caplog.text
    assert "at most until 2027-01-15T08:00:30+00:00" in caplog.text


def test_a_holder_elsewhere_with_a_wrong_clock_is_waited_for_a_minute(tmp_path: Path, time_: FakeClock) -> None:
    put_lease(tmp_path, replace(ELSEWHERE, expires=NOW + 86_400))
    with RunWriter.claim(str(tmp_path), clock=time_.clock):
        assert NOW + LEASE_SECONDS <= time_.seconds < NOW + LEASE_SECONDS + 2


def test_without_waiting_a_holder_elsewhere_is_refused(tmp_path: Path, time_: FakeClock) -> None:
    put_lease(tmp_path, ELSEWHERE)
    with pytest.raises(LeaseHeld, match="process 12 on host node-7"):
        RunWriter.claim(str(tmp_path), clock=time_.clock, wait=False)
    assert time_.slept == 0


@pytest.mark.parametrize("change", [{"expires": NOW + 70, "renewed": NOW + 10}, {"nonce": "rival"}])
def test_a_holder_elsewhere_that_renews_is_refused(tmp_path: Path, time_: FakeClock, change: dict[str, object]) -> None:
    put_lease(tmp_path, ELSEWHERE)
    time_.at(NOW + 10, lambda: put_lease(tmp_path, replace(ELSEWHERE, **change)))
    with pytest.raises(LeaseHeld, match="process 12 on host node-7"):
        RunWriter.claim(str(tmp_path), clock=time_.clock)
    assert time_.seconds < NOW + 32


def test_a_lease_given_back_meanwhile_is_taken(tmp_path: Path, time_: FakeClock) -> None:
    put_lease(tmp_path, ELSEWHERE)
    time_.at(NOW + 5, (tmp_path / "lease.json").unlink)
    with RunWriter.claim(str(tmp_path), clock=time_.clock) as writer:
        assert writer.attempt == 1
    assert time_.seconds < NOW + 7


def test_attempts_are_numbered_on(tmp_path: Path) -> None:
    for attempt in (1, 2):
        with RunWriter.claim(str(tmp_path)) as writer:
            assert writer.attempt == attempt
            writer.start_attempt({}, {})
    (tmp_path / "partial" / "round-0001").mkdir(parents=True)
    (tmp_path / "partial" / "round-0001" / "attempt-0010-unit-000001.parquet").write_bytes(b"")
    with RunWriter.claim(str(tmp_path)) as writer:
        assert writer.attempt == 11


def test_a_damaged_lease_is_named(tmp_path: Path) -> None:
    put_lease(tmp_path, ME)
    (tmp_path / "lease.json").write_bytes((tmp_path / "lease.json").read_bytes()[:40])
    for act in (RunReader(str(tmp_path)).lease, lambda: RunWriter.claim(str(tmp_path))):
        with pytest.raises(StoreError, match=r"lease\.json is truncated.*no process writes to the run, then delete it"):
            act()


def test_a_claim_that_failed_after_it_wrote_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time_: FakeClock
) -> None:
    real, failures = store_local.sync_folder, [OSError(errno.EIO, "away")]

    def fail_once(folder: Path) -> None:
        real(folder)
        if failures and (tmp_path / "lease.json").exists():
            raise failures.pop()

    monkeypatch.setattr(store_local, "sync_folder", fail_once)
    with RunWriter.claim(str(tmp_path), clock=time_.clock) as writer:
        writer.start_attempt({}, {})
    assert failures == []


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EPERM])
def test_without_hard_links_or_locks_the_lease_settles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time_: FakeClock, number: int
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(number, "not supported")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    monkeypatch.setattr(store_local.fcntl, "flock", refuse)
    with RunWriter.claim(str(tmp_path), clock=time_.clock) as writer:
        assert time_.seconds == NOW + store_lease.SETTLE_SECONDS
        writer.start_attempt({}, {})
    time_.at(time_.seconds + 1, lambda: put_lease(tmp_path, replace(ELSEWHERE, nonce="rival")))
    with pytest.raises(LeaseHeld, match="process 12 on host node-7"):
        RunWriter.claim(str(tmp_path), clock=time_.clock, wait=False)


def test_a_rival_that_the_lock_does_not_reach_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time_: FakeClock
) -> None:
    """Some network file systems lock within one host only: the first claim is exclusive all the same."""
    real = process_start

    def arrive(pid: int) -> float:
        put_lease(tmp_path, ELSEWHERE)
        return real(pid)

    monkeypatch.setattr(store_lease, "process_start", arrive)
    with pytest.raises(LeaseHeld, match="process 12 on host node-7"):
        RunWriter.claim(str(tmp_path), clock=time_.clock, wait=False)
    assert RunReader(str(tmp_path)).lease() == ELSEWHERE


def test_rivals_are_kept_out_between_look_and_takeover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time_: FakeClock
) -> None:
    monkeypatch.setattr(store_local, "LOCK_SECONDS", 0.0)
    put_lease(tmp_path, replace(ME, expires=NOW))
    real, refusals = process_start, []

    def rival(pid: int) -> float:
        if (lease := RunReader(str(tmp_path)).lease()) is not None and lease.nonce == ME.nonce:
            with pytest.raises(StorageAway):
                RunWriter.claim(str(tmp_path), clock=Clock(lambda: NOW, lambda seconds: None))
            refusals.append(pid)
        return real(pid)

    monkeypatch.setattr(store_lease, "process_start", rival)
    monkeypatch.setattr(store_lease, "_is_gone", lambda pid, start: False)
    with RunWriter.claim(str(tmp_path), clock=time_.clock) as writer:
        assert writer.attempt == 5
    assert refusals == [os.getpid()]


def test_a_lock_that_never_frees_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time_: FakeClock
) -> None:
    monkeypatch.setattr(store_local, "LOCK_SECONDS", 0.0)
    with store_files.Files(str(tmp_path)).lock() as locked:
        assert locked
        with pytest.raises(StorageAway, match="taking the lease failed"):
            RunWriter.claim(str(tmp_path), clock=time_.clock)


# --- holding ---------------------------------------------------------------------------------------------------------


def test_a_stolen_lease_stops_the_writer_before_it_writes(tmp_path: Path, time_: FakeClock) -> None:
    slow = RunWriter.claim(str(tmp_path), clock=time_.clock)
    slow.start_attempt({}, {})
    time_.seconds += LEASE_SECONDS
    with RunWriter.claim(str(tmp_path), clock=time_.clock) as fast:
        assert fast.attempt == 2
        with pytest.raises(LeaseLost, match=rf"taken over by process {os.getpid()} .*\(attempt 2\)"):
            slow.write_result("x", {})
        assert fast.reader.result("x") is None
        slow.close()
        lease = fast.reader.lease()
        assert lease is not None
        assert lease.attempt == 2
        fast.write_result("x", {})
    assert LeaseLost.exit_code == 75


def test_a_lease_stolen_while_a_file_is_written_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time_: FakeClock
) -> None:
    real = os.fsync

    def steal(descriptor: int) -> None:
        real(descriptor)
        put_lease(tmp_path, ELSEWHERE)

    with RunWriter.claim(str(tmp_path), clock=time_.clock) as writer:
        monkeypatch.setattr(store_local.os, "fsync", steal)
        with pytest.raises(LeaseLost):
            writer.write_result("x", {})
        assert list((tmp_path / "results").iterdir()) == []


def test_a_lease_that_expired_unnoticed_is_taken_up_again(tmp_path: Path, time_: FakeClock) -> None:
    with RunWriter.claim(str(tmp_path), clock=time_.clock) as writer:
        time_.seconds += 10 * LEASE_SECONDS
        writer.write_result("x", {})
        lease = writer.reader.lease()
        assert lease is not None
        assert lease.expires == time_.seconds + LEASE_SECONDS


def test_the_lease_is_renewed_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time_: FakeClock) -> None:
    monkeypatch.setattr(store_lease, "RENEW_SECONDS", 0.005)
    with RunWriter.claim(str(tmp_path), clock=time_.clock) as writer:
        time_.seconds += 20
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (lease := writer.reader.lease()) is None or lease.expires != NOW + 20 + LEASE_SECONDS:
            assert time.monotonic() < deadline
        assert lease.renewed == NOW + 20
        assert writer._lease._thread.is_alive()
    assert not writer._lease._thread.is_alive()
    assert not (tmp_path / "lease.json").exists()


def test_renewing_survives_an_outage_and_ends_with_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_lease, "RENEW_SECONDS", 0.005)
    with RunWriter.claim(str(tmp_path)) as writer:
        thread = writer._lease._thread
        with monkeypatch.context() as patch:
            patch.setattr(store_files.Files, "put", lambda *args: (_ for _ in ()).throw(OSError(28, "full")))
            deadline = time.monotonic() + DEADLINE_SECONDS
            while "the lease could not be renewed" not in caplog.text:
                assert time.monotonic() < deadline
        assert thread.is_alive()
        (tmp_path / "lease.json").unlink()
        thread.join(DEADLINE_SECONDS)
        assert not thread.is_alive()
    assert not (tmp_path / "lease.json").exists()


def test_a_lease_that_cannot_be_given_back_is_left_to_expire(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = RunWriter.claim(str(tmp_path))
    monkeypatch.setattr(store_files.Files, "delete", lambda *args: (_ for _ in ()).throw(OSError(5, "away")))
    writer.close()
    assert "could not be released" in caplog.text


# --- several processes -----------------------------------------------------------------------------------------------

CLAIM = """
import sys
from tale_ray.errors import LeaseHeld
from tale_ray.store import RunWriter
print("ready", flush=True)
sys.stdin.readline()
try:
    writer = RunWriter.claim(sys.argv[1], wait=False)
except LeaseHeld as error:
    print("held", error, flush=True)
else:
    writer.start_attempt({}, {})
    print("won", writer.attempt, flush=True)
    sys.stdin.readline()
    writer.close()
"""


@pytest.fixture
def claimants(place: Place) -> Iterator[list[subprocess.Popen[str]]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, place.uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def say(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("stale", [False, True], ids=["free", "stale"])
def test_of_claimants_at_the_same_time_one_wins(
    place: Place, claimants: list[subprocess.Popen[str]], stale: bool
) -> None:
    """Also when the lease of a dead holder is there: the takeover is as exclusive as the first claim."""
    if stale:
        place.write("lease.json", dump_json(replace(ME, pid=gone_pid(), expires=time.time() + 30)))
    assert [hear(process) for process in claimants] == ["ready"] * len(claimants)
    for process in claimants:
        say(process)
    answers = [hear(process) for process in claimants]
    assert sorted(answer.split()[0] for answer in answers) == ["held"] * (len(claimants) - 1) + ["won"]
    winner = claimants[[answer.split()[0] for answer in answers].index("won")]
    assert all(f"process {winner.pid} on host" in answer for answer in answers if answer.startswith("held"))
    assert len(RunReader(place.uri).attempts()) == 1


def test_the_lease_of_a_killed_process_is_taken_at_once(
    place: Place, claimants: list[subprocess.Popen[str]], time_: FakeClock
) -> None:
    holder = claimants[0]
    hear(holder)
    say(holder)
    assert hear(holder) == "won 1"
    lease = RunReader(place.uri).lease()
    assert lease is not None
    assert (lease.pid, holder_state(lease)) == (holder.pid, "alive")
    with pytest.raises(LeaseHeld):
        RunWriter.claim(place.uri)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert holder_state(lease) == "dead"
    with RunWriter.claim(place.uri, clock=Clock(sleep=time_.sleep)) as writer:
        assert writer.attempt == 2
    assert time_.slept == 0


def test_a_stopped_process_loses_its_lease_when_it_has_expired(
    place: Place, claimants: list[subprocess.Popen[str]]
) -> None:
    holder = claimants[0]
    hear(holder)
    say(holder)
    assert hear(holder) == "won 1"
    holder.send_signal(signal.SIGSTOP)
    later = Clock(now=lambda: time.time() + LEASE_SECONDS + 1)
    with RunWriter.claim(place.uri, clock=later) as writer:
        assert writer.attempt == 2
        holder.send_signal(signal.SIGCONT)
        say(holder)  # it closes: the lease that is there is not its own
        assert holder.wait(DEADLINE_SECONDS) == 0
        writer.write_result("x", {})
