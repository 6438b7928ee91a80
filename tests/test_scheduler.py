"""The scheduler as a pure machine: every cell once, whatever happens, in whatever order."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Table, scoring, submitted

from tale_ray.records import WorkUnit
from tale_ray.search.executor import UnitDone, UnitFailed, WorkerJoined, WorkerLost
from tale_ray.search.instructions import GiveUp, Keep, Retry, Submit
from tale_ray.search.pace import UnitShape
from tale_ray.search.scheduler import MAX_TRIES, Scheduler, Scoring

TABLE = Table(seed=1)


def run_all(scheduler: Scheduler, *workers: str) -> list[WorkUnit]:
    """Run every unit to its end, in order of submission; return the units."""
    queue = submitted(scheduler.start())
    for worker in workers:
        queue += submitted(scheduler.handle(WorkerJoined(worker)))
    done = []
    while queue:
        task = queue.pop(0)
        done.append(task.unit)
        queue += submitted(scheduler.handle(UnitDone(task.worker, TABLE.score(task.unit))))
    return done


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 50), st.integers(1, 10))
def test_units_cover_every_cell_exactly_once(num_rows: int, num_candidates: int, rows: int, candidates: int) -> None:
    scheduler = Scheduler(scoring(num_rows, tuple(range(num_candidates))), UnitShape(rows, candidates))
    units = run_all(scheduler, "a")
    cells = [(layer, row) for unit in units for layer in unit.candidates for row in unit.rows]
    assert sorted(cells) == [(layer, row) for layer in range(num_candidates) for row in range(num_rows)]
    assert all(len(unit.rows) <= rows and len(unit.candidates) <= candidates for unit in units)
    assert scheduler.finished
    assert scheduler.wasted_rows == scheduler.retries == 0
    assert scheduler.work.candidate_rows == num_rows * num_candidates


def test_scores_are_those_of_the_table() -> None:
    scheduler = Scheduler(scoring(30), UnitShape(7, 3))
    run_all(scheduler, "a", "b")
    for score in scheduler.scores():
        answers = [TABLE.answer(row, (score.layer,)) for row in range(30)]  # type: ignore[arg-type]
        assert score.correct == sum(answer.correct for answer in answers)
        assert score.invalid == sum(answer.prediction is None for answer in answers)
        assert scheduler.answers(score.layer) == tuple(answers)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**9), num_workers=st.integers(1, 5), trouble=st.floats(0, 0.3))
def test_trouble_and_order_change_no_score(seed: int, num_workers: int, trouble: float) -> None:
    """Random interleavings with lost workers, failed units, late joins and late answers of workers given up on."""
    rng = random.Random(seed)
    scheduler = Scheduler(scoring(17), UnitShape(4, 2))
    running = submitted(scheduler.start())
    absent = [f"w{number}" for number in range(num_workers)]
    ghosts: list[Submit] = []  # were running on a worker that was declared lost
    tries: dict[int, int] = {}
    while not scheduler.finished:
        if absent and (not running or rng.random() < 0.3):
            instructions = scheduler.handle(WorkerJoined(absent.pop()))
        elif ghosts and rng.random() < 0.2:
            ghost = ghosts.pop()
            instructions = scheduler.handle(UnitDone("gone-for-good", TABLE.score(ghost.unit)))
            assert instructions == [], "the answer of a lost worker is not taken"
        else:
            task = running.pop(rng.randrange(len(running)))
            if rng.random() < trouble and tries.get(task.unit.number, 0) < MAX_TRIES - 1:
                oldest = next(each for each in [*running, task] if each.worker == task.worker)
                if rng.random() < 0.5 and tries.get(oldest.unit.number, 0) < MAX_TRIES - 1:
                    lost = [each for each in running if each.worker == task.worker]
                    running = [each for each in running if each.worker != task.worker]
                    ghosts += [task, *lost]
                    absent.append(task.worker)
                    instructions = scheduler.handle(WorkerLost(task.worker, "died"))
                else:
                    instructions = scheduler.handle(UnitFailed(task.worker, task.unit, "error"))
            else:
                instructions = scheduler.handle(UnitDone(task.worker, TABLE.score(task.unit)))
        if any(isinstance(each, GiveUp) for each in instructions):
            return  # allowed: a unit had bad luck to the end
        for each in instructions:
            if isinstance(each, Retry):
                tries[each.unit.number] = tries.get(each.unit.number, 0) + 1
        running += submitted(instructions)
    undisturbed = Scheduler(scoring(17), UnitShape(4, 2))
    run_all(undisturbed, "a")
    counts = [(score.layer, score.correct, score.seen, score.invalid) for score in scheduler.scores()]
    assert counts == [(score.layer, score.correct, score.seen, score.invalid) for score in undisturbed.scores()]
    assert scheduler.work.candidate_rows == undisturbed.work.candidate_rows
    assert scheduler.work.layer_applications == undisturbed.work.layer_applications


def test_workers_are_filled_evenly() -> None:
    scheduler = Scheduler(scoring(4, (0,)), UnitShape(1, 1), workers=["a", "b", "c"])
    assert [task.worker for task in submitted(scheduler.start())] == ["a", "b", "c", "a"]


def test_a_failed_unit_goes_to_another_worker() -> None:
    scheduler = Scheduler(scoring(2, (0,)), UnitShape(1, 1), workers=["a", "b"])
    first, second = submitted(scheduler.start())
    assert {first.worker, second.worker} == {"a", "b"}
    instructions = scheduler.handle(UnitFailed(first.worker, first.unit, "error"))
    assert [each.unit for each in instructions if isinstance(each, Retry)] == [first.unit]
    assert [(task.worker, task.unit) for task in submitted(instructions)] == [(second.worker, first.unit)]


def test_a_lone_worker_gets_its_failed_unit_again() -> None:
    scheduler = Scheduler(scoring(1, (0,)), UnitShape(1, 1), workers=["a"])
    (task,) = submitted(scheduler.start())
    assert submitted(scheduler.handle(UnitFailed("a", task.unit, "error")))[0].unit == task.unit


def test_a_poison_unit_is_given_up_after_its_tries() -> None:
    scheduler = Scheduler(scoring(1, (0,)), UnitShape(1, 1), workers=["a"])
    (task,) = submitted(scheduler.start())
    for _ in range(MAX_TRIES - 1):
        assert not any(isinstance(each, GiveUp) for each in scheduler.handle(UnitFailed("a", task.unit, "error")))
    assert scheduler.handle(UnitFailed("a", task.unit, "last error")) == [GiveUp(task.unit, "last error")]
    assert scheduler.retries == MAX_TRIES - 1


def test_only_the_running_unit_of_a_lost_worker_is_suspected() -> None:
    scheduler = Scheduler(scoring(2, (0,)), UnitShape(1, 1), workers=["a"])
    first, second = submitted(scheduler.start())
    for _ in range(MAX_TRIES - 1):
        retried = [each for each in scheduler.handle(WorkerLost("a", "died")) if isinstance(each, Retry)]
        assert [each.unit for each in retried] == [first.unit]
        again = submitted(scheduler.handle(WorkerJoined("a")))
        assert [task.unit for task in again] == [first.unit, second.unit]
    assert GiveUp(first.unit, "died") in scheduler.handle(WorkerLost("a", "died"))


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.integers(0, 30))
def test_known_results_of_another_shape_are_not_repeated(
    rows: int, cands: int, rows2: int, cands2: int, kept: int
) -> None:
    first = Scheduler(scoring(13), UnitShape(rows, cands))
    known = [TABLE.score(unit) for unit in run_all(first, "a")][:kept]
    second = Scheduler(scoring(13), UnitShape(rows2, cands2), known)
    units = run_all(second, "a")
    cells = [(c, r) for result in known for c in result.unit.candidates for r in result.unit.rows]
    cells += [(layer, row) for unit in units for layer in unit.candidates for row in unit.rows]
    assert len(cells) == len(set(cells)) == second.total_cells
    assert second.wasted_rows == 0
    assert second.work.candidate_rows == first.work.candidate_rows


def test_every_new_result_is_kept_before_more_is_submitted() -> None:
    scheduler = Scheduler(scoring(6, (0,)), UnitShape(1, 1), workers=["a"])
    task = submitted(scheduler.start())[0]
    instructions = scheduler.handle(UnitDone("a", TABLE.score(task.unit)))
    assert isinstance(instructions[0], Keep)
    assert isinstance(instructions[1], Submit)


def test_units_of_another_scoring_are_refused() -> None:
    stray = Scheduler(scoring(2, (5,)), UnitShape(2, 1))
    results = [TABLE.score(unit) for unit in run_all(stray, "a")]
    with pytest.raises(ValueError, match="no candidate 5"):
        Scheduler(scoring(2, (0, 1)), UnitShape(2, 1), results)


def test_units_that_are_scarce_wait_for_who_is_done_first() -> None:
    class Scarce(UnitShape):
        def is_scarce(self, unit: WorkUnit, candidates: object, rows: int, workers: int) -> bool:
            return rows <= 8

    scoring = Scoring("round-0001", "search", (), (0, 1), 10)
    scheduler = Scheduler(scoring, Scarce(rows=2, candidates=2), workers=["a", "b"])
    sent = [each for each in scheduler.start() if isinstance(each, Submit)]
    assert [each.worker for each in sent] == ["a", "b"], "8 rows are left after the first unit"
    table = Table(seed=1)
    for _ in range(3):
        done = sent.pop(0)
        more = scheduler.handle(UnitDone(done.worker, table.score(done.unit)))
        (following,) = [each for each in more if isinstance(each, Submit)]
        assert following.worker == done.worker
        sent.append(following)
    for done in sent:
        assert [
            each for each in scheduler.handle(UnitDone(done.worker, table.score(done.unit))) if isinstance(each, Submit)
        ] == []
    assert scheduler.finished
