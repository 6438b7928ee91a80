"""From a row to a prompt, and from a prompt to token ids: the same ones on every machine and every day.

This module does not import a tokenizer: it is handed one and only calls it.
"""

import hashlib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from jinja2 import TemplateError

from tale_ray.errors import TaskError
from tale_ray.records import Choice, Example, Message, PromptRow
from tale_ray.tasks.answers import parse_target, target_choice
from tale_ray.tasks.spec import TaskSpec
from tale_ray.tasks.splits import row_digest
from tale_ray.tasks.templates import list_texts, render_template

DATE: Final = "26 Jul 2024"

# Chat templates may print today's date through a function that the template engine of transformers provides. Values
# handed to a template are reduced to plain data there, so a function cannot be replaced from outside: the template
# gets a macro of the same name instead. The line ends with a newline that the engine trims, so that the template
# itself starts on a line of its own, as before.
_FIXED_DATE_MACRO: Final = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(
        f" | replace('%{code}', '{text}')"
        for code, text in {
            "-d": "26",
            "-m": "7",
            "d": "26",
            "m": "07",
            "b": "Jul",
            "B": "July",
            "Y": "2024",
            "y": "24",
            "a": "Fri",
            "A": "Friday",
            "j": "208",
            "F": "2024-07-26",
            "H": "00",
            "I": "12",
            "M": "00",
            "S": "00",
            "p": "AM",
        }.items()
    )
    + " }}{%- endmacro %}\n"
)
_PROBE_SYSTEM: Final = "Reply with one word."
_PROBE: Final = ({"role": "system", "content": _PROBE_SYSTEM}, {"role": "user", "content": "Hello"})


class Tokenizer(Protocol):
    """What is needed of a tokenizer of transformers."""

    chat_template: Any  # a template, templates by name, or None
    bos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None

    def get_chat_template(self) -> str:
        """Return the template of a chat without tools."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """Return the conversation as text, with `tokenize=False`."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of the text."""


def render(spec: TaskSpec, row: Mapping[str, Any], digest: str) -> Example:
    """Return the row as the task asks it; `digest` is that of the row.

    Raises:
        TaskError: a template fails on the row, the row lacks the column to group by, or the target is no answer.
    """
    if spec.group_by is not None and spec.group_by not in row:
        raise TaskError(
            f"task {spec.name}: group_by names the column {spec.group_by!r}, but the columns are "
            f"{', '.join(map(str, row))}; name one of these"
        )
    messages = tuple(
        {"role": message["role"], "content": render_template(message["content"], row, f"messages[{index}].content")}
        for index, message in enumerate(spec.messages)
    )
    reply = render_template(spec.reply, row, "reply")
    target = render_template(spec.target, row, "target").strip()
    try:
        if spec.answer.choices is not None:
            choices = list_texts(spec.answer.choices, row, "answer.choices")
            return Example(digest, messages, reply, str(target_choice(choices, target)), choices)
        return Example(digest=digest, messages=messages, reply=reply, target=parse_target(spec.answer, target))
    except TaskError as error:
        raise TaskError(f"task {spec.name}, row {digest[:12]}: {error}; the row is {_shown(row)}") from error


def render_rows(spec: TaskSpec, rows: Iterable[Mapping[str, Any]]) -> tuple[Example, ...]:
    """Return the rows as the task asks them, in their order.

    Raises:
        TaskError: as `render`.
    """
    return tuple(render(spec, row, row_digest(row)) for row in rows)


def encode(
    tokenizer: Tokenizer, messages: Sequence[Message], demonstrations: Sequence[Example] = ()
) -> tuple[int, ...]:
    """Return the token ids of the chat up to where the model's reply starts.

    Demonstrations come first, after the system message of `messages`, each as its own messages (without system) and
    its reply. Thinking is switched off and the date is always the same. A system message that the chat template
    rejects or drops is put in front of the first user message. Without a chat template the chat is plain text.
    `chat_notes` says which of these was done.

    Raises:
        TaskError: the chat template fails, or there are no tokens.
    """
    text, adds_tokens = prompt_text(tokenizer, messages, demonstrations)
    token_ids = text_ids(tokenizer, text, add_special_tokens=adds_tokens)
    if not token_ids:
        raise TaskError(f"the prompt {_shown(text)} has no tokens: check the tokenizer and its chat template")
    return token_ids


def prompt_text(
    tokenizer: Tokenizer, messages: Sequence[Message], demonstrations: Sequence[Example]
) -> tuple[str, bool]:
    """Return the chat up to where the reply starts, and whether the tokenizer is to add its special tokens.

    Raises:
        TaskError: the chat template fails.
    """
    chat = _with_demonstrations(messages, demonstrations)
    if not tokenizer.chat_template:
        return _plain_text(chat), True
    if _system_is_lost(tokenizer):
        chat = _fold_system(chat)
    return _chat_text(tokenizer, chat), False  # the chat template writes its own special tokens


def finished_text(
    tokenizer: Tokenizer, messages: Sequence[Message], demonstrations: Sequence[Example], reply: str
) -> str:
    """Return the chat of `prompt_text` with the reply in it, and whatever the chat template ends a reply with.

    Raises:
        TaskError: the chat template fails.
    """
    chat = [*_with_demonstrations(messages, demonstrations), {"role": "assistant", "content": reply}]
    if not tokenizer.chat_template:
        return _plain_text(chat).rstrip()
    if _system_is_lost(tokenizer):
        chat = _fold_system(chat)
    return _chat_text(tokenizer, chat, is_open=False)


def encode_choices(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    choices: Sequence[str],
    demonstrations: Sequence[Example] = (),
) -> tuple[Choice, ...]:
    """Return what the model is to say how likely it is: each choice as the reply to the chat, cut as by `encode_pair`.

    Without a chat template a space comes before each, as before the replies of demonstrations.

    Raises:
        TaskError: as `encode`, or a choice has no tokens.
    """
    text, adds_tokens = prompt_text(tokenizer, messages, demonstrations)
    between = " " if adds_tokens else ""  # a plain prompt ends with 'Answer:'
    pairs = _encode_pairs(tokenizer, text, [between + choice for choice in choices], add_special_tokens=adds_tokens)
    return tuple(Choice(choice, *pair) for choice, pair in zip(choices, pairs, strict=True))


def encode_example(tokenizer: Tokenizer, example: Example) -> PromptRow:
    """Return a row as token ids.

    Raises:
        TaskError: as `encode` and `encode_choices`.
    """
    if example.prompt is not None:
        return _encode_plain(tokenizer, example, example.prompt)
    if not example.choices:
        return PromptRow(encode(tokenizer, example.messages, example.demonstrations), example.target)
    choices = encode_choices(tokenizer, example.messages, example.choices, example.demonstrations)
    return PromptRow(choices[0].context_ids, example.target, choices)


def _encode_plain(tokenizer: Tokenizer, example: Example, prompt: str) -> PromptRow:
    """Return a row whose prompt is plain text; tokens that the tokenizer adds are not added twice."""
    start, number = tokenizer.bos_token, str(example.number)

    def adds(text: str) -> bool:
        return not (start and text.startswith(start))

    if not example.choices:
        token_ids = text_ids(tokenizer, prompt, add_special_tokens=adds(prompt))
        if not token_ids:
            raise TaskError(f"the prompt {_shown(prompt)} has no tokens: check the task and the tokenizer")
        return PromptRow(token_ids, number)
    choices = tuple(
        Choice(choice, *encode_pair(tokenizer, context, choice, add_special_tokens=adds(context)))
        for context, choice in zip(example.contexts, example.choices, strict=True)
    )
    return PromptRow(choices[0].context_ids, number, choices)


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, *, add_special_tokens: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the token ids of a context and of what follows it, as lm-evaluation-harness cuts them.

    White space at the end of the context goes over to the continuation. Both are encoded together, and the continuation
    is what comes after as many tokens as the context has alone; the context is what it is alone, also where a token
    would cross the border. A context without text is the token that starts all texts, or else the one that ends them.

    Raises:
        TaskError: one of them has no tokens.
    """
    return _encode_pairs(tokenizer, context, [continuation], add_special_tokens=add_special_tokens)[0]


def _encode_pairs(
    tokenizer: Tokenizer, context: str, continuations: Sequence[str], *, add_special_tokens: bool
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return pairs that share one tuple of the context, which may be long."""
    stripped = context.rstrip()
    space = context[len(stripped) :]
    before = text_ids(tokenizer, stripped, add_special_tokens=add_special_tokens) if stripped else ()
    pairs = []
    for continuation in continuations:
        if stripped:
            whole = text_ids(tokenizer, stripped + space + continuation, add_special_tokens=add_special_tokens)
            pair = before, whole[len(before) :]
        else:
            pair = _start_pair(tokenizer, space + continuation)
        if not all(pair):
            raise TaskError(
                f"the choice {_shown(continuation)} after {_shown(context)} has no tokens of its own, so it has no "
                "likelihood: let both be texts, and the choice start with a space if the tokenizer joins them"
            )
        pairs.append(pair)
    return pairs


def _start_pair(tokenizer: Tokenizer, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a text that nothing comes before as what comes after the token that starts all texts."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    token_ids = text_ids(tokenizer, text, add_special_tokens=False)
    if start is None or token_ids[:1] == (start,):
        return token_ids[:1], token_ids[1:]
    return (start,), token_ids


def text_ids(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    """Return the token ids of a text that is to be gone on with."""
    token_ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if add_special_tokens and token_ids and token_ids[-1] == tokenizer.eos_token_id:
        token_ids = token_ids[:-1]  # some tokenizers end every text: the reply would come after the end
    return tuple(token_ids)


def chat_notes(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return in words where `encode` had to depart from the tokenizer's own chat template; empty if nowhere.

    Raises:
        TaskError: the chat template fails.
    """
    if not tokenizer.chat_template:
        return ("the tokenizer has no chat template: prompts are plain text that ends in 'Answer:'",)
    folded = _system_is_lost(tokenizer)
    notes = []
    if folded:
        notes.append("the chat template takes no system message: a task's is put in front of the first user message")
    if _chat_text(tokenizer, _fold_system(_PROBE) if folded else _PROBE).rstrip().endswith("<think>"):
        notes.append("the chat template starts every reply with thinking, which cannot be switched off")
    return tuple(notes)


def digest_tokens(rows: Iterable[tuple[int, ...]]) -> str:
    """Return one SHA-256, in hex, of token sequences in their order."""
    digest = hashlib.sha256()
    for token_ids in rows:
        digest.update(f"{','.join(map(str, token_ids))}\n".encode())
    return digest.hexdigest()


def _with_demonstrations(messages: Sequence[Message], demonstrations: Sequence[Example]) -> list[Message]:
    chat = [message for message in messages if message["role"] == "system"]
    for example in demonstrations:
        chat += [message for message in example.messages if message["role"] != "system"]
        chat.append({"role": "assistant", "content": example.reply})
    return chat + [message for message in messages if message["role"] != "system"]


def _chat_text(tokenizer: Tokenizer, chat: Sequence[Message], *, is_open: bool = True) -> str:
    """Return the chat as text, up to where a reply starts if it is open."""
    options: dict[str, Any] = {}
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            options["chat_template"] = _FIXED_DATE_MACRO + template
        text = tokenizer.apply_chat_template(
            [dict(message) for message in chat],
            tokenize=False,
            add_generation_prompt=is_open,
            enable_thinking=False,
            date_string=DATE,
            **options,
        )
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RecursionError,
    ) as error:
        raise TaskError(
            f"the tokenizer's chat template fails on {_shown(chat)}: {type(error).__name__}: {error}; "
            "change the roles of the task's messages, or use a model with another template"
        ) from error
    return str(text)


def _system_is_lost(tokenizer: Tokenizer) -> bool:
    """Whether the chat template rejects or drops a system message; asked of a fixed chat, so it holds for all rows."""
    try:
        return _PROBE_SYSTEM not in _chat_text(tokenizer, _PROBE)
    except TaskError:
        return True


def _fold_system(chat: Sequence[Message]) -> list[Message]:
    if chat[0]["role"] != "system":
        return list(chat)
    system, rest = chat[0]["content"], list(chat[1:])
    first = next(index for index, message in enumerate(rest) if message["role"] == "user")
    rest[first] = {"role": "user", "content": f"{system}\n\n{rest[first]['content']}"}
    return rest


def _plain_text(chat: Sequence[Message]) -> str:
    """Return paragraphs; each user message is followed by `Answer:` and, but for the last, by the reply to it."""
    text = ""
    for message in chat:
        if message["role"] == "assistant":
            text += f" {message['content']}\n\n"
        elif message["role"] == "user":
            text += f"{message['content']}\nAnswer:"
        else:
            text += f"{message['content']}\n\n"
    return text


def _shown(value: object) -> str:
    short = reprlib.Repr()
    short.maxstring, short.maxlist, short.maxdict = 200, 10, 10
    return short.repr(value)
