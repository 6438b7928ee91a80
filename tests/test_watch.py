"""`show --watch`: storage alone, a new block only when something has changed, an end when the run has one."""

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import Material, command, show
from folders import material_fixture as material_fixture

from tale_ray import watch


@pytest.fixture(scope="module", name="finished")
def finished_fixture(material: Material) -> Path:
    run = material.folder / "watched"
    assert material.search(run, "--max-removed", "2").code == 0
    return run


@pytest.fixture(name="unfinished")
def unfinished_fixture(finished: Path, tmp_path: Path) -> Path:
    """The run as it was after its first round."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for name in ("rounds/round-0002.parquet", "answers/round-0002.parquet"):
        (run / name).unlink()
    shutil.rmtree(run / "results")
    return run


def steps(monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], object]) -> list[float]:
    """Do one thing after another instead of sleeping; return for how long was to be slept."""
    slept: list[float] = []
    todo = list(actions)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        todo.pop(0)()

    changes = watch.changes
    monkeypatch.setattr(watch, "changes", lambda run: changes(run, sleep))
    return slept


def test_a_finished_run_is_shown_once(finished: Path) -> None:
    assert command("show", finished, "--watch") == command("show", finished)
    watched = command("show", finished, "--watch", "--json")
    assert json.loads(watched.out) == show(finished)
    assert watched.out.count("\n") == 1


def test_only_changes_are_shown(finished: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finish() -> None:
        shutil.copytree(finished, unfinished, dirs_exist_ok=True)

    before = command("show", unfinished).out
    slept = steps(monkeypatch, lambda: None, lambda: None, finish)
    watched = command("show", unfinished, "--watch")
    after = command("show", unfinished).out
    assert watched.code == 0
    assert watched.out == f"{before}\n{after}"
    assert slept == [watch.INTERVAL_SECONDS] * 3


def test_every_change_is_an_object_on_a_line(finished: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = "rounds/round-0002.parquet"
    steps(
        monkeypatch,
        lambda: shutil.copy(finished / rounds, unfinished / rounds),
        lambda: shutil.copytree(finished, unfinished, dirs_exist_ok=True),
    )
    first, *_, last = map(json.loads, command("show", unfinished, "--watch", "--json").out.splitlines())
    assert [len(first["rounds"]), first["state"]] == [1, "interrupted"]
    assert last == show(unfinished)


def test_ctrl_c_ends_it_with_0(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    steps(monkeypatch, interrupt)
    assert command("show", unfinished, "--watch").code == 0


def test_a_run_that_does_not_exist_is_refused_as_by_show(tmp_path: Path) -> None:
    watched = command("show", tmp_path / "nowhere", "--watch")
    assert watched.code == 2
    assert watched == command("show", tmp_path / "nowhere")
    assert "is not a run" in watched.err


def test_a_study_is_watched(material: Material, tmp_path: Path) -> None:
    study = tmp_path / "study"
    assert material.search(study, "--seeds", "0,1", "--max-removed", "0").code == 0
    assert command("show", study, "--watch") == command("show", study)
    assert command("show", study, "--watch", "--json").json["seeds"] == [0, 1]


WATCHING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it
from tale_ray.cli import main
main()
"""


def test_a_terminal_shows_one_table(unfinished: Path) -> None:
    """On a terminal of its own, up to Ctrl-C."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHING, "show", str(unfinished), "--watch"],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    seen = io.BytesIO()
    is_asked = False
    for part in _parts(ours):
        seen.write(part)
        if not is_asked and b"tale-ray resume" in seen.getvalue():
            is_asked = True  # a second signal would end it at once
            process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0, errors


def _parts(descriptor: int) -> Iterator[Any]:
    """What comes from a terminal until its other side is closed."""
    while True:
        try:
            part = os.read(descriptor, 4096)
        except OSError:
            return
        if not part:
            return
        yield part
