"""What a worker does, wherever it runs: load a model once, encode prompts, score units.

The only module of this room that imports torch; it is imported inside workers, and in process for `--local`.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from tale_ray.config import ModelSection, ResourceSection
from tale_ray.engine.budget import default_budget
from tale_ray.engine.score import score_unit
from tale_ray.model.load import LoadedModel, load_model
from tale_ray.records import Example, ModelInfo, PromptRow, UnitResult, WorkUnit
from tale_ray.search.executor import Questions
from tale_ray.tasks.prompts import chat_notes, encode

logger = logging.getLogger("tale_ray.cluster")


class Worker:
    """One loaded model and the questions that it is asked."""

    def __init__(self, name: str, section: ModelSection, dtype: str, resources: ResourceSection) -> None:
        self._name = name
        self._batch_bytes = resources.batch_bytes
        self._loaded: LoadedModel = load_model(section, dtype, resources.gpus_per_worker)
        self._questions: Questions | None = None

    @property
    def info(self) -> ModelInfo:
        """What is to be known of the model and of how it is asked."""
        info = self._loaded.info
        return replace(info, notes=(*info.notes, *chat_notes(self._loaded.tokenizer)))

    def encode(self, examples: Sequence[Example]) -> tuple[PromptRow, ...]:
        """Return the examples as token ids."""
        tokenizer = self._loaded.tokenizer
        return tuple(
            PromptRow(token_ids=encode(tokenizer, example.messages), target=example.target) for example in examples
        )

    def share(self, questions: Questions) -> None:
        """Take the questions that units refer to."""
        self._questions = questions

    def score(self, unit: WorkUnit) -> UnitResult:
        """Return the answers of every candidate of the unit to its rows; in smaller batches if memory runs out.

        Raises:
            ConfigError: not even one row fits.
        """
        assert self._questions is not None, "questions are shared before units are submitted"
        while True:
            try:
                return score_unit(
                    self._loaded,
                    unit,
                    self._questions.rows[unit.split],
                    self._questions.answer,
                    self._questions.max_new_tokens,
                    self._batch_bytes,
                    self._name,
                )
            except torch.cuda.OutOfMemoryError:
                pass  # the error holds the batch in its traceback: it is over before the memory is counted
            torch.cuda.empty_cache()
            self._halve_budget()

    def _halve_budget(self) -> None:
        """Run half as many rows at once from now on; below one row the budget itself is refused."""
        if self._batch_bytes is None:
            self._batch_bytes = default_budget(self._loaded.model.device)
        self._batch_bytes //= 2
        logger.warning(
            "%s is out of GPU memory; from now on a batch takes %.1f MiB at most", self._name, self._batch_bytes / 2**20
        )


def limit_threads(num_threads: int) -> None:
    """Let torch use this many CPU threads in this process."""
    torch.set_num_threads(num_threads)


def visible_gpus() -> int:
    """Return how many GPUs this process sees."""
    return torch.cuda.device_count()
