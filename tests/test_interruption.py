"""Requests to stop: where they break in, where they wait."""

import signal
import time

import pytest

from tale_ray.attempt.execution import connect
from tale_ray.errors import Interrupted
from tale_ray.search.interruption import Interruption


def test_a_request_waits_outside_of_what_may_break() -> None:
    interruption = Interruption()
    interruption.request("enough")
    with pytest.raises(Interrupted, match="enough"):
        interruption.check()


def test_a_request_breaks_into_what_may_break() -> None:
    interruption = Interruption()
    with pytest.raises(Interrupted, match="enough"), interruption.breakable():
        interruption.request("enough")
        pytest.fail("the body went on")


def test_an_error_made_of_a_request_is_the_request() -> None:
    interruption = Interruption()
    with pytest.raises(Interrupted, match="enough"), interruption.breakable():
        interruption.reason = "enough"
        raise ValueError("a library took the exception for its own")


def test_an_error_without_a_request_is_itself() -> None:
    with pytest.raises(ValueError, match="real"), Interruption().breakable():
        raise ValueError("real")


def test_the_time_limit_holds_when_a_library_has_taken_the_alarm() -> None:
    interruption = Interruption()
    with interruption.on_signals(0.01):
        signal.setitimer(signal.ITIMER_REAL, 0)  # as math-verify does
        deadline = time.monotonic() + 0.02
        while time.monotonic() < deadline:
            pass
        with pytest.raises(Interrupted, match="time limit"):
            interruption.check()


def test_a_signal_ends_a_sleep_and_handlers_are_given_back() -> None:
    interruption = Interruption()
    before = signal.getsignal(signal.SIGTERM)
    with interruption.on_signals(), pytest.raises(Interrupted, match="SIGTERM"):
        signal.raise_signal(signal.SIGTERM)
        interruption.sleep(60)
    assert signal.getsignal(signal.SIGTERM) is before


class Connecting:
    """An executor's way to its place, during which the process gets a signal."""

    def __init__(self, number: signal.Signals) -> None:
        self.number, self.is_there = number, False

    def connect(self) -> None:
        signal.raise_signal(self.number)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as ray.init does
        self.is_there = True


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGTERM, signal.SIGINT])
def test_nothing_breaks_into_connecting(number: signal.Signals) -> None:
    """What Ray has made by half may wait for ever when it is thrown away."""
    interruption, executor = Interruption(), Connecting(number)
    with pytest.raises(Interrupted), interruption.on_signals(60):
        connect(executor, interruption)  # type: ignore[arg-type]
        assert executor.is_there
        assert signal.getsignal(signal.SIGTERM) is not signal.default_int_handler
        with interruption.breakable():
            pytest.fail("the body went on")
    assert executor.is_there


def test_nobody_connects_who_was_asked_to_stop() -> None:
    interruption, executor = Interruption(), Connecting(signal.SIGALRM)
    interruption.request("enough")
    with pytest.raises(Interrupted, match="enough"):
        connect(executor, interruption)  # type: ignore[arg-type]
    assert not executor.is_there
