"""The files of one run folder, on any file system that pyarrow.fs reaches.

The only module that touches a file system: object stores differ from local folders here and nowhere else. A file is
complete or absent. Local: temporary name, fsync of file and folder, rename. Elsewhere: built in memory, one write.
Does not know what the files hold.
"""

import errno
import fcntl
import itertools
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa
import pyarrow.fs

from tale_ray.errors import StorageAway, StoreError
from tale_ray.store.uris import strip_credentials

logger = logging.getLogger("tale_ray.store")
Result = TypeVar("Result")

# Files that are not complete yet: dataset readers pass over the beginning of the name, patterns like *.parquet its end.
TEMPORARY = "_tmp-"
PART = ".part"
LOCK = "_lease.lock"
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)  # waits between the tries of one write
LOCK_SECONDS = 10.0
_LISTINGS = 3  # of a folder that changes while it is listed
_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EPERM, errno.EMLINK}


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


class Files:
    """Reads and writes the files of the folder at `uri`, named relative to it.

    Raises:
        StoreError: nothing of pyarrow can reach the address.
    """

    def __init__(self, uri: str, clock: Clock = SYSTEM_CLOCK) -> None:
        self.shown = strip_credentials(uri)
        self._clock = clock
        self._token = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._numbers = itertools.count()
        try:
            if "://" in uri:
                self._system, self._root = pa.fs.FileSystem.from_uri(uri)
            else:
                self._system, self._root = pa.fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
            self._system.normalize_path(self._root)  # refuses what no path can hold
        except (ValueError, pa.ArrowNotImplementedError, OSError, RuntimeError) as error:
            raise StoreError(
                f"run {self.shown!r} cannot be reached ({strip_credentials(str(error))}): "
                "a run is a folder or an address like s3://bucket/folder; choose another --run"
            ) from error
        self._local = Path(self._root) if isinstance(self._system, pa.fs.LocalFileSystem) else None

    def path(self, name: str) -> str:
        """Return a file's path as the file system has it."""
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def list(self, folder: str = "") -> tuple[Entry, ...]:
        """Return what lies in a folder, by name; nothing if it is missing.

        Raises:
            StoreError: it cannot be listed, or is a file.
        """
        with self._readable(folder):
            entries = (Entry(info.base_name, info.type == pa.fs.FileType.Directory) for info in self._infos(folder))
            return tuple(sorted(entries, key=lambda entry: entry.name))

    def _infos(self, folder: str) -> Any:
        selector = pa.fs.FileSelector(self.path(folder), allow_not_found=True)
        for _ in range(_LISTINGS - 1):
            try:
                return self._system.get_file_info(selector)
            except FileNotFoundError:  # the folder was made, or something in it deleted, while it was listed
                continue
        return self._system.get_file_info(selector)

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file; None if it is missing.

        Raises:
            StoreError: it cannot be read.
        """
        with self._readable(name):
            return self.read_now(name)

    def read_now(self, name: str) -> bytes | None:
        """As `read`, but an error of the file system is passed on: for use in `patiently`."""
        try:
            with self._system.open_input_stream(self.path(name)) as stream:
                return cast(bytes, stream.read())
        except (FileNotFoundError, NotADirectoryError):
            return None

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{strip_credentials(self.path(name))} cannot be read ({strip_credentials(str(error))}): "
                "a run is a folder whose files may be read; check the path and its permissions"
            ) from error

    def prepare(self) -> None:
        """Make the folder if it is missing, and try out that it can be written to.

        Raises:
            StoreError: it cannot.
        """
        with self._writable():
            probe = f"{TEMPORARY}{self._token}-probe"
            self.put(probe, b"probe")
            self._system.delete_file(self.path(probe))

    def check_place(self) -> None:
        """Look whether the folder can be made and written to, without doing so; only local ones show it.

        Raises:
            StoreError: it cannot.
        """
        if self._local is not None:
            with self._writable():
                there = next(folder for folder in (self._local, *self._local.parents) if folder.exists())
                if not there.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
                if not os.access(there, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"run {self.shown!r} cannot be written ({strip_credentials(str(error))}): "
                "the run folder must be writable; make room, change its permissions or choose another --run"
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
        """Write a file whole, replacing an older one; `allowed` is asked first and again just before it appears.

        Raises:
            StorageAway: it failed every time.
        """

        def write_once() -> None:
            allowed()
            self.put(name, data, allowed)

        self.patiently(f"writing {name}", write_once)

    def put(self, name: str, data: bytes, allowed: Callable[[], None] = lambda: None) -> None:
        """As `write`, in one try; an error of the file system is passed on."""
        if self._local is None:
            allowed()
            try:
                stream = self._system.open_output_stream(self.path(name))
            except FileNotFoundError:  # a file system that has folders
                self._system.create_dir(self.path(name.rpartition("/")[0]))
                stream = self._system.open_output_stream(self.path(name))
            with stream:
                stream.write(data)
        else:
            with self._temporary(self._local / name, data) as temporary:
                allowed()
                temporary.replace(self._local / name)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file in one try if there is none of that name; return whether it was ours that appeared."""
        if self._local is not None:
            with self._temporary(self._local / name, data) as temporary:
                try:
                    (self._local / name).hardlink_to(temporary)
                except FileExistsError:
                    return False
                except OSError as error:
                    if error.errno not in _UNSUPPORTED:
                        raise
                else:
                    return True
        if self.has(name):
            return False
        self.put(name, data)
        return True

    @contextmanager
    def _temporary(self, path: Path, data: bytes) -> Iterator[Path]:
        _make_folder(path.parent)
        temporary = path.parent / f"{TEMPORARY}{self._token}-{next(self._numbers)}-{path.name}{PART}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)

    def has(self, name: str) -> bool:
        """Return in one try whether there is a file of that name; an error of the file system is passed on."""
        return bool(self._system.get_file_info(self.path(name)).type == pa.fs.FileType.File)

    def delete(self, name: str) -> None:
        """Delete a file in one try; a missing one is fine."""
        with suppress(FileNotFoundError):
            self._system.delete_file(self.path(name))

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
        """Keep other processes out of the same block; yields False where the file system has no such thing.

        The lock falls with the process that holds it, however that ends.
        """
        if self._local is None:
            yield False
            return
        descriptor = os.open(self._local / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            yield _flock(descriptor)
        finally:
            os.close(descriptor)


def _flock(descriptor: int) -> bool:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        else:
            return True


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
