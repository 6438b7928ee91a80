"""A model without some of its layers as a standard checkpoint, which transformers loads by itself.

Weights are those of the source, in its numbers: mapped into memory, renumbered, written shard by shard. Everything else
is copied as it is. Knows nothing of runs, picks or scores.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.repocard import metadata_load
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig

from tale_ray.config import ModelSection
from tale_ray.errors import ModelError
from tale_ray.model.checkpoint import stored_tensors
from tale_ray.model.cut import check_removed
from tale_ray.model.digest import check_model, code_files, digest_model, has_tokenizer, model_folder, tokenizer_files
from tale_ray.model.layers import check_config, find_layers
from tale_ray.model.load import (
    as_model_error,
    load_tokenizer,
    no_progress_bars,
    read_weights,
    require_gguf,
    snapshot_folder,
)

logger = logging.getLogger("tale_ray.model")

STORED = "checkpoint"  # the dtype that the weights are stored in
_SHARD_SIZE = "2GB"  # of which one at a time may have to be in memory
_GENERATION = "generation_config.json"
_COPIED = ("preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
_LICENSE_FIELDS = ("license", "license_name", "license_link", "language")
_LAYER_NAME = re.compile(r"\b(?:layers?|h|blocks?)\.\d+\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What was written."""

    family: str
    num_layers: int  # of the full model
    removed: tuple[int, ...]  # ascending
    dtype: str
    num_parameters: int
    full_parameters: int  # of the full model
    code_files: tuple[str, ...]  # that transformers runs with trust_remote_code only
    license: Mapping[str, Any]  # what the source's model card says of its license
    notes: tuple[str, ...]


def write_checkpoint(
    section: ModelSection,
    removed: Collection[int],
    out: Path,
    *,
    digest: str | None,
    dtype: str = STORED,
    change: Callable[[Any], None] | None = None,
) -> Checkpoint:
    """Write the model of a section without the layers `removed` into the empty folder `out`, and return what it is.

    It has the checkpoint's own generation defaults, tokenizer files, chat template and code. A GGUF file's weights are
    de-quantised. No weight that is stored in the dtype asked for is copied in memory.

    Args:
        section: a hub id, a folder, or `bundled`; its own dtype is not heeded.
        removed: numbers of layers in the full model.
        out: an empty folder.
        digest: what `digest_model` has to say of the files; None: anything.
        change: what is done to the loaded model, without these layers, before it is written.
        dtype: float32, bfloat16, float16, or `checkpoint` for the one that the weights are stored in.

    Raises:
        ModelError: the model cannot be found or loaded, is another one, or cannot lose these layers.
        OSError: the disk is full, or cannot be written to.
    """
    check_model(section)
    folder = model_folder(section.model)
    if folder is not None:
        _check_digest(section, folder, digest)
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    if folder is None:
        options["revision"] = section.revision
    if section.gguf is not None:
        require_gguf()
        options["gguf_file"] = section.gguf
    place = str(folder) if folder is not None else section.model
    try:
        with no_progress_bars():
            config = AutoConfig.from_pretrained(place, **options)
            check_config(config)
            _check_quantisation(section, config)
            numbers = _numbers(folder, config, dtype)
            model, loading = read_weights(section, place, dtype=numbers, device_map=None, **options)
    except ModelError:
        raise
    except Exception as error:
        raise as_model_error(section, error) from error
    if folder is None:
        folder = snapshot_folder(section)
        _check_digest(section, folder, digest)
    layers = find_layers(model)
    full = model.num_parameters()
    with layers.without(removed), no_progress_bars():
        if change is not None:
            change(model)
        _save(model, out)
        num_parameters = model.num_parameters()
    _copy_files(section, folder, out)
    unused = sorted(map(str, loading["unexpected_keys"]))
    return Checkpoint(
        family=str(model.config.model_type),
        num_layers=layers.num_layers,
        removed=check_removed(removed, layers.num_layers),
        dtype=str(model.dtype).removeprefix("torch."),
        num_parameters=num_parameters,
        full_parameters=full,
        code_files=tuple(code_files(folder)),
        license=_license(folder),
        notes=(f"{len(unused)} weights that the model does not use are left out, such as {unused[0]}",)
        if unused
        else (),
    )


def _check_digest(section: ModelSection, folder: Path, expected: str | None) -> None:
    if expected is None:
        return
    if (found := digest_model(folder, section.gguf)) != expected:
        raise ModelError(
            f"the model {section.model} is not the one that was searched (SHA-256 {expected[:12]}, now {found[:12]}): "
            "restore its files, or name the folder of the one that was with --model"
        )


def _check_quantisation(section: ModelSection, config: Any) -> None:
    """Layers get new numbers: what a quantisation says of a layer by its number would be said of another one."""
    quantisation = getattr(config, "quantization_config", None)
    fields = quantisation if isinstance(quantisation, dict | None) else quantisation.to_dict()
    if section.gguf is None and (named := _LAYER_NAME.search(json.dumps(fields, default=str))):
        raise ModelError(
            f"the quantisation of model {section.model} names layers by number ({named[0]}), and these change when "
            "layers are removed: export from the checkpoint that is not quantised, and quantise the result"
        )


def _numbers(folder: Path | None, config: Any, dtype: str) -> torch.dtype | str:
    """Return the dtype to load: the one all floating weights are stored in, else what transformers makes of them."""
    if dtype != STORED:
        found: torch.dtype = getattr(torch, dtype)
        return found
    is_plain = getattr(config, "quantization_config", None) is None
    if folder is None or not is_plain or not any(folder.glob("model*.safetensors")):
        return "auto"
    kinds = {stored.dtype for stored in stored_tensors(folder).values() if stored.dtype.is_floating_point}
    return kinds.pop() if len(kinds) == 1 else "auto"


def _save(model: Any, out: Path) -> None:
    """Write configuration and weights.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    needed = sum(weight.nbytes for weight in {id(weight): weight for weight in model.parameters()}.values())
    if (free := shutil.disk_usage(out).free) < needed:
        raise OSError(f"{needed / 1e9:.1f} GB are needed there and {free / 1e9:.1f} GB are free")
    model.generation_config = GenerationConfig()  # the checkpoint's own, which is copied, may be refused by `save`
    try:
        model.save_pretrained(out, max_shard_size=_SHARD_SIZE)
    except SafetensorError as error:  # it has the system's errors in its text alone
        raise OSError(str(error)) from error
    (out / _GENERATION).unlink(missing_ok=True)
    for path in out.glob("*.safetensors"):  # safetensors lets nobody else read them
        path.chmod((out / "config.json").stat().st_mode)


def _copy_files(section: ModelSection, folder: Path, out: Path) -> None:
    """Copy what is no weight and no configuration of layers."""
    names = {*tokenizer_files(folder), *code_files(folder), _GENERATION}
    names.update(path.name for pattern in _COPIED for path in folder.glob(pattern))
    for name in sorted(names):
        if (folder / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, out / name)  # not its mode: others may read the copy
    if not has_tokenizer(folder):  # it is in the GGUF file
        load_tokenizer(section).save_pretrained(out)


def _license(folder: Path) -> dict[str, Any]:
    """Return what the front matter of the model's README.md says of its license."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    try:
        fields = metadata_load(readme) or {}
    except Exception as error:  # noqa: BLE001  whatever YAML makes of a file that is not ours: the card says less then
        logger.warning(
            "the license of the model is not known: the front matter of %s cannot be read: %s", readme, error
        )
        return {}
    return {name: fields[name] for name in _LICENSE_FIELDS if name in fields}
