"""The worker as a Ray actor. Imports torch only inside the actor's process, never in the driver's."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tale_ray.cluster.nodes import Place, here
from tale_ray.config import ModelSection, ResourceSection
from tale_ray.records import Example, Measurement, ModelInfo, Probe, PromptRow, UnitResult, WorkUnit
from tale_ray.search.executor import Questions


@dataclass(frozen=True, slots=True)
class Scored:
    """What an actor answers to a unit; `halvings`: how often its batch budget has been halved so far."""

    result: UnitResult
    halvings: int


class WorkerActor:
    """One process with one model. Loading is a call of its own: an error in `__init__` would lose its type."""

    def __init__(self, name: str, resources: ResourceSection) -> None:
        self._name = name
        self._resources = resources
        self._worker: Any = None
        if resources.gpus_per_worker == 0:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray shows every GPU to an actor that asked for none

    def place(self) -> Place:
        """Return where the actor runs: the first thing that can be known of it."""
        return here()

    def load(self, section: ModelSection, dtype: str, halvings: int) -> ModelInfo:
        """Load the model; see `Worker`."""
        from tale_ray.cluster.worker import Worker, limit_threads

        limit_threads(self._resources.cpus_per_worker)
        self._worker = Worker(self._name, section, dtype, self._resources, halvings)
        info: ModelInfo = self._worker.info
        return info

    def encode(self, examples: Sequence[Example]) -> tuple[PromptRow, ...]:
        """Return the examples as token ids."""
        rows: tuple[PromptRow, ...] = self._worker.encode(examples)
        return rows

    def measure(self, probe: Probe, rows: Sequence[tuple[int, ...]]) -> Measurement:
        """Return what a probe of the model comes to on rows of tokens."""
        measurement: Measurement = self._worker.measure(probe, rows)
        return measurement

    def share(self, questions: Questions) -> None:
        """Take the questions that units refer to."""
        self._worker.share(questions)

    def score(self, unit: WorkUnit) -> Scored:
        """Return the answers of every candidate of the unit to its rows."""
        return Scored(self._worker.score(unit), self._worker.halvings)
