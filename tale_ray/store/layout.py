"""Which names a run folder holds, and what lies in it that is not ours. Does not know what the files hold."""

import re
from collections.abc import Iterator

from tale_ray.errors import StoreError
from tale_ray.store.documents import LEASE, MANIFEST, NAME
from tale_ray.store.files import Entry, Files

ATTEMPT_FILE = re.compile(r"attempt-(?P<attempt>\d{4,})\.json")
ROUND_FILE = re.compile(r"round-(?P<round>\d{4,})(?:-attempt-(?P<attempt>\d{4,}))?\.parquet")
UNIT_FILE = re.compile(r"attempt-(?P<attempt>\d{4,})-unit-(?P<unit>\d{6,})\.parquet")
ANSWERS_FILE = re.compile(rf"(?P<name>{NAME.pattern})\.parquet")
MEASUREMENT_FILE = re.compile(r"round-(?P<round>\d{4,})\.json")
ROUND_SCOPE = re.compile(r"round-(?P<round>\d{4,})(?:-branch-\d{2,})?")
RESULT_FILE = re.compile(rf"(?P<name>{NAME.pattern})\.json")
FOLDERS = {
    "attempts": ATTEMPT_FILE,
    "rounds": ROUND_FILE,
    "partial": NAME,
    "answers": ANSWERS_FILE,
    "measurements": MEASUREMENT_FILE,
    "results": RESULT_FILE,
}


def attempt_file(attempt: int) -> str:
    """Return the path of an attempt's record."""
    return f"attempts/attempt-{attempt:04d}.json"


def round_file(number: int, attempt: int | None = None) -> str:
    """Return the path of a round; with an attempt, of one that supersedes it."""
    suffix = "" if attempt is None else f"-attempt-{attempt:04d}"
    return f"rounds/round-{number:04d}{suffix}.parquet"


def round_scope(number: int, branch: int = 0) -> str:
    """Return the scope that the units of a branch of a round belong to; of the first one, the round's answers, too."""
    return f"round-{number:04d}" + (f"-branch-{branch:02d}" if branch else "")


def round_of(scope: str) -> int | None:
    """Return the number of the round that a scope belongs to; None: to no round."""
    found = ROUND_SCOPE.fullmatch(scope)
    return None if found is None else int(found["round"])


def unit_file(scope: str, attempt: int, number: int) -> str:
    """Return the path of a unit's result."""
    return f"{scope_folder(scope)}/attempt-{attempt:04d}-unit-{number:06d}.parquet"


def scope_folder(scope: str) -> str:
    """Return the folder of a scope's units.

    Raises:
        StoreError: the scope cannot name a file.
    """
    return f"partial/{_checked(scope)}"


def answers_file(scope: str) -> str:
    """Return the path of a scope's answers.

    Raises:
        StoreError: the scope cannot name a file.
    """
    return f"answers/{_checked(scope)}.parquet"


def measurement_file(number: int) -> str:
    """Return the path of the measurement that decides a round."""
    return f"measurements/{round_scope(number)}.json"


def result_file(name: str) -> str:
    """Return the path of a result.

    Raises:
        StoreError: the name cannot be that of a file.
    """
    return f"results/{_checked(name)}.json"


def _checked(name: str) -> str:
    if NAME.fullmatch(name) is None:
        raise StoreError(
            f"{name!r} cannot name a file of a run: use letters, digits, . _ + and -, beginning with a letter or digit"
        )
    return name


def our_names(files: Files, folder: str) -> tuple[re.Match[str], ...]:
    """Return the names in a folder that have the form of ours, in order; for `partial` those of its folders.

    Raises:
        StoreError: the folder cannot be read.
    """
    pattern = FOLDERS.get(folder, UNIT_FILE)
    matches = (pattern.fullmatch(entry.name) for entry in files.list(folder) if not entry.ignored)
    return tuple(match for match in matches if match is not None)


def last_attempt(files: Files) -> int:
    """Return the highest attempt that left a file; 0 if none did.

    Raises:
        StoreError: a folder cannot be read.
    """
    names = [*our_names(files, "attempts"), *our_names(files, "rounds")]
    for scope in our_names(files, "partial"):
        names += our_names(files, f"partial/{scope.string}")
    return max((int(match["attempt"] or 1) for match in names), default=0)


def check_names(files: Files) -> None:
    """Refuse a folder that holds anything that is not ours; names that start with "_" or "." are passed over.

    Raises:
        StoreError: it does, or it has rounds but no run.json.
    """
    top = [entry for entry in files.list() if not entry.ignored]
    is_run = any(entry.name == MANIFEST for entry in top)
    foreign = [entry.name for entry in top if not _is_ours(entry)]
    if not is_run and foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise StoreError(f"{files.shown!r} is not a run folder: it holds {shown}; choose another --run")
    foreign += [name for entry in top if _is_ours(entry) for name in _foreign_in(files, entry.name)]
    if foreign:
        raise StoreError(
            f"{files.path(foreign[0])} is foreign: a run folder holds only files that tale_ray wrote; "
            "move it elsewhere, or choose another --run"
        )
    if not is_run and (names := our_names(files, "rounds")):
        raise StoreError(
            f"{files.path(MANIFEST)} is missing although {names[0].string} is there: every run begins with it; "
            "put back a copy of it, or choose another --run"
        )


def _is_ours(entry: Entry) -> bool:
    return entry.name in FOLDERS if entry.is_folder else entry.name in (MANIFEST, LEASE)


def _foreign_in(files: Files, folder: str) -> Iterator[str]:
    if folder not in FOLDERS and not folder.startswith("partial/"):
        return
    pattern = FOLDERS.get(folder, UNIT_FILE)
    for entry in files.list(folder):
        if entry.ignored:
            continue
        if pattern.fullmatch(entry.name) is None or entry.is_folder != (folder == "partial"):
            yield f"{folder}/{entry.name}"
        elif folder == "partial":
            yield from _foreign_in(files, f"partial/{entry.name}")
