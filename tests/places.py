"""Folders for runs on each kind of storage, looked into and changed by other means than the store's own."""

from pathlib import Path
from typing import Any, Protocol

from s3_server import BUCKET, ENVIRONMENT, REGION, S3Server


class Place(Protocol):
    """A folder in which a run can be."""

    uri: str

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, data: bytes) -> None: ...

    def delete(self, name: str) -> None: ...

    def names(self) -> list[str]:
        """All files below the folder, in order, without those that readers pass over."""
        ...


class LocalPlace:
    def __init__(self, path: Path) -> None:
        self.uri = str(path)
        self._path = path

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (self._path / name).parent.mkdir(parents=True, exist_ok=True)
        (self._path / name).write_bytes(data)

    def delete(self, name: str) -> None:
        (self._path / name).unlink()

    def names(self) -> list[str]:
        files = (path for path in self._path.rglob("*") if path.is_file() and path.name[0] != "_")
        return sorted(str(path.relative_to(self._path)) for path in files)


class S3Place:
    def __init__(self, server: S3Server, key: str) -> None:
        import boto3

        self.uri = server.uri(key)
        self.key = key
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=f"http://{server.endpoint}",
            region_name=REGION,
            aws_access_key_id=ENVIRONMENT["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
        )

    def read(self, name: str) -> bytes:
        return bytes(self.client.get_object(Bucket=BUCKET, Key=f"{self.key}/{name}")["Body"].read())

    def write(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=f"{self.key}/{name}", Body=data)

    def delete(self, name: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=f"{self.key}/{name}")

    def names(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{self.key}/")
        keys = (item["Key"] for page in pages for item in page.get("Contents", []))
        names = (key.removeprefix(f"{self.key}/") for key in keys if not key.endswith("/"))  # without folder markers
        return sorted(name for name in names if name.rpartition("/")[2][0] != "_")
