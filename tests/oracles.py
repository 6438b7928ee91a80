"""The plain truth, written to be read: slow twins that the engine and the search are compared with.

Nothing here uses the layers, the engine or the search of the package. A pruned model is built anew from a
configuration of its own making; one row at a time, no cache, no padding, no shortcuts.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

_LAYER = re.compile(r"^(.*\.(?:layers|h)\.)(\d+)(\..*)$")


def rebuild(model: Any, removed: Collection[int]) -> Any:
    """A new model with a new configuration and copied weights: `model` without the layers `removed`."""
    fields = model.config.to_dict()
    layers_field = "n_layer" if "n_layer" in fields else "num_hidden_layers"
    total = fields[layers_field]
    kept = [layer for layer in range(total) if layer not in removed]
    fields[layers_field] = len(kept)
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if fields.get(name) is not None:
            fields[name] = [fields[name][layer] for layer in kept]
    if "first_k_dense_replace" in fields:
        fields["first_k_dense_replace"] = len([layer for layer in kept if layer < fields["first_k_dense_replace"]])
    if "decoder_sparse_step" in fields:
        step, dense = fields["decoder_sparse_step"], fields["mlp_only_layers"]
        sparse = [layer for layer in range(total) if layer not in dense and (layer + 1) % step == 0]
        fields["decoder_sparse_step"] = 1
        fields["mlp_only_layers"] = [kept.index(layer) for layer in kept if layer not in sparse]
    config = type(model.config)(**fields)
    config._attn_implementation = model.config._attn_implementation
    pruned = type(model)(config)
    weights = {}
    for name, tensor in model.state_dict().items():
        if (match := _LAYER.match(name)) is None:
            weights[name] = tensor.clone()
        elif int(match[2]) in kept:
            weights[f"{match[1]}{kept.index(int(match[2]))}{match[3]}"] = tensor.clone()
    pruned.load_state_dict(weights, strict=True)
    return pruned.to(model.dtype).eval()


@torch.inference_mode()
def next_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """The logits (vocabulary) after one row."""
    return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0, -1].float()


def greedy_tokens(model: Any, tokens: Sequence[int], max_new_tokens: int, ends: Collection[int]) -> list[int]:
    """New tokens, the end token included, each from a forward over everything before it."""
    new: list[int] = []
    while len(new) < max_new_tokens and not (new and new[-1] in ends):
        new.append(int(next_logits(model, [*tokens, *new]).argmax()))
    return new


@torch.inference_mode()
def log_likelihood(model: Any, context: Sequence[int], continuation: Sequence[int]) -> float:
    """The log-likelihood of a continuation, in nats, from one forward over all of it."""
    logits = model(input_ids=torch.tensor([[*context, *continuation]]), use_cache=False).logits[0].double()
    log_probabilities = logits.log_softmax(-1)
    return sum(float(log_probabilities[len(context) + at - 1, token]) for at, token in enumerate(continuation))


@torch.inference_mode()
def hidden_states(model: Any, tokens: Sequence[int]) -> list[torch.Tensor]:
    """Hidden states (tokens, hidden size) below each layer, by the model's own account, and above the last.

    What the model says of the last layer has gone through its final norm: that one is taken from the layer.
    """
    name = "layers" if hasattr(model.get_decoder(), "layers") else "h"
    last: list[Any] = []
    hook = getattr(model.get_decoder(), name)[-1].register_forward_hook(lambda *call: last.append(call[-1]))
    output = model(input_ids=torch.tensor([list(tokens)]), output_hidden_states=True, use_cache=False)
    hook.remove()
    above = last[0][0] if isinstance(last[0], tuple) else last[0]
    return [state[0].double() for state in [*output.hidden_states[:-1], above]]


def end_tokens(model: Any) -> set[int]:
    end = model.generation_config.eos_token_id
    return set(end) if isinstance(end, list) else {end}


def oracle_replies(
    model: Any, tokenizer: Any, removed: Collection[int], prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """What the model without `removed` answers to each prompt."""
    pruned = rebuild(model, removed)
    ends = end_tokens(model)
    tokens = [greedy_tokens(pruned, prompt, max_new_tokens, ends) for prompt in prompts]
    return [tokenizer.decode(new, skip_special_tokens=True) for new in tokens]


def oracle_answers(
    model: Any,
    tokenizer: Any,
    removed: Collection[int],
    rows: Sequence[Any],
    max_new_tokens: int,
    parse: Callable[[str], str | None],
    correct: Callable[[str | None, str], bool],
) -> list[tuple[str, str | None, bool]]:
    """(reply, prediction, correct) of the model without `removed` on each row (with `token_ids` and `target`)."""
    answers = []
    replies = oracle_replies(model, tokenizer, removed, [row.token_ids for row in rows], max_new_tokens)
    for reply, row in zip(replies, rows, strict=True):
        prediction = parse(reply)
        answers.append((reply, prediction, correct(prediction, row.target)))
    return answers


@dataclass
class OracleSearch:
    """A whole search: `rounds` are the committed ones, (winner, correct rows of every candidate by layer)."""

    total: int
    baseline: int
    rounds: list[tuple[int, Mapping[int, int]]]
    rejected: Mapping[int, int] | None
    stop: str
    best: list[int]  # removed layers of the three results, in order of removal
    bsba: list[int]
    final: list[int]


def oracle_search(
    count_correct: Callable[[Collection[int]], int],
    num_layers: int,
    num_rows: int,
    epsilon: str = "0.08",
    max_removed: int | None = None,
    epsilon_mode: str = "baseline",
    start: Sequence[int] = (),
    keep: Collection[int] = (),
) -> OracleSearch:
    """The search of the TALE paper with our rules; `count_correct(removed)` says how many rows are right."""
    removed = list(start)
    baseline = reference = count_correct([])
    rounds: list[tuple[int, Mapping[int, int]]] = []
    path: list[tuple[list[int], int]] = [([], baseline)]
    rejected, stop = None, "baseline_zero" if baseline == 0 else ""
    while not stop:
        surviving = [layer for layer in range(num_layers) if layer not in removed]
        candidates = [layer for layer in surviving if layer not in keep]
        if max_removed is not None and len(removed) >= max_removed:
            stop = "max_removed"
        elif len(surviving) == 1:
            stop = "one_layer_left"
        elif not candidates:
            stop = "no_candidates"
        else:
            counts = {layer: count_correct([*removed, layer]) for layer in candidates}
            winner = min(layer for layer in candidates if counts[layer] == max(counts.values()))
            if counts[winner] < reference - Fraction(epsilon) * num_rows:
                rejected, stop = counts, "below_floor"
            else:
                removed.append(winner)
                rounds.append((winner, counts))
                path.append((list(removed), counts[winner]))
                if epsilon_mode == "current":
                    reference = counts[winner]
    most = max(correct for _, correct in path)
    best = next(layers for layers, correct in path if correct == most)
    bsba = [layers for layers, correct in path if correct >= baseline][-1]
    return OracleSearch(num_rows, baseline, rounds, rejected, stop, best, bsba, path[-1][0])
