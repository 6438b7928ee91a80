"""The rows of a plan: as tokens where a tokenizer is here, else as long as they are estimated to be."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tale_ray.attempt.rows import prepare_rows
from tale_ray.config import ModelSection, TaskSection
from tale_ray.errors import ConfigError
from tale_ray.model.digest import has_tokenizer
from tale_ray.paths import existing
from tale_ray.records import Choice, Example, PromptRow
from tale_ray.tasks.harness import PREFIX as HARNESS
from tale_ray.tasks.prompts import encode_example, prompt_text
from tale_ray.tasks.spec import TaskSpec, load_task

# Of the prompts of the nine built-in tasks that have rows of text, SmolLM2's tokenizer makes 2.8 (math500) to 4.3
# (mmlu) characters a token, and its chat template adds 9 tokens.
CHARACTERS_PER_TOKEN = 3.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRows:
    """The search rows, as a worker would be given them."""

    spec: TaskSpec
    rows: tuple[PromptRow, ...]
    counted: str  # how their tokens were counted, in words
    is_estimated: bool
    notes: tuple[str, ...] = ()


def plan_rows(section: ModelSection, task: TaskSection, tokens_per_row: int | None) -> PlannedRows:
    """Return the search rows of a task with their tokens, or with as many as they are estimated to have.

    With `tokens_per_row` each has so many, of which it shares none; rows are read only where `task.rows` is not given.

    Raises:
        TaskError: rows cannot be read or rendered.
        ModelError: there is a tokenizer, and it cannot be loaded.
        ConfigError: there are fewer than 1 tokens in a row.
    """
    if tokens_per_row is not None:
        return _of_length(task, tokens_per_row)
    prepared = prepare_rows(task)
    examples = prepared.examples["search"]
    tokenizer = _tokenizer(section)
    if tokenizer is None:
        encoder = _Characters()
        rows = tuple(encoder.row(example) for example in examples)
        counted = f"estimated: no tokenizer is here, so {CHARACTERS_PER_TOKEN} characters of a prompt make a token"
    else:
        rows = tuple(encode_example(tokenizer, example) for example in examples)
        counted = "counted with the model's tokenizer"
    return PlannedRows(
        spec=prepared.spec, rows=rows, counted=counted, is_estimated=tokenizer is None, notes=prepared.notes
    )


def _of_length(task: TaskSection, tokens_per_row: int) -> PlannedRows:
    if tokens_per_row < 1:
        raise ConfigError(f"tokens per row {tokens_per_row} is too small: it is at least 1; leave it out to count them")
    if task.rows is None or task.task.startswith(HARNESS):
        prepared = prepare_rows(task)
        spec, count, notes = prepared.spec, len(prepared.examples["search"]), prepared.notes
    else:
        spec, count, notes = load_task(task.task), task.rows, ()
    rows = tuple(PromptRow((row, *[0] * (tokens_per_row - 1)), "") for row in range(count))
    counted = f"as given: {tokens_per_row} in each row, of which it shares none"
    return PlannedRows(spec=spec, rows=rows, counted=counted, is_estimated=True, notes=notes)


def _tokenizer(section: ModelSection) -> Any:
    """Return the tokenizer of a folder, or of a hub model that is in the cache; None: there is none."""
    from tale_ray.model.configuration import local_folder  # torch is wanted in this process only now
    from tale_ray.model.load import folder_tokenizer

    folder = None if existing(section.model, Path.is_file) else local_folder(section)
    if folder is None or (section.gguf is None and not has_tokenizer(folder)):
        return None
    return folder_tokenizer(section, folder)


class _Characters:
    """Rows cut into pieces of a fixed number of characters, equal ones with equal numbers: beginnings stay shared."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def row(self, example: Example) -> PromptRow:
        """Return an example as a row."""
        prompt = example.prompt
        if prompt is None:
            prompt, _ = prompt_text(_WITHOUT_TEMPLATE, example.messages, example.demonstrations)
        if not example.choices:
            return PromptRow(self._ids(prompt), example.target)
        contexts: Sequence[str] = example.contexts or [prompt] * len(example.choices)
        choices = tuple(
            Choice(choice, self._ids(context), self._ids(choice))
            for context, choice in zip(contexts, example.choices, strict=True)
        )
        return PromptRow(choices[0].context_ids, example.target, choices)

    def _ids(self, text: str) -> tuple[int, ...]:
        found: list[int] = []
        start, at = 0, 0
        while start < len(text) or not found:
            at += 1
            end = int(at * CHARACTERS_PER_TOKEN)
            found.append(self._numbers.setdefault(text[start:end], len(self._numbers)))
            start = end
        return tuple(found)


_WITHOUT_TEMPLATE: Any = SimpleNamespace(chat_template=None)
