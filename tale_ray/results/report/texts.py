"""Texts that nobody has vouched for (prompts, replies, errors), made fit to be shown: visible and short.

Escaping for HTML is not done here: the page's template escapes everything.
"""

import re
from dataclasses import dataclass

# Control characters but tab and line feed, what changes the direction or the place of other characters, surrogates, and
# code points that are no characters: HTML forbids some of them, and the others can make a page say what it does not.
_UNFIT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufdd0-\ufdef\ufeff\ufff9-\uffff]"
)


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A text as it is shown; `total` is the number of characters that it really has."""

    text: str
    total: int
    is_cut: bool


def visible(text: str) -> str:
    """Return the text with all that would not be seen, or must not be in a page, written out."""
    return _UNFIT.sub(_picture, text.replace("\r\n", "\n"))


def excerpt(text: str, limit: int) -> Excerpt:
    """Return a text of at most about `limit` characters: its beginning and its end, where it is longer."""
    if len(text) <= limit:
        return Excerpt(visible(text), len(text), is_cut=False)
    head = limit * 2 // 3
    return Excerpt(f"{visible(text[:head])}\n[...]\n{visible(text[head - limit :])}", len(text), is_cut=True)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)  # the pictures of control characters
    return "\u2421" if code == 0x7F else f"\\u{code:04x}"
