"""Workers that are slow, leave or lose their node: others do their units, and no score changes."""

import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Table, scoring, submitted

from tale_ray.records import UnitResult, WorkUnit
from tale_ray.search.executor import UnitDone, UnitFailed, WorkerJoined, WorkerLeaving, WorkerLost
from tale_ray.search.instructions import Double, GiveUp, Keep, Retry, Submit, Tick
from tale_ray.search.pace import Left, UnitShape
from tale_ray.search.scheduler import LATE_FACTOR, LATE_SECONDS, LOOK_SECONDS, MAX_TRIES, Scheduler

TABLE = Table(seed=1)
EXPECTED = 5.0  # seconds of a unit
LATE = LATE_FACTOR * EXPECTED


@dataclass(frozen=True)
class Steady:
    """A pacer that knows how long every unit takes."""

    rows: int = 1
    expected: float | None = EXPECTED

    def shape(self, removed: object, candidates: object, left: Left) -> UnitShape:
        return UnitShape(self.rows, 100)

    def pays(self, removed: object, candidates: object, rows: int) -> bool:
        return True

    def seconds(self, unit: WorkUnit) -> float | None:
        return self.expected

    def is_scarce(self, unit: WorkUnit, candidates: object, rows: int, workers: int) -> bool:
        return False

    def note(self, result: UnitResult) -> None: ...


def done(task: Submit) -> UnitDone:
    return UnitDone(task.worker, TABLE.score(task.unit, task.worker))


def one_slow_worker(expected: float | None = EXPECTED) -> tuple[Scheduler, Submit]:
    """Two workers, one unit each; the second worker is done at once, the first is not."""
    scheduler = Scheduler(scoring(2), Steady(expected=expected), workers=["slow", "quick"])
    slow, quick = submitted(scheduler.start())
    assert [slow.worker, quick.worker] == ["slow", "quick"]
    assert [type(each) for each in scheduler.handle(done(quick))] == [Keep]
    return scheduler, slow


def test_a_late_unit_goes_to_an_idle_worker_too() -> None:
    scheduler, slow = one_slow_worker()
    assert scheduler.handle(Tick(LATE)) == []
    assert scheduler.handle(Tick(LATE + 1)) == [Double(slow.unit, "slow", LATE + 1), Submit("quick", slow.unit)]
    assert scheduler.handle(Tick(LATE + 2)) == []  # once is enough
    assert not scheduler.finished
    assert [type(each) for each in scheduler.handle(done(Submit("quick", slow.unit)))] == [Keep]
    assert scheduler.finished
    assert scheduler.left_over == {"slow": (slow.unit,)}
    assert scheduler.handle(done(slow)) == []  # it comes too late to be stored
    assert scheduler.wasted_rows == slow.unit.candidate_rows
    assert scheduler.work.candidate_rows == scheduler.total_cells
    assert scheduler.left_over == {}


def test_the_slow_worker_may_be_first_after_all() -> None:
    scheduler, slow = one_slow_worker()
    scheduler.handle(Tick(LATE + 1))
    assert [type(each) for each in scheduler.handle(done(slow))] == [Keep]
    assert scheduler.finished
    assert scheduler.left_over == {"quick": (slow.unit,)}


def test_nothing_is_late_soon_or_while_nobody_knows_how_long_it_takes() -> None:
    scheduler, _ = one_slow_worker(expected=0.01)
    assert scheduler.handle(Tick(LATE_SECONDS)) == []
    assert len(scheduler.handle(Tick(LATE_SECONDS + LOOK_SECONDS))) == 2
    scheduler, _ = one_slow_worker(expected=None)
    assert scheduler.handle(Tick(1e9)) == []


def test_nothing_is_doubled_while_everybody_is_busy() -> None:
    scheduler = Scheduler(scoring(2), Steady(), workers=["a", "b"])
    scheduler.start()
    assert scheduler.handle(Tick(1e9)) == []


def test_what_waits_behind_a_late_unit_is_late_too() -> None:
    scheduler = Scheduler(scoring(2), Steady(), workers=["slow"])
    first, second = submitted(scheduler.start())
    scheduler.handle(WorkerJoined("b"))
    scheduler.handle(WorkerJoined("c"))
    assert submitted(scheduler.handle(Tick(LATE + 1))) == [Submit("b", first.unit), Submit("c", second.unit)]


def test_a_unit_runs_from_when_the_one_before_it_is_done() -> None:
    scheduler = Scheduler(scoring(2), Steady(), workers=["a"])
    first, second = submitted(scheduler.start())
    scheduler.handle(WorkerJoined("idle"))
    scheduler.handle(Tick(LATE - 1))
    scheduler.handle(done(first))
    assert scheduler.handle(Tick(2 * LATE - 2)) == []
    assert submitted(scheduler.handle(Tick(2 * LATE))) == [Submit("idle", second.unit)]


def test_the_next_scoring_waits_for_nobody_who_is_late() -> None:
    scheduler, slow = one_slow_worker()
    scheduler.handle(Tick(LATE + 1))
    scheduler.handle(done(Submit("quick", slow.unit)))
    follower = Scheduler(
        scoring(6), Steady(), workers=["slow", "quick"], left_over=scheduler.left_over, now=LATE + 2
    )  # its units have the numbers of those left over, and the same scope
    assert [task.worker for task in submitted(follower.start())] == ["quick", "slow", "quick"]
    stale = UnitDone("slow", TABLE.score(WorkUnit(99, "round-0000", "search", (), (0,), (0,))))
    assert follower.handle(stale) == []
    assert follower.done_cells == 0


def test_a_leaving_worker_finishes_what_it_has_and_gets_no_more() -> None:
    scheduler = Scheduler(scoring(4), Steady(), workers=["a", "b"])
    tasks = submitted(scheduler.start())
    assert scheduler.handle(WorkerLeaving("a")) == []
    for task in tasks:
        assert submitted(scheduler.handle(done(task))) == []
    assert scheduler.finished
    follower = Scheduler(scoring(4), Steady(), workers=["a"])
    (first, second) = submitted(follower.start())
    follower.handle(WorkerLeaving("a"))
    assert submitted(follower.handle(done(first))) == []
    follower.handle(WorkerLost("a", "its node was drained", is_suspect=False))
    assert submitted(follower.handle(WorkerJoined("a")))[0].unit == second.unit


def test_units_of_nodes_that_are_taken_away_are_no_suspects() -> None:
    scheduler = Scheduler(scoring(1), Steady(), workers=["a"])
    scheduler.start()
    for _ in range(3 * MAX_TRIES):
        (retry,) = scheduler.handle(WorkerLost("a", "its node is gone", is_suspect=False))
        assert isinstance(retry, Retry)
        (task,) = submitted(scheduler.handle(WorkerJoined("a")))
    assert scheduler.retries == 3 * MAX_TRIES
    scheduler.handle(done(task))
    assert scheduler.finished


def test_a_poison_unit_is_given_up_though_it_is_doubled() -> None:
    scheduler, slow = one_slow_worker()
    scheduler.handle(Tick(LATE + 1))
    assert scheduler.handle(UnitFailed("quick", slow.unit, "error")) == [Retry(slow.unit, "error")]
    found = scheduler.handle(UnitFailed("slow", slow.unit, "error"))
    assert submitted(found) == [Submit("quick", slow.unit)]
    scheduler.handle(UnitFailed("quick", slow.unit, "error"))
    assert scheduler.handle(UnitFailed("slow", slow.unit, "at last")) == [GiveUp(slow.unit, "at last")]


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**9), num_workers=st.integers(2, 5))
def test_doubled_units_change_no_count(seed: int, num_workers: int) -> None:
    """Random orders of answers, late ones, lost and leaving workers, and ticks; every cell is counted once."""
    rng = random.Random(seed)
    scheduler = Scheduler(scoring(17), Steady(rows=3), workers=[f"w{number}" for number in range(num_workers)])
    running = submitted(scheduler.start())
    now, doubled, absent = 0.0, 0, []
    while not scheduler.finished:
        draw = rng.random()
        if absent and (not running or draw < 0.2):
            instructions = scheduler.handle(WorkerJoined(absent.pop()))
        elif draw < 0.5:
            now += rng.random() * LATE
            instructions = scheduler.handle(Tick(now))
        elif draw < 0.6 and len({task.worker for task in running}) > 1:
            gone = rng.choice(running).worker
            running = [task for task in running if task.worker != gone]
            if rng.random() < 0.5:
                assert scheduler.handle(WorkerLeaving(gone)) == []
            instructions = scheduler.handle(WorkerLost(gone, "away", is_suspect=False))
            absent.append(gone)
        else:
            worker = rng.choice(running).worker
            task = next(each for each in running if each.worker == worker)  # its oldest
            running.remove(task)
            instructions = scheduler.handle(done(task))
        doubled += sum(isinstance(each, Double) for each in instructions)
        running += submitted(instructions)
    undisturbed = Scheduler(scoring(17), Steady(rows=3), workers=["w0"])
    queue = submitted(undisturbed.start())
    while queue:
        queue += submitted(undisturbed.handle(done(queue.pop(0))))
    counts = [(score.layer, score.correct, score.seen, score.invalid) for score in scheduler.scores()]
    assert counts == [(score.layer, score.correct, score.seen, score.invalid) for score in undisturbed.scores()]
    assert scheduler.work == undisturbed.work
    late = {unit.number for units in scheduler.left_over.values() for unit in units}
    assert len(late) <= doubled
