"""Calibration text: what strategies measure a model on, from a file instead of the task's prompts.

Plain text has a row in every paragraph, JSON lines (`*.jsonl`) have one each, in the field `text`. Knows nothing of
models or measurements.
"""

import hashlib
import json
import re
from pathlib import Path

from tale_ray.errors import TaskError
from tale_ray.records import Example


def load_calibration(path: str) -> tuple[Example, ...]:
    """Return the rows of a file of calibration text, in its order, as plain prompts; empty ones are left out.

    Raises:
        TaskError: the file cannot be read, is not of that form, or holds no text.
    """
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(
            f"calibration file {path!r} cannot be read ({error}): name a text file in UTF-8, or a *.jsonl file"
        ) from error
    texts = _json_texts(content, path) if path.endswith(".jsonl") else re.split(r"\n\s*\n", content)
    rows = tuple(_example(text.strip()) for text in texts if text.strip())
    if not rows:
        raise TaskError(
            f"calibration file {path!r} is empty: it holds text, in paragraphs or as JSON lines with a field text; "
            "name another file, or leave --calibration out to measure on the prompts of the search rows"
        )
    return rows


def _json_texts(content: str, path: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TaskError(
                f"calibration file {path!r}, line {number} is no JSON ({error}): every line is an object with a field "
                "text, or rename a file of plain text to *.txt"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise TaskError(
                f"calibration file {path!r}, line {number} has no text: every line is an object with a field text that "
                "holds one"
            )
        texts.append(row["text"])
    return texts


def _example(text: str) -> Example:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Example(digest=digest, messages=(), reply="", target="", prompt=text)
