"""Which worker has which units, and since when. Knows neither answers nor what is to be scored next.

A worker computes its units in the order in which it was given them: only its first one is running. A unit may be with
two workers, if it took the first one too long; what is settled (answered by the other, or not wanted any more) is still
computed, and keeps its worker from new units until then.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from tale_ray.records import WorkUnit

Key: TypeAlias = tuple[str, str, int]  # of a unit: what tells it from all others of an attempt
UNITS_PER_WORKER = 2


@dataclass(slots=True)
class Assignment:
    """A unit that was given to a worker, or is to be given to one again."""

    unit: WorkUnit
    tries: int = 0
    last_worker: str | None = None
    running_since: float = 0.0  # seconds on the clock of the scheduler's owner
    settled: bool = False

    @property
    def key(self) -> Key:
        """The key of the unit."""
        return key_of(self.unit)


def key_of(unit: WorkUnit) -> Key:
    """Return what tells the unit from all others of an attempt."""
    return unit.scope, unit.split, unit.number


class Assignments:
    """The workers, in order of joining, and the units of each, in the order in which they were given."""

    def __init__(
        self,
        workers: Iterable[str] = (),
        units_per_worker: int = UNITS_PER_WORKER,
        left_over: Mapping[str, Sequence[WorkUnit]] | None = None,
    ) -> None:
        self._by_worker: dict[str, dict[Key, Assignment]] = {worker: {} for worker in workers}
        self._leaving: set[str] = set()
        self._with_room: tuple[dict[str, None], ...] = tuple({} for _ in range(units_per_worker))  # by number of units
        for worker, units in (left_over or {}).items():
            for unit in units if worker in self._by_worker else ():
                self._by_worker[worker][key_of(unit)] = Assignment(unit, settled=True)
        for worker in self._by_worker:
            self._file(worker)

    def __contains__(self, worker: str) -> bool:
        return worker in self._by_worker

    def __len__(self) -> int:
        """Number of workers that take units."""
        return len(self._by_worker) - len(self._leaving)

    @property
    def under_way(self) -> bool:
        """Whether the answer of any unit is awaited."""
        return any(not each.settled for units in self._by_worker.values() for each in units.values())

    @property
    def left_over(self) -> dict[str, tuple[WorkUnit, ...]]:
        """Units that are still computed although nobody waits for them, by worker."""
        return {
            worker: tuple(each.unit for each in units.values()) for worker, units in self._by_worker.items() if units
        }

    def join(self, worker: str) -> None:
        """Take in a worker."""
        self._by_worker.setdefault(worker, {})
        self._leaving.discard(worker)
        self._file(worker)

    def leave(self, worker: str) -> None:
        """Give no more units to a worker; it finishes those it has."""
        if worker in self._by_worker:
            self._leaving.add(worker)
            self._file(worker)

    def lose(self, worker: str) -> list[Assignment]:
        """Strike off a worker, and return what it had, the running one first."""
        self._leaving.discard(worker)
        units = self._by_worker.pop(worker, {})
        self._file(worker)
        return list(units.values())

    def give(self, worker: str, assignment: Assignment, now: float) -> None:
        """Add a unit to those of a worker."""
        units = self._by_worker[worker]
        units[assignment.key] = replace(assignment, running_since=now)
        self._file(worker)

    def take_back(self, worker: str, unit: WorkUnit, now: float) -> Assignment | None:
        """Return what a worker had to do, now that it is done with it; None: it was not its unit."""
        units = self._by_worker.get(worker, {})
        was_running = next(iter(units), None) == key_of(unit)
        taken = units.pop(key_of(unit), None)
        if was_running and units:
            next(iter(units.values())).running_since = now
        self._file(worker)
        return taken

    def settle(self, key: Key) -> None:
        """Await a unit no more, whoever has it."""
        for units in self._by_worker.values():
            if key in units:
                units[key].settled = True

    def copy_of(self, key: Key) -> Assignment | None:
        """Return the unit as some worker has it whose answer is awaited."""
        return next((units[key] for units in self._by_worker.values() if key in units and not units[key].settled), None)

    def free(self) -> Iterator[str]:
        """Yield workers to be given one more unit, the emptiest first; never two to one while another has none."""
        for workers in self._with_room:
            yield from list(workers)

    def is_busy(self, worker: str) -> bool:
        """Return whether a worker has any unit."""
        return bool(self._by_worker[worker])

    def idle(self) -> list[str]:
        """Return the workers that have nothing to do."""
        return list(self._with_room[0])

    def _file(self, worker: str) -> None:
        """Note how much room a worker has: looking for it among a thousand would cost more than all else."""
        for workers in self._with_room:
            workers.pop(worker, None)
        if worker in self._by_worker and worker not in self._leaving:
            num_units = len(self._by_worker[worker])
            if num_units < len(self._with_room):
                self._with_room[num_units][worker] = None

    def running(self) -> Iterator[tuple[str, list[Assignment]]]:
        """Yield each busy worker with its units, the running one first."""
        return ((worker, list(units.values())) for worker, units in self._by_worker.items() if units)
