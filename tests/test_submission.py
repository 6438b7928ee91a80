"""When a job is submitted again, and what its end means: against a server that plays its part."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tale_ray.cluster.job_state import JobState, describe_state, next_id
from tale_ray.cluster.submission import JobEnded, JobPrinted, JobRequest, JobSubmitted, submit_to_end

REQUEST = JobRequest(name="run", run="/shared/run", entrypoint="true")
SUCCEEDED = JobState(id="", status="SUCCEEDED", driver_exit_code=0)
STOPPED = JobState(id="", status="STOPPED")
LOST = JobState(id="", status="FAILED", error_type="JOB_SUPERVISOR_ACTOR_DIED")
NO_ENVIRONMENT = JobState(id="", status="FAILED", error_type="RUNTIME_ENV_SETUP_FAILURE")


def exited(code: int) -> JobState:
    return JobState(id="", status="FAILED", driver_exit_code=code, error_type="JOB_ENTRYPOINT_COMMAND_ERROR")


@dataclass
class Server:
    """Ends its jobs as it was told to."""

    ends: list[JobState | None]
    address: str = "http://played"
    taken: list[str] = field(default_factory=list)

    def submissions(self, run: str | None = None) -> list[JobState]:
        raise NotImplementedError

    def submit(self, request: JobRequest) -> str:
        self.taken.append(next_id(request.name, self.taken))
        return self.taken[-1]

    def state(self, job: str) -> JobState | None:
        raise NotImplementedError

    def stop(self, job: str) -> None:
        raise NotImplementedError

    def logs(self, job: str) -> str:
        raise NotImplementedError

    def follow(self, job: str) -> Iterator[str]:
        yield f"{job} "
        yield "says\n"

    def await_end(self, job: str, seconds: float | None = None) -> JobState | None:
        return self.ends[len(self.taken) - 1]


@pytest.mark.parametrize(
    ("state", "exit_code", "again"),
    [
        (SUCCEEDED, 0, False),
        (exited(1), 1, False),
        (exited(2), 2, False),
        (exited(75), 75, True),
        (exited(3), 1, False),
        (exited(137), 75, True),  # the shell's word for SIGKILL
        (exited(-9), 75, True),
        (LOST, 75, True),
        (NO_ENVIRONMENT, 1, False),
        (STOPPED, 75, False),
    ],
)
def test_an_end_has_an_exit_code_and_maybe_a_sequel(state: JobState, exit_code: int, again: bool) -> None:
    assert state.exit_code == exit_code
    assert state.worth_another_attempt is again
    assert f"(exit code {exit_code})" in describe_state(state)
    server = Server([state, SUCCEEDED])
    ended = [event for event in submit_to_end(server, REQUEST, 2, False) if isinstance(event, JobEnded)]
    assert [event.again for event in ended] == ([True, False] if again else [False])
    assert ended[-1].state is (SUCCEEDED if again else state)


def test_attempts_come_to_an_end() -> None:
    server = Server([exited(75), LOST, None, SUCCEEDED])
    events = list(submit_to_end(server, REQUEST, 3, False))
    assert server.taken == ["run-a1", "run-a2", "run-a3"]
    last = events[-1]
    assert isinstance(last, JobEnded)
    assert last.state.exit_code == 75
    assert "its driver is lost" in describe_state(last.state)


def test_a_followed_job_is_heard() -> None:
    events = list(submit_to_end(Server([SUCCEEDED]), REQUEST, 3, True))
    assert events == [
        JobSubmitted("run-a1", 1),
        JobPrinted("run-a1 "),
        JobPrinted("says\n"),
        JobEnded(SUCCEEDED, False),
    ]


def test_a_running_job_has_no_exit_code() -> None:
    running = JobState(id="run-a1", status="RUNNING")
    assert running.exit_code is None
    assert describe_state(running) == "run-a1: running"


def test_attempts_are_numbered_on() -> None:
    assert next_id("run", []) == "run-a1"
    assert (
        next_id("run", ["run-a1", "run-a9", "run-a10", "other-a40", "run-a1-a50", "xrun-a60", "r.n-a70"]) == "run-a11"
    )
    assert next_id("r.n", ["run-a4"]) == "r.n-a1"
