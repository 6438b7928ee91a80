"""`--log-json`: every line of stderr is an object, with a time, a level, an event, and nothing secret."""

import io
import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
from folders import Material, Outcome, command
from folders import material_fixture as material_fixture
from simulation import examples

from tale_ray.attempt.search import AttemptEvent, RunOpened
from tale_ray.log_lines import LogLines
from tale_ray.search.history import History
from tale_ray.search.pool import ScoringAdvanced, UnitRetried, WorkersChanged
from tale_ray.search.scheduler import Scoring

SCORING = Scoring("round-0001", "search", (3,), (0, 1, 2), len(examples(4)))


def lines_of(outcome: Outcome) -> list[dict[str, Any]]:
    return [json.loads(line) for line in outcome.err.splitlines()]


def test_a_search_is_logged_as_objects(material: Material, tmp_path: Path) -> None:
    outcome = material.search(tmp_path / "run", "--log-json", "--max-removed", "1")
    assert outcome.code == 0
    assert outcome.out == command("show", tmp_path / "run").out, "stdout is as it was"
    lines = lines_of(outcome)
    events = [line["event"] for line in lines]
    for event in ("rows_prepared", "model_loaded", "run_opened", "scoring_started", "round_finished", "search_ended"):
        assert event in events
    for line in lines:
        assert list(line)[:3] == ["time", "level", "event"]
        age = datetime.now(UTC) - datetime.fromisoformat(line["time"])
        assert timedelta() <= age < timedelta(minutes=5)
    rounds = [line["round"] for line in lines if line["event"] == "round_finished"]
    assert [entry["number"] for entry in rounds] == [0, 1]
    assert rounds[1]["score"]["total"] == 50
    ended = next(line for line in lines if line["event"] == "search_ended")
    assert (ended["reason"], ended["history"]["removed"]) == ("max_removed", rounds[1]["removed"])


def test_resume_and_evaluate_are_logged_as_objects(material: Material, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert material.search(run, "--max-removed", "0").code == 0
    for arguments in (("resume", run, "--max-removed", "1"), ("evaluate", "--run", run)):
        outcome = command(*arguments, "--log-json")
        assert outcome.code == 0, outcome.err
        assert "model_loaded" in [line["event"] for line in lines_of(outcome)]


def test_an_error_is_an_object_too(material: Material, tmp_path: Path) -> None:
    outcome = material.search(tmp_path / "run", "--log-json", "--task", material.zero_task)
    assert outcome.code == 1
    *_, last = lines_of(outcome)
    assert (last["level"], last["event"]) == ("error", "baseline_zero")
    assert "nothing to protect" in last["message"]


def test_log_records_are_lines_without_credentials() -> None:
    stream = io.StringIO()
    logger = logging.getLogger("tale_ray.store")
    with LogLines(stream) as lines:
        logger.warning("%s : writing failed", "s3://key:secret@bucket/run?secret_key=hidden")
        try:
            raise OSError("s3://key:secret@bucket is away")
        except OSError:
            logger.exception("away")
        lines.show(RunOpened("s3://key:secret@bucket/run", 1, None))
    logger.warning("not any more")
    first, second, third = map(json.loads, stream.getvalue().splitlines())
    assert first["message"] == "s3://bucket/run?secret_key=*** : writing failed"
    assert (first["level"], first["logger"]) == ("warning", "tale_ray.store")
    assert "Traceback" in second["exception"]
    assert third["run"] == "s3://bucket/run"
    assert "secret@" not in stream.getvalue()


def test_progress_is_logged_when_there_is_some() -> None:
    stream = io.StringIO()
    lines = LogLines(stream)
    for done in (0, 0, 5, 5, 12):
        lines.show(ScoringAdvanced(SCORING, done, 12, None, 2))
    lines.show(WorkersChanged("worker-1", 1, "it died"))
    lines.show(WorkersChanged("worker-1", 2, None))
    lines.show(UnitRetried(3, "round-0001", "it died"))
    found = list(map(json.loads, stream.getvalue().splitlines()))
    assert [line.get("done_cells") for line in found] == [0, 5, 12, None, None, None]
    assert found[0]["scoring"] == {
        "scope": "round-0001",
        "split": "search",
        "removed": [3],
        "candidates": 3,
        "rows": 4,
    }
    assert [line["level"] for line in found[3:]] == ["warning", "info", "warning"]


@pytest.mark.parametrize("kind", get_args(AttemptEvent), ids=lambda kind: kind.__name__)
def test_every_event_can_be_written(kind: type) -> None:
    values = {"scoring": SCORING, "history": History(num_layers=4)}
    event = kind(*(values.get(name, name) for name in kind.__dataclass_fields__))
    stream = io.StringIO()
    LogLines(stream).show(event)
    assert json.loads(stream.getvalue())["event"]
