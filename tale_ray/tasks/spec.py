"""A task as its YAML file describes it, checked whole before anything is read or asked.

This module does not read rows, nor render them.
"""

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import yaml

from tale_ray.errors import TaskError
from tale_ray.paths import existing
from tale_ray.tasks.keys import Keys, suggestion

FileAnswerType: TypeAlias = Literal["choice", "word", "number", "math", "regex", "likelihood"]  # in a task file
AnswerType: TypeAlias = FileAnswerType | Literal["harness"]
FileFormat: TypeAlias = Literal["csv", "json", "parquet"]

GENERATORS: Final = ("boolean",)
METRICS: Final = ("accuracy",)
ROLES: Final = ("system", "user", "assistant")

_FOLDER: Final = Path(str(resources.files("tale_ray.tasks"))) / "builtin"


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


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessSource:
    """A task of lm-evaluation-harness, with all that it says of its rows."""

    task: str
    include_path: str | None  # a folder of task files beside its own
    num_shots: int  # 0: as many as the task asks for

    def __str__(self) -> str:
        """Return the source as a user would name it."""
        where = f", from {self.include_path}" if self.include_path else ""
        return f"lm-evaluation-harness, {self.task}{where}"


Source: TypeAlias = HubSource | FileSource | GeneratorSource


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessScoring:
    """What says whether a row is right: a metric of lm-evaluation-harness, after a filter of the task."""

    source: HarnessSource
    metric: str
    filter: str
    fingerprint: str  # SHA-256 of the task's configuration and rows, hex: the same wherever it is scored
    config: str  # the task's configuration as canonical JSON


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerSpec:
    """How an answer is read from a reply, and what counts as equal."""

    type: AnswerType
    labels: tuple[str, ...] = ()  # of choice and word
    pattern: str | None = None  # of regex
    stop: tuple[str, ...] = ()  # a reply ends before the first of these texts
    choices: str | None = None  # of likelihood: a jinja2 expression over the row's columns that gives a list of texts
    normalised: bool = False  # of likelihood: by the characters of the choices
    harness: HarnessScoring | None = None  # of harness


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSpec:
    """A checked task. `messages`, `reply` and `target` are jinja2 templates over the columns of a row."""

    name: str
    description: str
    source: Source | HarnessSource
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
                **({"harness": self._harness_identity()} if self.answer.harness is not None else {}),
            },
            "max_new_tokens": self.max_new_tokens,
            "metric": self.metric,
            "group_by": self.group_by,
        }

    def _harness_identity(self) -> dict[str, Any]:
        scoring = self.answer.harness
        assert scoring is not None
        return {
            "task": scoring.source.task,
            "metric": scoring.metric,
            "filter": scoring.filter,
            "config": hashlib.sha256(scoring.config.encode()).hexdigest(),
        }


def builtin_tasks() -> tuple[str, ...]:
    """Return the names of the built-in tasks, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def load_task(name_or_path: str) -> TaskSpec:
    """Return the built-in task of that name, or the task of that YAML file.

    Raises:
        TaskError: no such task or file, or the file breaks a rule; the message names file, key, value and remedy.
    """
    if name_or_path in builtin_tasks():
        return _load_file(_FOLDER / f"{name_or_path}.yaml")
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or existing(name_or_path, Path.is_file):
        return _load_file(path)
    raise TaskError(
        f"task {name_or_path!r} is not known{suggestion(name_or_path, builtin_tasks())}: "
        f"the built-in tasks are {', '.join(builtin_tasks())}; a task of your own is given as the path of a .yaml "
        "file, one of lm-evaluation-harness as lm-eval:NAME"
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
    keys = Keys(f"task file {path}", "", content)
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


def _source(keys: Keys) -> Source:
    source: Source | HarnessSource
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


def _messages(keys: Keys) -> tuple[dict[str, str], ...]:
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


def _answer(keys: Keys) -> AnswerSpec:
    kind: FileAnswerType = keys.one_of("type", get_args(FileAnswerType))
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


def _max_new_tokens(keys: Keys, answer: AnswerSpec) -> int:
    if answer.type != "likelihood":
        return keys.integer("max_new_tokens", minimum=1)
    if keys.has("max_new_tokens"):
        keys.refuse("max_new_tokens", "nothing is decoded for answers of type likelihood; remove the key")
    return 1
