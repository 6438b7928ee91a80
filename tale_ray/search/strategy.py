"""Which candidates a round scores, and what is made of their scores: two pure functions of history.

`Tale` is task-aware layer elimination (TELL-TALE, arXiv 2510.22767). All decisions are made on integers and exact
fractions; in floats 55 - 0.08 * 100 is above 47, and a search would stop a layer early. `BeamSearch` goes on from
several sets of removed layers at once. The other strategies remove layers in an order of their own (see `orders`), one
candidate a round. All end at the same floor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from tale_ray.config import EpsilonMode, StrategySection
from tale_ray.option_texts import parse_epsilon
from tale_ray.records import Branch, CandidateScore, Probe, Score, StopReason
from tale_ray.search import orders
from tale_ray.search.history import History, best_first


@dataclass(frozen=True, slots=True)
class Decision:
    """The winner of a round and whether it is committed."""

    winner: CandidateScore
    accepted: bool


class Strategy(Protocol):
    """A search strategy. Implementations are frozen and keep no state: everything they know is the history."""

    def propose(self, history: History) -> tuple[Branch, ...] | Probe | StopReason:
        """Return what the next round scores, or why there is no next round.

        Or what has to be measured of the model first: then it is asked again, with a history that has the measurement.
        """
        ...

    def race_floor(self, history: History) -> Fraction | None:
        """Return the number of correct rows that a candidate needs to be of interest if it is not the best.

        None: `decide` needs every candidate scored on all rows. Otherwise it gets the best exactly, and of the
        others what was known when they were out.
        """
        ...

    def decide(self, history: History, scores: Sequence[CandidateScore]) -> Decision:
        """Return the winner among the scores of the proposed candidates."""
        ...


@dataclass(frozen=True, slots=True)
class Tale:
    """Greedy removal of the layer that the task misses least, as long as accuracy stays above the floor."""

    epsilon: Fraction
    epsilon_mode: EpsilonMode = "baseline"
    max_removed: int | None = None
    keep_layers: frozenset[int] = frozenset()

    def propose(self, history: History) -> tuple[Branch, ...] | StopReason:
        """Return every surviving layer that may be removed, or why the search ends."""
        candidates = self.candidates(history)
        return candidates if isinstance(candidates, StopReason) else (Branch(history.removed, candidates),)

    def candidates(self, history: History) -> tuple[int, ...] | StopReason:
        """Return the layers that may be removed, in order, or why the search ends."""
        if history.baseline.correct == 0:
            return StopReason.BASELINE_ZERO
        if history.rejected is not None and not self._reaches_floor(history, history.rejected.score.correct):
            return StopReason.BELOW_FLOOR
        if self.max_removed is not None and len(history.removed) >= self.max_removed:
            return StopReason.MAX_REMOVED
        if len(history.surviving) == 1:
            return StopReason.ONE_LAYER_LEFT
        candidates = tuple(layer for layer in history.surviving if layer not in self.keep_layers)
        return candidates or StopReason.NO_CANDIDATES

    def decide(self, history: History, scores: Sequence[CandidateScore]) -> Decision:
        """Return the candidate with most correct rows, ties to the lowest layer, and whether it reaches the floor."""
        in_order = sorted(scores, key=lambda score: -1 if score.layer is None else score.layer)
        winner = best_first(in_order)[0]
        return Decision(winner=winner, accepted=self._reaches_floor(history, winner.correct))

    def race_floor(self, history: History) -> Fraction:
        """Return the floor: a candidate below it can only win a round that is rejected."""
        return self.floor(history)

    def floor(self, history: History) -> Fraction:
        """Return the number of correct rows below which a winner is rejected (not rounded)."""
        reference: Score = history.baseline if self.epsilon_mode == "baseline" else history.final.score
        return reference.correct - self.epsilon * reference.total

    def _reaches_floor(self, history: History, correct: int) -> bool:
        return correct >= self.floor(history)


@dataclass(frozen=True, slots=True)
class BeamSearch:
    """TALE that goes on from the `width` best sets of removed layers of each round; with a width of 1 it is TALE.

    A set is scored once a round, however many sets it extends. Ties go to the set that extends the better one, then to
    the lowest layer. What a round removes is its best set, which need not extend the one of the round before.
    """

    limits: Tale
    width: int

    def propose(self, history: History) -> tuple[Branch, ...] | StopReason:
        """Return what can be removed beside each of the best sets so far, or why the search ends."""
        end = self.limits.candidates(history)
        if isinstance(end, StopReason):
            return end
        branches, known = [], set[frozenset[int]]()
        for removed in history.best_sets(self.width):
            free = (layer for layer in range(history.num_layers) if layer not in {*removed, *self.limits.keep_layers})
            new = tuple(layer for layer in free if frozenset((*removed, layer)) not in known)
            known |= {frozenset((*removed, layer)) for layer in new}
            if new:
                branches.append(Branch(removed, new))
        return tuple(branches)

    def decide(self, history: History, scores: Sequence[CandidateScore]) -> Decision:
        """Return the first candidate of those with most correct rows, and whether it reaches the floor."""
        winner = best_first(scores)[0]
        return Decision(winner, accepted=winner.correct >= self.limits.floor(history))

    def race_floor(self, history: History) -> Fraction | None:
        """Return the floor, as TALE; None where more than the best candidate counts."""
        return self.limits.race_floor(history) if self.width == 1 else None


@dataclass(frozen=True, slots=True)
class InOrder:
    """Removal of one layer after another in an order of its own, with the floor and the ends of TALE."""

    limits: Tale
    order: orders.Order

    def propose(self, history: History) -> tuple[Branch, ...] | Probe | StopReason:
        """Return the next layer of the order, what has to be measured to know it, or why the search ends."""
        candidates = self.limits.candidates(history)
        if isinstance(candidates, StopReason):
            return candidates
        found = self.order(history, candidates)
        return found if isinstance(found, Probe) else (Branch(history.removed, (found,)),)

    def decide(self, history: History, scores: Sequence[CandidateScore]) -> Decision:
        """Return the only candidate, and whether it reaches the floor."""
        return self.limits.decide(history, scores)

    def race_floor(self, history: History) -> Fraction | None:  # noqa: ARG002
        """Return None: there is nobody to race with."""
        return None


def make_strategy(section: StrategySection, seed: int = 0) -> Strategy:
    """Return the strategy that a configuration describes; the seed decides the random order."""
    tale = Tale(
        epsilon=parse_epsilon(section.epsilon),
        epsilon_mode=section.epsilon_mode,
        max_removed=section.max_removed,
        keep_layers=frozenset(section.keep_layers),
    )
    match section.strategy:
        case "tale":
            return tale
        case "beam":
            return BeamSearch(tale, section.width)
        case "reverse":
            return InOrder(tale, orders.deepest_first)
        case "random":
            return InOrder(tale, orders.in_random_order(seed))
        case "block_influence":
            return InOrder(tale, orders.least_influential_first)
        case "sleb":
            return InOrder(tale, orders.least_perplexity_first)
        case "contiguous":
            assert section.max_removed is not None, "the section was checked"
            return InOrder(tale, orders.of_nearest_block(section.max_removed, tale.keep_layers))
