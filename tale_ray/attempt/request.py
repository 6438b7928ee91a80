"""What can be refused before a run folder is touched or a model is loaded."""

import json

from tale_ray.attempt.execution import make_executor
from tale_ray.config import ModelSection, SearchConfig
from tale_ray.model.digest import check_model, model_folder
from tale_ray.model.support import NUM_LAYERS_FIELDS, text_fields


def check_request(config: SearchConfig) -> None:
    """Refuse a model, layers or, with `--local`, GPUs that cannot be had.

    What is at a hub or on a cluster shows later.

    Raises:
        UsageError: the request cannot be met.
    """
    check_model(config.model)
    if num_layers := _configured_layers(config.model):
        config.strategy.check_layers(num_layers)
    if config.resources.local:
        make_executor(config, "check").connect()


def _configured_layers(section: ModelSection) -> int | None:
    """Return the number of layers that the model's config.json tells; None: it does not, or is not here."""
    folder = model_folder(section.model)
    if folder is None or not (folder / "config.json").is_file():
        return None
    found = text_fields(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return next((found[name] for name in NUM_LAYERS_FIELDS if isinstance(found.get(name), int)), None)
