"""Everything in this process, one unit at a time, without Ray."""

import traceback
from collections import deque
from collections.abc import Collection, Sequence

import numpy as np

from tale_ray.config import ModelSection, ResourceSection
from tale_ray.errors import InfeasibleError, Interrupted, TaleRayError
from tale_ray.records import Example, Measurement, ModelInfo, Probe, PromptRow, WorkUnit
from tale_ray.search.executor import Questions, UnitDone, UnitFailed, WorkerEvent, WorkerJoined

LOCAL_WORKER = "local"


class LocalExecutor:
    """The one worker of `--local`. A unit runs while it is polled for."""

    units_per_worker = 1

    def __init__(self, section: ModelSection, dtype: str, resources: ResourceSection) -> None:
        self._section = section
        self._dtype = dtype
        self._resources = resources
        self._units: deque[WorkUnit] = deque()
        self._joining = False

    def connect(self) -> None:
        """Check that this machine has the GPUs asked for."""
        wanted = self._resources.gpus_per_worker
        if not wanted:
            return
        from tale_ray.cluster.worker import visible_gpus  # torch is wanted in this process only now

        if wanted > (present := visible_gpus()):
            raise InfeasibleError(
                f"{wanted} GPUs per worker are asked for, and this machine shows {present}: ask for fewer, or use a "
                "machine that has them"
            )

    def load(self) -> ModelInfo:
        """Load the model in this process."""
        from tale_ray.cluster.worker import Worker  # torch is wanted in this process only now

        self._worker = Worker(LOCAL_WORKER, self._section, self._dtype, self._resources)
        return self._worker.info

    def encode(self, examples: Sequence[Example]) -> tuple[PromptRow, ...]:
        """Return the examples as token ids."""
        return self._worker.encode(examples)

    def measure(self, probe: Probe, rows: Sequence[tuple[int, ...]]) -> Measurement:
        """Return what a probe of the model comes to on rows of tokens."""
        return self._worker.measure(probe, rows)

    def last_states(self, removed: Collection[int], rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the hidden states (boundaries, rows, hidden size) of the rows' last tokens between layers.

        Not of the protocol: they are large, and only a process of its own model gathers them.
        """
        return self._worker.last_states(removed, rows)

    def share(self, questions: Questions) -> None:
        """Give the questions to the worker."""
        self._worker.share(questions)
        self._joining = True

    def submit(self, worker: str, unit: WorkUnit) -> None:
        """Put the unit in the queue."""
        assert worker == LOCAL_WORKER
        self._units.append(unit)

    def poll(self, timeout_seconds: float) -> tuple[WorkerEvent, ...]:  # noqa: ARG002
        """Run the oldest unit to its end, whatever the timeout."""
        if self._joining:
            self._joining = False
            return (WorkerJoined(LOCAL_WORKER),)
        if not self._units:
            return ()
        unit = self._units.popleft()
        try:
            return (UnitDone(LOCAL_WORKER, self._worker.score(unit)),)
        except Interrupted:
            raise  # a request to stop is no failure of the unit
        except Exception as error:  # noqa: BLE001  whatever a unit raises is reported, as a remote worker would
            refusal = error if isinstance(error, TaleRayError) else None
            return (UnitFailed(LOCAL_WORKER, unit, "".join(traceback.format_exception(error)), refusal),)

    def close(self) -> None:
        """Forget the model."""
        self._units.clear()
        self.__dict__.pop("_worker", None)
