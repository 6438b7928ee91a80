"""Decisions of TALE: exact floor, ties, every stop reason, and the three results of a search."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tale_ray.config import StrategySection
from tale_ray.records import Branch, CandidateScore, Round, Score, StopReason
from tale_ray.search.history import History
from tale_ray.search.strategy import Tale, make_strategy


def candidate(layer: int | None, correct: int, total: int = 100) -> CandidateScore:
    return CandidateScore(layer=layer, correct=correct, seen=total, invalid=0, status="exact", seconds=0.0)


def finished(number: int, layer: int | None, removed: tuple[int, ...], correct: int, committed: bool = True) -> Round:
    return Round(number, layer, removed, Score(correct, 100, 0), (candidate(layer, correct),), committed)


def history(*corrects: int, num_layers: int = 12, rejected: int | None = None) -> History:
    """Rounds that remove layers 0, 1, 2 ... and leave so many correct of 100."""
    rounds = [
        finished(number, None if number == 0 else number - 1, tuple(range(number)), correct)
        for number, correct in enumerate(corrects)
    ]
    if rejected is not None:
        count = len(corrects)
        rounds.append(finished(count, count - 1, tuple(range(count)), rejected, committed=False))
    return History.of(rounds, num_layers=num_layers, start=())


def tale(epsilon: str = "0.08", **options: object) -> Tale:
    return make_strategy(StrategySection(epsilon=epsilon, **options))  # type: ignore[arg-type, return-value]


def test_floor_is_exact_where_floats_are_not() -> None:
    assert 47 < 55 - 0.08 * 100 + 1e-14, "floats would be fooled here, or the example proves nothing"
    assert tale().decide(history(55), [candidate(3, 47)]).accepted
    assert not tale().decide(history(55), [candidate(3, 46)]).accepted


@given(
    baseline=st.integers(1, 1000),
    winner=st.integers(0, 1000),
    hundredths=st.integers(0, 100),
)
def test_a_winner_is_rejected_exactly_below_the_floor(baseline: int, winner: int, hundredths: int) -> None:
    strategy = tale(f"{hundredths / 100:.2f}")
    start = History.of(
        [Round(0, None, (), Score(baseline, 1000, 0), (candidate(None, baseline, 1000),), True)], num_layers=4, start=()
    )
    accepted = strategy.decide(start, [candidate(1, winner, 1000)]).accepted
    assert accepted == (winner * 100 >= baseline * 100 - hundredths * 1000)


def test_ties_go_to_the_lowest_layer_whatever_the_order() -> None:
    scores = [candidate(9, 50), candidate(2, 60), candidate(7, 60), candidate(4, 60)]
    for order in (scores, scores[::-1]):
        assert tale().decide(history(60), order).winner.layer == 2


def test_layer_zero_wins_a_tie() -> None:
    assert tale().decide(history(60), [candidate(1, 60), candidate(0, 60)]).winner.layer == 0


def test_bounded_candidates_never_win() -> None:
    bounded = CandidateScore(layer=1, correct=99, seen=99, invalid=0, status="bounded_out", seconds=0.0)
    assert tale().decide(history(60), [bounded, candidate(5, 58)]).winner.layer == 5


def test_the_floor_follows_the_last_accepted_model_in_mode_current() -> None:
    falling = history(80, 74)
    assert not tale().decide(falling, [candidate(5, 70)]).accepted
    assert tale(epsilon_mode="current").decide(falling, [candidate(5, 70)]).accepted
    assert not tale(epsilon_mode="current").decide(falling, [candidate(5, 65)]).accepted


def test_every_surviving_layer_is_proposed_but_those_that_are_kept() -> None:
    assert tale().propose(history(80, 80)) == (Branch((0,), tuple(range(1, 12))),)
    assert tale(keep_layers=(1, 11)).propose(history(80, 80)) == (Branch((0,), tuple(range(2, 11))),)


@pytest.mark.parametrize(
    ("strategy", "so_far", "reason"),
    [
        (tale(), history(0), StopReason.BASELINE_ZERO),
        (tale(), history(80, rejected=71), StopReason.BELOW_FLOOR),
        (tale(max_removed=2), history(80, 80, 80), StopReason.MAX_REMOVED),
        (tale(max_removed=0), history(80), StopReason.MAX_REMOVED),
        (tale(), history(80, 80, 80, num_layers=3), StopReason.ONE_LAYER_LEFT),
        (tale(keep_layers=(2, 3)), history(80, 80, 80, num_layers=4), StopReason.NO_CANDIDATES),
    ],
)
def test_stop_reasons(strategy: Tale, so_far: History, reason: StopReason) -> None:
    assert strategy.propose(so_far) is reason


def test_a_larger_epsilon_takes_up_a_rejected_round() -> None:
    stopped = history(80, rejected=71)
    assert tale("0.08").propose(stopped) is StopReason.BELOW_FLOOR
    assert tale("0.09").propose(stopped) == (Branch((), tuple(range(12))),)


def test_the_search_starts_from_the_given_removal() -> None:
    start = History.of([finished(0, None, (), 80)], num_layers=6, start=(4, 1))
    assert start.removed == (4, 1)
    assert tale().propose(start) == (Branch((4, 1), (0, 2, 3, 5)),)
    later = start.with_round(finished(1, 0, (4, 1, 0), 79))
    assert later.removed == (4, 1, 0)


def test_results() -> None:
    run = history(80, 82, 84, 84, 80, 79, 73)
    assert run.best.number == 2, "the first round with the highest accuracy"
    assert run.bsba.number == 4, "the last round that is at least as accurate as the full model"
    assert run.final.number == 6


def test_round_zero_counts_for_best_and_bsba() -> None:
    run = history(80, 79, 78)
    assert (run.best.number, run.bsba.number, run.final.number) == (0, 0, 2)


def test_floor_is_a_fraction() -> None:
    assert tale("0.075").floor(history(80)) == Fraction("72.5")
