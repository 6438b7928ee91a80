"""What became of a submission: Ray's words and the exit code of `tale-ray`, from what its server says of a job.

Does not know how the server is asked; imports nothing of Ray.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 75
LOST_DRIVER = frozenset(  # Ray's error types of a driver whose process or node is gone
    {"JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE"}
)
_ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_SIGNALLED = 128  # a shell adds the signal's number


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """One submission as the cluster sees it."""

    id: str
    status: str  # PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED
    run: str | None = None  # folder or URI; None: not one of ours
    driver_exit_code: int | None = None
    error_type: str | None = None
    message: str = ""
    start_seconds: float | None = None  # Unix time
    end_seconds: float | None = None

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self.status in _ENDED

    @property
    def lost_driver(self) -> bool:
        """Whether the driver was ended from outside, by a signal or with its node, and not by `tale-ray stop`."""
        if self.status != "FAILED":
            return False
        code = self.driver_exit_code
        return self.error_type in LOST_DRIVER if code is None else code < 0 or code > _SIGNALLED

    @property
    def exit_code(self) -> int | None:
        """What `tale-ray search` would have exited with; None before the end.

        Ray notes no exit code of a job that it stops. Such a run can be gone on with, however its driver ended.
        """
        if not self.ended:
            return None
        if self.status == "STOPPED" or self.lost_driver:
            return INTERRUPTED
        if self.status == "SUCCEEDED":
            return DONE
        return self.driver_exit_code if self.driver_exit_code in (USAGE, INTERRUPTED) else FAILED

    @property
    def worth_another_attempt(self) -> bool:
        """Whether the run was interrupted, and by nobody who wanted it to stop."""
        return self.status == "FAILED" and self.exit_code == INTERRUPTED


def describe_state(state: JobState) -> str:
    """Return a submission's state in one line."""
    if not state.ended:
        return f"{state.id}: {state.status.lower()}"
    reason = {
        DONE: "done",
        FAILED: "failed",
        USAGE: "the request cannot be met",
        INTERRUPTED: "interrupted and resumable",
    }[state.exit_code or DONE]
    if state.status == "STOPPED":
        reason = f"stopped; {reason}"
    elif state.lost_driver:
        reason = f"its driver is lost; {reason}"
    return f"{state.id}: {reason} (exit code {state.exit_code})"


def next_id(name: str, taken: Iterable[str]) -> str:
    """Return the id of a run's next submission, `<name>-a<attempt>`: one more than the highest that is taken."""
    pattern = re.compile(rf"{re.escape(name)}-a([0-9]+)")
    attempts = [int(match[1]) for each in taken if (match := pattern.fullmatch(each))]
    return f"{name}-a{max(attempts, default=0) + 1}"
