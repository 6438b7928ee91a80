"""Which candidates of a round can still win it, told from counts alone: exact, whatever order the counts arrive in."""

from collections.abc import Iterable
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
