"""A signal at any line of the package, as a handler of the process raises it."""

import sys
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any


class Signal(BaseException):
    """What a signal handler raises."""


def struck_at(line: int, call: Callable[[], Any], functions: Collection[str] = ()) -> bool:
    """Call, and raise a Signal in the package's line of that number, counted from 0; False if there are not so many.

    Given `functions`, only their lines count.
    """
    left = line

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left
        code = frame.f_code
        if "tale_ray" not in code.co_filename or (functions and code.co_name not in functions):
            return None
        if event == "line":
            left -= 1
            if left == -1:
                raise Signal
        return trace

    previous = sys.gettrace()
    try:
        sys.settrace(trace)
        call()
    except Signal:
        pass
    finally:
        sys.settrace(previous)
    return left < 0
