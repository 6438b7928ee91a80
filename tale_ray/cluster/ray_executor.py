"""Workers on Ray: actors that load the model once, replaced when they die.

A worker that dies is replaced by a new actor under the same name (docs/adr says why Ray's own restarts are not
used), wherever there is room. A node that is told to go is left as soon as its workers have finished what they have.
Without `--workers`, new nodes get workers when they appear. The driver's process imports neither torch nor
transformers.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from tale_ray.cluster.actor import Scored, WorkerActor
from tale_ray.cluster.connection import (
    Head,
    check_feasible,
    connected,
    describe_cluster,
    describe_worker,
    has_autoscaler,
)
from tale_ray.cluster.gang import GangBroken, GangOutOfMemory, end_worker, start_worker
from tale_ray.cluster.nodes import Nodes, Place, last_words
from tale_ray.config import ModelSection, ResourceSection
from tale_ray.errors import InfeasibleError, Interrupted, ModelError, TaleRayError, WorkersLost
from tale_ray.records import Example, Measurement, ModelInfo, Probe, PromptRow, WorkUnit
from tale_ray.search.executor import (
    Questions,
    UnitDone,
    UnitFailed,
    WorkerEvent,
    WorkerJoined,
    WorkerLeaving,
    WorkerLost,
)

logger = logging.getLogger("tale_ray.cluster")

POLL_SECONDS = 1.0
CLOSE_SECONDS = 3.0  # of patience with a head that is left anyway
IDLE_SECONDS = 0.1  # between two looks while no worker has anything to do
FETCH_SECONDS = 60.0  # for an answer that is ready
MISSING_SECONDS = 5.0  # after the first worker has joined, until it is said that others have no place
MAX_STARTS_IN_VAIN = 3  # of one worker, without a finished unit in between


@dataclass(slots=True)
class _Slot:
    """One worker: its present actor and the calls that it has not answered."""

    name: str
    actor: Any = None  # of a gang, its lead
    group: Any = None  # of a gang: the places of its members
    info: ModelInfo | None = None
    placing: Any = None  # the calls that are awaited before the worker joins, in this order
    loading: Any = None
    sharing: Any = None
    units: dict[Any, WorkUnit] = field(default_factory=dict)  # by object reference
    place: Place | None = None
    is_joined: bool = False
    is_leaving: bool = False
    starts_in_vain: int = 0

    def calls(self) -> list[Any]:
        return [ref for ref in (self.placing, self.loading, self.sharing) if ref is not None] + list(self.units)

    @property
    def placed(self) -> bool:
        return self.actor is not None and self.placing is None


class RayExecutor:
    """Up to `resources.workers` actors on the cluster at `resources.address`, or on a private one."""

    units_per_worker = 2  # so that no worker idles for a round trip

    def __init__(self, section: ModelSection, dtype: str, resources: ResourceSection, name: str = "search") -> None:
        self._section = section
        self._dtype = dtype
        self._resources = resources
        self._name = name
        self._stack = contextlib.ExitStack()
        self._head: Head | None = None
        self._nodes = Nodes()
        self._halvings = 0  # of the batch budget of workers that start: others have run out of memory
        self._slots: list[_Slot] = []
        self._questions: Any = None
        self._info: ModelInfo | None = None
        self._unplaced_since: float | None = None
        self._first_joined_at: float | None = None
        self._missing_told = False
        self._untold: list[WorkerEvent] = []  # that happened outside of `poll`, which tells them

    # The Executor protocol.

    def connect(self) -> None:
        """Join or start the cluster, and check that a worker fits some node of it."""
        self._head = self._stack.enter_context(connected(self._resources.address))
        check_feasible(self._resources)
        self._nodes.sees_drains = not self._head.address.startswith("ray://")
        self._nodes.look()

    def load(self) -> ModelInfo:
        """Start the workers, and wait until the first has loaded the model."""
        self._grow(self._resources.workers or max(1, self._nodes.num_places(self._resources)))
        info = self._loaded_slot().info
        assert info is not None
        return info

    def encode(self, examples: Sequence[Example]) -> tuple[PromptRow, ...]:
        """Return the examples as token ids, by the first worker that has loaded."""
        rows: tuple[PromptRow, ...] = self._ask(lambda actor: actor.encode.remote(examples))
        return rows

    def measure(self, probe: Probe, rows: Sequence[tuple[int, ...]]) -> Measurement:
        """Return what a probe of the model comes to, by the first worker that has loaded; its units come first."""
        measurement: Measurement = self._ask(lambda actor: actor.measure.remote(probe, rows))
        return measurement

    def share(self, questions: Questions) -> None:
        """Put the questions into the object store once; every worker fetches them before it joins."""
        self._questions = ray.put(questions)
        for slot in self._slots:
            if slot.info is not None:
                slot.sharing = slot.actor.share.remote(self._questions)

    def submit(self, worker: str, unit: WorkUnit) -> None:
        """Queue the unit at the worker's actor; not if that was replaced, which an event under way tells."""
        slot = next(slot for slot in self._slots if slot.name == worker)
        if slot.is_joined:
            slot.units[slot.actor.score.remote(unit)] = unit

    def poll(self, timeout_seconds: float) -> tuple[WorkerEvent, ...]:
        """Return what the workers have answered; waits for the first answer only."""
        if self._untold:
            untold, self._untold = self._untold, []
            return tuple(untold)
        return tuple(self._collect(timeout_seconds))

    def close(self) -> None:
        """Kill the actors (a dropped handle would leave its GPU memory taken) and leave the cluster."""
        with contextlib.suppress(Interrupted):
            if self._head is not None and ray.is_initialized():
                self._head.check(CLOSE_SECONDS)
                for slot in self._slots:
                    if slot.actor is not None:
                        end_worker(slot.actor, slot.group)
        self._slots = []
        self._head = None
        self._stack.close()

    def _check_head(self) -> None:
        if self._head is not None:
            self._head.check_now_and_then()

    # Workers come and go.

    def _grow(self, num_workers: int) -> None:
        """Start workers until there are so many."""
        for number in range(len(self._slots), num_workers):
            self._slots.append(_Slot(name=f"worker-{number}"))
            self._start(self._slots[-1])

    def _start(self, slot: _Slot) -> None:
        full_name = f"tale/{self._name}/{slot.name}/{time.time_ns():x}"
        slot.actor, slot.group = start_worker(WorkerActor, slot.name, full_name, self._resources)
        slot.placing = slot.actor.place.remote()
        slot.loading = slot.actor.load.remote(self._section, self._dtype, self._halvings)

    def _ask(self, start_call: Callable[[Any], Any]) -> Any:
        """Return what the actor of the first loaded worker answers to a call; of another one if that is lost."""
        while True:
            slot = self._loaded_slot()
            call = start_call(slot.actor)
            while not ray.wait([call], timeout=POLL_SECONDS)[0]:
                self._check_head()
            try:
                return ray.get(call)
            except RayError as error:
                if (refusal := _refusal(error)) is not None:
                    raise refusal from None
                cause = error.cause if isinstance(error, RayTaskError) else None
                self._note([self._lose(slot, cause if isinstance(cause, GangBroken) else error)])

    def _note(self, events: Sequence[WorkerEvent]) -> None:
        """Log what happened before anybody polls; keep for the next poll what happened since."""
        if self._questions is None:
            _log_lost(events)
        else:
            self._untold += events

    def _loaded_slot(self) -> _Slot:
        """Return a worker that has loaded the model; wait for one if need be. Loading may take any time."""
        while True:
            for slot in self._slots:
                if slot.info is not None:
                    return slot
            self._note(self._collect(POLL_SECONDS))

    def _check_places(self) -> None:
        """Refuse to wait any longer for the place of the only workers, be they the first or replacements.

        Raises:
            InfeasibleError: for some time no worker has run anywhere.
            Interrupted: the same, of a search that had workers.
        """
        if any(slot.placed for slot in self._slots):
            self._unplaced_since = None
            return
        now = time.monotonic()
        self._unplaced_since = self._unplaced_since or now
        if now - self._unplaced_since >= self._resources.wait_resources_seconds:
            found = (
                f"no worker found a place within {self._resources.wait_resources_seconds:g} s: each needs "
                f"{describe_worker(self._resources)}, and {describe_cluster()}"
            )
            if self._info is not None:
                raise Interrupted(f"all workers are lost, and {found}; `tale-ray resume` goes on when there is room")
            raise InfeasibleError(f"{found}. Wait until others are done, ask for less, or raise --wait-resources")

    def _tell_of_missing(self) -> None:
        """Say once that some workers have no place yet."""
        if self._missing_told or self._first_joined_at is None:
            return
        if time.monotonic() - self._first_joined_at < MISSING_SECONDS:
            return
        self._missing_told = True
        placed = sum(slot.placed for slot in self._slots)
        if placed < len(self._slots):
            logger.info(
                "%d of %d workers have a place; %s; the others join when there is room",
                placed,
                len(self._slots),
                describe_cluster(),
            )

    def _lose(self, slot: _Slot, cause: RayError | GangBroken | str) -> WorkerLost:
        """Replace the actor, or give the worker up if it keeps dying.

        Raises:
            WorkersLost: that was the last one.
            Interrupted: the whole cluster is gone.
        """
        if self._head is not None:
            self._head.check()
        self._nodes.look()
        is_node_gone = slot.place is not None and self._nodes.is_going(slot.place.node)
        reason = _telling_line(cause) if isinstance(cause, RayError) else str(cause)
        log = "" if isinstance(cause, str | RayTaskError | GangBroken) or is_node_gone else last_words(slot.place)
        if isinstance(cause, OutOfMemoryError | GangOutOfMemory):
            self._halvings += 1
        slot.starts_in_vain += not is_node_gone
        self._end(slot)
        if slot.starts_in_vain < MAX_STARTS_IN_VAIN:
            self._start(slot)
        elif all(other.actor is None for other in self._slots):
            raise WorkersLost(
                f"every worker died {MAX_STARTS_IN_VAIN} times without finishing a unit; the last one because: "
                f"{reason}. Look at its memory use; then go on with `tale-ray resume`\n{log}".rstrip()
            )
        return WorkerLost(slot.name, log + reason, is_suspect=not is_node_gone)

    def _end(self, slot: _Slot) -> None:
        end_worker(slot.actor, slot.group)
        slot.units.clear()
        slot.placing = slot.loading = slot.sharing = slot.info = slot.actor = slot.group = slot.place = None
        slot.is_joined = slot.is_leaving = False

    def _follow_nodes(self) -> Iterator[WorkerEvent]:
        """Leave nodes that are told to go if there are others, and start workers on those that are new."""
        known = self._nodes.resources.keys()
        if not self._nodes.look_now_and_then():
            return
        num_places = self._nodes.num_places(self._resources)
        for slot in self._slots if num_places or has_autoscaler() else ():
            if slot.place is not None and slot.place.node in self._nodes.draining:
                if not slot.is_leaving:
                    slot.is_leaving = True
                    yield WorkerLeaving(slot.name)
                if not slot.units:
                    self._end(slot)
                    self._start(slot)
                    yield WorkerLost(slot.name, "its node is going; it moves to another", is_suspect=False)
        if self._nodes.resources.keys() - known:
            for slot in self._slots:
                if slot.actor is None:  # given up, but on other nodes
                    slot.starts_in_vain = 0
                    self._start(slot)
        if self._resources.workers is None:
            self._grow(num_places)

    # Answers.

    def _collect(self, timeout_seconds: float) -> list[WorkerEvent]:
        owners = {ref: slot for slot in self._slots for ref in slot.calls()}
        if owners:
            ready, _ = ray.wait(list(owners), num_returns=1, timeout=timeout_seconds)
        else:
            ready = []
            time.sleep(min(timeout_seconds, IDLE_SECONDS))
        self._check_head()
        if ready:
            ready, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
        events = [
            event
            for ref in ready
            if ref in owners[ref].calls()  # not one of a worker that was lost a moment ago
            for event in self._answer(owners[ref], ref)
        ]
        events += self._follow_nodes()
        self._check_places()
        self._tell_of_missing()
        return events

    def _answer(self, slot: _Slot, ref: Any) -> list[WorkerEvent]:
        try:
            value = ray.get(ref, timeout=FETCH_SECONDS)
        except RayTaskError as error:
            return self._failed(slot, ref, error)
        except RayError as error:  # its process or node is gone, or what it answered cannot be fetched
            return [self._lose(slot, error)]
        if ref == slot.placing:
            logger.debug("%s runs at %s", slot.name, value)
            slot.place = value
            slot.placing = None
            return []
        if ref == slot.loading:
            try:
                return self._loaded(slot, value)
            except ModelError as error:  # only this node has it, the others go on
                return [self._lose(slot, str(error))]
        if ref == slot.sharing:
            slot.sharing = None
            slot.is_joined = True
            self._first_joined_at = self._first_joined_at or time.monotonic()
            return [WorkerJoined(slot.name)]
        del slot.units[ref]
        slot.starts_in_vain = 0
        scored: Scored = value
        self._halvings = max(self._halvings, scored.halvings)
        return [UnitDone(slot.name, scored.result)]

    def _loaded(self, slot: _Slot, info: ModelInfo) -> list[WorkerEvent]:
        self._info = self._info or info
        if (info.digest, info.num_layers, info.dtype) != (self._info.digest, self._info.num_layers, self._info.dtype):
            raise ModelError(
                f"{slot.name} loaded another model from {self._section.model} than the first worker did "
                f"(digest {info.digest[:12]} in {info.dtype}, not {self._info.digest[:12]} in {self._info.dtype}): "
                "put the same files on every node"
            )
        slot.loading = None
        slot.info = info
        if self._questions is not None:
            slot.sharing = slot.actor.share.remote(self._questions)
        return []

    def _failed(self, slot: _Slot, ref: Any, error: RayTaskError) -> list[WorkerEvent]:
        """Tell of an error that the worker's process survived."""
        if isinstance(error.cause, GangBroken):
            return [self._lose(slot, error.cause)]
        refusal = _refusal(error)
        if ref in slot.units:
            return [UnitFailed(slot.name, slot.units.pop(ref), str(error), refusal)]
        if refusal is not None and self._info is None:  # no worker has loaded the model: the same anywhere
            raise refusal
        return [self._lose(slot, error if refusal is None else str(refusal))]


def _log_lost(events: Sequence[WorkerEvent]) -> None:
    """Log what happened before anybody polls."""
    for event in events:
        if isinstance(event, WorkerLost):
            logger.warning("%s is lost: %s", event.worker, event.reason)


def _telling_line(error: RayError) -> str:
    """Return the line of Ray's many that says what happened."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[0 if isinstance(error, OutOfMemoryError) else -1].strip()


def _refusal(error: RayError) -> TaleRayError | None:
    """Return the error that the worker raised on purpose, or None if it was raised by accident."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return cause if isinstance(cause, TaleRayError) else None
