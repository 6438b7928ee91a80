"""What the JSON files of a run hold: manifest, attempts, lease, measurements, results; and which names are ours.

Every file is one object with its schema version. Older versions are read, newer ones refused. Addresses lose their
credentials on the way to a file. Does not know where the files are.
"""

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, TypeAlias, TypeVar

from tale_ray.annotations import fits
from tale_ray.config import SearchConfig
from tale_ray.errors import ConfigError, StoreError
from tale_ray.records import Measure, Measurement, Probe
from tale_ray.store.uris import strip_all

JSON: TypeAlias = Any  # what json.loads returns
Document = TypeVar("Document")

SCHEMA_VERSION = 1
MANIFEST = "run.json"
LEASE = "lease.json"
STUDY = "study.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # of a scope or a result


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What the run is: written first, before anything is computed."""

    run: str  # the run's name
    created: str  # ISO 8601, UTC
    config: Mapping[str, JSON]  # SearchConfig.to_json()
    identity: Mapping[str, JSON]  # what a resumed run must agree with
    model: Mapping[str, JSON]
    task: Mapping[str, JSON]
    rows: Mapping[str, Mapping[str, JSON]]  # by split: {"count", "digest"}
    tokens: Mapping[str, str]  # by split: digest of the token sequences
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyManifest:
    """What a study is: the same search with several seeds."""

    seeds: list[int]
    created: str  # ISO 8601, UTC
    config: Mapping[str, JSON]  # SearchConfig.to_json() of the first seed


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """One process that worked on the run."""

    attempt: int  # from 1
    host: str
    pid: int
    started: str  # ISO 8601, UTC
    options: Mapping[str, JSON] = field(default_factory=dict)  # resources and storage, and what changed
    versions: Mapping[str, str] = field(default_factory=dict)
    load_seconds: float = 0.0
    search_seconds: float = 0.0
    retries: int = 0
    wasted_rows: int = 0
    ended: str | None = None  # ISO 8601, UTC
    how: str | None = None  # "finished", "interrupted" or "failed"
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Who writes to the run, and until when."""

    host: str
    pid: int
    process_start: float  # seconds since the boot of the host
    attempt: int
    nonce: str
    expires: float  # Unix seconds
    renewed: float  # Unix seconds
    machine: str = ""  # tells apart boots and containers that share a host name


def format_time(seconds: float) -> str:
    """Return Unix seconds as ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def dump_json(document: Any) -> bytes:
    """Return the bytes of a document's file: sorted, indented, with its schema version, without credentials.

    Raises:
        ValueError: it holds NaN or infinity, which JSON lacks.
    """
    content = dict(document) if isinstance(document, Mapping) else asdict(document)
    content = {**strip_all(content), "schema_version": SCHEMA_VERSION}
    return (json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def parse_json(data: bytes, path: str, remedy: str) -> dict[str, JSON]:
    """Return the object in a file of ours, without its schema version.

    Raises:
        StoreError: truncated, not ours, or written by a newer version.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is truncated or was changed ({error}): it holds one JSON object; {remedy}") from error
    if not isinstance(content, dict) or not isinstance(content.get("schema_version"), int):
        raise StoreError(f"{path} was not written by tale_ray: it has no schema version; {remedy}")
    check_version(content.pop("schema_version"), path)
    return content


def check_version(version: int, path: str) -> None:
    """Refuse what a newer tale_ray wrote.

    Raises:
        StoreError: it did.
    """
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer tale_ray (schema version {version}; this one reads up to "
            f"{SCHEMA_VERSION}): update tale_ray"
        )


def _load(kind: type[Document], data: bytes, path: str, remedy: str) -> Document:
    content = parse_json(data, path, remedy)
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]  # dataclasses, all of them
    required = {name for name, item in known.items() if item.default is item.default_factory is MISSING}
    if missing := sorted(required - content.keys()):
        raise StoreError(f"{path} was changed: {', '.join(missing)} is missing in it; {remedy}")
    values = {name: value for name, value in content.items() if name in known}
    check_fields(values, {name: known[name].type for name in values}, path, remedy)
    return kind(**values)


def check_fields(content: Mapping[str, JSON], kinds: Mapping[str, Any], path: str, remedy: str) -> None:
    """Refuse an object in a file that lacks a field, or has one of another type.

    Raises:
        StoreError: names the first of them.
    """
    for name, kind in kinds.items():
        if name not in content or not fits(content[name], kind):
            shown = reprlib.repr(content.get(name))
            raise StoreError(f"{path} was changed: {name} is {shown}, which tale_ray never writes there; {remedy}")


def load_manifest(data: bytes, path: str) -> Manifest:
    """Return the manifest in a file.

    Raises:
        StoreError: truncated, changed, not ours, or written by a newer version.
    """
    remedy = "put back a copy of it, or choose another --run"
    manifest = _load(Manifest, data, path, remedy)
    check_fields(manifest.model, {"num_layers": int, "digest": str, "dtype": str}, path, remedy)
    check_fields(manifest.task, {"name": str}, path, remedy)
    for entry in manifest.rows.values():
        check_fields(entry, {"count": int, "digest": str}, path, remedy)
    try:
        SearchConfig.from_json(manifest.config)
    except ConfigError as error:
        raise StoreError(f"{path} was changed: config: {error}; {remedy}") from error
    return manifest


def load_study(data: bytes, path: str) -> StudyManifest:
    """Return what a study is, from its file.

    Raises:
        StoreError: truncated, changed, not ours, or written by a newer version.
    """
    remedy = "delete it and search with --seeds again: its runs go on from their own files"
    study = _load(StudyManifest, data, path, remedy)
    if not study.seeds:
        raise StoreError(f"{path} was changed: it names no seeds, and a study has one at least; {remedy}")
    try:
        SearchConfig.from_json(study.config)
    except ConfigError as error:
        raise StoreError(f"{path} was changed: config: {error}; {remedy}") from error
    return study


def load_attempt(data: bytes, path: str) -> AttemptRecord:
    """Return the attempt in a file.

    Raises:
        StoreError: truncated, changed, not ours, or written by a newer version.
    """
    return _load(AttemptRecord, data, path, "delete it: only what it says of that attempt is lost")


def load_measurement(data: bytes, path: str) -> Measurement:
    """Return the measurement in a file.

    Raises:
        StoreError: truncated, changed, not ours, or written by a newer version.
    """
    remedy = "delete it and resume: rounds stay as they are, and what decides the next one is measured again"
    content = parse_json(data, path, remedy)
    kinds: dict[str, Any] = {"probe": Mapping[str, JSON], "values": list[float | None]}
    check_fields(content, {**kinds, "num_rows": int, "num_tokens": int, "seconds": float}, path, remedy)
    kinds = {"measure": Measure, "removed": list[int], "layers": list[int], "span": int}
    probe = content["probe"]
    check_fields(probe, kinds, path, remedy)
    if len(content["values"]) != len(probe["layers"]):
        count = f"{len(content['values'])} values of {len(probe['layers'])} layers"
        raise StoreError(f"{path} was changed: it has {count}, and every layer has one; {remedy}")
    return Measurement(
        probe=Probe(probe["measure"], tuple(probe["removed"]), tuple(probe["layers"]), probe["span"]),
        values=tuple(content["values"]),
        num_rows=content["num_rows"],
        num_tokens=content["num_tokens"],
        seconds=content["seconds"],
    )


def load_lease(data: bytes, path: str) -> Lease:
    """Return the lease in a file.

    Raises:
        StoreError: truncated, changed, not ours, or written by a newer version.
    """
    lease = _load(Lease, data, path, _LEASE_REMEDY)
    if lease.pid < 1:
        raise StoreError(f"{path} was changed: pid {lease.pid}, and processes are numbered from 1; {_LEASE_REMEDY}")
    return lease


_LEASE_REMEDY = "make sure that no process writes to the run, then delete it"
