"""A gang: processes that split the weights of one model, and are one worker to the driver.

The driver talks to the lead alone. The lead, which is the first member, starts the others, hands every call on to them,
takes its own part in a thread, and answers for all. All members compute the same unit on the same rows in lockstep, so
whatever one of them decides the others decide, too. A gang that loses a member, or whose members differ, is of no more
use: its lead says so and is ended with all of them. Imports torch only inside the actors' processes.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, TypeVar

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import get_current_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tale_ray.cluster.actor import Scored, WorkerActor
from tale_ray.cluster.nodes import Place, here, last_words
from tale_ray.config import ModelSection, ResourceSection
from tale_ray.errors import TaleRayError
from tale_ray.records import Measurement, ModelInfo, Probe, UnitResult, WorkUnit
from tale_ray.search.executor import Questions

Answer = TypeVar("Answer")

LOOK_SECONDS = 0.2  # between two looks at the others while the lead computes
ALIKE_SECONDS = 5.0  # for others to fail as one member has failed
END_SECONDS = 10.0  # for the driver to end a gang that is broken
_FOR_ALL = {"max_restarts": 0, "max_task_retries": 0}


class GangBroken(Exception):
    """A gang can compute nothing any more; the message says why."""


class GangOutOfMemory(GangBroken):
    """A member had too little memory: the next gang is to take smaller batches."""


def start_worker(actor_class: Any, name: str, full_name: str, resources: ResourceSection) -> tuple[Any, Any]:
    """Return the new actor that a worker is, or the lead of its gang, and the gang's placement group or None.

    Args:
        actor_class: of a worker of one process.
        name: of the worker.
        full_name: of the actor in Ray's lists, never used before.
        resources: what a worker needs; a gang gets it on one node.
    """
    group, where = None, {}
    if resources.tensor_parallel > 1:
        actor_class = GangLead
        bundle = {"CPU": resources.cpus_per_worker, "GPU": _member_gpus(resources)}
        bundle = {kind: amount for kind, amount in bundle.items() if amount}
        group = placement_group([bundle] * resources.tensor_parallel, strategy="STRICT_PACK")
        where = {"scheduling_strategy": _bundle(group, 0)}
    options = {"num_cpus": resources.cpus_per_worker, "num_gpus": _member_gpus(resources), "name": full_name}
    return ray.remote(actor_class).options(**options, **_FOR_ALL, **where).remote(name, resources), group


def end_worker(actor: Any, group: Any) -> None:
    """Kill an actor and, if it leads a gang, all members."""
    ray.kill(actor)
    if group is not None:
        remove_placement_group(group)  # ends whatever still runs in it, a member that does not answer, too


def _member_gpus(resources: ResourceSection) -> int:
    return resources.gpus_per_worker // resources.tensor_parallel


def _bundle(group: Any, rank: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=rank)


class GangMember(WorkerActor):
    """One process of a gang."""

    def load_part(
        self, rank: int, port: int, section: ModelSection, dtype: str, halvings: int, store: Any = None
    ) -> ModelInfo:
        """Load this member's part of the model, once all members are there; see `WorkerActor.load`.

        Args:
            rank: of this member; the lead's is 0.
            port: where members find each other on their node.
            section: which model.
            dtype: of its weights.
            halvings: of the batch budget.
            store: behind the port, in the lead's process.
        """
        from tale_ray.cluster.process_group import join_group

        join_group(
            rank,
            self._resources.tensor_parallel,
            port,
            self._resources.gang_timeout_seconds,
            on_gpu=self._resources.gpus_per_worker > 0,
            store=store,
        )
        return WorkerActor.load(self, section, dtype, halvings)

    def predict(self, unit: WorkUnit) -> str:
        """Score a unit, and return a digest of its predictions."""
        return predictions_digest(self._worker.score(unit))


class GangLead(GangMember):
    """The first member. Its methods are those of a worker, and are called one at a time."""

    def __init__(self, name: str, resources: ResourceSection) -> None:
        super().__init__(name, resources)
        self._others: list[Any] = []
        self._places: list[Place] = []  # of the others
        self._thread = futures.ThreadPoolExecutor(max_workers=1)  # so that the others can be watched meanwhile
        self._broken: GangBroken | None = None

    def place(self) -> Place:
        """Start the other members, and return where the lead runs: on the same node."""
        group = get_current_placement_group()
        for rank in range(1, self._resources.tensor_parallel):
            options = {"num_cpus": self._resources.cpus_per_worker, "num_gpus": _member_gpus(self._resources)}
            member = ray.remote(GangMember).options(**options, **_FOR_ALL, scheduling_strategy=_bundle(group, rank))
            self._others.append(member.remote(f"{self._name}-member-{rank}", self._resources))
        self._places = ray.get([member.place.remote() for member in self._others])
        return here()

    def load(self, section: ModelSection, dtype: str, halvings: int) -> ModelInfo:
        """Load the model, a part in each member."""
        from tale_ray.cluster.process_group import open_store

        store, port = open_store(self._resources.tensor_parallel, self._resources.gang_timeout_seconds)
        info, _ = self._together(
            lambda: self.load_part(0, port, section, dtype, halvings, store),
            lambda member, rank: member.load_part.remote(rank, port, section, dtype, halvings),
        )
        return info

    def measure(self, probe: Probe, rows: Sequence[tuple[int, ...]]) -> Measurement:
        """Return what the lead finds of a probe that all members compute together.

        Raises:
            GangBroken: a member is lost.
        """
        measurement, _ = self._together(
            lambda: WorkerActor.measure(self, probe, rows),
            lambda member, _rank: member.measure.remote(probe, rows),
        )
        return measurement

    def share(self, questions: Questions) -> None:
        """Give the questions to all members."""
        whole = ray.put(questions)
        self._together(
            lambda: WorkerActor.share(self, questions),
            lambda member, _rank: member.share.remote(whole),
        )

    def score(self, unit: WorkUnit) -> Scored:
        """Return the lead's answers to a unit, which all members have computed together.

        Raises:
            GangBroken: a member is lost, or predicted otherwise.
        """
        result: UnitResult
        result, digests = self._together(
            lambda: self._worker.score(unit), lambda member, _rank: member.predict.remote(unit)
        )
        own = predictions_digest(result)
        for rank, digest in enumerate(digests, start=1):
            if digest != own:
                self._broken = GangBroken(f"{self._member(rank)} predicts otherwise than its lead on the same unit")
                raise self._broken
        return Scored(result, self._worker.halvings)

    def _together(self, own: Callable[[], Answer], ask: Callable[[Any, int], Any]) -> tuple[Answer, list[Any]]:
        """Return what the lead's own work comes to, and what the others answer, each of which is asked first.

        Raises:
            GangBroken: a member is lost, does not answer in time, or fails where others do not.
            Exception: what all members have raised alike, without losing touch.
        """
        if self._broken is not None:
            time.sleep(END_SECONDS)  # it was said, and the driver ends this process: who asked this does not listen
            raise self._broken
        others = [_Call(rank, ask(member, rank)) for rank, member in enumerate(self._others, start=1)]
        mine = self._thread.submit(own)
        try:
            self._watch(mine, others)
            self._compare(mine.exception(), others)
        except GangBroken as broken:
            self._broken = broken  # members may wait for each other in different places
            raise
        return mine.result(), [call.value for call in others]

    def _watch(self, mine: futures.Future[Any], others: Sequence["_Call"]) -> None:
        """Wait for the lead's own work, but not where another member has failed and this one may wait for ever.

        Raises:
            GangBroken: that is so.
        """
        while not mine.done():
            futures.wait([mine], LOOK_SECONDS)
            for call in others:
                call.look(0.0)
                if call.is_lost or (call.error is not None and not futures.wait([mine], ALIKE_SECONDS).done):
                    raise self._as_broken(call)

    def _compare(self, error: BaseException | None, others: Sequence["_Call"]) -> None:
        """Wait for the other members, once the lead's own work is done.

        Raises:
            GangBroken: they did not do as the lead did, or lost touch with each other.
            Exception: what the lead has raised, if they raised it, too.
        """
        is_patient = error is None or isinstance(error, TaleRayError)
        for call in others:
            call.look(self._resources.gang_timeout_seconds if is_patient else ALIKE_SECONDS)
        kind = GangBroken if error is None else _kind(error)
        own = "" if error is None else f"; its lead failed, too: {_in_words(error)}"
        for call in sorted(others, key=lambda call: not call.is_lost):
            if not call.is_done:
                raise kind(f"{self._member(call.rank)} does not answer{own}")
            if call.is_lost or (call.error is not None and not call.failed_like(error)):
                raise self._as_broken(call)
        if error is None:
            return
        if not all(call.failed_like(error) for call in others):
            raise kind(f"the lead of the gang failed alone: {_in_words(error)}")
        if isinstance(error, RuntimeError):  # torch's own: out of memory, or out of touch
            raise kind(f"all members of the gang failed: {_in_words(error)}")
        raise error

    def _as_broken(self, call: "_Call") -> GangBroken:
        """Return the error of another member's call as the gang's."""
        error = call.error
        assert error is not None, "it has failed"
        if call.is_lost:
            telling = str(error).strip().splitlines()[-1].partition(" Worker exit type:")[0]
            words = last_words(self._places[call.rank - 1]) if self._places else ""
            return _kind(error)(f"{words}{self._member(call.rank)} is lost: {telling}")
        cause = error.cause if isinstance(error, RayTaskError) else error
        return _kind(cause)(f"{self._member(call.rank)} failed: {_in_words(cause)}")

    def _member(self, rank: int) -> str:
        place = f" ({self._places[rank - 1]})" if self._places else ""
        return f"member {rank} of the gang{place}"


class _Call:
    """A call of another member, answered or not."""

    def __init__(self, rank: int, ref: Any) -> None:
        self.rank = rank
        self.is_done = False
        self.value: Any = None
        self.error: RayError | None = None
        self._ref = ref

    def look(self, seconds: float) -> None:
        """Wait so long for the answer, if it is not there."""
        if self.is_done or not ray.wait([self._ref], timeout=seconds)[0]:
            return
        self.is_done = True
        try:
            self.value = ray.get(self._ref)
        except RayError as error:  # what it means depends on what the others say
            self.error = error

    @property
    def is_lost(self) -> bool:
        """Whether the member's process is gone, which no other can have in common with it."""
        return isinstance(self.error, RayActorError | OutOfMemoryError)

    def failed_like(self, error: BaseException | None) -> bool:
        """Return whether it raised what another member raised."""
        return isinstance(self.error, RayTaskError) and type(self.error.cause) is type(error)


def predictions_digest(result: UnitResult) -> str:
    """Return the SHA-256 of what every candidate of a unit predicts for each row."""
    predicted = [(each.layer, [answer.prediction for answer in each.answers]) for each in result.candidates]
    return hashlib.sha256(repr(predicted).encode()).hexdigest()


def _kind(error: BaseException) -> type[GangBroken]:
    import torch  # of an actor's process, which has it

    return GangOutOfMemory if isinstance(error, torch.cuda.OutOfMemoryError | OutOfMemoryError) else GangBroken


def _in_words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
