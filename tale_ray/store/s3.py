"""Addresses s3://bucket/folder: what is said in them and in the environment, and the clients made of it.

pyarrow reads and writes files; boto3, where it is installed, writes on conditions. Both get the same endpoint, region
and credentials from here. Does not know which files there are.
"""

import os
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow.fs

SCHEME = "s3://"
BOTO3 = (1, 36)  # the first that has all that is asked of it
ATTEMPTS = 3  # of one request, by the client itself; longer outages are waited for by whoever writes
CONNECT_SECONDS = 3.0
REPLY_SECONDS = 10.0  # without a byte
DEFAULT_REGION = "us-east-1"  # where an endpoint is named: most of them do not care
REMEDY = (
    "check the bucket and its permissions, endpoint and region (AWS_ENDPOINT_URL, AWS_REGION, or endpoint_override=, "
    "scheme= and region= in the address) and credentials (AWS_ACCESS_KEY_ID, ~/.aws), or choose another --run"
)
_OPTIONS = ("anonymous", "endpoint_override", "force_virtual_addressing", "region", "scheme", "tls_ca_file_path")


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Address:
    """A folder in a bucket, and how to reach it."""

    bucket: str
    key: str  # of the folder, without slashes at its ends
    region: str | None  # None: the bucket's own
    scheme: str
    endpoint: str | None  # host:port; None: AWS
    access_key: str | None = None  # None: the environment's
    secret_key: str | None = field(default=None, repr=False)
    anonymous: bool = False
    virtual: bool = False
    ca_file: str | None = None

    @property
    def path(self) -> str:
        """The folder as pyarrow names it."""
        return f"{self.bucket}/{self.key}" if self.key else self.bucket

    def file_system(self) -> Any:
        """Return pyarrow's file system: a file below 8 MiB is one PUT, and no bucket is ever made or deleted.

        Raises:
            OSError: the bucket's region is not named and cannot be found out.
        """
        return pyarrow.fs.S3FileSystem(
            access_key=self.access_key,
            secret_key=self.secret_key,
            anonymous=self.anonymous,
            region=self.region or _region_of(self.bucket),
            scheme=self.scheme,
            endpoint_override=self.endpoint,
            force_virtual_addressing=self.virtual,
            tls_ca_file_path=self.ca_file,
            connect_timeout=CONNECT_SECONDS,
            request_timeout=REPLY_SECONDS,
            retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
            allow_delayed_open=True,
            background_writes=False,
        )

    def client(self) -> Any:
        """Return boto3's client for the same bucket.

        Raises:
            ImportError: boto3 is not installed, or older than the extra `s3` asks for.
            OSError: the bucket's region is not named and cannot be found out.
        """
        import boto3
        import botocore
        from botocore.config import Config

        if tuple(map(int, boto3.__version__.split(".")[:2])) < BOTO3:
            raise ImportError(f"boto3 {boto3.__version__} knows no conditions")

        style = "virtual" if self.virtual else "path" if self.endpoint else "auto"
        return boto3.session.Session().client(
            "s3",
            region_name=self.region or _region_of(self.bucket),
            endpoint_url=f"{self.scheme}://{self.endpoint}" if self.endpoint else None,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            verify=self.ca_file,
            config=Config(
                connect_timeout=CONNECT_SECONDS,
                read_timeout=REPLY_SECONDS,
                retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
                signature_version=botocore.UNSIGNED if self.anonymous else None,
                s3={"addressing_style": style},
                ignore_configured_endpoint_urls=True,  # pyarrow does not read those of ~/.aws/config
                request_checksum_calculation="when_required",  # stores other than AWS do not all know them
                response_checksum_validation="when_required",
            ),
        )


@cache
def _region_of(bucket: str) -> str:
    return str(pyarrow.fs.resolve_s3_region(bucket))


def parse_address(uri: str) -> S3Address:
    """Return what an address and the environment say; the address wins.

    Raises:
        ValueError: it is no address of a folder in a bucket, or has an option that there is not.
    """
    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise ValueError(f"{unknown[0]} is none of the options of an address: {', '.join(_OPTIONS)}")
    user, _, host = parts.netloc.rpartition("@")
    access_key, mark, secret_key = user.partition(":")
    if not host or ":" in host:
        raise ValueError("an address names a bucket: s3://bucket/folder; a key's special characters are written as %2F")
    named_only = bool(access_key) and not mark
    if named_only and access_key != "anonymous":
        raise ValueError("an access key comes with its secret key: s3://key:secret@bucket/folder")
    endpoint, scheme = _endpoint(options)
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return S3Address(
        bucket=host,
        key=unquote(parts.path).strip("/"),
        region=region or (DEFAULT_REGION if endpoint else None),
        scheme=scheme,
        endpoint=endpoint,
        access_key=unquote(access_key) if mark else None,
        secret_key=unquote(secret_key) if mark else None,
        anonymous=named_only or _is_true(options, "anonymous"),
        virtual=_is_true(options, "force_virtual_addressing"),
        ca_file=options.get("tls_ca_file_path") or os.environ.get("AWS_CA_BUNDLE"),
    )


def _endpoint(options: dict[str, str]) -> tuple[str | None, str]:
    """Return host:port, None for AWS; and the scheme."""
    given = options.get("endpoint_override")
    given = given or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    scheme, mark, endpoint = given.rpartition("://")
    scheme = options.get("scheme") or (scheme if mark else "https")
    if scheme not in ("http", "https"):
        raise ValueError(f"scheme is {scheme!r}: endpoints are reached by http or https")
    return endpoint.rstrip("/") or None, scheme


def _is_true(options: dict[str, str], name: str) -> bool:
    value = options.get(name, "false").lower()
    if value not in ("true", "false", "1", "0"):
        raise ValueError(f"{name} is {value!r}: it is true or false")
    return value in ("true", "1")
