"""A row as a model learns it: the prompt exactly as it would be scored, and the tokens that should come after it.

This module does not import a tokenizer: it is handed one and only calls it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tale_ray.errors import TaskError
from tale_ray.records import Example
from tale_ray.tasks.prompts import Tokenizer, encode_example, finished_text, prompt_text, text_ids


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A prompt and its reference reply as token ids; the loss is on the reply only."""

    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.reply_ids)


def encode_training(tokenizer: Tokenizer, example: Example, end_ids: Sequence[int]) -> TrainingRow:
    """Return a row with its reference reply, which ends with the model's end token if it has one.

    The prompt has the tokens that are scored. The reply is what the chat template writes after it, up to the end
    token; where the template writes a finished chat otherwise than an open one, the reply and an end token. Of rows
    whose choices are compared by their likelihoods it is the right choice, as it is scored, without an end.

    Args:
        tokenizer: of the model.
        example: the row.
        end_ids: tokens that end a reply; the first is taken where the chat template writes none.

    Raises:
        TaskError: the chat template fails, or there is no reply to learn.
    """
    row = encode_example(tokenizer, example)
    if row.choices:
        if not example.target.isdecimal() or int(example.target) >= len(row.choices):
            raise TaskError(f"row {example.digest[:12]} has no right choice to learn: leave it out of the task's rows")
        found = row.choices[int(example.target)]
        return TrainingRow(found.context_ids, found.continuation_ids)
    text, adds_tokens = _prompt(tokenizer, example)
    whole = _finished(tokenizer, example, text)
    reply_ids = _following(tokenizer, row.token_ids, text, whole, adds_tokens=adds_tokens)
    end = next((at for at, token in enumerate(reply_ids) if token in end_ids), None)
    if end == 0 or not reply_ids:
        raise TaskError(
            f"row {example.digest[:12]} has the reference reply {example.reply!r}, which has no tokens to learn: "
            "correct `reply` in the task file"
        )
    if end is None:
        return TrainingRow(row.token_ids, (*reply_ids, *end_ids[:1]))
    return TrainingRow(row.token_ids, reply_ids[: end + 1])


def _prompt(tokenizer: Tokenizer, example: Example) -> tuple[str, bool]:
    if example.prompt is None:
        return prompt_text(tokenizer, example.messages, example.demonstrations)
    start = tokenizer.bos_token
    return example.prompt, not (start and example.prompt.startswith(start))


def _finished(tokenizer: Tokenizer, example: Example, text: str) -> str:
    """Return the prompt's text with the reply after it."""
    if example.prompt is not None:
        return text + ("" if text[-1:].isspace() else " ") + example.reply
    whole = finished_text(tokenizer, example.messages, example.demonstrations, example.reply)
    return whole if whole.startswith(text) else text + example.reply


def _following(
    tokenizer: Tokenizer, prompt_ids: tuple[int, ...], text: str, whole: str, *, adds_tokens: bool
) -> tuple[int, ...]:
    """Return the tokens after the prompt's own, also where a token of the whole would cross the border."""
    whole_ids = text_ids(tokenizer, whole, add_special_tokens=adds_tokens)
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        return whole_ids[len(prompt_ids) :]
    return text_ids(tokenizer, whole[len(text) :], add_special_tokens=False)
