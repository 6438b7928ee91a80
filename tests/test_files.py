"""Files are complete or absent: kills at any step, storage that fails, places that cannot be written, lost leases."""

import os
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pyarrow.parquet
import pytest
from stored_runs import MANIFEST, SHEET, WRITES, Weather, contents, make_round, write_run

from tale_ray.errors import StorageAway, StoreError
from tale_ray.records import Work
from tale_ray.store import RunReader, RunWriter
from tale_ray.store import files as store_files
from tale_ray.store import local as store_local
from tale_ray.store.files import RETRY_SECONDS, Files

# --- writing: complete or absent -------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a process that ends here."""


STEPS = ["before_open", "half_written", "before_sync", "before_rename", "after_rename"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("write", WRITES)
def test_a_kill_at_any_step_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str, step: str
) -> None:
    write_run(tmp_path)
    writer = RunWriter.claim(str(tmp_path))
    before = contents(tmp_path)
    real_open, real_replace, real_fsync = Path.open, Path.replace, store_local.os.fsync

    def end(*args: object, **keywords: object) -> None:
        raise Killed

    def write_half(path: Path, mode: str = "r", *args: object, **keywords: object) -> object:
        if mode != "xb":
            return real_open(path, mode)
        with real_open(path, mode) as file:
            file.write(b"PAR1{")
        raise Killed

    def replace_then_end(path: Path, target: Path) -> None:
        real_replace(path, target)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", end)  # a killed process does not tidy up
        match step:
            case "before_open":
                patch.setattr(Path, "open", end)
            case "half_written":
                patch.setattr(Path, "open", write_half)
            case "before_sync":
                patch.setattr(store_local.os, "fsync", end)
            case "before_rename":
                patch.setattr(Path, "replace", end)
            case "after_rename":
                patch.setattr(Path, "replace", replace_then_end)
        with pytest.raises(Killed):
            WRITES[write](writer)
    assert store_local.os.fsync is real_fsync
    after = contents(tmp_path)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert len(changed) == (1 if step == "after_rename" else 0)
    assert {path.suffix for path in tmp_path.rglob("_*")} <= {".part", ".lock"}  # no pattern like *.parquet fits
    RunReader(str(tmp_path)).check()
    writer.close()
    with RunWriter.claim(str(tmp_path)) as writer:
        WRITES[write](writer)
        writer.clean()
        RunReader(str(tmp_path)).check()
    assert [path for path in tmp_path.rglob("_*") if path.name != "_lease.lock"] == []


@pytest.mark.parametrize("number", [28, 13, 122, 5])  # no space, permission, quota, input/output
def test_a_full_disk_is_waited_for_then_the_run_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    weather = Weather()
    writer = RunWriter.claim(str(tmp_path), clock=weather.clock)
    writer.write_manifest(MANIFEST)
    before = contents(tmp_path)

    def fail(*args: object) -> None:
        raise OSError(number, "it failed")

    with monkeypatch.context() as patch:
        patch.setattr(store_local.os, "fsync", fail)
        with pytest.raises(StorageAway, match=r"writing results/x\.json failed 7 times.*it failed.*tale-ray resume"):
            writer.write_result("x", {})
    assert tuple(weather.slept) == RETRY_SECONDS
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.rglob("_*")] == ["_lease.lock"]
    writer.write_result("x", {})
    writer.close()


def test_a_short_outage_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weather = Weather()
    writer = RunWriter.claim(str(tmp_path), clock=weather.clock)
    real, failures = store_local.os.fsync, [OSError(28, "full"), OSError(5, "away")]

    def fail_twice(descriptor: int) -> None:
        if failures:
            raise failures.pop()
        real(descriptor)

    monkeypatch.setattr(store_local.os, "fsync", fail_twice)
    writer.write_result("x", {"a": 1})
    assert tuple(weather.slept) == RETRY_SECONDS[:2]
    assert writer.reader.result("x") == {"a": 1}
    writer.close()


@pytest.mark.parametrize("run", ["file", "file/run", "/proc/run", "/sys/run"])
def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path, run: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"cannot be (written|read) .*(choose another --run|check the path)"):
        RunWriter.claim(str(tmp_path / run))
    assert RunReader(str(tmp_path / "file/run")).is_empty()


def test_where_a_run_can_be_is_told_without_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("folder", "new", "folder/new/newer"):
        RunReader(str(tmp_path / name)).check_place()
    for name in ("file", "file/run", "x" * 300):
        with pytest.raises(StoreError, match=r"cannot be (read|written) "):
            RunReader(str(tmp_path / name)).check_place()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "folder")
    with pytest.raises(StoreError, match=r"cannot be written \(.*Permission denied.*change its permissions"):
        RunReader(str(tmp_path / "folder" / "run")).check_place()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_names_that_would_leave_the_folder_are_refused(tmp_path: Path) -> None:
    with RunWriter.claim(str(tmp_path / "run")) as writer:
        for name in ("../x", "a/b", "", ".x", "_x"):
            with pytest.raises(StoreError, match="cannot name a file"):
                writer.write_result(name, {})


def test_files_on_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither rename nor lock, as on an object store: one write, and the lease settles."""
    elsewhere = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())

    class Elsewhere:
        @staticmethod
        def from_uri(uri: str) -> tuple[object, str]:
            return elsewhere, uri.partition("://")[2]

    monkeypatch.setattr(store_files.pa.fs, "FileSystem", Elsewhere)
    weather = Weather()
    with RunWriter.claim("mem://run", clock=weather.clock) as writer:
        assert weather.slept == [2.0]
        writer.write_manifest(MANIFEST)
        writer.start_attempt({}, {})
        first = writer.write_round(make_round(0), Work(), "")
        writer.write_answers(SHEET)
        assert Files("mem://run").shown == "mem://run"
    reader = RunReader("mem://run")
    reader.check()
    assert (reader.manifest(), reader.rounds(), reader.answers("round-0001")) == (MANIFEST, (first,), SHEET)
    assert reader.lease() is None
    assert list((tmp_path / "run").rglob("_*")) == []


class Churning:
    """A file system in which a listing fails so many times, as when the folder is made or emptied meanwhile."""

    def __init__(self, system: Any, failures: int) -> None:
        self._system = system
        self.failures = failures

    def get_file_info(self, selector: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise FileNotFoundError("Cannot list directory")
        return self._system.get_file_info(selector)


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_folder_that_changes_while_it_is_listed_is_listed_again(tmp_path: Path, failures: int) -> None:
    (tmp_path / "file").touch()
    files = Files(str(tmp_path))
    files._system = Churning(files._system, failures)
    assert [entry.name for entry in files.list()] == ["file"]


def test_a_folder_that_never_stands_still_is_named(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    files._system = Churning(files._system, 99)
    with pytest.raises(StoreError, match=str(tmp_path)):
        files.list()
