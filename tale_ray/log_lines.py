"""How a search goes, as JSON on stderr: an object on a line for every event and every log record.

The same events as `progress` shows, for programs that read logs. Knows nothing of terminals.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from types import TracebackType
from typing import Any, TextIO

from tale_ray.search.history import History
from tale_ray.search.pool import UnitDoubled, UnitRetried, WorkersChanged
from tale_ray.search.scheduler import Scoring
from tale_ray.store.uris import strip_all

_LOGGER = "tale_ray"


class LogLines:
    """Writes the events of an attempt. A context: logs of the package go to the same place while it is open.

    A line has `time` (ISO 8601, UTC), `level`, `event`, and the event's own fields; addresses have lost what is secret.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._logs = _Records(self)
        self._latest: tuple[str, int] | None = None  # scope and cells of the last line about progress

    def __enter__(self) -> "LogLines":
        logger = logging.getLogger(_LOGGER)
        logger.addHandler(self._logs)
        logger.setLevel(logging.INFO)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.write("error", _name(type(error)), {"message": str(error)})
        logging.getLogger(_LOGGER).removeHandler(self._logs)

    def show(self, event: Any) -> None:
        """Write one event of an attempt; that nothing has advanced is no news."""
        values = {field.name: _plain(getattr(event, field.name)) for field in fields(event)}
        if {"done_cells", "num_workers"} <= values.keys():
            latest = (values["scoring"]["scope"], values["done_cells"])
            if latest == self._latest:
                return
            self._latest = latest
        self.write(_level(event), _name(type(event)), values)

    def write(self, level: str, event: str, values: Mapping[str, Any]) -> None:
        """Write one line."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "level": level, "event": event, **strip_all(dict(values))}
        self._stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._stream.flush()


class _Records(logging.Handler):
    """Writes each log record as an event `log`."""

    def __init__(self, lines: LogLines) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        values: dict[str, Any] = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info is not None:
            values["exception"] = logging.Formatter().formatException(record.exc_info)
        self._lines.write(record.levelname.lower(), "log", values)


def _level(event: Any) -> str:
    lost = isinstance(event, WorkersChanged) and event.lost_because is not None
    return "warning" if lost or isinstance(event, UnitRetried | UnitDoubled) else "info"


def _name(kind: type) -> str:
    """Return a type's name as events are named: `RoundFinished` is `round_finished`."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind.__name__).lstrip("_")


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: of a history its layers, of a scoring what it is of; of others all fields."""
    match value:
        case History():
            return {"rounds": len(value.rounds), "removed": list(value.removed), "num_layers": value.num_layers}
        case Scoring():
            return {
                "scope": value.scope,
                "split": value.split,
                "removed": list(value.removed),
                "candidates": len(value.candidates),
                "rows": value.num_rows,
            }
        case Enum():
            return value.value
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple() | frozenset() | set():
            return [_plain(item) for item in value]
        case _ if is_dataclass(value):
            return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value if isinstance(value, bool | int | float | str | None) else str(value)
