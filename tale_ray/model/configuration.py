"""The configuration of a model without its weights: of a folder, a file, or the hub's cache. Downloads nothing."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tale_ray.config import ModelSection
from tale_ray.errors import ModelError
from tale_ray.model.digest import model_folder
from tale_ray.model.layers import check_config
from tale_ray.paths import existing


def read_configuration(section: ModelSection) -> Any:
    """Return the transformers configuration that a section names; a path of a config.json will do.

    Raises:
        ModelError: there is none here, it cannot be read, or its model cannot lose layers.
    """
    place = existing(section.model, Path.is_file) or model_folder(section.model) or section.model
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code, "local_files_only": True}
    if section.gguf is not None and isinstance(place, Path) and not (place / "config.json").is_file():
        options["gguf_file"] = section.gguf
    if isinstance(place, str):
        options["revision"] = section.revision
    try:
        config = AutoConfig.from_pretrained(str(place), **options)
    except Exception as error:  # whatever the hub's client, JSON or a family's code makes of it
        lines = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"the configuration of model {section.model} cannot be read ({type(error).__name__}: {lines[0]}): give a "
            "folder with a config.json, the path of one, `bundled`, or a hub model that has been downloaded"
        ) from error
    check_config(config)
    return config
