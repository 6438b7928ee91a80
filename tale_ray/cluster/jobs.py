"""The job server of a Ray cluster: submit, look at, follow and stop.

Does not know what a job searches for. Errors of Ray and of HTTP become ours here.
"""

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from textwrap import shorten
from typing import Any, TypeVar

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from tale_ray.cluster.job_state import JobState, next_id
from tale_ray.cluster.submission import JobRequest
from tale_ray.errors import ConfigError, InfeasibleError, Interrupted, TaleRayError
from tale_ray.store.uris import strip_credentials

logger = logging.getLogger("tale_ray.cluster")
logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it tells of every stream
Result = TypeVar("Result")

CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 60.0  # of silence within one request
PATIENCE_SECONDS = 30.0  # with a server that answered before
START_SECONDS = 90.0  # that a cluster may take from its first answer to its first job
POLL_SECONDS = 1.0
QUIET_SECONDS = 5.0  # without a line, until the state is looked at
RUN_KEY = "tale_ray_run"  # in a job's metadata
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray prefers them to an address that is given
_NO_AGENT = "No available agent"
_AWAY = re.compile(r"status code 50[234]\b")  # said by a proxy whose server is away
_DROPPED = (ConnectionError, requests.ConnectionError, requests.Timeout, aiohttp.ClientError, TimeoutError)
_TOKEN_REMEDY = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's own token "
    "(on its head: ~/.ray/auth_token, or what RAY_AUTH_TOKEN is there)"
)


class _UnknownJob(TaleRayError):
    """The server knows no job of this id."""


class _Client(JobSubmissionClient):  # type: ignore[misc]  # Ray has no types here
    """Ray's client, but no request waits for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=(CONNECT_SECONDS, REQUEST_SECONDS), **options)


class Jobs:
    """The jobs of the cluster whose dashboard is at `address`: a `JobServer`.

    Raises:
        ConfigError: `address` is not of the form http://HOST:PORT.
        InfeasibleError: nothing answers there, or it asks for another token.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise ConfigError(
                f"address {strip_credentials(address)!r} is not that of a dashboard: write http://HOST:8265; "
                "HOST:6379 is where `tale-ray search` joins the cluster"
            )
        self.address = strip_credentials(address)
        self._client: Any = self._connect(address)

    def submissions(self, run: str | None = None) -> list[JobState]:
        """Return the submissions that the cluster knows, those of one run if it is named, oldest first."""
        found = [_state(each) for each in self._patiently(self._client.list_jobs) if each.submission_id]
        of_run = [state for state in found if run is None or state.run == strip_credentials(run)]
        return sorted(of_run, key=lambda state: (state.start_seconds or 0, state.id))

    def submit(self, request: JobRequest) -> str:
        """Submit a job and return its id, whose attempt follows those that are there.

        Waits for a cluster that has just been started.

        Raises:
            InfeasibleError: an earlier submission of the run has not ended, or the cluster refuses the job.
            Interrupted: the cluster does not answer any more.
        """
        deadline = time.monotonic() + START_SECONDS
        unanswered: set[str] = set()
        while True:
            known = self.submissions()
            if taken := unanswered & {state.id for state in known}:
                return taken.pop()  # only the answer was lost
            self._check_idle(request.run, known)
            job = next_id(request.name, [state.id for state in known])
            try:
                self._refusing(lambda job=job: self._post(job, request))  # type: ignore[misc]
            except InfeasibleError:
                raise
            except _DROPPED as error:
                unanswered.add(job)
                problem: Exception = Interrupted(f"the cluster at {self.address} does not answer: {_first_line(error)}")
            except (RuntimeError, ValueError) as error:
                if _NO_AGENT not in str(error) and f"{job} already exists" not in str(error):
                    raise InfeasibleError(
                        f"the cluster at {self.address} refuses the job: {_last_line(error)}; correct the job file"
                    ) from error
                problem = InfeasibleError(
                    f"the cluster at {self.address} has taken no job for {START_SECONDS:g} s ({_last_line(error)}): "
                    "look at dashboard_agent.log on its head"
                )
            else:
                return job
            if time.monotonic() >= deadline:
                raise problem
            logger.info("no job was taken yet; trying again: %s", problem)
            time.sleep(POLL_SECONDS)

    def state(self, job: str) -> JobState | None:
        """Return the state of a submission; None if the cluster does not know it.

        Raises:
            Interrupted: the cluster does not answer any more.
        """
        try:
            return _state(self._about(job, lambda: self._client.get_job_info(job)))
        except _UnknownJob:
            return None

    def stop(self, job: str) -> None:
        """Ask a submission to end. It gets SIGTERM, and time to store what it has."""
        self._about(job, lambda: self._client.stop_job(job))

    def logs(self, job: str) -> str:
        """Return everything that a submission has printed.

        Raises:
            TaleRayError: the node where the log was is gone.
        """
        return str(self._about(job, lambda: self._client.get_job_logs(job)))

    def follow(self, job: str) -> Iterator[str]:
        """Yield what a submission prints, from the beginning, until it has ended.

        A stream that drops is taken up again where it was; nothing is yielded twice.
        """
        count = 0
        while True:
            passed_over = 0
            for text in self._stream(job):
                new = text[max(0, count - passed_over) :]
                passed_over += len(text)
                if new:
                    count += len(new)
                    yield new
            state = self.state(job)
            if state is None or state.ended:
                break
            time.sleep(POLL_SECONDS)
        if state is not None:
            with contextlib.suppress(TaleRayError):  # its node, where the log was, is gone
                if rest := self.logs(job)[count:]:
                    yield rest

    def await_end(self, job: str, seconds: float | None = None) -> JobState | None:
        """Return a submission's last state, or what it is after so many seconds; None if the cluster forgot it."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            state = self.state(job)
            if state is None or state.ended or (deadline is not None and time.monotonic() >= deadline):
                return state
            time.sleep(POLL_SECONDS)

    def _stream(self, job: str) -> Iterator[str]:
        """Yield the log from its beginning until the stream ends, drops, or falls silent after the job's end."""
        with asyncio.Runner() as runner:
            stream = self._client.tail_job_logs(job)
            piece = None
            try:
                while True:
                    piece = runner.get_loop().create_task(_next(stream))
                    while not runner.run(_is_done(piece)):
                        state = self.state(job)
                        if state is None or state.ended:
                            return
                    text = piece.result()
                    if text is None:
                        return
                    yield text
            except (*_DROPPED, RuntimeError) as error:
                logger.debug("the log of %s dropped: %s", job, error)
            finally:
                runner.run(_close(stream, piece))

    def _check_idle(self, run: str, known: Sequence[JobState]) -> None:
        for state in known:
            if state.run == strip_credentials(run) and not state.ended:
                raise InfeasibleError(
                    f"{state.id} of the same run is {state.status.lower()}: follow it with `tale-ray logs {state.id} "
                    f"--follow --address {self.address}`, or end it with `tale-ray stop` first"
                )

    def _post(self, job: str, request: JobRequest) -> None:
        self._client.submit_job(
            submission_id=job,
            entrypoint=request.entrypoint,
            runtime_env=dict(request.runtime_env),
            metadata={**request.metadata, RUN_KEY: strip_credentials(request.run)},
            entrypoint_num_cpus=request.num_cpus or None,
        )

    def _about(self, job: str, call: Callable[[], Result]) -> Result:
        """Return what a call about a job returns.

        Raises:
            TaleRayError: the server cannot answer it; `_UnknownJob` if there is no such job.
        """
        try:
            return self._patiently(call)
        except RuntimeError as error:
            kind = _UnknownJob if "status code 404" in str(error) else TaleRayError
            raise kind(f"{job}: the cluster at {self.address} cannot say: {_last_line(error)}") from error

    def _patiently(self, call: Callable[[], Result]) -> Result:
        """Return what a call returns, tried again while the server is away for a moment.

        Raises:
            Interrupted: it stays away.
            InfeasibleError: it asks for another token.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return self._refusing(call)
            except _DROPPED as error:
                if time.monotonic() >= deadline:
                    raise Interrupted(
                        f"the cluster at {self.address} does not answer any more: a run's folder has everything that "
                        "it finished; submit it again when a cluster is there"
                    ) from error
                time.sleep(POLL_SECONDS)

    def _refusing(self, call: Callable[[], Result]) -> Result:
        """Return what a call returns, its errors about the address and the token put in our words."""
        try:
            return call()
        except AuthenticationError as error:
            raise InfeasibleError(
                f"the cluster at {self.address} asks for a token, and refuses what it got ({_first_line(error)}): "
                f"{_TOKEN_REMEDY}"
            ) from error
        except RuntimeError as error:
            if _AWAY.search(str(error)):
                raise ConnectionError(_first_line(error)) from error
            raise

    def _connect(self, address: str) -> Any:
        try:
            with _without_overrides():
                return self._refusing(lambda: _Client(address))
        except InfeasibleError:
            raise
        except _DROPPED as error:
            problem: Exception = error
        except (requests.RequestException, RuntimeError, ValueError, KeyError) as error:  # HTTP, but not of Ray
            problem = error
        raise InfeasibleError(
            f"no Ray dashboard answers at {self.address}: check the address (http://HOST:8265; from outside through "
            f"`ssh -L 8265:localhost:8265 HEAD`) and that the cluster is up; the error was: {_first_line(problem)}"
        ) from problem


@contextlib.contextmanager
def _without_overrides() -> Iterator[None]:
    """Let the address that was given be the one that Ray uses."""
    saved = {name: os.environ.pop(name) for name in _OVERRIDES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _state(details: Any) -> JobState:
    """Return what Ray says of a job as ours."""
    return JobState(
        id=str(details.submission_id or details.job_id),
        status=str(details.status),
        run=(details.metadata or {}).get(RUN_KEY),
        driver_exit_code=details.driver_exit_code,
        error_type=details.error_type and str(details.error_type).rpartition(".")[2],
        message=details.message or "",
        start_seconds=details.start_time and details.start_time / 1000,
        end_seconds=details.end_time and details.end_time / 1000,
    )


async def _next(stream: Any) -> str | None:
    """Return the next text of a stream; None at its end."""
    return await anext(stream, None)


async def _is_done(task: "asyncio.Task[Any]") -> bool:
    done, _ = await asyncio.wait({task}, timeout=QUIET_SECONDS)
    return bool(done)


async def _close(stream: Any, task: "asyncio.Task[Any] | None") -> None:
    """End a stream, also one that is waited for."""
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
    await stream.aclose()


def _first_line(error: Exception) -> str:
    return shorten((str(error).strip() or type(error).__name__).splitlines()[0], 200)


def _last_line(error: Exception) -> str:
    """Return the line of a traceback that says what happened."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
