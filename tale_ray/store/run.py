"""A run folder opened for writing, under its lease, by one process at a time; and the reader of it."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import pyarrow as pa

from tale_ray.records import Measurement, Round, UnitResult, Work
from tale_ray.store import layout
from tale_ray.store.documents import JSON, MANIFEST, AttemptRecord, Lease, Manifest, dump_json, format_time
from tale_ray.store.files import SYSTEM_CLOCK, Clock, Files
from tale_ray.store.lease import HeldLease, claim_lease
from tale_ray.store.reader import RunReader
from tale_ray.store.tables import AnswerSheet, StoredRound, digest_round, dump_round, dump_sheet, dump_unit

__all__ = ["RunReader", "RunWriter"]


class RunWriter:
    """Writes to one run until it is closed; made by `claim`.

    Every write is durable when the method returns, and complete or absent if it does not. Every writing method

    Raises:
        LeaseLost: another process took the run over; nothing was written.
        StorageAway: the storage failed again and again; nothing is torn.
    """

    def __init__(self, reader: RunReader, files: Files, clock: Clock, lease: HeldLease) -> None:
        self.reader = reader
        self.attempt = lease.lease.attempt
        self._files = files
        self._clock = clock
        self._lease = lease
        self._record: AttemptRecord | None = None
        self._run: str | None = None

    @classmethod
    def claim(cls, uri: str, *, wait: bool = True, clock: Clock = SYSTEM_CLOCK) -> "RunWriter":
        """Return the writer of a run, which is made if there is none; its lease is renewed until `close`.

        A lease whose holder is gone, or that has expired, is taken over. One that is held on another host is waited
        for if `wait`, up to its expiry.

        Raises:
            StoreError: the folder cannot be written, or holds what is not ours.
            LeaseHeld: another process writes to the run.
            StorageAway: the lease could not be written.
        """
        files = Files(uri, clock)
        layout.check_names(files)
        files.prepare()
        pa.array([""])  # imports what pyarrow asks after (pandas) now, not when the first unit is to be stored

        def next_attempt(replaced: Lease | None) -> int:
            return 1 + max(layout.last_attempt(files), replaced.attempt if replaced else 0)

        lease = HeldLease(files, clock, claim_lease(files, clock, next_attempt, wait=wait))
        try:
            lease.start()
            return cls(RunReader(uri, files=files), files, clock, lease)
        except BaseException:
            lease.release()
            raise

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the lease back; a second call does nothing."""
        self._lease.release()

    def write_manifest(self, manifest: Manifest) -> None:
        """Store what the run is: the first write of a run."""
        self._write(MANIFEST, dump_json(manifest))
        self._run = manifest.run

    def start_attempt(self, options: Mapping[str, JSON], versions: Mapping[str, str]) -> AttemptRecord:
        """Store that this attempt has begun, and return its record."""
        record = AttemptRecord(
            attempt=self.attempt,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=format_time(self._clock.now()),
            options=dict(options),
            versions=dict(versions),
        )
        return self._write_attempt(record)

    def update_attempt(self, **changes: Any) -> AttemptRecord:
        """Store this attempt's record with some fields changed, and return it; `start_attempt` comes first."""
        assert self._record is not None, "start_attempt comes first"
        return self._write_attempt(replace(self._record, **changes))

    def _write_attempt(self, record: AttemptRecord) -> AttemptRecord:
        self._write(layout.attempt_file(self.attempt), dump_json(record))
        self._record = record
        return record

    def write_unit(self, result: UnitResult, row_digests: Sequence[str]) -> None:
        """Store a finished unit; `row_digests` are those of the unit's rows, in their order."""
        unit = result.unit
        data = dump_unit(result, row_digests, self.attempt, self._run_name())
        self._write(layout.unit_file(unit.scope, self.attempt, unit.number), data)

    def write_round(self, round_: Round, work: Work, parent: str) -> StoredRound:
        """Store a finished round after its parent (the digest of the round before; "" for round 0), and return it.

        A round that is stored already is superseded, never overwritten.
        """
        stored = StoredRound(round_, self.attempt, work, digest_round(round_, parent), parent)
        data = dump_round(stored, self._run_name())
        if not self._files.write_new(layout.round_file(round_.number), data, self._lease.check):
            self._write(layout.round_file(round_.number, self.attempt), data)
        return stored

    def write_answers(self, sheet: AnswerSheet) -> None:
        """Store the answers of one configuration, replacing older ones of the same scope."""
        self._write(layout.answers_file(sheet.scope), dump_sheet(sheet, self.attempt, self._run_name()))

    def write_measurement(self, number: int, measurement: Measurement) -> None:
        """Store what was measured of the model before it decides a round, replacing what was measured for that one."""
        self._write(layout.measurement_file(number), dump_json(measurement))

    def write_result(self, name: str, result: Mapping[str, JSON]) -> None:
        """Store a result, replacing an older one of the same name."""
        self._write(layout.result_file(name), dump_json(result))

    def drop_partials(self, scope: str) -> None:
        """Delete the stored units of a scope; for use after its round is committed."""
        folder = layout.scope_folder(scope)

        def drop() -> None:
            self._lease.check()
            self._files.delete_folder(folder)

        self._files.patiently(f"deleting {folder}", drop)

    def clean(self) -> None:
        """Delete left-overs of earlier attempts: temporary files, and units of rounds whose answers are stored."""

        def delete() -> None:
            self._lease.check()
            scopes = [f"partial/{scope}" for scope in self.reader.partial_scopes()]
            for folder in ("", *layout.FOLDERS, *scopes):
                self._files.delete_leftovers(folder)

        self._files.patiently("deleting temporary files", delete)
        stored = {match["name"] for match in layout.our_names(self._files, "answers")}
        committed = {item.round.number for item in self.reader.rounds() if item.round.committed}
        for scope in self.reader.partial_scopes():
            number = layout.round_of(scope)
            answers = scope if number is None else layout.round_scope(number)
            if answers in stored and (number is None or number in committed):
                self.drop_partials(scope)

    def _write(self, path: str, data: bytes) -> None:
        self._files.write(path, data, self._lease.check)

    def _run_name(self) -> str:
        if self._run is None:
            self._run = self.reader.manifest().run
        return self._run
