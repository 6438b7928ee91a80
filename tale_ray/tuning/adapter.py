"""Low-rank adapters on a loaded model, through peft: put on, counted, saved, and merged into the weights.

Only linear layers get one, those of the decoder's surviving layers (of some families, what projects their input and
output, too); embeddings and the head stay as they are, so that tied embeddings stay tied.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tale_ray.errors import ConfigError, TaleRayError
from tale_ray.tuning.options import ALL_LINEAR, TuningOptions

_OWN_DOINGS = (
    "`is_gradient_checkpointing` is deprecated",  # it asks transformers for something by its old name
    "fan_in_fan_out is set to False but the target module is `Conv1D`",  # it sets that right
    "The following (rank|alpha)_pattern keys did not match",  # its own, for the fused experts, which get no adapter
)


@dataclass(frozen=True)
class TunedModel:
    """A model with an adapter, and the adapter's parameters by name, in a fixed order."""

    model: Any  # a peft.PeftModel
    parameters: dict[str, torch.nn.Parameter]

    @property
    def num_trainable(self) -> int:
        """Number of parameters that are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def copy(self) -> dict[str, torch.Tensor]:
        """Return a copy of the adapter's weights, on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def restore(self, weights: dict[str, torch.Tensor]) -> None:
        """Give the adapter these weights."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def save(self, folder: Path) -> None:
        """Write the adapter in peft's format into a folder."""
        self.model.save_pretrained(folder, save_embedding_layers=False)  # they have no adapter
        (folder / "README.md").unlink(missing_ok=True)  # an empty form to be filled in


def add_adapter(model: Any, options: TuningOptions, base: str) -> TunedModel:
    """Return a model with a fresh adapter, which changes nothing yet; the model itself is changed in place.

    Args:
        model: of transformers; without some of its layers it is the model at this moment.
        options: of the adapter.
        base: what the adapter's configuration calls the model.

    Raises:
        ConfigError: no layer is of a name that was asked for, or a tied embedding is.
    """
    from peft import LoraConfig, get_peft_model  # an extra, and slow to import

    targets: str | list[str] = list(options.target_modules)
    if options.target_modules == (ALL_LINEAR,):
        targets = ALL_LINEAR
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(options.seed)
    try:
        with _quiet():
            tuned = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(
            f"target modules {','.join(options.target_modules)} cannot be trained ({str(error).splitlines()[0]}): name "
            f"layers of the model, such as q_proj,v_proj, or {ALL_LINEAR}"
        ) from error
    tuned.peft_config["default"].base_model_name_or_path = base
    _check_embeddings(model)
    parameters = {name: each for name, each in sorted(tuned.named_parameters()) if each.requires_grad}
    return TunedModel(tuned, parameters)


def _check_embeddings(model: Any) -> None:
    """Refuse an adapter on embeddings or the head: these may share weights, and merging would change both."""
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        if part is not None and any("lora_" in name for name, _ in part.named_parameters()):
            raise ConfigError(
                "target modules name the embedding or the head, which may share their weights: leave them out, or ask "
                f"for {ALL_LINEAR}"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to oneself what peft says of its own doings, which ask nothing of a user."""
    with warnings.catch_warnings():
        for message in _OWN_DOINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


def merge_adapter(model: Any, adapter: Path) -> None:
    """Add a saved adapter to the weights of the model that it was trained on, in place.

    Raises:
        TaleRayError: a weight would not be a finite number.
    """
    from peft import PeftModel

    try:
        with _quiet():
            merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise TaleRayError(
            f"the adapter cannot be merged ({error}): it has grown too large; train with a lower --learning-rate"
        ) from error
    assert merged is model, "layers are put back where they were"


def adapted_layers(names: Sequence[str]) -> list[str]:
    """Return the kinds of layers that have an adapter, sorted, told by the names of its parameters."""
    return sorted({name.split(".lora_")[0].rpartition(".")[2] for name in names})
