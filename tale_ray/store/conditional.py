"""Writing on a condition to object storage: a file appears only if it is still as it was when it was read.

Needs boto3 (the extra `s3`): pyarrow has no conditions. Does not know what the files hold.
"""

from typing import Any

from tale_ray.store.s3 import S3Address

_REFUSED = (409, 412)  # 409: two writes at one time, and ours was not the one
_NOT_THERE = 404
_UNKNOWN_STATUS = (405, 501)
_UNKNOWN_CODES = ("InvalidArgument", "InvalidRequest", "NotImplemented")
_NEVER = '"00000000000000000000000000000000"'  # the tag of no file


class _UnknownCondition(OSError):
    """The storage does not know conditions."""


class ConditionalObjects:
    """Reads and writes single objects, each method in one step; errors of the storage are OSError.

    Raises:
        ImportError: boto3 is not installed.
    """

    def __init__(self, address: S3Address) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        self._errors = (BotoCoreError, ClientError)
        self._address = address
        self._client = address.client()

    def read(self, name: str) -> tuple[bytes, str] | None:
        """Return the bytes of a file and its tag; None if it is missing."""
        try:
            reply = self._client.get_object(**self._place(name))
            return bytes(reply["Body"].read()), str(reply["ETag"])
        except self._errors as error:
            if _status(error) == _NOT_THERE and _code(error) != "NoSuchBucket":
                return None
            raise OSError(str(error)) from error

    def put(self, name: str, data: bytes, tag: str | None) -> bool:
        """Write a file if its tag is still this one, or, for None, if there is none; return whether ours is there.

        A refusal is looked into: the reply to a try of ours that came through may have been lost.
        """
        if self._put(name, data, tag):
            return True
        found = self.read(name)
        return found is not None and found[0] == data

    def delete(self, name: str, tag: str) -> None:
        """Delete a file if its tag is still this one; without asking where only writes know conditions."""
        try:
            try:
                self._client.delete_object(**self._place(name), IfMatch=tag)
            except self._errors as error:
                if not _is_unknown(error):
                    raise
                self._client.delete_object(**self._place(name))
        except self._errors as error:
            if _status(error) not in (*_REFUSED, _NOT_THERE):
                raise OSError(str(error)) from error

    def works(self, name: str) -> bool:
        """Return whether the storage refuses what it has to refuse, tried out on a file that is there."""
        try:
            return not self._put(name, b"never", None) and not self._put(name, b"never", _NEVER)
        except _UnknownCondition:
            return False

    def _put(self, name: str, data: bytes, tag: str | None) -> bool:
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        try:
            self._client.put_object(**self._place(name), Body=data, **condition)
        except self._errors as error:
            status = _status(error)
            if status in _REFUSED or (status == _NOT_THERE and tag is not None and _code(error) != "NoSuchBucket"):
                return False
            if _is_unknown(error):
                raise _UnknownCondition(str(error)) from error
            raise OSError(str(error)) from error
        return True

    def _place(self, name: str) -> dict[str, str]:
        key = f"{self._address.key}/{name}" if self._address.key else name
        return {"Bucket": self._address.bucket, "Key": key}


def _reply(error: Any) -> dict[str, Any]:
    """Return what the storage answered; nothing where there was no answer."""
    return getattr(error, "response", None) or {}


def _status(error: Any) -> int | None:
    status: int | None = _reply(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def _code(error: Any) -> str:
    return str(_reply(error).get("Error", {}).get("Code", ""))


def _is_unknown(error: Any) -> bool:
    return _status(error) in _UNKNOWN_STATUS or _code(error) in _UNKNOWN_CODES
