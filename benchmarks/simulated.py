"""A search on a cluster that exists on paper: the driver, pool, scheduler and pace of the product, with another clock.

Workers answer from a table and take the seconds that a model of unit times says; they join, die and dawdle as a plan
says. The driver handles one event after another, and its own seconds (writing a unit, committing a round) are on the
same clock. Nothing here waits.
"""

import hashlib
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from unit_times import UnitTimes

from tale_ray.config import StrategySection
from tale_ray.records import CandidateAnswers, Example, ModelInfo, PromptRow, Round, RowAnswer, UnitResult, WorkUnit
from tale_ray.search.driver import Driver
from tale_ray.search.executor import Questions, UnitDone, WorkerEvent, WorkerJoined, WorkerLost
from tale_ray.search.history import History
from tale_ray.search.interruption import Interruption
from tale_ray.search.pool import Pool
from tale_ray.search.strategy import make_strategy
from tale_ray.store.tables import AnswerSheet, StoredRound

RIGHT = RowAnswer(reply="yes", prediction="yes", correct=True)
WRONG = RowAnswer(reply="no", prediction="no", correct=False)
Correct = Callable[[int, tuple[int, ...]], bool]  # whether the model without some layers answers a row


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Seconds that are not of a unit's own."""

    unit_write: float = 0.005  # by the driver, before it does anything else
    round_commit: float = 0.03
    dispatch: float = 0.002  # from the driver to a worker; one way
    handling: float = 0.0005  # of the driver, by event


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Who is there when, and what goes wrong."""

    num_workers: int
    late_workers: int = 0  # of these, join at `late_seconds`
    late_seconds: float = 0.0
    mean_lifetime_seconds: float | None = None  # of a worker; None: for ever
    rejoin_seconds: float = 30.0  # from a loss to its being noticed, replaced and loaded
    slow_workers: int = 0
    slow_units: float = 0.0  # share of units
    slowness: float = 1.0  # how many times as long slow workers, and slow units, take
    seed: int = 0


@dataclass(slots=True)
class _Worker:
    name: str
    slowness: float
    joined_at: float | None = None
    present_seconds: float = 0.0
    queue: deque[tuple[float, WorkUnit]] = field(default_factory=deque)  # with when it arrives
    running: WorkUnit | None = None
    taking: float = 0.0  # seconds that it takes
    life: int = 0
    opened: set[str] = field(default_factory=set)  # scopes of which it has had a unit, in this life


class SimulatedCluster:
    """The executor, and the clock: `now` is when the driver is done with what it has heard of."""

    units_per_worker = 2

    def __init__(self, correct: Correct, times: UnitTimes, plan: Plan, costs: Costs) -> None:
        self.now = 0.0
        self.computed: list[tuple[UnitResult, float]] = []  # with when it was finished
        self._correct = correct
        self._times = times
        self._plan = plan
        self._costs = costs
        self._random = random.Random(plan.seed)
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, str, _Worker, int]] = []
        slow = set(self._random.sample(range(plan.num_workers), plan.slow_workers))
        self._workers = {
            f"worker-{number}": _Worker(f"worker-{number}", plan.slowness if number in slow else 1.0)
            for number in range(plan.num_workers)
        }
        for number, worker in enumerate(self._workers.values()):
            is_late = number >= plan.num_workers - plan.late_workers
            self._expect(plan.late_seconds if is_late else 0.0, "join", worker)

    def available_seconds(self) -> float:
        """Return for how long workers have been there, all together."""
        there = (self.now - worker.joined_at for worker in self._workers.values() if worker.joined_at is not None)
        return sum(there) + sum(worker.present_seconds for worker in self._workers.values())

    def spend(self, seconds: float) -> None:
        """Let the driver be busy."""
        self.now += seconds

    # The Executor protocol.

    def connect(self) -> None:
        """Do nothing: there is nothing to join."""

    def load(self) -> ModelInfo:
        """Return a model of as many layers as the times are of."""
        return ModelInfo(self._times.num_layers, "simulated", "0" * 64, "float32", "none", 0.0)

    def encode(self, examples: Sequence[Example]) -> tuple[PromptRow, ...]:
        """Return rows that say nothing."""
        return tuple(PromptRow((0,), example.target) for example in examples)

    def share(self, questions: Questions) -> None:
        """Do nothing: workers answer from a table."""

    def submit(self, worker: str, unit: WorkUnit) -> None:
        """Put the unit into the worker's queue, where it is a moment later."""
        to = self._workers[worker]
        assert to.joined_at is not None, "a unit was sent to a worker that is gone"
        to.queue.append((self.now + self._costs.dispatch, unit))
        if to.running is None:
            self._begin(to, self.now)

    def poll(self, timeout_seconds: float) -> tuple[WorkerEvent, ...]:
        """Return the next event, and let the clock be there; nothing if it is later than the timeout."""
        while self._events and self._events[0][3].life != self._events[0][4]:
            heapq.heappop(self._events)
        assert self._events, "no worker is left, and none will come"
        if self._events[0][0] > self.now + timeout_seconds:
            self.now += timeout_seconds
            return ()
        at, _, what, worker, _ = heapq.heappop(self._events)
        self.now = max(self.now, at) + self._costs.handling
        match what:
            case "join":
                return (self._join(worker, at),)
            case "lose":
                return (self._lose(worker, at),)
            case _:
                return (self._finish(worker, at),)

    def close(self) -> None:
        """Do nothing."""

    # What happens.

    def _expect(self, at: float, what: str, worker: _Worker) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), what, worker, worker.life))

    def _begin(self, worker: _Worker, free_at: float) -> None:
        arrives, worker.running = worker.queue.popleft()
        unit = worker.running
        is_first = unit.scope not in worker.opened
        worker.opened.add(unit.scope)
        seconds = self._times.seconds(unit, is_first=is_first, draw=self._random) * worker.slowness
        if self._random.random() < self._plan.slow_units:
            seconds *= self._plan.slowness
        worker.taking = seconds
        self._expect(max(free_at, arrives) + seconds, "finish", worker)

    def _finish(self, worker: _Worker, at: float) -> UnitDone:
        unit, seconds = worker.running, worker.taking
        assert unit is not None, "only what runs is finished"
        worker.running = None
        if worker.queue:
            self._begin(worker, at)
        result = self._score(unit, seconds, worker.name)
        self.computed.append((result, at))
        return UnitDone(worker.name, result)

    def _score(self, unit: WorkUnit, seconds: float, worker: str) -> UnitResult:
        candidates = tuple(
            CandidateAnswers(
                layer,
                tuple(
                    RIGHT if self._correct(row, unit.removed if layer is None else (*unit.removed, layer)) else WRONG
                    for row in unit.rows
                ),
                seconds / len(unit.candidates),
            )
            for layer in unit.candidates
        )
        return UnitResult(unit, candidates, 1, seconds, worker)

    def _join(self, worker: _Worker, at: float) -> WorkerJoined:
        worker.joined_at = at
        if self._plan.mean_lifetime_seconds is not None:
            self._expect(at + self._random.expovariate(1 / self._plan.mean_lifetime_seconds), "lose", worker)
        return WorkerJoined(worker.name)

    def _lose(self, worker: _Worker, at: float) -> WorkerLost:
        assert worker.joined_at is not None, "only workers that are there are lost"
        worker.present_seconds += at - worker.joined_at
        worker.joined_at = None
        worker.life += 1  # what was expected of it is void
        worker.queue.clear()
        worker.opened.clear()
        worker.running = None
        self._expect(at + self._plan.rejoin_seconds, "join", worker)
        return WorkerLost(worker.name, "its node is gone", is_suspect=False)


class MemoryWriter:
    """Stands for run folder and its reader: keeps what the driver asks for again, and takes the driver's time."""

    def __init__(self, cluster: SimulatedCluster, costs: Costs) -> None:
        self.reader = self
        self.stored: list[UnitResult] = []
        self._cluster = cluster
        self._costs = costs
        self._sheets: dict[str, AnswerSheet] = {}

    def answers(self, scope: str) -> AnswerSheet | None:
        """Return what was written of a scope."""
        return self._sheets.get(scope)

    def unit_results(self, scope: str) -> tuple[UnitResult, ...]:  # noqa: ARG002
        """Return nothing: there was no earlier attempt."""
        return ()

    def write_unit(self, result: UnitResult, row_digests: Sequence[str]) -> None:  # noqa: ARG002
        """Keep a unit."""
        self._cluster.spend(self._costs.unit_write)
        self.stored.append(result)

    def write_answers(self, sheet: AnswerSheet) -> None:
        """Keep the answers of a round."""
        self._sheets[sheet.scope] = sheet

    def write_round(self, round_: Round, work: Any, parent: str) -> StoredRound:
        """Return the round as stored."""
        self._cluster.spend(self._costs.round_commit)
        return StoredRound(round_, 1, work, f"round {round_.number}", parent)

    def clean(self) -> None:
        """Do nothing: there are no left-overs."""

    def drop_partials(self, scope: str) -> None:
        """Do nothing: `stored` is what is asked about in the end."""

    def update_attempt(self, **changes: Any) -> None:
        """Keep no record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Searched:
    """What a simulated search came to."""

    history: History
    seconds: float  # from the first worker's joining to the last commit
    available_seconds: float  # of all workers
    stored: Sequence[UnitResult]
    retries: int
    wasted_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A search: rows, layers, and how they answer."""

    num_rows: int
    times: UnitTimes
    correct: Correct
    strategy: StrategySection = field(default_factory=StrategySection)
    max_new_tokens: int = 1


def simulate(workload: Workload, plan: Plan, costs: Costs = Costs()) -> Searched:
    """Return what a search comes to on the planned cluster."""
    cluster = SimulatedCluster(workload.correct, workload.times, plan, costs)
    writer = MemoryWriter(cluster, costs)
    driver = Driver(
        strategy=make_strategy(workload.strategy),
        history=History(num_layers=workload.times.num_layers, start=workload.strategy.remove),
        examples={"search": _examples(workload.num_rows)},
        pool=Pool(cluster, Interruption(), clock=lambda: cluster.now),
        writer=writer,  # type: ignore[arg-type]
        recommend=lambda scores: len(scores) - 1,
        loaded_at=0.0,
        exhaustive=workload.strategy.exhaustive,
        max_new_tokens=workload.max_new_tokens,
    )
    for _ in driver.run():
        pass
    return Searched(
        history=driver.history,
        seconds=cluster.now,
        available_seconds=cluster.available_seconds(),
        stored=writer.stored,
        retries=driver.retries,
        wasted_rows=driver.wasted_rows,
    )


def _examples(count: int) -> tuple[Example, ...]:
    return tuple(Example(f"{row:064x}", ({"role": "user", "content": str(row)},), "yes", "yes") for row in range(count))


class PaperModel:
    """Which rows a model answers without which layers: rows differ in how hard they are, layers in how they are missed.

    The first layers and the last are missed most, a few in the middle hardly at all, and to be without some makes a few
    rows right, as in real models. A pure function of the seed.
    """

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        self._seed = seed
        middle = num_layers // 2
        self._missed = [
            0.01 + 0.06 * self._draw("layer", layer) + 0.8 * (abs(layer - middle) / middle) ** 6
            for layer in range(num_layers)
        ]
        self._rows: dict[int, tuple[float, list[float]]] = {}
        self._known: dict[tuple[int, tuple[int, ...]], bool] = {}

    def __call__(self, row: int, removed: tuple[int, ...]) -> bool:
        """Return whether the row is answered."""
        key = (row, removed)
        if key not in self._known:
            left, losses = self._row(row)
            self._known[key] = left > sum(losses[layer] for layer in removed)
        return self._known[key]

    def _row(self, row: int) -> tuple[float, list[float]]:
        """Return what a row can lose, and what it loses without each layer."""
        if row not in self._rows:
            losses = [missed * (2 * self._draw(row, layer) - 0.5) for layer, missed in enumerate(self._missed)]
            self._rows[row] = (self._draw("row", row) - 0.3, losses)
        return self._rows[row]

    def _draw(self, *of: object) -> float:
        text = ":".join(map(str, (self._seed, *of)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64
