"""What can be said of a model without loading it: where it lies, what is wrong with it, and its digest.

Knows nothing of torch or transformers; reads JSON and bytes only.
"""

import hashlib
import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tale_ray.config import ModelSection
from tale_ray.errors import ModelError
from tale_ray.model.support import refusal
from tale_ray.paths import existing

_BUNDLED = Path(__file__).parent / "bundled"
_CONFIGURATION_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("chat_template.jinja", "chat_template.json"),
)
_VOCABULARIES = (  # any one of these sets makes a tokenizer
    *(("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",)),
    *(("spiece.model",), ("sentencepiece.bpe.model",), ("tekken.json",)),
)


def model_folder(ref: str) -> Path | None:
    """Return the folder that a model reference names: the package's own for `bundled`, an existing one, else None."""
    if ref == "bundled":
        return _BUNDLED
    return existing(ref, Path.is_dir)


def check_model(section: ModelSection) -> None:
    """Refuse what can be refused without loading anything: reads JSON only.

    A hub id is not looked up: what is wrong with it shows when it is loaded.

    Raises:
        ModelError: the folder or a file in it is missing or damaged, or the family cannot lose layers.
    """
    folder = model_folder(section.model)
    if folder is None:
        if existing(section.model, Path.is_file):
            raise ModelError(
                f"model {section.model} is a file: give the folder that it lies in, and a GGUF file's name with --gguf"
            )
        if _is_path(section.model):
            raise ModelError(
                f"model folder {section.model} does not exist: "
                "give an existing folder, a hub id such as Qwen/Qwen2.5-0.5B-Instruct, or 'bundled'"
            )
        return
    if section.gguf is not None and not existing(str(folder / section.gguf), Path.is_file):
        there = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
        raise ModelError(f"GGUF file {section.gguf} is not in {folder}: the GGUF files there are {there}")
    if section.gguf is None or (folder / "config.json").is_file():
        fields = _configuration(folder)
        if reason := refusal(fields):
            raise ModelError(f"model {section.model} cannot be searched: {reason}; choose another model")
        _check_remote_code(section, fields)
    if section.gguf is None:
        if not has_tokenizer(folder):
            raise ModelError(
                f"model folder {folder} has no tokenizer: expected tokenizer.json, tokenizer.model or "
                "vocab.json with merges.txt; copy the tokenizer's files there"
            )
        if not _weight_files(folder):
            raise ModelError(
                f"model folder {folder} has no weights: expected model.safetensors, pytorch_model.bin or the index of "
                "their shards; copy them there, or name a GGUF file with --gguf"
            )


def digest_model(folder: Path, gguf: str | None) -> str:
    """Return the SHA-256 (hex) of the model's content, independent of where it lies.

    It covers (name, SHA-256) of each file that is loaded: configuration, generation defaults, tokenizer, chat
    template, code that the configuration refers to, and weights (safetensors rather than bin where both are there;
    the GGUF file alone where one is named).

    Raises:
        ModelError: a file cannot be read.
    """
    names = {name for name in _CONFIGURATION_FILES if (folder / name).is_file()}
    names.update(tokenizer_files(folder), code_files(folder))
    names.update([gguf] if gguf is not None else _weight_files(folder))
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0{_file_digest(folder / name)}\n".encode())
    return digest.hexdigest()


def has_tokenizer(folder: Path) -> bool:
    """Return whether the folder has the files of a tokenizer."""
    return any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES) or any(
        folder.glob("*.tiktoken")
    )


def tokenizer_files(folder: Path) -> list[str]:
    """Return the names of the files there that make a tokenizer, chat templates included."""
    names = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    for pattern in ("additional_chat_templates/*.jinja", "*.tiktoken"):
        names += sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern))
    return names


def code_files(folder: Path) -> list[str]:
    """Return the names of the files with code that the configuration refers to; none if it refers to none.

    Raises:
        ModelError: the configuration cannot be read.
    """
    if not (folder / "config.json").is_file() or "auto_map" not in _configuration(folder):
        return []
    return sorted(path.name for path in folder.glob("*.py"))


def _configuration(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model folder {folder} has no config.json: give the folder that holds the checkpoint itself"
        ) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): make it readable") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({error}): copy the checkpoint again") from None
    if not isinstance(fields, dict):
        raise ModelError(f"{path} is not a JSON object: copy the checkpoint again")
    return fields


def _weight_files(folder: Path) -> list[str]:
    """Names of the weight files that transformers would load: an index's shards, or the single file."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [single]
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError, OSError):
                raise ModelError(f"{index} is not an index of weight files: copy the checkpoint again") from None
            _check_shards(folder, index.name, shards)
            return [index.name, *shards]
    return []


def _check_shards(folder: Path, index: str, shards: Iterable[str]) -> None:
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise ModelError(
            f"model folder {folder} lacks {missing[0]}, which {index} names ({len(missing)} missing): "
            "copy the checkpoint again"
        )


def _check_remote_code(section: ModelSection, fields: dict[str, Any]) -> None:
    if fields.get("auto_map") and not section.trust_remote_code and not _is_native(str(fields.get("model_type") or "")):
        raise ModelError(
            f"model {section.model} brings its own code (auto_map in config.json), which is not run unasked: "
            "read it, then pass --trust-remote-code"
        )


def _is_native(family: str) -> bool:
    """Whether transformers has code of its own for the family, told by its folders: importing it would load torch."""
    spec = find_spec("transformers")
    places = spec.submodule_search_locations if spec is not None else None
    name = family.removesuffix("_text").replace("-", "_")
    return bool(name) and any((Path(place) / "models" / name).is_dir() for place in places or ())


def _is_path(ref: str) -> bool:
    return ref.startswith((".", "/", "~")) or ref.count("/") > 1 or "\\" in ref or ref.endswith("/")


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): make it readable, or copy it again") from None
