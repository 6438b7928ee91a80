"""The configuration of a model without its weights: of a folder, a file, or the hub's cache. Downloads nothing."""

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig

from tale_ray.config import ModelSection
from tale_ray.errors import ModelError
from tale_ray.model.digest import model_folder
from tale_ray.model.layers import check_config
from tale_ray.paths import existing

_REMEDY = "give a folder with a config.json, the path of one, `bundled`, or a hub model that has been downloaded"


def read_configuration(section: ModelSection) -> Any:
    """Return the transformers configuration that a section names; a path of a config.json will do.

    Raises:
        ModelError: there is none here, it cannot be read, or its model cannot lose layers.
    """
    place = existing(section.model, Path.is_file) or local_folder(section)
    if place is None:
        raise ModelError(f"the configuration of model {section.model} is not here: {_REMEDY}")
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    if section.gguf is not None and place.is_dir() and not (place / "config.json").is_file():
        options["gguf_file"] = section.gguf
    try:
        config = AutoConfig.from_pretrained(str(place), **options)
    except Exception as error:  # whatever JSON or a family's code makes of it
        lines = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"the configuration of model {section.model} cannot be read ({type(error).__name__}: {lines[0]}): {_REMEDY}"
        ) from error
    check_config(config)
    return config


def local_folder(section: ModelSection) -> Path | None:
    """Return the folder of a model, or that of the hub's cache where its configuration lies; None: there is none."""
    if (folder := model_folder(section.model)) is not None:
        return folder
    try:
        found = try_to_load_from_cache(section.model, "config.json", revision=section.revision)
    except HFValidationError:  # no hub id
        return None
    return Path(found).parent if isinstance(found, str) else None
