"""What can be refused before a run folder is touched or a model is loaded."""

import json
from collections.abc import Mapping
from typing import Any

from tale_ray.attempt.execution import make_executor
from tale_ray.config import ModelSection, SearchConfig
from tale_ray.model.digest import check_model, model_folder
from tale_ray.model.support import NUM_LAYERS_FIELDS, text_fields
from tale_ray.model.tensor_parallel import check_sizes


def check_request(config: SearchConfig) -> None:
    """Refuse a model, layers, a gang that cannot split it or, with `--local`, GPUs that cannot be had.

    What is at a hub or on a cluster shows later.

    Raises:
        UsageError: the request cannot be met.
    """
    check_model(config.model)
    fields = _configuration(config.model)
    if num_layers := next((fields[name] for name in NUM_LAYERS_FIELDS if isinstance(fields.get(name), int)), None):
        config.strategy.check_layers(num_layers)
    if config.resources.tensor_parallel > 1:
        check_sizes(fields, config.resources.tensor_parallel)
    if config.resources.local:
        make_executor(config, "check").connect()


def _configuration(section: ModelSection) -> Mapping[str, Any]:
    """Return what the model's config.json tells of its decoder; nothing if it is not here."""
    folder = model_folder(section.model)
    if folder is None or not (folder / "config.json").is_file():
        return {}
    return text_fields(json.loads((folder / "config.json").read_text(encoding="utf-8")))
