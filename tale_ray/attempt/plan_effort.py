"""What scoring all rows of a search takes: passes, units as a pacer cuts them, and an estimate of their time."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tale_ray.attempt.gpus import HOST_BYTES_PER_SECOND, Gpu
from tale_ray.attempt.plan_place import Placed, Subject
from tale_ray.engine.choices import PromptKeys, prompt_groups
from tale_ray.engine.passes import Held, Pass, Products, products, unit_passes
from tale_ray.records import UnitResult, WorkUnit
from tale_ray.search.pace import Left, Pace, row_applications


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """Work from above: racing, and what earlier rounds have computed, save some of it."""

    units: int | None  # None: the speed is not known
    layer_applications: int
    flops: int
    seconds: float | None  # with all workers; None: the speed is not known


@dataclass(frozen=True, slots=True)
class Scoring:
    """A scoring of all rows, and the passes of its largest unit; without a known speed that is all of it."""

    effort: Effort
    unit_passes: Sequence[Pass]
    held: Held


@dataclass(slots=True)
class Estimator:
    """Asks what scorings take on a model that is placed; each size of unit is looked at once."""

    subject: Subject
    placed: Placed
    gpu: Gpu | None
    _sizes: Products = field(init=False)
    _groups: list[PromptKeys] = field(init=False)
    _known: dict[tuple[int, tuple[int | None, ...]], tuple[list[Pass], Held]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._groups = prompt_groups(self.subject.rows.rows)
        self._sizes = products(self.subject.model, self.subject.cost, self.subject.weights.total_bytes)

    def scoring(self, candidates: Sequence[int | None]) -> Scoring:
        """Return what scoring candidates on all rows takes."""
        num_rows = len(self.subject.rows.rows)
        whole, held = self._passes(num_rows, tuple(candidates)) if candidates else ([], Held())
        work = {
            "layer_applications": sum(each.count * each.applications for each in whole),
            "flops": sum(each.count * each.flops for each in whole),
        }
        if self.gpu is None or not whole:
            return Scoring(Effort(units=None, seconds=None, **work), whole, held)
        workers = self.subject.config.resources.workers or 1
        pace = Pace(self.subject.num_layers, self.subject.max_new_tokens, is_streamed=self.placed.is_streamed)
        units, left, most = 0, num_rows, (0, tuple(candidates))
        seconds = self._seconds([each for each in whole if each.kind == "prefix"])  # once, by the first units
        while left:
            removed = self.subject.config.strategy.remove
            shape = pace.shape(removed, candidates, Left(left, num_rows, candidates, workers, racing=False))
            rows = min(shape.rows, left)
            left -= rows
            for start in range(0, len(candidates), shape.candidates):
                chosen = tuple(candidates[start : start + shape.candidates])
                passes, _ = self._passes(rows, chosen)
                took = self._seconds([each for each in passes if each.kind != "prefix"])
                units += 1
                seconds += took
                most = max(most, (rows, chosen), key=lambda each: each[0] * len(each[1]))
                unit = WorkUnit(units, "plan", "search", removed, chosen, tuple(range(rows)))
                pace.note(UnitResult(unit, (), 0, took, "plan"))
        largest, held = self._passes(*most)
        return Scoring(Effort(units=units, seconds=seconds / workers, **work), largest, held)

    def search(self, baseline: Effort, first: Effort, rounds: int) -> Effort:
        """Return the effort of all rounds: later ones take of the first what they have of its layer applications."""
        removed = list(self.subject.config.strategy.remove)
        candidates = list(self.subject.candidates)
        num_layers = self.subject.num_layers
        whole, share = row_applications(num_layers, removed, candidates), 0.0
        for _ in range(rounds):
            share += row_applications(num_layers, removed, candidates) / whole
            removed.append(candidates.pop())
        known = baseline.seconds is not None and first.seconds is not None
        return Effort(
            units=round((baseline.units or 0) + share * (first.units or 0)) if known else None,
            layer_applications=round(baseline.layer_applications + share * first.layer_applications),
            flops=round(baseline.flops + share * first.flops),
            seconds=(baseline.seconds or 0.0) + share * (first.seconds or 0.0) if known else None,
        )

    def _passes(self, num_rows: int, candidates: tuple[int | None, ...]) -> tuple[list[Pass], Held]:
        """Return the passes over so many rows, taken evenly from all."""
        if (num_rows, candidates) not in self._known:
            rows = self.subject.rows.rows
            chosen = tuple(at * len(rows) // num_rows for at in range(num_rows))
            removed = self.subject.config.strategy.remove
            unit = WorkUnit(0, "plan", "search", removed, candidates, chosen)
            demand, held = self.placed.demand(self.subject), Held()
            found = unit_passes(demand, self._sizes, rows, self._groups, unit, self.subject.max_new_tokens, held)
            self._known[num_rows, candidates] = (list(found), held)
        return self._known[num_rows, candidates]

    def _seconds(self, passes: Sequence[Pass]) -> float:
        """Return how long one worker takes; the GPUs of a pipeline wait while it fills and empties."""
        assert self.gpu is not None, "time is asked of a known GPU only"
        gpus = len(self.placed.layers)
        prompts = sum(each.kind == "prompts" for each in passes)
        total = 0.0
        for each in passes:
            if each.kind == "replies":  # in as many parts as GPUs, for each of which each reads its weights
                read_bytes = each.read_bytes - each.cache_bytes + each.cache_bytes / gpus
                seconds = self.gpu.seconds(each.flops / gpus, read_bytes, each.layer_calls * gpus)
            else:
                share = (prompts + gpus - 1) / prompts / gpus if each.kind == "prompts" else 1.0
                seconds = self.gpu.seconds(each.flops * share, each.read_bytes * share, each.layer_calls)
            if self.placed.is_streamed:
                seconds = max(seconds, self.subject.weights.total_bytes / HOST_BYTES_PER_SECOND)
            total += each.count * seconds
        return total
