"""Files of a local folder that are complete or absent: temporary name, fsync of file and folder, rename; and its lock.

Does not know what the files hold, nor that there are other file systems.
"""

import errno
import fcntl
import itertools
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

# Files that are not complete yet: dataset readers pass over the beginning of the name, patterns like *.parquet its end.
TEMPORARY = "_tmp-"
PART = ".part"
LOCK = "_lease.lock"
LOCK_SECONDS = 10.0
_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EPERM, errno.EMLINK}


def make_token() -> str:
    """Return what tells the temporary files of one writer apart from those of others."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """Writes the files of the folder at `path`, named relative to it; errors of the file system are passed on."""

    path: Path
    token: str
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def put(self, name: str, data: bytes, allowed: Callable[[], None]) -> None:
        """Write a file whole, replacing an older one; `allowed` is asked first and again just before it appears."""
        allowed()
        with self._temporary(self.path / name, data) as temporary:
            allowed()
            temporary.replace(self.path / name)

    def create(self, name: str, data: bytes) -> bool | None:
        """Write a file if there is none of that name; return whether it was ours that appeared.

        None: this file system cannot do that in one step, and nothing was written.
        """
        with self._temporary(self.path / name, data) as temporary:
            try:
                (self.path / name).hardlink_to(temporary)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                return None
            return True

    def check(self) -> None:
        """Look whether the folder can be made and written to, without doing so; OSError if not."""
        there = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Keep other processes out of the same block; yields False where the file system has no such thing.

        The lock falls with the process that holds it, however that ends.
        """
        descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            yield _flock(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _temporary(self, path: Path, data: bytes) -> Iterator[Path]:
        make_folder(path.parent)
        temporary = path.parent / f"{TEMPORARY}{self.token}-{next(self._numbers)}-{path.name}{PART}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


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


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the file system has such a thing."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
