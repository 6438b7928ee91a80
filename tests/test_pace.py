"""How large units are: from what units and their files have taken so far."""

from dataclasses import replace

import pytest
from simulation import Table

from tale_ray.records import WorkUnit
from tale_ray.search.pace import (
    LEAST_UNIT_SECONDS,
    MOST_WRITE_SECONDS,
    UNIT_SECONDS,
    WRITE_SECONDS,
    Left,
    Pace,
    row_applications,
)

LAYERS = tuple(range(6))
APPLICATION = 0.001  # seconds of a layer on a row


def unit(num_rows: int, number: int = 0) -> WorkUnit:
    return WorkUnit(number, "round-0001", "search", (), LAYERS, tuple(range(num_rows)))


def took(num_rows: int, seconds: float) -> object:
    return replace(Table(seed=1).score(unit(num_rows)), seconds=seconds)


def learned(fixed: float = 0.0, slope: float = APPLICATION) -> Pace:
    """A pace that has seen units of many sizes, each as long as a fixed time and one per layer application."""
    pace = Pace(len(LAYERS))
    for num_rows in (10, 20, 30, 40) * 5:
        each = row_applications(len(LAYERS), (), LAYERS)
        pace.note(took(num_rows, fixed + slope * each * num_rows))  # type: ignore[arg-type]
    return pace


def left(workers: int, rows: int = 10_000_000) -> Left:
    return Left(rows=rows, all_rows=rows, all_candidates=LAYERS, workers=workers, racing=False)


def seconds_of(pace: Pace, workers: int) -> float:
    shape = pace.shape((), LAYERS, left(workers))
    assert shape.candidates == len(LAYERS)
    found = pace.seconds(unit(shape.rows))
    assert found is not None
    return found


def test_applications_are_those_of_the_formula() -> None:
    assert row_applications(6, (), LAYERS) == 5 + 6 * 5 // 2
    assert row_applications(6, (2,), (0, 1, 3, 4, 5)) == 4 + 5 * 4 // 2
    assert row_applications(6, (), (None,)) == 6


@pytest.mark.parametrize("fixed", [0.0, 0.01])
def test_the_seconds_of_a_unit_are_predicted_from_the_latest(fixed: float) -> None:
    assert Pace(6).seconds(unit(3)) is None
    predicted = learned(fixed).seconds(unit(25))
    assert predicted == pytest.approx(fixed + APPLICATION * 20 * 25, rel=0.01)


def test_units_are_as_long_as_they_may_be_while_there_is_much_to_do() -> None:
    assert seconds_of(learned(), workers=4) == pytest.approx(UNIT_SECONDS, rel=0.05)


def test_units_of_many_workers_are_no_smaller_than_can_be_written() -> None:
    pace = learned()
    workers = 400
    assert seconds_of(pace, workers) == pytest.approx(workers * WRITE_SECONDS, rel=0.05)
    for _ in range(40):
        pace.note_write(0.08)  # object storage
    assert seconds_of(pace, workers) == pytest.approx(workers * 0.08, rel=0.05)
    assert seconds_of(pace, 4) == pytest.approx(UNIT_SECONDS, rel=0.05)


def test_an_outage_does_not_make_units_huge() -> None:
    pace = learned()
    pace.note_write(600.0)
    assert seconds_of(pace, 2) == pytest.approx(UNIT_SECONDS, rel=0.05)
    for _ in range(100):
        pace.note_write(600.0)
    assert seconds_of(pace, 10) <= 10 * MOST_WRITE_SECONDS * 1.05


def test_little_that_is_left_is_shared() -> None:
    pace = learned()
    rows = 40
    shape = pace.shape((), LAYERS, left(workers=8, rows=rows))
    assert shape.rows <= rows / 8
    assert shape.rows * 20 * APPLICATION <= LEAST_UNIT_SECONDS


def test_a_row_of_which_there_are_too_few_is_cut_into_parts_of_like_cost() -> None:
    layers = tuple(range(40))
    pace = Pace(len(layers))
    rows = 30
    whole = row_applications(40, (), layers)
    cells = [WorkUnit(0, "round-0001", "search", (), layers, tuple(range(num))) for num in (1, 2, 3, 4)]
    for each in cells * 5:
        pace.note(replace(Table(seed=1).score(each), seconds=whole * APPLICATION * len(each.rows)))  # 0.8 s a row
    first = pace.shape((), layers, Left(rows=rows, all_rows=rows, all_candidates=layers, workers=30, racing=False))
    assert first.rows == 1
    parts, rest = [], layers
    while rest:
        left_ = Left(rows=rows, all_rows=rows, all_candidates=layers, workers=30, racing=False)
        count = pace.shape((), rest, left_).candidates
        parts.append(row_applications(40, (), rest[:count]))
        rest = rest[count:]
    assert 2 <= len(parts) <= 4
    assert max(parts) <= 2 * min(parts[:-1])
    assert sum(parts) < 1.2 * whole  # what is below the candidates is computed again for each part


@pytest.mark.parametrize(("workers", "is_scarce"), [(4, False), (40, True)])
def test_long_units_are_kept_for_who_is_done_first_once_few_are_left(workers: int, is_scarce: bool) -> None:
    each = unit(100)  # 2 s
    assert learned().is_scarce(each, LAYERS, 1600, workers) is is_scarce
    assert not learned().is_scarce(unit(20), LAYERS, 1600, workers), "a short one may wait behind another"
    assert Pace(len(LAYERS)).is_scarce(each, LAYERS, 1600, workers), "nobody knows how long they take"


def test_units_of_a_streamed_model_are_few_and_large() -> None:
    """Each reads all weights: 10 s here, and a row takes 2 s, which makes a unit of one row of a model in memory."""
    streamed, loaded = Pace(len(LAYERS), is_streamed=True), Pace(len(LAYERS))
    row = 2.0
    for num_rows in (4, 16, 4, 16):
        streamed.note(took(num_rows, 10 + row * num_rows))  # type: ignore[arg-type]
        loaded.note(took(num_rows, row * num_rows))  # type: ignore[arg-type]
    assert loaded.shape((), LAYERS, left(1)).rows == 1
    shape = streamed.shape((), LAYERS, left(1))
    assert shape.candidates == len(LAYERS)
    assert 100 < shape.rows < 160
    assert streamed.shape((), LAYERS, left(1, rows=40)).rows == 40, "one pass, if that is all there is"


@pytest.mark.parametrize("fixed", [80.0, 800.0])
def test_candidates_share_a_unit_whose_time_is_nearly_all_fixed(fixed: float) -> None:
    """Long replies on a card that is slow to read the weights: cutting candidates apart would only read them again."""
    layers = tuple(range(80))
    pace = Pace(len(layers), max_new_tokens=256)
    some = Left(rows=500, all_rows=500, all_candidates=layers, workers=1, racing=False)
    for _ in range(30):
        shape = pace.shape((), layers, some)
        each = replace(unit(shape.rows), candidates=layers[: shape.candidates])
        applied = row_applications(len(layers), (), each.candidates) * shape.rows
        pace.note(replace(Table(seed=1).score(unit(1)), unit=each, seconds=fixed + APPLICATION / 2 * applied))
    assert shape.candidates == len(layers)
    assert shape.rows > 100
