"""A model whose decoder layers stay in their files, for models larger than the memory: built, and when to.

The model is made without memory, as transformers makes it; embedding, final norm and head are loaded, and the layers
get a `LayerStream`. Weights are used as they are stored: checkpoints that have to be converted (experts that are to be
fused, weights that are quantised) are refused. Knows nothing of candidates or rows.
"""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from tale_ray.config import ModelSection, StreamMode
from tale_ray.errors import ModelError
from tale_ray.model.capacity import free_gpu_bytes, free_memory_bytes
from tale_ray.model.checkpoint import MappedFiles, StoredTensor, map_files, stored_tensors
from tale_ray.model.digest import check_model, model_folder
from tale_ray.model.layers import LayerStack, find_layers
from tale_ray.model.outline import DTYPES, configured_dtype, hollow_model
from tale_ray.model.placement import Placement
from tale_ray.model.stages import weight_room
from tale_ray.model.stream import LayerStream, Weight, make_source

_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_REMEDY = "give a worker more memory and load it whole (--stream never), or choose another checkpoint"


def should_stream(section: ModelSection, dtype: str, placement: Placement, mode: StreamMode) -> bool:
    """Return whether a model is to be streamed: if asked for, or if its weights do not fit into the memory there is.

    Of a hub model that has not been downloaded the size is not known: it is streamed if asked for.

    Raises:
        ModelError: the model cannot be found.
    """
    if mode != "auto":
        return mode == "always"
    check_model(section)
    folder = _cached(section)
    if folder is None or section.gguf is not None or placement.num_gpus > torch.cuda.device_count():
        return False  # what is wrong with it, loading says
    try:
        tensors = stored_tensors(folder)
    except ModelError:
        return False  # loading says what is wrong with it
    free = free_gpu_bytes(placement.num_gpus) if placement.num_gpus else free_memory_bytes()
    return is_too_large(weight_bytes(tensors, dtype), free, placement.num_gpus)


def is_too_large(needed_bytes: int, free_bytes: int, num_gpus: int) -> bool:
    """Return whether weights are streamed unasked: `free_bytes` are those of all GPUs together, or of RAM without."""
    return needed_bytes > (weight_room(free_bytes) if num_gpus else free_bytes)


def weight_bytes(tensors: Mapping[str, StoredTensor], dtype: str) -> int:
    """Return the bytes of all weights once they are loaded in a dtype (`checkpoint`: as they are stored)."""
    return sum(
        (tensor.end - tensor.start)
        // tensor.dtype.itemsize
        * (DTYPES[dtype].itemsize if dtype in DTYPES and tensor.dtype.is_floating_point else tensor.dtype.itemsize)
        for tensor in tensors.values()
    )


def check_streamable(section: ModelSection, model: Any) -> None:
    """Refuse a model, made without memory, that a checkpoint as its family stores them cannot be streamed for.

    Raises:
        ModelError: with the reason.
    """
    _check_format(section, model.config)
    _check_dtype(section, model)
    if any(isinstance(each, WeightConverter) for each in get_model_conversion_mapping(model)):
        raise ModelError(
            f"model {section.model} cannot be streamed: checkpoints of the family {model.config.model_type} store "
            f"experts one by one, and it computes with all together; {_REMEDY}"
        )


def stream_model(
    section: ModelSection, config: Any, dtype: str, placement: Placement
) -> tuple[Any, dict[str, set[str]]]:
    """Return a model that streams its layers, and the names of weights that are missing and of those not used.

    Raises:
        ModelError: its checkpoint cannot be streamed; nothing has been loaded then. Or a file is damaged.
    """
    _check_format(section, config)
    folder = checkpoint_folder(section)
    tensors = stored_tensors(folder)
    model = _outline(section, config, _dtype(config, dtype, tensors))
    stack = find_layers(model)
    stored, unexpected = _by_module_name(section, model, tensors)
    _check_shapes(section, model, stored)
    layers = _layer_weights(stack, stored)
    rest = {name: tensor for name, tensor in stored.items() if not _is_streamed(stack, model, name)}
    device = torch.device(placement.devices[0])
    is_mapped = device.type == "cpu" and all(weight.dtype == weight.stored.dtype for each in layers for weight in each)
    files = map_files(tensors.values())
    _load_rest(model, rest, files, device, is_mapped=is_mapped)
    loading = _complete(model, stored, unexpected, device)
    source = make_source(files, layers, rest, device, is_mapped=is_mapped)
    LayerStream(list(stack.full), source)
    _read_generation(model, folder)
    return model, loading


def checkpoint_folder(section: ModelSection) -> Path:
    """Return the folder that holds a model's safetensors files; of a hub model they are downloaded.

    Raises:
        ModelError: they cannot be.
    """
    if (folder := model_folder(section.model)) is not None:
        return folder
    try:
        return Path(snapshot_download(section.model, revision=section.revision, allow_patterns=list(_FILES)))
    except Exception as error:  # whatever the hub's client makes of it
        raise ModelError(
            f"the weights of {section.model} cannot be downloaded ({type(error).__name__}: {error}): "
            "download the model and give its folder"
        ) from error


def _cached(section: ModelSection) -> Path | None:
    if (folder := model_folder(section.model)) is not None:
        return folder
    try:
        return Path(snapshot_download(section.model, revision=section.revision, local_files_only=True))
    except Exception:  # noqa: BLE001  # it is not there: loading will download it
        return None


def _check_format(section: ModelSection, config: Any) -> None:
    if section.gguf is not None:
        raise ModelError(
            f"GGUF file {section.gguf} cannot be streamed, as its weights have to be de-quantised: {_REMEDY}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"model {section.model} is quantised (quantization_config in config.json), and quantised weights cannot be "
            f"streamed: {_REMEDY}"
        )


def _dtype(config: Any, dtype: str, tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype asked for; of a checkpoint, the one its configuration names, else the first one that is stored."""
    if (configured := configured_dtype(config, dtype)) is not None:
        return configured
    stored = (tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point)
    return next(stored, torch.float32)


def _outline(section: ModelSection, config: Any, dtype: torch.dtype) -> Any:
    """The model with all its modules and no memory."""
    try:
        model = hollow_model(config, dtype, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # whatever a family's code makes of it
        raise ModelError(
            f"model {section.model} cannot be streamed, as it cannot be made without memory "
            f"({type(error).__name__}: {error}): {_REMEDY}"
        ) from error
    _check_dtype(section, model)
    return model.eval().requires_grad_(False)


def _check_dtype(section: ModelSection, model: Any) -> None:
    if model.dtype != torch.float32 and (kept := _kept_in_float32(model)):
        raise ModelError(
            f"model {section.model} cannot be streamed in {str(model.dtype).removeprefix('torch.')}: its family keeps "
            f"some weights ({kept}) in float32; use --dtype float32, or {_REMEDY}"
        )


def _kept_in_float32(model: Any) -> str:
    names = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return ", ".join(sorted(names))


def _by_module_name(
    section: ModelSection, model: Any, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], set[str]]:
    """Return the stored tensors under the names of the model, and the names of those that it has no use for."""
    transforms = get_model_conversion_mapping(model)
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    renamings = [each for each in transforms if not isinstance(each, WeightConverter)]
    own = model.state_dict()
    found: dict[str, StoredTensor] = {}
    unexpected: set[str] = set()
    for name, tensor in tensors.items():
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if converted is not None and renamed in own:
            raise ModelError(
                f"model {section.model} cannot be streamed: its checkpoint stores {name} in another form than the "
                f"family {model.config.model_type} computes with; {_REMEDY}"
            )
        if renamed in own:
            found[renamed] = tensor
        else:
            unexpected.add(name)
    return found, unexpected


def _check_shapes(section: ModelSection, model: Any, stored: Mapping[str, StoredTensor]) -> None:
    own = model.state_dict()
    for name, tensor in stored.items():
        if (wanted := tuple(own[name].shape)) != tensor.shape:
            raise ModelError(
                f"model {section.model}: the weight {name} has the shape {list(tensor.shape)} in {tensor.path.name}, "
                f"but its configuration asks for {list(wanted)}: copy config.json and weights of the same checkpoint"
            )


def _is_streamed(stack: LayerStack, model: Any, name: str) -> bool:
    return name.startswith(_layers_name(stack, model) + ".") and name in dict(model.named_parameters())


def _layers_name(stack: LayerStack, model: Any) -> str:
    return next(str(name) for name, module in model.named_modules() if module is stack.full)


def _layer_weights(stack: LayerStack, stored: Mapping[str, StoredTensor]) -> list[list[Weight]]:
    """Return the parameters of every layer that are stored, in the order of the layer's own."""
    prefix = _layers_name(stack, stack.model)
    return [
        [
            Weight(module, parameter, stored[full])
            for inside, module in layer.named_modules()
            for parameter in module._parameters
            if (full := ".".join(filter(None, (prefix, str(number), inside, parameter)))) in stored
        ]
        for number, layer in enumerate(stack.full)
    ]


def _load_rest(
    model: Any, rest: Mapping[str, StoredTensor], files: MappedFiles, device: torch.device, *, is_mapped: bool
) -> None:
    """Give the modules outside the layers their weights: where they are mapped and of the right dtype, in the file."""
    for name, stored in rest.items():
        module, own = _place(model, name)
        is_parameter = own in module._parameters
        dtype = model.get_parameter_or_buffer(name).dtype
        view = files.view(stored)
        as_it_is = is_mapped and is_parameter and view.dtype == dtype
        tensor = view if as_it_is else torch.empty_like(view, dtype=dtype, device=device).copy_(view)
        if is_parameter:
            module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[own] = tensor
    if not is_mapped:
        files.drop(rest.values())


def _complete(
    model: Any, stored: Mapping[str, StoredTensor], unexpected: set[str], device: torch.device
) -> dict[str, set[str]]:
    """Compute what no checkpoint stores, tie what is tied, and return what is missing and what is not used.

    As transformers does when it loads a model: it fills whatever is not marked as initialised.
    """
    own = model.state_dict(keep_vars=True)
    for name in stored:
        own[name]._is_hf_initialized = True
    found = SimpleNamespace(missing_keys=own.keys() - stored.keys(), unexpected_keys=set(unexpected))
    for name in model.all_tied_weights_keys:
        model.get_parameter(name)._is_hf_initialized = True
    for name, buffer in model.named_non_persistent_buffers():
        module, last = _place(model, name)
        module._buffers[last] = torch.empty_like(buffer, device=device)
    model.initialize_weights()
    model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(found)
    return {"missing_keys": found.missing_keys, "unexpected_keys": found.unexpected_keys}


def _place(model: Any, name: str) -> tuple[nn.Module, str]:
    owner, _, last = name.rpartition(".")
    return model.get_submodule(owner), last


def _read_generation(model: Any, folder: Path) -> None:
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
