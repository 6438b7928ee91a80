"""The files of one run folder, on any file system that pyarrow.fs reaches.

The only module that knows which file system it is: everything above it sees names and bytes. A file is complete or
absent. Local: temporary name, fsync of file and folder, rename. Elsewhere: built in memory, one write. Does not know
what the files hold.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa
import pyarrow.fs

from tale_ray.errors import StorageAway, StoreError
from tale_ray.store import s3
from tale_ray.store.conditional import ConditionalObjects
from tale_ray.store.local import TEMPORARY, LocalFolder, make_token
from tale_ray.store.uris import strip_credentials

logger = logging.getLogger("tale_ray.store")
Result = TypeVar("Result")

RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)  # waits between the tries of one write
_LISTINGS = 3  # of a folder that changes while it is listed


@dataclass(frozen=True, slots=True)
class Clock:
    """Unix seconds, and how to let some pass."""

    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep


SYSTEM_CLOCK = Clock()


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder."""

    name: str
    is_folder: bool

    @property
    def ignored(self) -> bool:
        """Whether readers of a data set, and ours, pass over it."""
        return self.name.startswith(("_", "."))


@dataclass(frozen=True, slots=True)
class Stamped:
    """What a file held when it was read, and what tells whether it was written since; None where nothing does."""

    data: bytes
    tag: str | None


class Files:
    """Reads and writes the files of the folder at `uri`, named relative to it.

    Raises:
        StoreError: nothing of pyarrow can reach the address.
    """

    def __init__(self, uri: str, clock: Clock = SYSTEM_CLOCK) -> None:
        self.shown = strip_credentials(uri)
        self._clock = clock
        self._token = make_token()
        self._address: s3.S3Address | None = None
        self._conditional: ConditionalObjects | None = None  # found by `prepare`
        self._is_patient = False  # whether reading waits for storage that was there a moment ago
        try:
            if uri.startswith(s3.SCHEME):
                self._address = s3.parse_address(uri)
                self._system, self._root = self._address.file_system(), self._address.path
            elif "://" in uri:
                self._system, self._root = pa.fs.FileSystem.from_uri(uri)
            else:
                self._system, self._root = pa.fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
            self._system.normalize_path(self._root)  # refuses what no path can hold
        except (ImportError, ValueError, pa.ArrowNotImplementedError, OSError, RuntimeError) as error:
            raise StoreError(
                f"run {self.shown!r} cannot be reached ({strip_credentials(str(error))}): "
                "a run is a folder or an address like s3://bucket/folder; choose another --run"
            ) from error
        is_local = isinstance(self._system, pa.fs.LocalFileSystem)
        self._local = LocalFolder(Path(self._root), self._token) if is_local else None

    def path(self, name: str) -> str:
        """Return a file's path as the file system has it."""
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def list(self, folder: str = "") -> tuple[Entry, ...]:
        """Return what lies in a folder, by name; nothing if it is missing.

        Raises:
            StoreError: it cannot be listed, or is a file.
        """
        entries = (
            Entry(info.base_name, info.type == pa.fs.FileType.Directory)
            for info in self._look(folder, partial(self._infos, folder))
        )
        return tuple(sorted(entries, key=lambda entry: entry.name))

    def _infos(self, folder: str) -> Any:
        selector = pa.fs.FileSelector(self.path(folder), allow_not_found=True)
        for _ in range(_LISTINGS - 1):
            try:
                infos = self._system.get_file_info(selector)
            except FileNotFoundError:  # the folder was made, or something in it deleted, while it was listed
                continue
            if not infos and not folder:
                self._check_bucket()
            return infos
        return self._system.get_file_info(selector)

    def _check_bucket(self) -> None:
        """Look whether the bucket is there: a missing one otherwise looks like an empty folder."""
        if self._address is not None:
            bucket = self._address.bucket
            if self._system.get_file_info(bucket).type == pa.fs.FileType.NotFound:
                raise OSError(f"there is no bucket {bucket!r} at {self._address.endpoint or 'AWS'}")

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file; None if it is missing.

        Raises:
            StoreError: it cannot be read.
        """
        return self._look(name, partial(self.read_now, name))

    def read_now(self, name: str) -> bytes | None:
        """As `read`, but an error of the file system is passed on: for use in `patiently`."""
        try:
            with self._system.open_input_stream(self.path(name)) as stream:
                return cast(bytes, stream.read())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _look(self, name: str, operation: Callable[[], Result]) -> Result:
        """Return what reading comes to.

        Raises:
            StorageAway: it failed again and again after `prepare` had found the storage there.
            StoreError: it failed.
        """
        if self._is_patient:
            return self.patiently(f"reading {name or 'the folder'}", operation)
        try:
            return operation()
        except OSError as error:
            remedy = s3.REMEDY if self._address else "check the path and its permissions"
            raise StoreError(
                f"{strip_credentials(self.path(name))} cannot be read ({strip_credentials(str(error))}): "
                f"a run is a folder whose files may be read; {remedy}"
            ) from error

    def read_stamped(self, name: str) -> Stamped | None:
        """Return what a file holds, for `exchange`; None if it is missing. An error is passed on."""
        if self._conditional is not None:
            found = self._conditional.read(name)
            return None if found is None else Stamped(*found)
        data = self.read_now(name)
        return None if data is None else Stamped(data, None)

    def prepare(self) -> None:
        """Make the folder if it is missing, and try out that it can be written to, and whether on conditions.

        From here on reading, too, waits for object storage that is away.

        Raises:
            StoreError: it cannot be written to.
        """
        with self._writable():
            probe = f"{TEMPORARY}{self._token}-probe"
            self.put(probe, b"probe")
            if self._address is not None:
                self._conditional = self._find_conditions(self._address, probe)
            self._system.delete_file(self.path(probe))
        self._is_patient = self._local is None

    @property
    def is_exclusive(self) -> bool:
        """Whether a lease here can never be held by two at once; known after `prepare`."""
        return self._local is not None or self._conditional is not None

    def _find_conditions(self, address: s3.S3Address, probe: str) -> ConditionalObjects | None:
        try:
            objects = ConditionalObjects(address)
        except ImportError:
            reason = f"boto3 {'.'.join(map(str, s3.BOTO3))} is not installed (pip install 'tale-ray[s3]')"
        else:
            if objects.works(probe):
                return objects
            reason = "the storage does not keep to conditions (If-None-Match, If-Match)"
        logger.warning(
            "%s: the lease is best effort, since %s: it is written and read back, and two processes that start "
            "within the same 2 s may both believe to hold it for a moment",
            self.shown,
            reason,
        )
        return None

    def check_place(self) -> None:
        """Look whether the folder can be made and written to, without doing so; of a bucket, whether it is there.

        Raises:
            StoreError: it cannot.
        """
        with self._writable():
            if self._local is not None:
                self._local.check()
            else:
                self._check_bucket()

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = s3.REMEDY if self._address else "make room, change its permissions or choose another --run"
            raise StoreError(
                f"run {self.shown!r} cannot be written ({strip_credentials(str(error))}): "
                f"the run folder must be writable; {remedy}"
            ) from error

    def patiently(self, what: str, operation: Callable[[], Result]) -> Result:
        """Return what the operation returns, trying again after errors of the file system.

        Raises:
            StorageAway: it failed every time.
        """
        for seconds in (*RETRY_SECONDS, None):
            try:
                return operation()
            except OSError as error:
                reason = strip_credentials(str(error))
                if seconds is None:
                    raise StorageAway(
                        f"run {self.shown!r}: {what} failed {len(RETRY_SECONDS) + 1} times, last with {reason}; "
                        "what was stored before is safe: free the storage, then go on with `tale-ray resume`"
                    ) from error
                logger.warning("%s: %s failed (%s); next try in %g s", self.shown, what, reason, seconds)
                self._clock.sleep(seconds)
        raise AssertionError("the last try returns or raises")

    def write(self, name: str, data: bytes, allowed: Callable[[], None] = lambda: None) -> None:
        """Write a file whole, replacing an older one; `allowed` is asked just before it appears.

        Raises:
            StorageAway: it failed every time.
        """
        self.patiently(f"writing {name}", partial(self.put, name, data, allowed))

    def write_new(self, name: str, data: bytes, allowed: Callable[[], None]) -> bool:
        """As `write`, but return False if there is a file of that name: then nothing is written.

        On conditional storage that holds to the last: a file that appears meanwhile stays, too.

        Raises:
            StorageAway: it failed every time.
        """
        if (objects := self._conditional) is not None:

            def create() -> bool:
                allowed()
                return objects.put(name, data, None)

            return self.patiently(f"writing {name}", create)
        if self.patiently(f"looking for {name}", partial(self.has, name)):
            return False
        self.write(name, data, allowed)
        return True

    def put(self, name: str, data: bytes, allowed: Callable[[], None] = lambda: None) -> None:
        """As `write`, in one try; an error of the file system is passed on."""
        if self._local is not None:
            self._local.put(name, data, allowed)
            return
        allowed()
        try:
            stream = self._system.open_output_stream(self.path(name))
        except FileNotFoundError:  # a file system that has folders
            self._system.create_dir(self.path(name.rpartition("/")[0]))
            stream = self._system.open_output_stream(self.path(name))
        with stream:
            stream.write(data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file in one try if there is none of that name; return whether it was ours that appeared."""
        if self._conditional is not None:
            return self._conditional.put(name, data, None)
        if self._local is not None and (created := self._local.create(name, data)) is not None:
            return created
        if self.has(name):
            return False
        self.put(name, data)
        return True

    def exchange(self, name: str, data: bytes, read: Stamped) -> bool:
        """Write a file in one try unless it was written since it was read; return whether ours is there.

        Where that cannot be told ours is written: only `lock` keeps others out.
        """
        if self._conditional is not None:
            return self._conditional.put(name, data, read.tag)
        self.put(name, data)
        return True

    def has(self, name: str) -> bool:
        """Return in one try whether there is a file of that name; an error of the file system is passed on."""
        return bool(self._system.get_file_info(self.path(name)).type == pa.fs.FileType.File)

    def delete(self, name: str) -> None:
        """Delete a file in one try; a missing one is fine."""
        with suppress(FileNotFoundError):
            self._system.delete_file(self.path(name))

    def delete_stamped(self, name: str, read: Stamped) -> None:
        """As `delete`, but a file that was written since it was read stays, where that can be told."""
        if self._conditional is not None and read.tag is not None:
            self._conditional.delete(name, read.tag)
        else:
            self.delete(name)

    def delete_folder(self, name: str) -> None:
        """Delete a folder and all in it in one try; a missing one is fine."""
        with suppress(FileNotFoundError):
            self._system.delete_dir(self.path(name))

    def delete_leftovers(self, folder: str = "") -> None:
        """Delete the temporary files in a folder that were not made through this object."""
        for entry in self.list(folder):
            if entry.name.startswith(TEMPORARY) and not entry.name.startswith(f"{TEMPORARY}{self._token}-"):
                self.delete(f"{folder}/{entry.name}" if folder else entry.name)

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Keep other processes out of the same block; yields whether `create` and `exchange` in it are decisive.

        They are under a lock, which falls with the process that holds it; and where they are conditional, which needs
        no lock. Elsewhere whoever writes last has written.
        """
        if self._local is None:
            yield self._conditional is not None
            return
        with self._local.lock() as locked:
            yield locked
