"""An S3 server in a process of its own: moto behind the faults of `faults.py`, over HTTP on a free port.

    with S3Server() as server:
        run = server.uri("run")                      # s3://tale-tests/run?endpoint_override=127.0.0.1:...&scheme=http&...
        os.environ.update(server.environment)        # credentials; also for other processes
        server.plan(Fault(kind="503", methods=("PUT",), count=2), seed=7)
        ...
        puts = server.requests("PUT", "run/rounds/")  # what was asked since `forget`

What is stored is in memory and ends with the server. The bucket is there; requests without credentials are refused.
A plan stays until the next one; `server.plan()` is fair weather. `stop` is a storage that is away for good.
"""

import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from faults import Fault, Faults, Plan, Request, refuse

BUCKET = "tale-tests"
REGION = "us-east-1"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "very-secret-testing",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_CONTROL = "/_control/"  # no bucket can have this name


class S3Server:
    """The server's process, and how to speak to it from any thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self.endpoint = ""  # host:port

    def __enter__(self) -> "S3Server":
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parent)}
        self._process = subprocess.Popen(  # it ends when its standard input does: never left behind
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip()
        assert port, "the server did not start: are moto[server] and boto3 installed?"
        self.endpoint = f"127.0.0.1:{port}"
        self.forget()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process: nothing answers at the endpoint any more, and what was stored is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use `uri`."""
        return dict(ENVIRONMENT)

    def uri(self, path: str, bucket: str = BUCKET) -> str:
        """The address of a folder in the bucket; it holds no credentials."""
        return f"s3://{bucket}/{path}?endpoint_override={self.endpoint}&scheme=http&region={REGION}"

    def plan(self, *faults: Fault, seed: int = 0) -> None:
        """Let these faults happen from now on, instead of those before; none: fair weather."""
        self._call("plan", {"faults": [asdict(fault) for fault in faults], "seed": seed})

    def requests(self, method: str = "", key: str = "") -> list[Request]:
        """The requests since `forget` of a method (none: all) whose key begins so; keys are without the bucket."""
        found = [Request(**item) for item in self._call("log")]
        mine = [
            Request(item.method, item.key.removeprefix(f"{BUCKET}/"), item.query, item.status, item.fault)
            for item in found
        ]
        return [item for item in mine if item.method == method or not method if item.key.startswith(key)]

    def keys(self, prefix: str = "") -> list[str]:
        """What is stored under a prefix, past all faults and the log."""
        return list(self._call("keys", prefix))

    def forget(self) -> None:
        """Begin the log anew."""
        self._call("forget")

    def _call(self, name: str, body: Any = None) -> Any:
        url = f"http://{self.endpoint}{_CONTROL}{name}"
        request = urllib.request.Request(url, data=json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.loads(reply.read())


class _Front:
    """The server's own side: control paths, then credentials, then faults and moto."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._faults = Faults(application)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if not path.startswith(_CONTROL):
            if "HTTP_AUTHORIZATION" not in environ:
                return refuse(start_response, "403 Forbidden", "AccessDenied", environ["REQUEST_METHOD"])
            return self._faults(environ, start_response)
        body = json.loads(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))
        answer = json.dumps(self._answer(path.removeprefix(_CONTROL), body)).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
        return [answer]

    def _answer(self, name: str, body: Any) -> Any:
        match name:
            case "plan":
                faults = (Fault(**{**fault, "methods": tuple(fault["methods"])}) for fault in body["faults"])
                self._faults.plan = Plan(tuple(faults), body["seed"])
                return None
            case "log":
                return [asdict(request) for request in self._faults.log]
            case "keys":
                return [key for key in _stored_keys() if key.startswith(body)]
            case "forget":
                self._faults.log = []
                return None
            case _:
                raise ValueError(f"no control path {name!r}")


def _stored_keys() -> list[str]:
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    return list(s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[BUCKET].keys)


def _serve() -> None:
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, _Front(DomainDispatcherApplication(create_backend_app)), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server.port}", region_name=REGION).create_bucket(Bucket=BUCKET)
    print(server.port, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve()
