"""What a worker does, wherever it runs: load a model once, encode prompts, score units.

Only this module and `process_group` import torch in this room; they are imported inside workers, and in process for
`--local`.
"""

import ctypes
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from tale_ray.cluster.process_group import least_budget
from tale_ray.config import ModelSection, ResourceSection
from tale_ray.engine.measure import measure
from tale_ray.engine.score import Scorer
from tale_ray.engine.states import last_states
from tale_ray.model.load import LoadedModel, load_model
from tale_ray.model.placement import worker_placement
from tale_ray.model.streaming import should_stream
from tale_ray.records import Example, Measurement, ModelInfo, Probe, PromptRow, UnitResult, WorkUnit
from tale_ray.search.executor import Questions
from tale_ray.tasks.harness import load_for_scoring
from tale_ray.tasks.prompts import chat_notes, encode_example

logger = logging.getLogger("tale_ray.cluster")
Answer = TypeVar("Answer")

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


class Worker:
    """One loaded model and the questions that it is asked.

    Attributes:
        halvings: how often its batch budget has been halved, because memory ran out, here or in others of the run.
    """

    def __init__(
        self, name: str, section: ModelSection, dtype: str, resources: ResourceSection, halvings: int = 0
    ) -> None:
        self._name = name
        self._is_member = resources.tensor_parallel > 1
        placement = worker_placement(
            resources.gpus_per_worker, is_alone=resources.local, num_members=resources.tensor_parallel
        )
        streamed = not self._is_member and should_stream(section, dtype, placement, resources.stream)
        self._loaded: LoadedModel = load_model(section, dtype, replace(placement, is_streamed=streamed))
        if not resources.gpus_per_worker:
            keep_heap()
        self._scorer = Scorer(self._loaded, resources.batch_bytes)
        if self._is_member:
            self._scorer.budget = least_budget(self._scorer.budget, self._loaded.model.device)
        self._questions: Questions | None = None
        self.halvings = 0
        for _ in range(halvings):
            self._halve_budget("as others of this run were out of memory")

    @property
    def info(self) -> ModelInfo:
        """What is to be known of the model and of how it is asked."""
        info = self._loaded.info
        engine = (self._scorer.fit.note,) if self._scorer.fit.note else ()
        return replace(info, notes=(*info.notes, *chat_notes(self._loaded.tokenizer), *engine))

    def encode(self, examples: Sequence[Example]) -> tuple[PromptRow, ...]:
        """Return the examples as token ids.

        Raises:
            TaskError: the chat template rejects a prompt.
            ConfigError: not even one row fits into the batch budget.
        """
        tokenizer = self._loaded.tokenizer
        rows = tuple(encode_example(tokenizer, example) for example in examples)
        self._scorer.check_budget(rows)
        return rows

    def share(self, questions: Questions) -> None:
        """Take the questions that units refer to from now on.

        Raises:
            TaskError: a task of lm-evaluation-harness is not the same here.
        """
        if questions.answer.harness is not None:
            load_for_scoring(questions.answer.harness)
        self._scorer.forget()  # states of other rows, which had the same positions
        self._questions = questions

    def score(self, unit: WorkUnit) -> UnitResult:
        """Return the answers of every candidate of the unit to its rows; in smaller batches if memory runs out.

        Raises:
            ConfigError: not even one row fits.
            torch.cuda.OutOfMemoryError: memory ran out, of a member of a gang: the others do not know.
        """
        questions = self._questions
        assert questions is not None, "questions are shared before units are submitted"
        return self._within_memory(
            lambda: self._scorer.score(
                unit, questions.rows[unit.split], questions.answer, questions.max_new_tokens, self._name
            )
        )

    def measure(self, probe: Probe, rows: Sequence[tuple[int, ...]]) -> Measurement:
        """Return what a probe of the model comes to on rows of tokens; in smaller batches if memory runs out.

        Raises:
            ConfigError: there is nothing to measure on, or not even one row fits.
            ModelError: the model cannot be measured so.
            TaskError: a row is too long for the model.
            torch.cuda.OutOfMemoryError: as of `score`.
        """
        return self._within_memory(lambda: measure(self._loaded, self._scorer, probe, rows))

    def last_states(self, removed: Collection[int], rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the hidden states (boundaries, rows, hidden size) of the rows' last tokens between layers.

        Raises:
            ConfigError: not even one row fits.
            ModelError: the family hides its hidden states.
        """
        return self._within_memory(lambda: last_states(self._loaded, self._scorer, removed, rows))

    def _within_memory(self, compute: Callable[[], Answer]) -> Answer:
        while True:
            try:
                return compute()
            except torch.cuda.OutOfMemoryError:
                if self._is_member:
                    raise
                pass  # the error holds the batch in its traceback: it is over before the memory is counted
            torch.cuda.empty_cache()
            self._halve_budget("as it is out of memory")  # below one row the budget itself is refused

    def _halve_budget(self, why: str) -> None:
        self._scorer.halve_budget()
        self.halvings += 1
        logger.warning("%s works in %.1f MiB at most, %s", self._name, self._scorer.budget.total / 2**20, why)


def keep_heap() -> None:
    """Let the C library keep memory that was freed for what is allocated next, where it can be told to (glibc).

    By itself it gives blocks of over 128 KiB back and maps them anew, and filling fresh pages costs a search on CPU up
    to a tenth of its time. To be called when the weights are there: what loading has freed is not to be kept.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most that it takes
        mallopt(_M_TRIM_THRESHOLD, 128 * 2**20)
        mallopt(_M_TOP_PAD, 64 * 2**20)


def limit_threads(num_threads: int) -> None:
    """Let torch use this many CPU threads in this process."""
    torch.set_num_threads(num_threads)


def visible_gpus() -> int:
    """Return how many GPUs this process sees."""
    return torch.cuda.device_count()
