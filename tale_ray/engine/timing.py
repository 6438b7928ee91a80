"""How long a model takes, with all its layers and without some: the same weights, in turns, in one process.

The model's own forward and cache do all the computing, as `generate` would use them, without what `generate` does
besides. Knows nothing of runs, statistics or files. Axes in tensor names: b prompts, t tokens, n new tokens.
"""

import inspect
import time
from collections.abc import Callable, Collection
from typing import Any

import torch

from tale_ray.errors import ModelError
from tale_ray.model.layers import LayerStack
from tale_ray.model.load import LoadedModel
from tale_ray.records import BatchTimes, PassTime

_SEED = 0  # of the prompts' tokens


def time_batch(
    loaded: LoadedModel,
    removed: Collection[int],
    *,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> BatchTimes:
    """Return the times of `repeats` passes of the full model and of the one without `removed`, in turns.

    Each makes one pass before, which is not counted. Afterwards `repeats` passes of the full model have their layers
    timed. Prompts are random tokens of one length; all `new_tokens` are decoded, whatever they are.

    Raises:
        ModelError: a layer cannot be removed, or the family hands out no cache.
    """
    model, layers = loaded.model, loaded.layers
    vocabulary = min(model.config.get_text_config(decoder=True).vocab_size, len(loaded.tokenizer))
    generator = torch.Generator().manual_seed(_SEED)
    prompts_bt = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator).to(model.device)
    now = _stopwatch(model, clock)

    def full() -> PassTime:
        return time_pass(model, prompts_bt, new_tokens, now)[0]

    def pruned() -> PassTime:
        with layers.without(removed):
            return time_pass(model, prompts_bt, new_tokens, now)[0]

    full(), pruned()
    turns = [(full(), pruned()) for _ in range(repeats)]
    layered = tuple(time_layers(layers, prompts_bt, new_tokens, now) for _ in range(repeats))
    return BatchTimes(batch_size, tuple(a for a, _ in turns), tuple(b for _, b in turns), layered)


@torch.inference_mode()
def time_pass(
    model: Any, prompts_bt: torch.Tensor, new_tokens: int, now: Callable[[], float]
) -> tuple[PassTime, torch.Tensor]:
    """Return how long greedy decoding takes, and its tokens (b n).

    Raises:
        ModelError: the family hands out no cache.
    """
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    start = now()
    outputs = model(input_ids=prompts_bt, use_cache=True, **last)
    tokens = [outputs.logits[:, -1:].argmax(-1)]
    first = now()
    cache = outputs.past_key_values if "past_key_values" in outputs else None
    if cache is None and new_tokens > 1:
        raise ModelError(
            f"a model of the family {model.config.model_type} hands out no cache of keys and values, so what its "
            "decoding takes cannot be measured: measure the first token alone (--new-tokens 1)"
        )
    for _ in range(new_tokens - 1):
        outputs = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True)
        tokens.append(outputs.logits[:, -1:].argmax(-1))
    return PassTime(first - start, now() - first), torch.cat(tokens, dim=1)


def time_layers(layers: LayerStack, prompts_bt: torch.Tensor, new_tokens: int, now: Callable[[], float]) -> PassTime:
    """Return how long a pass takes, and every layer in it. On a GPU each layer is waited for.

    Raises:
        ModelError: the family hands out no cache.
    """
    seconds: list[list[float]] = [[] for _ in layers.full]

    def timed(number: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            start = now()
            found = own(*args, **kwargs)
            seconds[number].append(now() - start)
            return found

        return forward

    with layers.forwarding([timed(number, layer.forward) for number, layer in enumerate(layers.full)]):
        whole, _ = time_pass(layers.model, prompts_bt, new_tokens, now)
    return PassTime(
        whole.first_seconds,
        whole.decode_seconds,
        tuple(calls[0] for calls in seconds),
        tuple(sum(calls[1:]) for calls in seconds),
    )


def _stopwatch(model: Any, clock: Callable[[], float]) -> Callable[[], float]:
    """Return a clock that waits until the model's GPUs have done what they were asked."""
    gpus = sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})

    def now() -> float:
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        return clock()

    return now
