"""A request to stop, honoured only where stopping is safe.

A signal handler calls `request`. Inside `breakable` the request is raised at once (also out of a long computation);
everywhere else it waits for the next `check`, so that a file under way is written to its end.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tale_ray.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)


class Interruption:
    """One run's request to stop; `reason` is None until there is one."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._breakable = False
        self._deadline: float | None = None
        self._handler: Callable[[int, FrameType | None], None] | None = None

    def request(self, reason: str) -> None:
        """Ask to stop. Raises at once inside `breakable`, if called in the thread that runs it."""
        self.reason = reason
        if self._breakable:
            self.check()

    def check(self) -> None:
        """Raise `Interrupted` if a stop was asked for, or the time is up (libraries may take the alarm for theirs)."""
        if self.reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = "the time limit is reached"
        if self.reason is not None:
            self._breakable = False
            raise Interrupted(self.reason)

    def sleep(self, seconds: float) -> None:
        """Let some time pass, or less if a stop is asked for."""
        with self.breakable():
            time.sleep(seconds)

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """Let a request break into the body.

        The body ends as interrupted too where a library took the request for an error of its own.
        """
        self._breakable = True
        try:
            self.check()
            yield
        except Exception as error:
            if self.reason is None or isinstance(error, Interrupted):
                raise
            raise Interrupted(self.reason) from error
        finally:
            self._breakable = False

    def arm(self) -> None:
        """Install the signal handlers again, if `on_signals` did and another library has replaced them since."""
        if self._handler is not None:
            for number in _SIGNALS:
                signal.signal(number, self._handler)

    @contextmanager
    def on_signals(self, time_limit_seconds: float | None = None) -> Iterator[None]:
        """Turn SIGINT, SIGTERM and the time limit into requests; after a signal, a second one ends the process at once.

        Outside the main thread Python allows no handlers: only the time limit holds there, between units.
        """
        if time_limit_seconds is not None:
            self._deadline = time.monotonic() + time_limit_seconds
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            if number == signal.SIGALRM:
                self.request(f"the time limit of {time_limit_seconds:g} s is reached")
                return
            signal.setitimer(signal.ITIMER_REAL, 0)
            for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(each, signal.SIG_DFL)
            self.request(f"{signal.Signals(number).name} was received")

        previous = {number: signal.getsignal(number) for number in _SIGNALS}
        self._handler = handle
        self.arm()
        signal.setitimer(signal.ITIMER_REAL, time_limit_seconds or 0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._handler = None
            for number, handler in previous.items():
                signal.signal(number, handler or signal.SIG_DFL)  # None: it was not installed by Python
