"""The keys of a file, each taken by a rule; every refusal names file, key, value and remedy."""

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, Final, NoReturn

from tale_ray.errors import TaskError
from tale_ray.tasks.templates import compile_expression, compile_template, half_character

_MISSING: Final = object()


def suggestion(word: str, words: Iterable[str], question: str = "did you mean") -> str:
    """Return the closest of the words in brackets, as a question, or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" ({question} {close[0]}?)" if close else ""


class Keys:
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
        """Raise what says which value of the key breaks which rule."""
        value = self._content.get(key, _MISSING)
        shown = "is missing" if value is _MISSING else f"is {_shown(value)}"
        raise TaskError(f"{self._file}: key `{self._prefix}{key}` {shown}: {rule}")

    def finish(self) -> None:
        """Refuse keys that nobody took."""
        for key in self._content:
            if key not in self._known:
                raise TaskError(
                    f"{self._file}: key `{self._prefix}{key}` is not known{suggestion(str(key), self._known)}: "
                    f"the keys here are {', '.join(dict.fromkeys(self._known))}; correct or remove it"
                )

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        self._known.append(key)
        return self._content.get(key) is not None

    def take(self, key: str, default: Any = _MISSING) -> Any:
        """Return the value of a key; one without a default has to be there."""
        self._known.append(key)
        value = self._content.get(key)
        if value is None and default is _MISSING:
            misspelled = [str(name) for name in self._content if name not in self._known]
            self.refuse(key, f"the key is required{suggestion(key, misspelled, 'is it')}; add it with a value")
        return default if value is None else value

    def text(self, key: str, default: Any = _MISSING) -> str:
        """Return a text that is not empty."""
        value = self.take(key, default)
        if not isinstance(value, str):
            self.refuse(key, f"it is a text; {_quote_hint(value)}")
        if not value.strip() and default is _MISSING:
            self.refuse(key, "it is a text that is not empty; write one")
        self._check_characters(key, value)
        return value

    def matching(self, key: str, pattern: str, rule: str) -> str:
        """Return a text that matches a pattern as a whole."""
        value = self.text(key)
        if not re.fullmatch(pattern, value):
            self.refuse(key, f"it is {rule}; correct it")
        return value

    def name(self, key: str) -> str:
        """Return a name."""
        return self.matching(key, r"\w[\w.-]*", "one name of letters, digits and . _ -")

    def template(self, key: str) -> str:
        """Return the text of a template that compiles."""
        value = self.text(key)
        try:
            compile_template(value)
        except TaskError as error:
            self.refuse(key, f"{error}; correct it")
        return value

    def expression(self, key: str) -> str:
        """Return the text of an expression that compiles."""
        value = self.text(key)
        try:
            compile_expression(value)
        except TaskError as error:
            self.refuse(key, f"{error}; correct it")
        return value

    def flag(self, key: str) -> bool:
        """Return true or false."""
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
        """Return a whole number."""
        value = self.take(key)
        if not isinstance(value, int) or isinstance(value, bool):
            self.refuse(key, "it is a whole number; write one")
        if minimum is not None and value < minimum:
            self.refuse(key, f"it is at least {minimum}; raise it")
        return value

    def one_of(self, key: str, choices: tuple[Any, ...], default: Any = _MISSING) -> Any:
        """Return one of the choices."""
        value = self.text(key, default)
        if value not in choices:
            self.refuse(key, f"it is one of {', '.join(choices)}{suggestion(value, choices)}; choose one")
        return value

    def section(self, key: str) -> "Keys":
        """Return the keys of a mapping."""
        return Keys(self._file, f"{self._prefix}{key}.", self.take(key))

    def sections(self, key: str) -> list["Keys"]:
        """Return the keys of every mapping in a list."""
        values = self.take(key)
        if not isinstance(values, list) or not values:
            self.refuse(key, "it is a list with at least one entry; write each entry as `- {key: value}`")
        return [Keys(self._file, f"{self._prefix}{key}[{index}].", value) for index, value in enumerate(values)]


def _shown(value: object) -> str:
    short = reprlib.Repr()
    short.maxstring, short.maxlist, short.maxdict = 200, 10, 10
    return short.repr(value)


def _quote_hint(value: object) -> str:
    if isinstance(value, bool):
        return 'YAML reads True, False, Yes, No, On and Off as booleans unless quoted; write "True" with its quotes'
    return "write it in quotes"
