"""What is made of a job server's words, its silence and its errors: Ray's client is played here."""

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from ray.exceptions import AuthenticationError

from tale_ray.cluster import jobs
from tale_ray.cluster.jobs import Jobs
from tale_ray.cluster.submission import JobRequest
from tale_ray.errors import InfeasibleError, Interrupted, TaleRayError

URL = "http://played:8265"
REQUEST = JobRequest(name="run", run="s3://user:word@bucket/run", entrypoint="true", metadata={"team": "x"})
NO_AGENT = "Request failed with status code 500: No available agent to submit job, please try again later.."


@dataclass
class Client:
    """Ray's client: raises the errors that it was given, one a call, before it does what it is asked for."""

    errors: list[Exception] = field(default_factory=list)
    jobs: dict[str, Any] = field(default_factory=dict)
    pieces: list[list[str | Exception]] = field(default_factory=list)  # of one log stream each
    taken_in_spite: bool = False

    def _maybe(self) -> None:
        if self.errors:
            raise self.errors.pop(0)

    def list_jobs(self) -> list[Any]:
        return list(self.jobs.values())

    def submit_job(self, **asked: Any) -> str:
        job = asked["submission_id"]
        if not self.errors or self.taken_in_spite:
            self.jobs[job] = details(job, "RUNNING", metadata=asked["metadata"])
        self._maybe()
        return job  # type: ignore[no-any-return]

    def get_job_info(self, job: str) -> Any:
        self._maybe()
        if job not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")
        return self.jobs[job]

    def get_job_logs(self, job: str) -> str:
        self._maybe()
        return "one\ntwo\nthree\n"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        stream = self.pieces.pop(0)
        if not self.pieces:
            self.jobs[job] = details(job, "SUCCEEDED")
        for piece in stream:
            if isinstance(piece, Exception):
                raise piece
            yield piece


def details(job: str, status: str, **more: Any) -> Any:
    known = {"job_id": None, "driver_exit_code": None, "error_type": None, "message": None, "metadata": {}}
    return SimpleNamespace(submission_id=job, status=status, start_time=None, end_time=None, **{**known, **more})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Jobs, Client]]]:
    def make(**played: Any) -> tuple[Jobs, Client]:
        client = Client(**played)
        monkeypatch.setattr(jobs, "_Client", lambda address: client)
        return Jobs(URL), client

    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.0)
    return make


def test_a_job_that_was_taken_is_not_submitted_twice(server: Any) -> None:
    """The answer was lost on its way, and not the question."""
    asked, client = server(errors=[requests.ConnectionError("reset")], taken_in_spite=True)
    assert asked.submit(REQUEST) == "run-a1"
    assert list(client.jobs) == ["run-a1"]


def test_a_question_that_was_lost_is_asked_again(server: Any) -> None:
    asked, client = server(errors=[requests.Timeout("slow"), ConnectionError("reset")])
    assert asked.submit(REQUEST) == "run-a1"
    assert list(client.jobs) == ["run-a1"]


def test_a_cluster_that_has_just_been_started_is_waited_for(server: Any) -> None:
    asked, _ = server(errors=[RuntimeError(NO_AGENT)] * 3)
    assert asked.submit(REQUEST) == "run-a1"


def test_a_cluster_that_never_takes_a_job_is_given_up(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "START_SECONDS", 0.0)
    asked, _ = server(errors=[RuntimeError(NO_AGENT)])
    with pytest.raises(InfeasibleError, match=r"has taken no job for 0 s .*dashboard_agent.log"):
        asked.submit(REQUEST)


def test_a_job_that_is_refused_is_not_submitted_again(server: Any) -> None:
    asked, client = server(errors=[RuntimeError("Request failed with status code 400: Traceback\nValueError: no pip")])
    with pytest.raises(InfeasibleError, match=r"refuses the job: ValueError: no pip; correct the job file"):
        asked.submit(REQUEST)
    assert client.jobs == {}


def test_a_token_that_expires_is_not_taken_for_a_bad_job(server: Any) -> None:
    asked, _ = server(errors=[AuthenticationError("Authentication failed: no")])
    with pytest.raises(InfeasibleError, match=f"the cluster at {URL} asks for a token.*set RAY_AUTH_MODE=token"):
        asked.submit(REQUEST)


def test_a_run_has_one_driver_at_a_time(server: Any) -> None:
    asked, client = server()
    asked.submit(REQUEST)
    with pytest.raises(InfeasibleError, match="run-a1 of the same run is running: follow it"):
        asked.submit(REQUEST)
    client.jobs["run-a1"].status = "STOPPED"
    assert asked.submit(REQUEST) == "run-a2"
    assert "word" not in str(client.jobs)


def test_a_proxy_without_its_server_is_waited_for(server: Any) -> None:
    asked, client = server(jobs={"run-a1": details("run-a1", "RUNNING")})
    client.errors = [RuntimeError("Request failed with status code 503: upstream")] * 2
    assert asked.state("run-a1").status == "RUNNING"


def test_a_server_that_is_gone_is_given_up(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PATIENCE_SECONDS", 0.0)
    asked, client = server()
    client.errors = [requests.ConnectionError("refused")]
    with pytest.raises(Interrupted, match=f"the cluster at {URL} does not answer any more"):
        asked.state("run-a1")


def test_a_job_that_is_not_known_has_no_state(server: Any) -> None:
    asked, _ = server()
    assert asked.state("run-a1") is None


def test_a_log_whose_node_is_gone_is_said_so(server: Any) -> None:
    asked, client = server()
    client.errors = [RuntimeError("Request failed with status code 500: Traceback\nOSError: no agent")]
    with pytest.raises(TaleRayError, match=r"run-a1: the cluster at .* cannot say: OSError: no agent"):
        asked.logs("run-a1")


@pytest.mark.parametrize(
    "streams",
    [
        [["one\ntwo\nthree\n"]],
        [
            ["one\n", RuntimeError("WebSocket closed with 1006")],
            ["one\ntw", RuntimeError("again")],
            ["one\ntwo\nthree\n"],
        ],
        [["one\n", "two\n", ConnectionError("reset")], ["one\n", "two\n", "three\n"]],
        [[RuntimeError("at once")], ["one\n"]],  # the rest comes from the whole log
        [[], ["one\n", "two\n"]],
    ],
)
def test_a_log_is_printed_once(server: Any, streams: list[list[str | Exception]]) -> None:
    asked, _ = server(jobs={"run-a1": details("run-a1", "RUNNING")}, pieces=streams)
    assert "".join(asked.follow("run-a1")) == "one\ntwo\nthree\n"
