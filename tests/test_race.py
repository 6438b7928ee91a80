"""Racing leaves out candidates early and never changes a winner: against plain counting, over random score matrices."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tale_ray.records import CandidateAnswers, RowAnswer, UnitResult, WorkUnit
from tale_ray.search.executor import UnitDone, UnitFailed, WorkerJoined, WorkerLost
from tale_ray.search.instructions import GiveUp, Keep, Submit
from tale_ray.search.pace import UnitShape
from tale_ray.search.race import Standing, still_racing
from tale_ray.search.scheduler import Race, Scheduler, Scoring

Matrix = list[list[bool]]  # by candidate, by row


def random_matrix(rng: random.Random) -> Matrix:
    """Candidates near each other or far apart, with rows that all miss: ties are common."""
    num_rows, num_candidates = rng.randint(1, 24), rng.randint(1, 8)
    hard = [rng.random() < 0.2 for _ in range(num_rows)]
    skills = [rng.choice([0.0, 0.3, 0.8, 0.9, 1.0]) for _ in range(num_candidates)]
    return [[not hard[row] and rng.random() < skill for row in range(num_rows)] for skill in skills]


def winner_of(matrix: Matrix) -> int:
    return max(range(len(matrix)), key=lambda layer: (sum(matrix[layer]), -layer))


def score(unit: WorkUnit, matrix: Matrix) -> UnitResult:
    candidates = tuple(
        CandidateAnswers(layer, tuple(RowAnswer("", "x", matrix[layer][row]) for row in unit.rows), 0.0)
        for layer in unit.candidates
        if layer is not None
    )
    return UnitResult(unit, candidates, unit.candidate_rows, 0.0, "w")


def race_to(floor: Fraction, num_rows: int) -> Race:
    return Race(floor, (True,) * num_rows)


def race(rng: random.Random, matrix: Matrix, floor: Fraction, trouble: float = 0.0) -> Scheduler:
    """A round under a floor, with units of any shape that finish in any order."""
    num_rows = len(matrix[0])
    order = tuple(rng.sample(range(num_rows), num_rows))
    right = tuple(rng.random() < 0.7 for _ in range(num_rows))
    favourite = rng.choice([None, None, *range(len(matrix))])
    racing = Race(floor, right, favourite)
    scoring = Scoring("round-0001", "search", (), tuple(range(len(matrix))), num_rows, racing, order)
    shape = UnitShape(rng.randint(1, num_rows), rng.randint(1, len(matrix)))
    scheduler = Scheduler(scoring, shape, workers=["a"])
    instructions = scheduler.start()
    for worker in ["b", "c"][: rng.randint(0, 2)]:
        instructions += scheduler.handle(WorkerJoined(worker))
    running = [each for each in instructions if isinstance(each, Submit)]
    failures: dict[int, int] = {}
    while not scheduler.finished:
        task = running.pop(rng.randrange(len(running)))
        if rng.random() < trouble and failures.get(task.unit.number, 0) < 3:
            failures[task.unit.number] = failures.get(task.unit.number, 0) + 1
            instructions = scheduler.handle(UnitFailed(task.worker, task.unit, "error"))
        else:
            instructions = scheduler.handle(UnitDone(task.worker, score(task.unit, matrix)))
        assert not any(isinstance(each, GiveUp) for each in instructions)
        running += [each for each in instructions if isinstance(each, Submit)]
    assert not running
    return scheduler


def check(scheduler: Scheduler, matrix: Matrix) -> None:
    """The winner is the exhaustive one, exact; all counts are true of the rows seen; nothing was done twice."""
    num_rows = len(matrix[0])
    scores = scheduler.scores()
    exact = [each for each in scores if each.status == "exact"]
    best = max(exact, key=lambda each: (each.correct, -(each.layer or 0)))
    assert (best.layer, best.correct, best.seen) == (winner_of(matrix), max(map(sum, matrix)), num_rows)
    for each in scores:
        assert each.layer is not None
        assert (each.status == "exact") == (each.seen == num_rows)
        possible = each.correct + num_rows - each.seen
        assert each.correct <= sum(matrix[each.layer]) <= possible
        if each.seen == num_rows:
            assert each.correct == sum(matrix[each.layer])
    assert scheduler.work.candidate_rows == sum(each.seen for each in scores)


@pytest.mark.slow
def test_the_winner_is_the_exhaustive_one_in_ten_thousand_races() -> None:
    rng = random.Random(0)
    left_out = 0
    for _ in range(10_000):
        matrix = random_matrix(rng)
        floor = Fraction(rng.randint(-1, 2 * len(matrix[0]) + 2), 2)
        scheduler = race(rng, matrix, floor)
        check(scheduler, matrix)
        left_out += scheduler.work.candidate_rows < scheduler.total_cells
    assert left_out > 3_000  # else nothing was raced


@settings(max_examples=300)
@given(seed=st.integers(0, 10**9))
def test_trouble_changes_no_winner(seed: int) -> None:
    rng = random.Random(seed)
    matrix = random_matrix(rng)
    check(race(rng, matrix, Fraction(rng.randint(0, len(matrix[0]))), trouble=0.2), matrix)


@settings(max_examples=300)
@given(seed=st.integers(0, 10**9))
def test_a_race_goes_on_from_any_results_of_an_earlier_attempt(seed: int) -> None:
    rng = random.Random(seed)
    matrix = random_matrix(rng)
    num_rows, layers = len(matrix[0]), tuple(range(len(matrix)))
    earlier = Scheduler(
        Scoring("round-0001", "search", (), layers, num_rows, race_to(Fraction(num_rows), num_rows)), UnitShape(2, 3)
    )
    queue = [each for each in earlier.handle(WorkerJoined("a")) if isinstance(each, Submit)]
    known: list[UnitResult] = []
    for _ in range(rng.randint(0, 6)):
        if queue:
            instructions = earlier.handle(UnitDone("a", score(queue.pop(0).unit, matrix)))
            known += [each.result for each in instructions if isinstance(each, Keep)]
            queue += [each for each in instructions if isinstance(each, Submit)]
    floor = Fraction(rng.randint(0, num_rows))  # a lower one than before takes candidates back
    later = Scheduler(
        Scoring("round-0001", "search", (), layers, num_rows, race_to(floor, num_rows)), UnitShape(3, 2), known
    )
    queue = [each for each in later.handle(WorkerJoined("a")) if isinstance(each, Submit)]
    while not later.finished:
        instructions = later.handle(UnitDone("a", score(queue.pop(0).unit, matrix)))
        queue += [each for each in instructions if isinstance(each, Submit)]
    check(later, matrix)


def test_ties_go_to_the_lower_layer() -> None:
    leader, equal, lower = Standing(3, 5, 8), Standing(4, 3, 8), Standing(2, 3, 8)
    assert still_racing([leader, equal, lower], 10, Fraction(0)) == {3, 2}


def test_a_candidate_that_can_only_draw_level_with_a_lower_layer_is_out() -> None:
    assert still_racing([Standing(0, 9, 10), Standing(1, 4, 5)], 10, Fraction(0)) == {0}
    assert still_racing([Standing(0, 4, 5), Standing(1, 9, 10)], 10, Fraction(0)) == {0, 1}


@pytest.mark.parametrize(("floor", "racing"), [(Fraction(5), {0, 1}), (Fraction(11, 2), {0}), (Fraction(8), {0, 1})])
def test_below_the_floor_only_the_race_for_the_loser_goes_on(floor: Fraction, racing: set[int]) -> None:
    assert still_racing([Standing(0, 4, 8), Standing(1, 3, 8)], 10, floor) == racing


def test_a_late_answer_of_a_lost_worker_does_no_harm() -> None:
    matrix = [[True] * 4, [False] * 4]
    scheduler = Scheduler(
        Scoring("round-0001", "search", (), (0, 1), 4, race_to(Fraction(2), 4)), UnitShape(1, 2), workers=["a"]
    )
    first = next(each for each in scheduler.start() if isinstance(each, Submit))
    again = scheduler.handle(WorkerLost("a", "died")) + scheduler.handle(WorkerJoined("b"))
    assert scheduler.handle(UnitDone("a", score(first.unit, matrix))) == []
    queue = [each for each in again if isinstance(each, Submit)]
    while not scheduler.finished:
        instructions = scheduler.handle(UnitDone("b", score(queue.pop(0).unit, matrix)))
        queue += [each for each in instructions if isinstance(each, Submit)]
    check(scheduler, matrix)
    assert scheduler.work.candidate_rows < 8
