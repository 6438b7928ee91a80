"""A job to its end: submitted, followed, and submitted again where its run was interrupted.

A generator of frozen events. Does not know how a server is asked (`Jobs` does) nor how anything is shown.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tale_ray.cluster.job_state import JobState


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest:
    """What is submitted."""

    name: str  # ids are <name>-a<attempt>
    run: str
    entrypoint: str
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    num_cpus: float = 0


@dataclass(frozen=True, slots=True)
class JobSubmitted:
    """A submission has an id."""

    id: str
    attempt: int  # of those that this call may make, from 1


@dataclass(frozen=True, slots=True)
class JobPrinted:
    """A submission has printed something."""

    text: str


@dataclass(frozen=True, slots=True)
class JobEnded:
    """A submission has ended; another follows if `again`."""

    state: JobState
    again: bool


JobEvent = JobSubmitted | JobPrinted | JobEnded


class JobServer(Protocol):
    """The jobs of a cluster. Any call raises `Interrupted` when the cluster does not answer any more."""

    address: str

    def submissions(self, run: str | None = None) -> list[JobState]:
        """Return the submissions that the cluster knows, those of one run if it is named, oldest first."""

    def submit(self, request: JobRequest) -> str:
        """Submit a job and return its id, whose attempt follows those that are there."""

    def state(self, job: str) -> JobState | None:
        """Return the state of a submission; None if the cluster does not know it."""

    def stop(self, job: str) -> None:
        """Ask a submission to end. It gets SIGTERM, and time to store what it has."""

    def logs(self, job: str) -> str:
        """Return everything that a submission has printed."""

    def follow(self, job: str) -> Iterator[str]:
        """Yield what a submission prints, from the beginning, until it has ended; nothing twice."""

    def await_end(self, job: str, seconds: float | None = None) -> JobState | None:
        """Return a submission's last state, or what it is after so many seconds; None if the cluster forgot it."""


def submit_to_end(server: JobServer, request: JobRequest, attempts: int, follow: bool) -> Iterator[JobEvent]:
    """Submit a job, wait for its end, and submit it again while its run was interrupted and attempts are left.

    A job that was stopped on purpose, that failed or that asks for what cannot be is not submitted again. Every
    submission goes on with what the run's folder holds.
    """
    for attempt in range(1, attempts + 1):
        job = server.submit(request)
        yield JobSubmitted(job, attempt)
        if follow:
            for text in server.follow(job):
                yield JobPrinted(text)
        state = server.await_end(job) or forgotten(job)
        again = state.worth_another_attempt and attempt < attempts
        yield JobEnded(state, again)
        if not again:
            return


def forgotten(job: str) -> JobState:
    """Return the state of a submission that the cluster has forgotten: its head was started anew."""
    return JobState(id=job, status="FAILED", error_type="JOB_SUPERVISOR_ACTOR_DIED", message="the cluster is a new one")
