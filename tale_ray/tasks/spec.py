"""A task as its YAML file describes it, checked whole before anything is read or asked.

This module does not read rows, nor render them.
"""

import difflib
import importlib.util
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeAlias, get_args

import yaml

from tale_ray.errors import TaskError
from tale_ray.paths import existing
from tale_ray.tasks.templates import compile_expression, compile_template, half_character

AnswerType: TypeAlias = Literal["choice", "word", "number", "math", "regex", "likelihood"]
FileFormat: TypeAlias = Literal["csv", "json", "parquet"]

GENERATORS: Final = ("boolean",)
METRICS: Final = ("accuracy",)
ROLES: Final = ("system", "user", "assistant")

_FOLDER: Final = Path(str(resources.files("tale_ray.tasks"))) / "builtin"
_MISSING: Final = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSource:
    """A split of a data set of the Hugging Face hub."""

    path: str
    name: str | None
    split: str
    revision: str | None

    def __str__(self) -> str:
        """Return the source as a user would name it."""
        name = f", {self.name}" if self.name else ""
        revision = f", revision {self.revision}" if self.revision else ""
        return f"{self.path}{name}, split {self.split}{revision}"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSource:
    """Local files; relative ones are relative to the folder of the task file, and may be glob patterns."""

    format: FileFormat
    data_files: tuple[str, ...]

    def __str__(self) -> str:
        """Return the source as a user would name it."""
        return f"{self.format} {', '.join(self.data_files)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorSource:
    """Rows that this package generates."""

    generator: str
    seed: int
    rows: int

    def __str__(self) -> str:
        """Return the source as a user would name it."""
        return f"generated ({self.generator}, seed {self.seed}, {self.rows} rows)"


Source: TypeAlias = HubSource | FileSource | GeneratorSource


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerSpec:
    """How an answer is read from a reply, and what counts as equal."""

    type: AnswerType
    labels: tuple[str, ...] = ()  # of choice and word
    pattern: str | None = None  # of regex
    stop: tuple[str, ...] = ()  # a reply ends before the first of these texts
    choices: str | None = None  # of likelihood: a jinja2 expression over the row's columns that gives a list of texts
    normalised: bool = False  # of likelihood: by the characters of the choices


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSpec:
    """A checked task. `messages`, `reply` and `target` are jinja2 templates over the columns of a row."""

    name: str
    description: str
    source: Source
    shots: Source | None  # where demonstrations come from; None: they are carved out of the rows
    group_by: str | None  # a column; demonstrations share its value with the row asked
    messages: tuple[dict[str, str], ...]  # {"role": ..., "content": template}
    reply: str
    target: str
    answer: AnswerSpec
    max_new_tokens: int
    metric: str
    folder: Path  # what relative data files are relative to
    text: str  # the task file itself

    @property
    def is_builtin(self) -> bool:
        """Whether the task came with this package."""
        return self.folder == _FOLDER.absolute()

    def identity(self) -> dict[str, Any]:
        """Return what can change a prediction or its score, as canonical JSON values: no source, name or path."""
        return {
            "messages": [dict(message) for message in self.messages],
            "reply": self.reply,
            "target": self.target,
            "answer": {
                "type": self.answer.type,
                "labels": list(self.answer.labels),
                "pattern": self.answer.pattern,
                **({"stop": list(self.answer.stop)} if self.answer.stop else {}),  # without: as it always was
                **(
                    {"choices": self.answer.choices, "normalised": self.answer.normalised}
                    if self.answer.choices is not None
                    else {}
                ),
            },
            "max_new_tokens": self.max_new_tokens,
            "metric": self.metric,
            "group_by": self.group_by,
        }


def builtin_tasks() -> tuple[str, ...]:
    """Return the names of the built-in tasks, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def load_task(name_or_path: str) -> TaskSpec:
    """Return the built-in task of that name, or the task of that YAML file.

    Raises:
        TaskError: no such task or file, or the file breaks a rule; the message names file, key, value and remedy.
    """
    if name_or_path.startswith("lm-eval:"):
        raise TaskError(
            f"task {name_or_path!r} is not available: this version takes no tasks of lm-evaluation-harness; "
            f"use a built-in task ({', '.join(builtin_tasks())}) or write a task file"
        )
    if name_or_path in builtin_tasks():
        return _load_file(_FOLDER / f"{name_or_path}.yaml")
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or existing(name_or_path, Path.is_file):
        return _load_file(path)
    raise TaskError(
        f"task {name_or_path!r} is not known{_suggestion(name_or_path, builtin_tasks())}: "
        f"the built-in tasks are {', '.join(builtin_tasks())}; a task of your own is given as the path of a .yaml file"
    )


def _load_file(path: Path) -> TaskSpec:
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = yaml.safe_load(text)
    except FileNotFoundError:
        raise TaskError(f"task file {path} does not exist: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"task file {path} cannot be read: {error}; a task file is YAML in UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the latter from values such as 2020-99-99
        raise TaskError(f"task file {path} is not valid YAML: {error}; correct it there") from error
    keys = _Keys(f"task file {path}", "", content)
    answer = _answer(keys.section("answer"))
    spec = TaskSpec(
        name=keys.name("name"),
        description=keys.text("description", ""),
        source=_source(keys.section("source")),
        shots=_source(keys.section("shots")) if keys.has("shots") else None,
        group_by=keys.text("group_by") if keys.has("group_by") else None,
        messages=_messages(keys),
        reply=keys.template("reply"),
        target=keys.template("target"),
        answer=answer,
        max_new_tokens=_max_new_tokens(keys, answer),
        metric=keys.one_of("metric", METRICS, "accuracy"),
        folder=path.absolute().parent,
        text=text,
    )
    keys.finish()
    return spec


def _source(keys: "_Keys") -> Source:
    source: Source
    if keys.has("generator"):
        source = GeneratorSource(
            generator=keys.one_of("generator", GENERATORS),
            seed=keys.integer("seed"),
            rows=keys.integer("rows", minimum=1),
        )
    elif keys.text("path") in get_args(FileFormat):
        source = FileSource(format=keys.take("path"), data_files=keys.texts("data_files"))
        if keys.text("split", "train") != "train":
            keys.refuse("split", "rows read from files are the split train; leave the key out")
    else:
        if keys.has("data_files"):
            keys.refuse("path", f"data files are read as {', '.join(get_args(FileFormat))}; choose one of them")
        source = HubSource(
            path=keys.matching("path", r"[\w.-]*\w[\w.-]*(/[\w.-]*\w[\w.-]*)?", "the id of a data set, owner/name"),
            name=keys.matching("name", r"[^./\\][^/\\]*", "the name of a configuration, with no slash in it")
            if keys.has("name")
            else None,
            split=keys.matching("split", r"\w+([.-]\w+)*", "the name of one split (rows are chosen with --rows)"),
            revision=keys.text("revision") if keys.has("revision") else None,
        )
    keys.finish()
    return source


def _messages(keys: "_Keys") -> tuple[dict[str, str], ...]:
    messages = []
    for section in keys.sections("messages"):
        role = section.one_of("role", ROLES)
        messages.append({"role": role, "content": section.template("content")})
        section.finish()
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        keys.refuse("messages", "only the first message may have the role system; move it to the front, or merge them")
    if roles[-1] != "user":
        keys.refuse("messages", "the last message has the role user, for the model replies to it; add one")
    return tuple(messages)


def _answer(keys: "_Keys") -> AnswerSpec:
    kind: AnswerType = keys.one_of("type", get_args(AnswerType))
    labels: tuple[str, ...] = ()
    pattern: str | None = None
    choices: str | None = None
    normalised = False
    if kind in ("choice", "word"):
        labels = keys.texts("labels")
        seen = [label.casefold() if kind == "word" else label for label in labels]
        if len(set(seen)) < len(seen):
            keys.refuse(
                "labels", f"each label of a {kind} is there once{', in any case' * (kind == 'word')}; remove one"
            )
        if any(label != label.strip() for label in labels):
            keys.refuse("labels", "labels neither start nor end with a space; remove it")
    elif kind == "regex":
        pattern = keys.text("pattern")
        try:
            groups = re.compile(pattern).groups
        except (re.error, OverflowError, RecursionError) as error:
            keys.refuse("pattern", f"it is not a regular expression of Python: {error}; correct it")
        if groups < 1:
            keys.refuse("pattern", "the answer is its first group; put parentheses around what is the answer")
    elif kind == "likelihood":
        choices = keys.expression("choices")
        normalised = keys.flag("normalised")
    elif kind == "math" and importlib.util.find_spec("math_verify") is None:
        keys.refuse("type", "answers of this type need the library math-verify; run: pip install math-verify")
    stop = keys.texts("stop", may_be_blank=True) if kind != "likelihood" and keys.has("stop") else ()
    keys.finish()
    return AnswerSpec(type=kind, labels=labels, pattern=pattern, stop=stop, choices=choices, normalised=normalised)


def _max_new_tokens(keys: "_Keys", answer: AnswerSpec) -> int:
    if answer.type != "likelihood":
        return keys.integer("max_new_tokens", minimum=1)
    if keys.has("max_new_tokens"):
        keys.refuse("max_new_tokens", "nothing is decoded for answers of type likelihood; remove the key")
    return 1


def _suggestion(word: str, words: Iterable[str], question: str = "did you mean") -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" ({question} {close[0]}?)" if close else ""


class _Keys:
    """The keys of one mapping of a file: each is taken once by a rule, and what nobody took is refused."""

    def __init__(self, file: str, prefix: str, content: object) -> None:
        self._file = file
        self._prefix = prefix
        if not isinstance(content, Mapping):
            where = f"{file}: key `{prefix[:-1]}`" if prefix else file
            raise TaskError(f"{where} is {_shown(content)}: it is a mapping of keys to values; write `key: value`")
        self._content = content
        self._known: list[str] = []

    def refuse(self, key: str, rule: str) -> NoReturn:
        value = self._content.get(key, _MISSING)
        shown = "is missing" if value is _MISSING else f"is {_shown(value)}"
        raise TaskError(f"{self._file}: key `{self._prefix}{key}` {shown}: {rule}")

    def finish(self) -> None:
        for key in self._content:
            if key not in self._known:
                raise TaskError(
                    f"{self._file}: key `{self._prefix}{key}` is not known{_suggestion(str(key), self._known)}: "
                    f"the keys here are {', '.join(dict.fromkeys(self._known))}; correct or remove it"
                )

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        self._known.append(key)
        return self._content.get(key) is not None

    def take(self, key: str, default: Any = _MISSING) -> Any:
        self._known.append(key)
        value = self._content.get(key)
        if value is None and default is _MISSING:
            misspelled = [str(name) for name in self._content if name not in self._known]
            self.refuse(key, f"the key is required{_suggestion(key, misspelled, 'is it')}; add it with a value")
        return default if value is None else value

    def text(self, key: str, default: Any = _MISSING) -> str:
        value = self.take(key, default)
        if not isinstance(value, str):
            self.refuse(key, f"it is a text; {_quote_hint(value)}")
        if not value.strip() and default is _MISSING:
            self.refuse(key, "it is a text that is not empty; write one")
        self._check_characters(key, value)
        return value

    def matching(self, key: str, pattern: str, rule: str) -> str:
        value = self.text(key)
        if not re.fullmatch(pattern, value):
            self.refuse(key, f"it is {rule}; correct it")
        return value

    def name(self, key: str) -> str:
        return self.matching(key, r"\w[\w.-]*", "one name of letters, digits and . _ -")

    def template(self, key: str) -> str:
        value = self.text(key)
        try:
            compile_template(value)
        except TaskError as error:
            self.refuse(key, f"{error}; correct it")
        return value

    def expression(self, key: str) -> str:
        value = self.text(key)
        try:
            compile_expression(value)
        except TaskError as error:
            self.refuse(key, f"{error}; correct it")
        return value

    def flag(self, key: str) -> bool:
        value = self.take(key, default=False)
        if not isinstance(value, bool):
            self.refuse(key, "it is true or false; write one")
        return value

    def texts(self, key: str, *, may_be_blank: bool = False) -> tuple[str, ...]:
        """One text or a list of texts, none of them empty, nor, unless it may be, white space only."""
        value = self.take(key)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not values:
            self.refuse(key, "it is a list of texts with at least one entry; write it like [A, B]")
        for item in values:
            if not isinstance(item, str):
                self.refuse(key, f"entry {item!r} is not a text; {_quote_hint(item)}")
            if not (item if may_be_blank else item.strip()):
                self.refuse(key, "an entry is empty; remove it")
            self._check_characters(key, item)
        return tuple(values)

    def _check_characters(self, key: str, text: str) -> None:
        if half := half_character(text):
            self.refuse(key, f"{half} in it is half a character; correct it")

    def integer(self, key: str, minimum: int | None = None) -> int:
        value = self.take(key)
        if not isinstance(value, int) or isinstance(value, bool):
            self.refuse(key, "it is a whole number; write one")
        if minimum is not None and value < minimum:
            self.refuse(key, f"it is at least {minimum}; raise it")
        return value

    def one_of(self, key: str, choices: tuple[Any, ...], default: Any = _MISSING) -> Any:
        value = self.text(key, default)
        if value not in choices:
            self.refuse(key, f"it is one of {', '.join(choices)}{_suggestion(value, choices)}; choose one")
        return value

    def section(self, key: str) -> "_Keys":
        return _Keys(self._file, f"{self._prefix}{key}.", self.take(key))

    def sections(self, key: str) -> list["_Keys"]:
        values = self.take(key)
        if not isinstance(values, list) or not values:
            self.refuse(key, "it is a list with at least one entry; write each entry as `- {key: value}`")
        return [_Keys(self._file, f"{self._prefix}{key}[{index}].", value) for index, value in enumerate(values)]


def _shown(value: object) -> str:
    short = reprlib.Repr()
    short.maxstring, short.maxlist, short.maxdict = 200, 10, 10
    return short.repr(value)


def _quote_hint(value: object) -> str:
    if isinstance(value, bool):
        return 'YAML reads True, False, Yes, No, On and Off as booleans unless quoted; write "True" with its quotes'
    return "write it in quotes"
