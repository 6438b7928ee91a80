"""Telling what is probably a secret, by its name or its form. Does not know what the text is for.

Errs on the side of refusing: a name such as API_TOKEN is a secret unless it says that it names a file, or its value
is a mere yes or no.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tale_ray.store.uris import strip_credentials

_WORD_BORDER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+")  # of snake_case and camelCase
_SECRET_NAME = re.compile(r"SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|SIGNATURE|(?:\b|API|ACCESS)KEY\b|TOKEN\b")
_PLACE_NAME = re.compile(r"\b(?:PATH|FILE|DIR|FOLDER|URL|URI|ENDPOINT)$")
_SWITCHES = frozenset({"", "0", "1", "true", "false", "yes", "no", "on", "off"})
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bAIza[0-9A-Za-z_-]{35}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}"  # a JSON web token
)


def is_secret_name(name: str) -> bool:
    """Return whether something of this name is probably a secret: HF_TOKEN, apiKey, aws_secret_access_key."""
    words = _WORD_BORDER.sub(" ", name).upper().strip()
    return bool(_SECRET_NAME.search(words)) and not _PLACE_NAME.search(words)


def is_secret_value(text: str) -> bool:
    """Return whether a text has the form of a well-known secret, or is a URI with one in it."""
    return bool(_SECRET_VALUE.search(text)) or strip_credentials(text) != text


def find_secrets(value: Any, name: str) -> Iterator[str]:
    """Yield the names, such as `env_vars.HF_TOKEN`, of what in a value of YAML or JSON is probably a secret."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            path = f"{name}.{key}"
            if is_secret_name(str(key)) and str(item).strip().lower() not in _SWITCHES:
                yield path
            else:
                yield from find_secrets(item, path)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from find_secrets(item, name)
    elif isinstance(value, str) and is_secret_value(value):
        yield name
