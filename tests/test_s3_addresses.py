"""Addresses of runs on S3: what is said in them and in the environment, what is wrong with them, and their secrets."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Fault
from places import S3Place
from s3_server import BUCKET, S3Server
from stored_runs import write_run

from tale_ray.errors import StoreError
from tale_ray.store import RunReader, RunWriter
from tale_ray.store.files import Files
from tale_ray.store.s3 import parse_address


@pytest.fixture
def quickly() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 15


def refusals(uri: str) -> list[str]:
    messages = []
    for act in (RunReader(uri).check_place, RunReader(uri).manifest, lambda: RunWriter.claim(uri)):
        with pytest.raises(StoreError) as caught:
            act()
        messages.append(str(caught.value))
    return messages


def test_a_wrong_bucket_is_named(s3_server: S3Server, quickly: None) -> None:
    for message in refusals(s3_server.uri("run", bucket="nobody-has-this")):
        assert "there is no bucket 'nobody-has-this' at 127.0.0.1" in message
        assert "check the bucket" in message


def test_no_credentials_and_no_answer_are_named(
    s3_server: S3Server, quickly: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for message in refusals("s3://bucket/run?endpoint_override=127.0.0.1:1&scheme=http"):
        assert "Could not connect to server" in message
        assert "endpoint and region" in message
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for message in refusals(s3_server.uri("run")):
        assert "ACCESS_DENIED" in message or "HTTP status 403" in message
        assert "credentials (AWS_ACCESS_KEY_ID, ~/.aws)" in message


def test_the_environment_says_where_and_who(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, s3_place: S3Place
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3_server.endpoint}")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    write_run(f"s3://{BUCKET}/{s3_place.key}")
    assert RunReader(s3_place.uri).rounds() == RunReader(f"s3://{BUCKET}/{s3_place.key}").rounds()
    assert len(RunReader(s3_place.uri).rounds()) == 3


def test_credentials_of_an_address_reach_both_clients_and_no_file(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, s3_place: S3Place, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    caplog.set_level(logging.DEBUG, logger="tale_ray")
    uri = s3_place.uri.replace("s3://", "s3://mykey:SEC%2FRET@")
    write_run(uri)
    s3_server.plan(Fault(kind="503"))
    with pytest.raises(StoreError) as caught:
        RunReader(uri).rounds()
    s3_server.plan()
    for name in s3_place.names():
        assert b"SEC" not in s3_place.read(name)
        assert b"mykey" not in s3_place.read(name)
    for text in (caplog.text, str(caught.value), RunReader(uri).uri, repr(parse_address(uri)).replace("mykey", "")):
        assert "SEC" not in text
        assert "mykey" not in text


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://", "names a bucket"),
        ("s3://key:SE/CRET@bucket/run", "names a bucket"),
        ("s3://key@bucket/run", "comes with its secret key"),
        ("s3://bucket/run?colour=red", "colour is none of the options"),
        ("s3://bucket/run?scheme=ftp", "reached by http or https"),
        ("s3://bucket/run?anonymous=maybe", "it is true or false"),
        ("s3://bucket/run?allow_bucket_creation=true", "allow_bucket_creation is none of the options"),
    ],
)
def test_addresses_that_say_nothing_sensible_are_refused(uri: str, reason: str) -> None:
    with pytest.raises(StoreError, match=f"cannot be reached.*{reason}.*choose another --run") as caught:
        Files(uri)
    assert "CRET@" not in str(caught.value)


def test_an_address_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://other:1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    found = parse_address("s3://bucket/a%20b/run/")
    assert (found.path, found.endpoint, found.scheme) == ("bucket/a b/run", "other:1", "http")
    assert (found.region, found.anonymous) == ("eu-north-1", False)
    found = parse_address("s3://anonymous@bucket?endpoint_override=https://mine&region=x")
    assert (found.path, found.endpoint, found.scheme, found.region) == ("bucket", "mine", "https", "x")
    assert (found.anonymous, found.access_key) == (True, None)
