"""What a reply answers, and whether that is right. Nothing is ever evaluated.

Every pattern here takes time linear in the length of the reply.

This module does not know what was asked.
"""

import importlib
import re
import threading
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any, Final

from tale_ray.errors import TaskError
from tale_ray.records import RowAnswer
from tale_ray.tasks.harness import judge_reply
from tale_ray.tasks.spec import AnswerSpec

_LETTER_OR_DIGIT: Final = r"[^\W_]"
_AFTER_LABEL: Final = tuple(" \n\t.,;:!?")  # the empty text at the end is not among them
_LEADING: Final = " \t\r\n\f\v\u00a0\u200b\ufeff\"'`*_#$([{<“”„‘’‚«»「『（【"

# Sign (not the dash of 5-7), currency, digits with thousands separators or not, decimals, exponent as e7 or × 10^7.
_NUMBER: Final = re.compile(
    r"(?P<sign>(?<![\w)\]])[-+−])?\\?[$€£]?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE](?P<exponent>[-+−]?\d+)|\ ?(?:[x×*]|\\times|\\cdot)\ ?10(?:\^|\*\*)\{?(?P<power>[-+−]?\d+)\}?)?"
)


def parse_answer(answer: AnswerSpec, reply: str) -> str | None:
    """Return the answer that the reply gives, or None if none can be read from it (an invalid reply).

    A choice or a word is returned as the label is spelled, a number without its thousands separators.
    """
    match answer.type:
        case "choice":
            return _parse_choice(answer.labels, reply)
        case "word":
            return _first_label(answer.labels, reply, ignore_case=True)
        case "number":
            return _parse_number(reply)
        case "regex":
            return _parse_regex(answer.pattern or "", reply)
        case "math":
            return _parse_math(reply)
        case "likelihood" | "harness":
            raise ValueError(f"answers of type {answer.type} are not read from a reply here")


def read_reply(answer: AnswerSpec, reply: str, target: str) -> RowAnswer:
    """Return what a reply answers, and whether that is right.

    Raises:
        TaskError: a task of lm-evaluation-harness cannot judge it.
    """
    if answer.harness is not None:
        return judge_reply(answer.harness, reply, target)
    prediction = parse_answer(answer, reply)
    return RowAnswer(reply, prediction, is_correct(answer, prediction, target))


def cut_reply(answer: AnswerSpec, text: str) -> str:
    """Return what comes before the first stop string."""
    return text[: min((at for stop in answer.stop if (at := text.find(stop)) >= 0), default=len(text))]


def is_settled(answer: AnswerSpec, reply: str) -> bool:
    """Return whether `parse_answer` gives the same answer whatever the reply goes on with. False: it may not.

    So it is after a stop string, and for a choice or a word once a label is complete and none that is under way could
    take its place.
    """
    if len(cut_reply(answer, reply)) < len(reply):
        return True
    if answer.type not in ("choice", "word"):
        return False
    text = _composed(reply)
    found = _first_label(answer.labels, text, ignore_case=answer.type == "word")
    if found is None or found != parse_answer(answer, text):
        return False
    pattern = _labels_pattern(answer.labels, answer.type == "word")
    match = pattern.search(text)
    assert match is not None, "a label was found"
    if text[match.end() : match.end() + 1] not in _AFTER_LABEL:
        return False
    labels = [_composed(label).casefold() for label in answer.labels]
    under_way = (text[start:].casefold() for start in range(match.end()))
    return not any(label.startswith(rest) for rest in under_way for label in labels)


def target_choice(choices: Sequence[str], target: str) -> int:
    """Return which of the choices the target of a row is, but for white space around it; the first of equals.

    Raises:
        TaskError: it is none of them.
    """
    for number, choice in enumerate(choices):
        if choice.strip() == target.strip():
            return number
    raise TaskError(
        f"the target {target!r} is none of the choices {', '.join(map(repr, choices))}: it is the text of one of them; "
        "correct `target` or `answer.choices`"
    )


def is_correct(answer: AnswerSpec, prediction: str | None, target: str) -> bool:
    """Return whether the prediction equals the target, as the type of the answer understands equality."""
    if prediction is None:
        return False
    match answer.type:
        case "choice" | "likelihood":
            return prediction == target
        case "word" | "regex":
            return prediction.strip().casefold() == target.strip().casefold()
        case "number":
            expected = _parse_number(target)
            return expected is not None and Decimal(prediction) == Decimal(expected)
        case "math":
            return _math_equal(prediction, target)
        case "harness":
            raise ValueError("tasks of lm-evaluation-harness judge replies themselves")


def parse_target(answer: AnswerSpec, target: str) -> str:
    """Return the target of a row, a word spelled as its label.

    Raises:
        TaskError: no reply could ever equal it.
    """
    if answer.type == "choice":
        spelled = target if target in answer.labels else None
    elif answer.type == "word":
        spelled = next((label for label in answer.labels if label.casefold() == target.casefold()), None)
    elif answer.type == "number":
        spelled = target if _parse_number(target) is not None else None
    else:
        spelled = target or None
    if spelled is not None:
        return spelled
    rule = f"one of the labels {', '.join(answer.labels)}" if answer.labels else "a number"
    if answer.type in ("regex", "math"):
        rule = "not empty"
    raise TaskError(f"the target {target!r} is no answer of type {answer.type}: it is {rule}; correct `target`")


def _parse_choice(labels: tuple[str, ...], reply: str) -> str | None:
    start = _composed(reply).lstrip(_LEADING)
    for label in sorted(labels, key=len, reverse=True):
        rest = start.removeprefix(_composed(label))
        if len(rest) < len(start) and not _continues(label, rest):
            return label
    return _first_label(labels, reply, ignore_case=False)


def _composed(text: str) -> str:
    """Return the text with each letter and its accents as one character."""
    return unicodedata.normalize("NFC", text)


def _continues(label: str, rest: str) -> bool:
    """Whether the text goes on as the same word, or as the same number for a label like 1."""
    return rest[:1].isalpha() or (label[-1].isdigit() and rest[:1].isdigit())


def _first_label(labels: tuple[str, ...], reply: str, *, ignore_case: bool) -> str | None:
    found = _labels_pattern(labels, ignore_case).search(_composed(reply))
    return labels[int(found.lastgroup[1:])] if found and found.lastgroup else None


@lru_cache(maxsize=256)
def _labels_pattern(labels: tuple[str, ...], ignore_case: bool) -> re.Pattern[str]:
    longest_first = sorted(enumerate(labels), key=lambda item: -len(item[1]))
    names = "|".join(f"(?P<L{index}>{re.escape(_composed(label))})" for index, label in longest_first)
    pattern = rf"(?<!{_LETTER_OR_DIGIT})(?:{names})(?!{_LETTER_OR_DIGIT})"
    return re.compile(pattern, re.IGNORECASE if ignore_case else 0)


def _parse_number(text: str) -> str | None:
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "")
    if marked := re.search(r"####[\s*]*(?=[-+−\\$€£.\d])", text):
        found = _NUMBER.match(text, marked.end())
        if found and (number := _plain_number(found)) is not None:
            return number
    boxed = _last_boxed(text)
    for part in (boxed, text):
        if part is not None and (number := _last_number(part)) is not None:
            return number
    return None


def _last_number(text: str) -> str | None:
    number = None
    for found in _NUMBER.finditer(text):
        number = _plain_number(found) or number
    return number


def _plain_number(found: re.Match[str]) -> str | None:
    sign = "-" if found["sign"] in ("-", "−") else ""
    number = sign + found["digits"].replace(",", "")
    if exponent := found["exponent"] or found["power"]:
        number += "e" + exponent.replace("−", "-")
    try:
        return number if Decimal(number).is_finite() else None
    except InvalidOperation:  # an exponent beyond all bounds
        return None


def _last_boxed(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` holds; to the end of the text if it is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start:index]
    return text[start:]


def _parse_regex(pattern: str, reply: str) -> str | None:
    found = re.search(pattern, reply, re.IGNORECASE)
    return (found[1] or "").strip() or None if found else None


def _math_verify() -> Any:
    try:
        return importlib.import_module("math_verify")
    except ImportError as error:
        raise TaskError(
            "answers of type math need the library math-verify, which is not installed; run: pip install math-verify"
        ) from error


def _parse_math(reply: str) -> str | None:
    boxed = _last_boxed(reply)
    answer = reply if boxed is None else f"\\boxed{{{boxed}}}"
    return answer if _math_values(answer) else None


def _math_values(text: str) -> Any:
    return _math_verify().parse(text, **_timeouts("parsing_timeout"))


def _math_equal(prediction: str, target: str) -> bool:
    expected = target if "\\boxed" in target else f"\\boxed{{{target}}}"
    values = _math_values(expected), _math_values(prediction)
    return bool(_math_verify().verify(*values, **_timeouts("timeout_seconds")))


def _timeouts(option: str) -> dict[str, None]:
    """Its timeout is an alarm, which only a main thread can set."""
    return {} if threading.current_thread() is threading.main_thread() else {option: None}
