"""Faults of a storage server, as a WSGI middleware: which requests are hurt is a plan, seeded and counted.

Knows HTTP, not S3: what is behind it is any WSGI application. Every request is logged when its answer is known.
"""

import hashlib
import io
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote

FaultKind = Literal["500", "501", "503", "drop", "lose_reply", "slow", "unconditional"]
KINDS = ("500", "501", "503", "drop", "lose_reply", "slow", "unconditional")
DROPPED = 0  # status in the log where no answer was sent

_ERRORS = {
    "500": ("500 Internal Server Error", "InternalError"),
    "501": ("501 Not Implemented", "NotImplemented"),
    "503": ("503 Slow Down", "SlowDown"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to the requests that fit; of several faults that fit a request the first one happens.

    `500`, `501`, `503`: refused with that status, not performed. `drop`: not performed, the connection is cut.
    `lose_reply`: performed, then the connection is cut. `slow`: performed, answered after `seconds`. `unconditional`:
    performed as if it had no conditions, as some stores do.
    """

    kind: FaultKind
    methods: tuple[str, ...] = ()  # none: all
    key: str = ""  # a regular expression, searched in the path without its first slash: bucket/run/lease.json
    header: str = ""  # only requests that have this header, as If-None-Match
    after: int = 0  # so many that fit are let pass first
    count: int | None = None  # at most so often; None: for good
    probability: float = 1.0  # of each that fits, drawn from the plan's seed
    seconds: float = 0.0  # of `slow`

    def __post_init__(self) -> None:
        assert self.kind in KINDS, f"kind is {self.kind!r}: one of {KINDS}"


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the server saw it, in the order of arrival."""

    method: str
    key: str  # the path without its first slash
    query: str
    status: int  # DROPPED: none was sent
    fault: str = ""  # the kind of the fault that it met


@dataclass
class Plan:
    """Which request meets which fault. Depends on the seed and on how many requests fitted a fault before."""

    faults: tuple[Fault, ...] = ()
    seed: int = 0
    _fitted: list[int] = field(default_factory=list)
    _happened: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._fitted = [0] * len(self.faults)
        self._happened = [0] * len(self.faults)

    def draw(self, method: str, key: str, headers: frozenset[str]) -> Fault | None:
        """The fault that a request meets, counted."""
        for number, fault in enumerate(self.faults):
            if fault.methods and method not in fault.methods:
                continue
            if re.search(fault.key, key) is None or (fault.header and fault.header.lower() not in headers):
                continue
            self._fitted[number] += 1
            if self._fitted[number] <= fault.after:
                continue
            if fault.count is not None and self._happened[number] >= fault.count:
                continue
            if _chance(self.seed, number, self._fitted[number]) >= fault.probability:
                continue
            self._happened[number] += 1
            return fault
        return None


def _chance(*parts: int) -> float:
    """A number in [0, 1) that depends on nothing but the parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class Faults:
    """The middleware. `plan` is replaced from any thread; `log` grows until it is cleared."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.plan = Plan()
        self.log: list[Request] = []
        self._application = application
        self._lock = threading.Lock()
        self._serial = threading.Lock()  # one request at a time is performed: conditions are atomic, as they are at S3

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, query = environ["REQUEST_METHOD"], environ.get("QUERY_STRING", "")
        key = unquote(environ["PATH_INFO"]).lstrip("/")
        headers = frozenset(name[5:].replace("_", "-").lower() for name in environ if name.startswith("HTTP_"))
        environ["wsgi.input"] = io.BytesIO(_body(environ))
        with self._lock:
            fault = self.plan.draw(method, key, headers)
            place = len(self.log)
            self.log.append(Request(method, key, query, DROPPED, fault.kind if fault else ""))
            log = self.log

        def note(status: int) -> None:
            log[place] = Request(method, key, query, status, fault.kind if fault else "")

        if fault is not None and fault.kind in _ERRORS:
            line, code = _ERRORS[fault.kind]
            note(int(line[:3]))
            return refuse(start_response, line, code, method)
        if fault is not None and fault.kind == "drop":
            return _cut(environ)
        if fault is not None and fault.kind == "unconditional":
            for name in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"):
                environ.pop(name, None)
        status, sent, body = self._perform(environ)
        if fault is not None and fault.kind == "lose_reply":
            return _cut(environ)
        if fault is not None and fault.kind == "slow":
            time.sleep(fault.seconds)
        note(int(status[:3]))
        start_response(status, sent)
        return [body]

    def _perform(self, environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], bytes]:
        given: list[tuple[str, list[tuple[str, str]]]] = []

        def start(status: str, headers: list[tuple[str, str]], *_: Any) -> Callable[[bytes], None]:
            given.append((status, headers))
            return lambda data: None

        with self._serial:
            parts = self._application(environ, start)
            body = b"".join(parts)
            if (close := getattr(parts, "close", None)) is not None:
                close()
        return *given[0], body


def refuse(start_response: Callable[..., Any], line: str, code: str, method: str) -> Iterable[bytes]:
    """An answer in the form of S3's errors."""
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
    data = b"" if method == "HEAD" else body.encode()
    start_response(line, [("Content-Type", "application/xml"), ("Content-Length", str(len(data)))])
    return [data]


def _body(environ: dict[str, Any]) -> bytes:
    stream = environ["wsgi.input"]
    if environ.get("wsgi.input_terminated"):
        return bytes(stream.read())
    return bytes(stream.read(int(environ.get("CONTENT_LENGTH") or 0)))


def _cut(environ: dict[str, Any]) -> Iterable[bytes]:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError("cut by a fault")
