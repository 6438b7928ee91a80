"""One writer at a time: lease.json, who holds it and until when.

Local: every change of the file is made under a lock that dies with its process, and the first one by exclusive
creation, so two claimants cannot both win. Object stores that know conditions: every change is refused if the file is
not what it was when it was read. Where there is neither: write, settle, read back whose it is. A holder that was put to
sleep beyond the expiry notices before it writes. Does not know what is written under the lease.
"""

import logging
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import psutil

from tale_ray.errors import LeaseHeld, LeaseLost
from tale_ray.store.documents import LEASE, Lease, dump_json, format_time, load_lease
from tale_ray.store.files import Clock, Files, Stamped

logger = logging.getLogger("tale_ray.store")

HolderState = Literal["alive", "dead", "unknown", "expired"]

LEASE_SECONDS = 60.0
RENEW_SECONDS = 15.0
POLL_SECONDS = 1.0
SETTLE_SECONDS = 2.0  # where there is neither lock nor condition: by then a rival's write is visible
_START_TOLERANCE_SECONDS = 2.0  # clocks count boot time in whole seconds


def holder_state(lease: Lease, now: float | None = None) -> HolderState:
    """Return what can be known of the holder from here at `now` (Unix seconds; None: at this moment).

    `dead`: it ran on this host and is gone. `expired`: its time is up. `alive`: it runs on this host. `unknown`: it
    is elsewhere and its time is not up.
    """
    here = lease.host == socket.gethostname() and lease.machine == machine_name()
    if here and _is_gone(lease.pid, lease.process_start):
        return "dead"
    if lease.expires <= (time.time() if now is None else now):
        return "expired"
    return "alive" if here else "unknown"


@cache
def machine_name() -> str:
    """Return what tells apart machines, boots and containers that share a host name; "" where nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def process_start(pid: int) -> float:
    """Return when a process began, in seconds since the machine did: steps of the wall clock do not change it.

    Raises:
        psutil.Error: there is no such process, or it is hidden.
    """
    return float(psutil.Process(pid).create_time() - psutil.boot_time())


def _is_gone(pid: int, start: float) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # another user's: it exists
    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        return abs(process_start(pid) - start) > _START_TOLERANCE_SECONDS
    except psutil.Error:
        return False  # hidden, or ending just now: the next look tells


def read_lease(files: Files) -> tuple[Lease, Stamped] | None:
    """Return the lease as it is in the folder, and its file as it was read; errors of the file system are passed on.

    Raises:
        StoreError: the file is damaged.
    """
    found = files.read_stamped(LEASE)
    return None if found is None else (load_lease(found.data, files.path(LEASE)), found)


def claim_lease(files: Files, clock: Clock, next_attempt: Callable[[Lease | None], int], *, wait: bool) -> Lease:
    """Return the lease, taken; wait for the expiry of one that is held elsewhere if `wait`.

    `next_attempt` numbers the attempt, given the lease that is replaced.

    Raises:
        LeaseHeld: its holder is at work.
        StorageAway: the lease could not be written.
        StoreError: the file is damaged.
    """
    nonce = secrets.token_hex(16)
    awaited: Lease | None = None
    give_up_at = math.inf  # when the awaited lease counts as abandoned: no lease runs longer than LEASE_SECONDS
    while True:
        abandoned = awaited if clock.now() >= give_up_at else None
        seen, taken = files.patiently(
            "taking the lease", partial(_try_claim, files, clock, next_attempt, nonce, abandoned)
        )
        if taken is not None:
            return taken
        if seen is None:
            continue  # somebody else came first or left just now: look again
        if awaited is None and wait and holder_state(seen, clock.now()) == "unknown":
            awaited = seen
            give_up_at = min(seen.expires, clock.now() + LEASE_SECONDS)
            logger.warning(
                "%s is held by %s; it is not renewed if that process is gone: waiting for its expiry, at most until %s",
                files.shown,
                _describe(seen),
                format_time(give_up_at),
            )
        elif awaited is None or _was_renewed(awaited, seen) or not wait:
            raise LeaseHeld(
                f"run {files.shown!r} is being written by {_describe(seen)}: one process writes to a run at a time; "
                f"wait for it or stop it. Its lease runs until {format_time(seen.expires)} unless renewed"
            )
        clock.sleep(max(0.0, min(POLL_SECONDS, give_up_at - clock.now())))


def _describe(lease: Lease) -> str:
    return f"process {lease.pid} on host {lease.host} (attempt {lease.attempt})"


def _was_renewed(before: Lease, after: Lease) -> bool:
    return (before.nonce, before.renewed) != (after.nonce, after.renewed)


def _try_claim(
    files: Files, clock: Clock, next_attempt: Callable[[Lease | None], int], nonce: str, abandoned: Lease | None
) -> tuple[Lease | None, Lease | None]:
    """Return the lease that stands in the way and the one taken; both None: things moved, look again."""
    with files.lock() as decisive:
        found = read_lease(files)
        held = None if found is None else found[0]
        if held is not None and held.nonce != nonce:  # ours: a try that failed after it had written
            is_abandoned = abandoned is not None and not _was_renewed(abandoned, held)
            if not is_abandoned and holder_state(held, clock.now()) in ("alive", "unknown"):
                return held, None
        lease = Lease(
            host=socket.gethostname(),
            pid=os.getpid(),
            process_start=process_start(os.getpid()),
            attempt=next_attempt(held),
            nonce=nonce,
            expires=clock.now() + LEASE_SECONDS,
            renewed=clock.now(),
            machine=machine_name(),
        )
        data = dump_json(lease)
        written = files.create(LEASE, data) if found is None else files.exchange(LEASE, data, found[1])
        if not written:
            return None, None
    if held is not None:
        logger.warning("%s: took over the lease of %s", files.shown, _describe(held))
    return None, lease if _settled(files, clock, lease, decisive) else None


def _settled(files: Files, clock: Clock, lease: Lease, decisive: bool) -> bool:
    """Return whether the lease just written has stayed; if that was decisive nothing else can have been written."""
    if decisive:
        return True
    clock.sleep(SETTLE_SECONDS)
    found = read_lease(files)
    return found is not None and found[0].nonce == lease.nonce


class HeldLease:
    """A lease that this process has taken, renewed by a thread between `start` and `release`."""

    def __init__(self, files: Files, clock: Clock, lease: Lease) -> None:
        self.lease = lease
        self._files = files
        self._clock = clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="tale-lease", daemon=True)

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def check(self) -> None:
        """Make sure that the lease is ours now; one that expired while nobody took it is renewed.

        Raises:
            LeaseLost: it is not ours any more.
            OSError: that cannot be told.
        """
        if self._own()[0].expires <= self._clock.now():
            self.renew()

    def renew(self) -> None:
        """Move the expiry on, in one try.

        Raises:
            LeaseLost: it is not ours any more.
            OSError: it could not be read or written.
        """
        with self._files.lock() as decisive:
            held, read = self._own()
            now = self._clock.now()
            lease = replace(self.lease, expires=now + LEASE_SECONDS, renewed=now)
            if self._files.exchange(LEASE, dump_json(lease), read):
                self.lease = lease
            elif self._own()[0].expires <= self._clock.now():  # not by our other thread, which may renew as well
                raise OSError(f"{LEASE} was written by something else while it was renewed")
        if held.expires <= now and not _settled(self._files, self._clock, lease, decisive):
            self._own()

    def release(self) -> None:
        """Stop renewing and delete the lease if it is ours; a failure is logged: the lease then expires."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            with self._files.lock():
                self._files.delete_stamped(LEASE, self._own()[1])
        except LeaseLost:
            pass
        except OSError as error:
            logger.warning("%s: the lease could not be released (%s); it will expire", self._files.shown, error)

    def _own(self) -> tuple[Lease, Stamped]:
        found = read_lease(self._files)
        if found is None:
            raise LeaseLost(
                f"run {self._files.shown!r}: {LEASE} was deleted, so another process may write: this one stops; "
                "go on with `tale-ray resume`"
            )
        if found[0].nonce != self.lease.nonce:
            raise LeaseLost(
                f"run {self._files.shown!r} was taken over by {_describe(found[0])} while this process "
                f"(attempt {self.lease.attempt}) was away: one process writes to a run at a time, so this one stops"
            )
        return found

    def _keep_renewing(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            try:
                self.renew()
            except LeaseLost as error:
                logger.warning("%s", error)  # the next write stops the run
                return
            except OSError as error:
                logger.warning("%s: the lease could not be renewed (%s); trying again", self._files.shown, error)
