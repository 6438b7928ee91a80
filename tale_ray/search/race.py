"""Which candidates of a round can still win it, told from counts alone: exact, whatever order the counts arrive in.

And which one probably will: told from counts, too, but of no weight for any decision.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Standing:
    """A candidate on the way: `correct` of the `seen` rows."""

    layer: int
    correct: int
    seen: int


def still_racing(standings: Iterable[Standing], num_rows: int, floor: Fraction) -> frozenset[int]:
    """Return the layers of the candidates that must be scored further, or are scored on all rows and may win.

    A candidate is out when even with all its unseen rows correct it would lose to the leader: fewer correct rows, or
    as many and a higher layer. It is also out when it could not reach the floor, unless no candidate can any more: then
    the round is lost, and the race goes on for who is reported as having lost it. So the winner of an exhaustive round
    is always among those returned.
    """
    everyone = list(standings)
    leader = max(everyone, key=lambda each: (each.correct, -each.layer))
    bounds = {each.layer: each.correct + num_rows - each.seen for each in everyone}
    racing = {layer for layer, bound in bounds.items() if (bound, -layer) >= (leader.correct, -leader.layer)}
    above = {layer for layer in racing if bounds[layer] >= floor}
    return frozenset(above or racing)


def probe_rows(right: Sequence[bool], order: Sequence[int]) -> tuple[int, ...]:
    """Return rows to tell a good candidate by: half of as many as the current model gets wrong, of either kind.

    Every candidate has to miss about as many rows before it can be out, so seeing these first costs next to nothing.
    """
    wrong_rows = [row for row in order if not right[row]]
    right_rows = [row for row in order if right[row]]
    half = max(1, len(wrong_rows) // 2)
    return tuple(wrong_rows[:half] + right_rows[:half])


def expected_correct(answers: Mapping[int, bool], right: Sequence[bool]) -> float:
    """Return how many rows a candidate probably gets right: its rates where the current model is right, and wrong.

    `answers` are those rows it has seen. Of a kind of rows that it has not seen half are taken to be right.
    """
    expected = 0.0
    for kind in (True, False):
        seen = [correct for row, correct in answers.items() if right[row] is kind]
        rate = sum(seen) / len(seen) if seen else 0.5
        expected += rate * sum(each is kind for each in right)
    return expected
