"""Addresses without what is secret in them. Does not know what an address is of."""

import re
from typing import Any

# user:password@ before the host; everything up to the last @ of the authority, and a password with an unescaped /
_USER = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*)://(?P<user>[^/?#\s]*|[^/?#@:\s]+:(?!\d+(?:/|$))[^?#\s]*)@")
_SECRET_OPTION = re.compile(
    r"(?P<name>[?&][^=&#\s]*(?:secret|password|token|credential|signature|access_?key|\bsig\b)[^=&#\s]*)=[^&#\s]*",
    re.IGNORECASE,
)
_CONTAINER_SCHEMES = ("abfs", "abfss", "wasb", "wasbs")  # Azure: container@account names a place, not a person


def strip_credentials(text: str) -> str:
    """Return a text whose URIs have lost user, password and secret options; other text is unchanged."""
    if "://" not in text:
        return text
    return _SECRET_OPTION.sub(lambda match: f"{match['name']}=***", _USER.sub(_without_user, text))


def _without_user(match: re.Match[str]) -> str:
    if match["scheme"].lower() in _CONTAINER_SCHEMES and ":" not in match["user"]:
        return match[0]
    return f"{match['scheme']}://"


def strip_all(value: Any) -> Any:
    """Return a JSON value with `strip_credentials` applied to every text in it."""
    if isinstance(value, str):
        return strip_credentials(value)
    if isinstance(value, dict):
        return {strip_all(key): strip_all(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strip_all(item) for item in value]
    return value
