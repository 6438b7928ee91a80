"""A model and its tokenizer, loaded, ready to lose layers. Knows nothing of tasks, rows or scores."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from tale_ray.config import ModelSection
from tale_ray.errors import ModelError
from tale_ray.model.converted import shared_weights
from tale_ray.model.digest import check_model, digest_model, has_tokenizer, model_folder
from tale_ray.model.layers import LayerStack, check_config, find_layers
from tale_ray.model.outline import DTYPES, configured_dtype, hollow_model
from tale_ray.model.placement import ON_CPU, Placement
from tale_ray.model.stages import device_map, weight_room
from tale_ray.model.streaming import stream_model
from tale_ray.model.tensor_parallel import held_whole, split_plan
from tale_ray.records import ModelInfo

_DTYPES = {**DTYPES, "checkpoint": "auto"}
_PROBE_TOKENS = 8
_STREAMED = "weights do not stay in memory: layers are read from their files one after another, once for many rows"


@dataclass(frozen=True)
class LoadedModel:
    """A decoder with its tokenizer, in evaluation mode, no gradients, generation defaults neutral."""

    model: Any  # a transformers PreTrainedModel
    tokenizer: Any
    layers: LayerStack
    info: ModelInfo
    num_stages: int = 1  # of the pipeline: so many micro-batches are to be in flight


def load_model(section: ModelSection, dtype: str, placement: Placement = ON_CPU) -> LoadedModel:
    """Return the model of a section, ready to be searched.

    Args:
        section: a hub id, a folder, or `bundled`; a GGUF file is de-quantised.
        dtype: float32, bfloat16, float16, or `checkpoint` for the one the weights are stored in.
        placement: where its weights are to lie.

    Raises:
        ModelError: the model cannot be found, loaded, or searched; or not be split among the members of a gang.
    """
    started = time.monotonic()
    check_model(section)
    folder = model_folder(section.model)
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    if folder is None:
        options["revision"] = section.revision
    place = str(folder) if folder is not None else section.model
    quantised = {} if section.gguf is None else {"gguf_file": section.gguf}
    if section.gguf is not None:
        require_gguf()
    try:
        with no_progress_bars():
            config = AutoConfig.from_pretrained(place, **options, **quantised)
            check_config(config)
            tokenizer = _load_tokenizer(place, folder, options, quantised)
            digest = None if folder is None else digest_model(folder, section.gguf)
            split = _split(config, section, placement) if placement.num_members > 1 else None
            if placement.is_streamed:
                model, loading = stream_model(section, config, dtype, placement)
                _check_weights(section, loading)
            else:
                placed = {"distributed_config": split.config} if split else _placed(config, section, dtype, placement)
                read = partial(read_weights, section, place, dtype=_DTYPES[dtype], **placed, **options, **quantised)
                if placement.shares_weights and _is_converted(config, section, dtype):
                    model, loading = shared_weights(digest or _commit_name(section), read)
                else:
                    model, loading = read()
    except ModelError:
        raise
    except Exception as error:
        raise as_model_error(section, error) from error
    model.eval().requires_grad_(False)
    model.generation_config = neutral_generation(model, tokenizer)
    _check_placement(model, placement.num_gpus)
    num_embeddings = int(model.get_input_embeddings().weight.shape[0])
    _check_vocabulary(section, tokenizer, num_embeddings)
    layers = find_layers(model)
    layers.is_streamed = placement.is_streamed
    check_causal(model)
    info = ModelInfo(
        num_layers=layers.num_layers,
        family=str(model.config.model_type),
        digest=digest or digest_model(snapshot_folder(section), section.gguf),
        dtype=str(model.dtype).removeprefix("torch."),
        device=_device_name(model),
        load_seconds=time.monotonic() - started,
        max_positions=max_positions(model),
        notes=(
            *_notes(model, loading),
            *([_STREAMED] if placement.is_streamed else []),
            *([] if split is None else [split.note]),
        ),
        num_embeddings=num_embeddings,
        is_streamed=placement.is_streamed,
    )
    return LoadedModel(model, tokenizer, layers, info, num_stages=len(placement.devices))


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Within the context transformers draws no progress bars: several workers would draw theirs over each other."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def load_tokenizer(section: ModelSection) -> Any:
    """Return the tokenizer of a section, as `load_model` loads it with the model.

    Raises:
        ModelError: the model or its tokenizer cannot be found or loaded.
    """
    check_model(section)
    folder = model_folder(section.model)
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    if folder is None:
        options["revision"] = section.revision
    quantised = {} if section.gguf is None else {"gguf_file": section.gguf}
    if section.gguf is not None:
        require_gguf()
    return _load_tokenizer(str(folder) if folder is not None else section.model, folder, options, quantised)


def folder_tokenizer(section: ModelSection, folder: Path) -> Any:
    """Return the tokenizer in a model's folder, whatever else is missing there.

    Raises:
        ModelError: it cannot be loaded.
    """
    quantised = {} if section.gguf is None else {"gguf_file": section.gguf}
    return _load_tokenizer(str(folder), folder, {"trust_remote_code": section.trust_remote_code}, quantised)


def max_positions(model: Any) -> int | None:
    """Return how many tokens a row may have in all; None: the configuration names no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def neutral_generation(model: Any, tokenizer: Any) -> GenerationConfig:
    """Return generation defaults that keep only the end, padding and start tokens of the checkpoint.

    Repetition penalties, sampling and forced tokens are gone. Without a padding token the end token pads.
    """
    own, config = model.generation_config, model.config.get_text_config(decoder=True)

    def token(name: str) -> Any:
        for source in (own, config, tokenizer):
            if (value := getattr(source, name, None)) is not None:
                return value
        return None

    end, pad = token("eos_token_id"), token("pad_token_id")
    if not isinstance(pad, int) or not 0 <= pad < config.vocab_size:
        pad = (end[0] if isinstance(end, list) else end) if end else 0
    return GenerationConfig(eos_token_id=end, pad_token_id=pad, bos_token_id=token("bos_token_id"))


@torch.inference_mode()
def check_causal(model: Any) -> None:
    """Refuse a model whose earlier logits depend on later tokens, or whose logits are not finite.

    Raises:
        ModelError: with the reason.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens_bt = (torch.arange(_PROBE_TOKENS, device=model.device) * 7 + 3).remainder(vocabulary).repeat(2, 1)
    tokens_bt[1, -1] = (tokens_bt[1, -1] + vocabulary // 2).remainder(vocabulary)
    logits_btv = model(input_ids=tokens_bt, use_cache=False).logits.float()
    if not logits_btv.isfinite().all():
        raise ModelError(
            f"the model's logits are not finite in {str(model.dtype).removeprefix('torch.')}: "
            "use --dtype bfloat16 or float32"
        )
    earlier_btv = logits_btv[:, :-1]
    scale = earlier_btv.abs().amax().clamp(min=1e-6)
    if (earlier_btv[0] - earlier_btv[1]).abs().amax() > 0.01 * scale:
        raise ModelError(
            f"a model of the family {model.config.model_type} cannot be searched: "
            "its earlier logits change with later tokens, so it is no causal decoder"
        )


def _load_tokenizer(place: str, folder: Path | None, options: dict[str, Any], quantised: dict[str, str]) -> Any:
    own = folder is not None and has_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(place, **options, **({} if own else quantised))
    except Exception as error:
        raise ModelError(
            f"the tokenizer of {place} cannot be loaded ({_first_line(error)}): "
            "copy its tokenizer files again, or install what they need"
        ) from error


def _placed(config: Any, section: ModelSection, dtype: str, placement: Placement) -> dict[str, Any]:
    """Return the options that put weights where they are to lie, without a second copy in this process's memory."""
    devices = placement.devices
    if not placement.num_gpus:
        return {"device_map": None}  # files are mapped into memory, which all workers of a node share
    if getattr(config, "quantization_config", None) is not None:  # only its own code knows how large its weights are
        if len(devices) == 1:
            return {"device_map": {"": devices[0]}}
        memory = {gpu: weight_room(torch.cuda.mem_get_info(gpu)[0]) for gpu in range(placement.num_gpus)}
        return {"device_map": "auto", "max_memory": memory}  # what is not named is not used
    computed = configured_dtype(config, dtype) or torch.float32
    places = device_map(hollow_model(config, computed, trust_remote_code=section.trust_remote_code), devices)
    return {"device_map": places if len(devices) > 1 else {"": devices[0]}}


@dataclass(frozen=True, slots=True)
class _Split:
    """How a gang splits a model: for transformers, and in words."""

    config: DistributedConfig
    note: str


def _split(config: Any, section: ModelSection, placement: Placement) -> _Split:
    """Return how the weights are split, told from the configuration.

    Raises:
        ModelError: they cannot be.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"model {section.model} is quantised, and a gang splits plain weights only: leave out --tensor-parallel, "
            "or choose a checkpoint that is not quantised"
        )
    num_members = placement.num_members
    hollow = hollow_model(config, torch.float32, trust_remote_code=section.trust_remote_code)
    fields = hollow.config.get_text_config(decoder=True).to_dict()
    plan = split_plan(hollow.tp_plan or {}, fields, num_members)
    whole = held_whole(plan, fields)
    note = f"{num_members} processes split the weights of a worker" + (
        f", but for {' and '.join(whole)}: {num_members} does not divide these, and each holds all of it"
        if whole
        else ""
    )
    return _Split(DistributedConfig(tp_size=num_members, tp_plan=plan), note)


def read_weights(section: ModelSection, place: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model, and what transformers says of loading it; `options` are those of its `from_pretrained`.

    Raises:
        ModelError: weights are missing.
    """
    model, loading = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **options)
    _check_weights(section, loading)
    if section.gguf is not None and (quantiser := getattr(model, "hf_quantizer", None)) is not None:
        quantiser.remove_quantization_config(model)  # the weights are not quantised any more, and can be saved
    return model, loading


def _is_converted(config: Any, section: ModelSection, dtype: str) -> bool:
    """Return whether weights are computed with as other numbers than they are stored as, so that no file holds them."""
    if dtype != "float32" or getattr(config, "auto_map", None):  # its own code may save it as it likes
        return False
    return section.gguf is not None or getattr(config, "dtype", None) not in (None, torch.float32)


def _commit_name(section: ModelSection) -> str:
    """Return a name for the content of a hub model's files, which may not have been downloaded yet."""
    return f"{snapshot_folder(section).name}-{section.gguf or 'safetensors'}"


def _device_name(model: Any) -> str:
    devices = dict.fromkeys(str(parameter.device) for parameter in model.parameters() if not parameter.is_meta)
    return ",".join(devices)


def snapshot_folder(section: ModelSection) -> Path:
    """The folder of the hub's cache from which a hub id was just loaded; it bears the name of its commit."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", section.gguf):
        found = try_to_load_from_cache(section.model, name, revision=section.revision) if name else None
        if isinstance(found, str):
            return Path(found).parent
    raise ModelError(f"the files of {section.model} are not in the hub's cache: download them and give the folder")


def _check_weights(section: ModelSection, loading: dict[str, Any]) -> None:
    """Transformers fills weights that the checkpoint lacks with random numbers; a search of those means nothing."""
    if missing := sorted(map(str, loading["missing_keys"])):
        raise ModelError(
            f"model {section.model} lacks weights that its configuration asks for: {missing[0]} "
            f"({len(missing)} missing); is num_hidden_layers in config.json right? copy the checkpoint again"
        )


def _check_vocabulary(section: ModelSection, tokenizer: Any, num_embeddings: int) -> None:
    """Added tokens may be without an embedding as long as no prompt has them; see `ModelInfo.check_tokens`."""
    if tokenizer.vocab_size > num_embeddings:
        raise ModelError(
            f"the tokenizer of {section.model} has {tokenizer.vocab_size} tokens and the model embeds "
            f"{num_embeddings}: copy the tokenizer that belongs to the checkpoint"
        )


def require_gguf() -> None:
    """Refuse to go on without the package that reads GGUF files.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ModelError("reading a GGUF file needs the package gguf: pip install 'tale-ray[gguf]'") from None


def _check_placement(model: Any, num_gpus: int) -> None:
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if num_gpus and places & {"cpu", "disk"}:
        raise ModelError(
            f"the model does not fit into the memory of {num_gpus} GPU{'s' if num_gpus > 1 else ''}: "
            "give each worker more GPUs (--gpus-per-worker), or choose a smaller dtype"
        )


def _notes(model: Any, loading: dict[str, Any]) -> tuple[str, ...]:
    notes = []
    if unused := sorted(map(str, loading["unexpected_keys"])):
        notes.append(f"the checkpoint holds {len(unused)} weights that the model does not use, such as {unused[0]}")
    if model.generation_config.eos_token_id is None:
        notes.append("the checkpoint names no end token: replies always have the full number of new tokens")
    return tuple(notes)


def as_model_error(section: ModelSection, error: Exception) -> ModelError:
    """Return what transformers raised while it loaded a model as an error of ours, with a remedy."""
    name, text = section.model, _first_line(error)
    kind = type(error).__name__
    if kind in ("GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError") or "gated repo" in text:
        remedy = "check the name and revision; for a gated model log in on every node with `hf auth login`"
    elif isinstance(error, OSError) and model_folder(name) is None:
        remedy = "the hub may be out of reach: download the model and give its folder, or check the name"
    elif isinstance(error, torch.cuda.OutOfMemoryError):
        remedy = "give each worker more GPUs, or choose a smaller dtype"
    elif isinstance(error, MemoryError) or "Cannot allocate memory" in text:
        remedy = "give the process more memory, or leave the layers in their files (--stream always)"
    elif isinstance(error, ImportError):
        remedy = "install the package it names"
    else:
        remedy = "check that the installed transformers knows the family and that the checkpoint is whole"
    return ModelError(f"model {name} cannot be loaded ({kind}: {text}): {remedy}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
