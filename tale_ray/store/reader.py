"""What a run folder holds, read only: works while the run is written, and when the cluster is gone."""

from collections.abc import Sequence

from tale_ray.errors import StoreError
from tale_ray.records import Measurement, UnitResult
from tale_ray.store import layout
from tale_ray.store.documents import (
    JSON,
    LEASE,
    MANIFEST,
    STUDY,
    AttemptRecord,
    Lease,
    Manifest,
    load_attempt,
    load_lease,
    load_manifest,
    load_measurement,
    parse_json,
)
from tale_ray.store.files import Files
from tale_ray.store.tables import AnswerSheet, StoredRound, load_round, load_sheet, load_unit


class RunReader:
    """Reads the run at a folder or URI; never writes, never creates. Everything is read afresh at each call.

    Raises:
        StoreError: nothing can reach the address; from every method: something cannot be read.
    """

    def __init__(self, uri: str, *, files: Files | None = None) -> None:
        self._files = files or Files(uri)

    @property
    def uri(self) -> str:
        """Where the run is, without credentials: for people, not for opening it again."""
        return self._files.shown

    def exists(self) -> bool:
        """Return whether a run has begun here."""
        return any(entry.name == MANIFEST for entry in self._files.list())

    def is_empty(self) -> bool:
        """Return whether there is nothing at all here, or no folder; names that start with "_" or "." do not count."""
        return all(entry.ignored for entry in self._files.list())

    def check_place(self) -> None:
        """Look whether a run can begin here, as far as that shows without writing.

        Raises:
            StoreError: the folder cannot be written, or holds what is not ours.
        """
        layout.check_names(self._files)
        self._files.check_place()

    def manifest(self) -> Manifest:
        """Return what the run is.

        Raises:
            StoreError: it is missing, damaged, or written by a newer version.
        """
        data = self._files.read(MANIFEST)
        if data is None:
            if any(entry.name == STUDY for entry in self._files.list()):
                raise StoreError(
                    f"{self._files.shown!r} is a study, not a run: name one of its runs, the folders seed-... in it"
                )
            raise StoreError(
                f"{self._files.shown!r} is not a run: {MANIFEST} is missing there; check the path, or start a search"
            )
        return load_manifest(data, self._files.path(MANIFEST))

    def rounds(self) -> tuple[StoredRound, ...]:
        """Return the longest chain of rounds from round 0 on, each the child of the one before.

        Of two chains of one length the one with the later attempt where they part is taken. The last round may be
        one that was rejected.

        Raises:
            StoreError: a round's file is damaged, or written by a newer version.
        """
        return longest_chain(self._all_rounds())

    def _all_rounds(self) -> list[StoredRound]:
        paths = sorted((f"rounds/{match.string}" for match in layout.our_names(self._files, "rounds")), key=len)
        return [
            load_round(data, self._files.path(path)) for path in paths if (data := self._files.read(path)) is not None
        ]

    def partial_scopes(self) -> tuple[str, ...]:
        """Return the scopes of which units are stored."""
        return tuple(match.string for match in layout.our_names(self._files, "partial"))

    def unit_results(self, scope: str) -> tuple[UnitResult, ...]:
        """Return the stored units of a scope, by attempt and number.

        Raises:
            StoreError: a file is damaged, or written by a newer version.
        """
        folder = layout.scope_folder(scope)
        matches = sorted(
            layout.our_names(self._files, folder), key=lambda match: (int(match["attempt"]), int(match["unit"]))
        )
        paths = [f"{folder}/{match.string}" for match in matches]
        return tuple(
            load_unit(data, self._files.path(path)) for path in paths if (data := self._files.read(path)) is not None
        )

    def attempts(self) -> tuple[AttemptRecord, ...]:
        """Return the attempts so far, in order.

        Raises:
            StoreError: a file is damaged, or written by a newer version.
        """
        paths = [f"attempts/{match.string}" for match in layout.our_names(self._files, "attempts")]
        records = (
            load_attempt(data, self._files.path(path)) for path in paths if (data := self._files.read(path)) is not None
        )
        return tuple(sorted(records, key=lambda record: record.attempt))

    def lease(self) -> Lease | None:
        """Return who writes to the run; None: nobody. `holder_state` tells whether that process is still there.

        Raises:
            StoreError: the file is damaged, or written by a newer version.
        """
        data = self._files.read(LEASE)
        return None if data is None else load_lease(data, self._files.path(LEASE))

    def answers(self, scope: str) -> AnswerSheet | None:
        """Return the answers of one configuration; None if they are not stored.

        Raises:
            StoreError: the file is damaged, or written by a newer version.
        """
        path = layout.answers_file(scope)
        data = self._files.read(path)
        return None if data is None else load_sheet(data, self._files.path(path))

    def measurements(self) -> tuple[Measurement, ...]:
        """Return what was measured of the model, by the round that it decides.

        Raises:
            StoreError: a file is damaged, or written by a newer version.
        """
        matches = sorted(layout.our_names(self._files, "measurements"), key=lambda match: int(match["round"]))
        paths = [f"measurements/{match.string}" for match in matches]
        return tuple(
            load_measurement(data, self._files.path(path))
            for path in paths
            if (data := self._files.read(path)) is not None
        )

    def result(self, name: str) -> dict[str, JSON] | None:
        """Return a result as it was written; None if it is not stored.

        Raises:
            StoreError: the file is damaged, or written by a newer version.
        """
        path = layout.result_file(name)
        data = self._files.read(path)
        if data is None:
            return None
        return parse_json(data, self._files.path(path), "delete it: it is derived from what the run has stored")

    def check(self) -> None:
        """Read everything once.

        Raises:
            StoreError: something is damaged, foreign, or written by a newer version; the message names it.
        """
        layout.check_names(self._files)
        if self.exists():
            self.manifest()
        self.lease()
        self.attempts()
        self._all_rounds()
        for scope in self.partial_scopes():
            self.unit_results(scope)
        for match in layout.our_names(self._files, "answers"):
            self.answers(match["name"])
        self.measurements()
        for match in layout.our_names(self._files, "results"):
            self.result(match["name"])


def longest_chain(stored: Sequence[StoredRound]) -> tuple[StoredRound, ...]:
    """Return the longest chain by parent digest from round 0 on; between equals the later attempt wins.

    Of one round by one attempt in two places the later place wins. A rejected round has no children.
    """
    best: dict[tuple[int, str], tuple[StoredRound, ...]] = {}  # by number and parent: the best chain from there on
    for item in sorted(stored, key=lambda item: (-item.round.number, item.attempt)):
        tail = best.get((item.round.number + 1, item.digest), ()) if item.round.committed else ()
        key = (item.round.number, item.parent)
        if 1 + len(tail) >= len(best.get(key, ())):
            best[key] = (item, *tail)
    return best.get((0, ""), ())
