"""One row as a model is asked it, without the model: its tokenizer is enough."""

from dataclasses import dataclass

from tale_ray.attempt.rows import prepare_rows
from tale_ray.config import ModelSection, TaskSection
from tale_ray.errors import ConfigError
from tale_ray.records import Example
from tale_ray.results.tables import count_text
from tale_ray.tasks.prompts import chat_notes, encode, encode_example, prompt_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """A row of the search split, with all that comes before the reply."""

    task: str
    num_rows: int  # of the search split
    row: int
    example: Example
    text: str  # the prompt
    token_ids: tuple[int, ...]  # of the prompt; with special tokens that the tokenizer adds to a plain text
    notes: tuple[str, ...]


def preview_row(model: ModelSection, section: TaskSection, row: int) -> Preview:
    """Return a row of the search split, numbered from 0, as the model would be asked it.

    Raises:
        ConfigError: there is no such row.
        TaskError: rows cannot be read or rendered, or the chat template fails.
        ModelError: the tokenizer cannot be loaded.
    """
    prepared = prepare_rows(section)
    examples = prepared.examples["search"]
    if not 0 <= row < len(examples):
        raise ConfigError(
            f"row {row} does not exist: the search split of task {prepared.spec.name} has {len(examples)} rows, "
            f"numbered 0 to {len(examples) - 1}"
        )
    from tale_ray.model.load import load_tokenizer  # torch is wanted in this process only now

    tokenizer, example = load_tokenizer(model), examples[row]
    return Preview(
        task=prepared.spec.name,
        num_rows=len(examples),
        row=row,
        example=example,
        text=prompt_text(tokenizer, example.messages, example.demonstrations)[0]
        if example.prompt is None
        else example.prompt,
        token_ids=encode(tokenizer, example.messages, example.demonstrations)
        if example.prompt is None
        else encode_example(tokenizer, example).token_ids,
        notes=(*prepared.notes, *(chat_notes(tokenizer) if example.prompt is None else ())),
    )


def preview_text(preview: Preview) -> str:
    """Return the row under headings, the prompt character by character as it is."""
    example = preview.example
    target = example.target if not example.choices else f"{example.target}, of {list(example.choices)}"
    lines = [
        f"task {preview.task}: search row {preview.row} of {preview.num_rows}, "
        f"{count_text(len(example.demonstrations), 'demonstration')}, SHA-256 {example.digest[:12]}",
        *(f"note: {note}" for note in preview.notes),
        *("--- prompt ---", preview.text),
        *(f"--- {count_text(len(preview.token_ids), 'token')} ---", " ".join(map(str, preview.token_ids))),
        *("--- reference reply ---", example.reply),
        *("--- target ---", target),
    ]
    return "\n".join(lines)
