"""Workers on Ray that are made of paper: they answer by a table, load no model, and die where a test says so."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulation import MODEL, Table, examples, measured

from tale_ray.cluster.actor import Scored, WorkerActor
from tale_ray.config import ModelSection, ResourceSection
from tale_ray.errors import ModelError
from tale_ray.records import Measurement, ModelInfo, Probe, PromptRow, WorkUnit
from tale_ray.search.executor import Questions
from tale_ray.search.interruption import Interruption
from tale_ray.search.pace import UnitShape
from tale_ray.search.pool import Pool
from tale_ray.search.scheduler import Scheduler, Scoring
from tale_ray.tasks.spec import AnswerSpec

TABLE = Table(seed=1)
NUM_ROWS = 24
QUESTIONS = Questions({"search": [PromptRow((1, 2), "yes")] * NUM_ROWS}, AnswerSpec(type="regex", pattern="(y)"), 1)


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.01)
    return found


@pytest.fixture(name="executor")
def executor_fixture(ray_address: str) -> Iterator[Callable[..., Any]]:
    """Makes executors on the session's cluster that are closed in the end."""
    from tale_ray.cluster.ray_executor import RayExecutor

    made: list[RayExecutor] = []

    def make(model: str | Path = "simulated", address: str = ray_address, **resources: Any) -> RayExecutor:
        section = ResourceSection(address=address, **resources)
        made.append(RayExecutor(ModelSection(model=str(model)), "float32", section))
        return made[-1]

    yield make
    for each in made:
        each.close()


def paper_worker(**deaths: Any) -> type:
    """A worker class that answers by a table; its process dies in the methods named, so many times."""
    folder = deaths.pop("folder", None)
    bad = deaths.pop("bad", None)  # how worker-1 is on a bad node
    seconds = deaths.pop("seconds", 0)  # that a unit takes
    halvings = deaths.pop("halvings", 0)  # of its batch budget, that a unit needs

    class Paper(WorkerActor):
        def _maybe_die(self, method: str) -> None:
            for number in range(deaths.get(method, 0)):
                death = Path(str(folder)) / f"{method}-{number}"
                try:
                    death.touch(exist_ok=False)
                except FileExistsError:
                    continue
                print(f"these were the last words of {self._name}", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

        def load(self, section: ModelSection, dtype: str, halvings: int) -> ModelInfo:
            with (Path(str(folder)) / "loads").open("a") as loads:
                print(halvings, file=loads)
            self._maybe_die("load")
            if bad and self._name != "worker-0":
                time.sleep(1)  # the good one is first
                if bad == "refuses":
                    raise ModelError("no such folder here")
                return replace(MODEL, digest="f" * 64)
            return MODEL

        def encode(self, rows: Sequence[Any]) -> tuple[PromptRow, ...]:
            self._maybe_die("encode")
            return tuple(PromptRow((1, 2), row.target) for row in rows)

        def measure(self, probe: Probe, rows: Sequence[tuple[int, ...]]) -> Measurement:
            self._maybe_die("measure")
            return Measurement(probe, measured(TABLE.seed, probe), len(rows), sum(map(len, rows)), 0.0)

        def share(self, questions: Questions) -> None:
            self._maybe_die("share")

        def score(self, unit: WorkUnit) -> Scored:
            time.sleep(seconds)
            if 0 in unit.rows:
                self._maybe_die("score")
            result = TABLE.score(unit, self._name if seconds else os.environ["CUDA_VISIBLE_DEVICES"])
            return Scored(result, halvings)

    return Paper


@pytest.fixture(name="paper")
def paper_fixture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    def use(**deaths: Any) -> None:
        monkeypatch.setattr("tale_ray.cluster.ray_executor.WorkerActor", paper_worker(folder=tmp_path, **deaths))

    return use


def scored(ray: Any) -> Scheduler:
    """A scoring from the first call of an executor to the last unit."""
    ray.connect()
    assert ray.load() == MODEL
    assert ray.encode(examples(3)) == (PromptRow((1, 2), "yes"),) * 3
    ray.share(QUESTIONS)
    scoring = Scoring("round-0001", "search", (), (0, 1, 2), 24)
    scheduler = Scheduler(scoring, UnitShape(rows=4, candidates=3))
    for _ in Pool(ray, Interruption()).run(scheduler):
        pass
    return scheduler
