"""Metrics of a search: what events come to, that none ever fails a search, and that Ray exports them."""

import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from folders import Material
from folders import material_fixture as material_fixture

from tale_ray.api import make_config
from tale_ray.attempt.search import RunOpened, run_search
from tale_ray.cluster import metrics
from tale_ray.records import Round, Score
from tale_ray.search.driver import RoundFinished, ScoringStarted, UnitStored
from tale_ray.search.history import History
from tale_ray.search.interruption import Interruption
from tale_ray.search.pool import ScoringAdvanced, UnitDoubled, UnitRetried, WorkersChanged
from tale_ray.search.scheduler import Scoring

SCORING = Scoring("round-0001", "search", (), (0, 1, 2), 10)
EXPORT_SECONDS = 60.0
ROUNDS = "tale_ray_rounds_total"


class Recorded:
    """Stands for a kind of metric of Ray; remembers what was recorded."""

    all: dict[str, list[float]]

    def __init__(self, name: str, *more: Any) -> None:
        self.name = name

    def inc(self, value: float = 1.0, *, tags: dict[str, str]) -> None:
        assert tags == {"run": "tiny-1"}
        self.all.setdefault(self.name, []).append(value)

    set = observe = inc


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    Recorded.all = {}
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, Recorded)
    return Recorded.all


def test_events_become_metrics(recorded: dict[str, list[float]]) -> None:
    note = metrics.SearchMetrics("tiny-1").note
    history = History(num_layers=3)
    baseline = Round(0, None, (), Score(5, 10, 0), (), committed=True)
    for event in (
        WorkersChanged("worker-0", 1, None),
        ScoringStarted(SCORING, history, 3, 30),
        UnitStored(0, "round-0001", "worker-0", 12, 1.5),
        ScoringAdvanced(SCORING, 15, 30, None, 1),
        UnitRetried(1, "round-0001", "it died"),
        UnitDoubled(1, "round-0001", "worker-0", 9.0),
        WorkersChanged("worker-0", 0, "it died"),
        RoundFinished(baseline, history.with_round(baseline)),
        ScoringStarted(SCORING, history.with_round(baseline), 0, 30),
        object(),
    ):
        note(event)
    assert {name.removeprefix("tale_ray_"): values for name, values in recorded.items()} == {
        "units": [1],
        "candidate_rows": [12],
        "unit_seconds": [1.5],
        "unit_retries": [1],
        "units_doubled": [1],
        "workers_lost": [1],
        "rounds": [1],
        "workers": [1, 1, 0],
        "round": [0, 1],
        "cells_open": [27, 15, 30],
    }


def test_a_metric_that_fails_fails_no_search(
    recorded: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("no agent")

    note = metrics.SearchMetrics("tiny-1").note
    monkeypatch.setattr(Recorded, "inc", fail)
    for _ in range(3):
        note(RoundFinished(Round(0, None, (), Score(5, 10, 0), (), committed=True), History(num_layers=3)))
    assert [record.getMessage() for record in caplog.records] == [
        "the metrics of this search are not recorded any more: no agent"
    ]


def exported(address: str, run: str) -> dict[str, float]:
    """What Ray exports of a run, by name; labels of histograms are left out."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    ours = [line for line in lines if "tale_ray_" in line and f'run="{run}"' in line]
    return {line.partition("{")[0].removeprefix("ray_"): float(line.rpartition(" ")[2]) for line in ours}


@pytest.mark.ray
def test_ray_exports_the_metrics_of_a_search(material: Material, tmp_path: Path, ray_address: str) -> None:
    """The run has a name of its own: what this process exported of runs of other tests, under theirs, still stands."""
    import ray

    options = {"model": material.model, "task": material.task, "max_removed": 1, "run": tmp_path / "exported-metrics"}
    config = make_config(**options, address=ray_address, workers=1, exhaustive=True)
    name, found, deadline = "", {}, None
    for event in run_search(config, Interruption()):
        if isinstance(event, RunOpened):
            name = metrics_name(event.run)
        if isinstance(event, RoundFinished) and event.round.number == 1:
            node = ray.nodes()[0]
            address = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
            deadline = time.monotonic() + EXPORT_SECONDS
            while not any("rounds" in each for each in found) and time.monotonic() < deadline:
                found = exported(address, name)
                time.sleep(0.5)
    assert deadline is not None
    values = {each.removeprefix("tale_ray_").removesuffix("_total"): value for each, value in found.items()}
    assert values["rounds"] == 2, found
    assert values["candidate_rows"] == 50 * (1 + 6)
    assert values["workers"] == 1
    assert values["unit_seconds_count"] == values["units"] > 1


def metrics_name(run: str) -> str:
    from tale_ray.store.reader import RunReader

    return RunReader(run).manifest().run
