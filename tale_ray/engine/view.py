"""The plain path: one candidate after another, each the model without some layers, rows in micro-batches.

The model's own forward and `generate` do all the computing. It works for every family, is what the sweep falls back
on, and what it is compared with. Axes in tensor names: b rows of a micro-batch, t tokens, q places that the head runs
on, d hidden size, v vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria

from tale_ray.engine.budget import Budget, batches, row_cost
from tale_ray.model.load import LoadedModel
from tale_ray.records import Choice


@dataclass(frozen=True, slots=True)
class Ending:
    """When a reply ends before it has all its new tokens."""

    tokens: frozenset[int]  # that end it
    is_settled: Callable[[Sequence[int]], bool] | None = None  # whether what comes after so many tokens is not wanted

    def is_over(self, new: Sequence[int]) -> bool:
        """Return whether the reply has ended with its last token."""
        return new[-1] in self.tokens or (self.is_settled is not None and self.is_settled(new))


@torch.inference_mode()
def view_tokens(
    loaded: LoadedModel,
    removed: Collection[int],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    budget_bytes: int,
    ending: Ending | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, the end token included, by the model without the layers `removed`.

    Without an `ending` replies end at the model's end tokens. The model is whole again afterwards, also when an
    exception (a signal's, too) ends it halfway.

    Raises:
        ModelError: a layer cannot be removed.
        ConfigError: not even one row fits into `budget_bytes`.
    """
    lengths = [len(prompt) for prompt in prompts]
    plan = batches(lengths, budget_bytes, lambda tokens: row_cost(loaded.model).row_bytes(tokens, max_new_tokens))
    found: dict[int, list[int]] = {}
    try:
        with loaded.layers.without(removed):
            for batch in plan:
                chosen = [prompts[row] for row in batch]
                if max_new_tokens == 1:
                    new = [[token] for token in _next_tokens(loaded.model, chosen)]
                else:
                    new = _generate(
                        loaded.model, chosen, max_new_tokens, ending or Ending(frozenset(end_tokens(loaded.model)))
                    )
                found.update(zip(batch, new, strict=True))
    finally:  # once more: a signal may have interrupted the tidying up itself
        _free_head(loaded.model)
        loaded.layers.restore()
    return [tokens for _, tokens in sorted(found.items())]


@torch.inference_mode()
def view_log_likelihoods(
    loaded: LoadedModel, removed: Collection[int], choices: Sequence[Choice], budget: Budget
) -> list[float]:
    """Return the log-likelihood, in nats, of each choice's continuation by the model without the layers `removed`.

    Raises:
        ModelError: a layer cannot be removed.
        ConfigError: not even one choice fits into the budget.
    """
    rows = [(*choice.context_ids, *choice.continuation_ids[:-1]) for choice in choices]
    cost = row_cost(loaded.model)
    most = max(len(choice.continuation_ids) for choice in choices)  # positions of a row that the head runs on

    def row_bytes(num_tokens: int) -> int:
        return cost.row_bytes(num_tokens, 1) + (most - 1) * cost.logit_bytes

    needed = row_bytes(max(map(len, rows)))
    found: dict[int, float] = {}
    try:
        with loaded.layers.without(removed):
            for batch in batches(list(map(len, rows)), max(budget.batch, min(needed, budget.total)), row_bytes):
                own = [rows[at] for at in batch]
                wanted = [choices[at].continuation_ids for at in batch]
                places = [
                    (at, position)
                    for at, (row, tokens) in enumerate(zip(own, wanted, strict=True))
                    for position in range(len(row) - len(tokens), len(row))
                ]
                asked_q = torch.tensor([token for tokens in wanted for token in tokens], device=loaded.model.device)
                log_probabilities_qv = _logits_at(loaded.model, own, places).float().log_softmax(-1)
                values_q = log_probabilities_qv.gather(1, asked_q[:, None])[:, 0].double()
                parts = torch.split(values_q, [len(tokens) for tokens in wanted])
                found.update(zip(batch, (float(part.sum()) for part in parts), strict=True))
    finally:  # once more: a signal may have interrupted the tidying up itself
        _free_head(loaded.model)
        loaded.layers.restore()
    return [value for _, value in sorted(found.items())]


def _next_tokens(model: Any, prompts: Sequence[Sequence[int]]) -> list[int]:
    """The most likely next token of each prompt."""
    logits_bv = _logits_at(model, prompts, [(row, len(prompt) - 1) for row, prompt in enumerate(prompts)])
    return [int(token) for token in logits_bv.argmax(-1)]


def _logits_at(model: Any, rows: Sequence[Sequence[int]], places: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The logits (places, vocabulary) at some (row, position) places; the head runs on these only.

    Padding is on the right and there is no mask: with causal attention no token of a row sees it.
    """
    longest = max(map(len, rows))
    # Any token pads; the row's own last one needs no check that it exists.
    padded = [[*row, *[row[-1]] * (longest - len(row))] for row in rows]
    tokens_bt = torch.tensor(padded, device=model.device)
    row_q, position_q = torch.tensor(places).unbind(1)
    with _head_at(model, row_q, position_q):
        logits: torch.Tensor = model(input_ids=tokens_bt, use_cache=False).logits
    if logits.shape[1] > 1:  # a model whose head is not known runs it everywhere
        logits = logits[row_q, position_q, None]
    return logits[:, -1]


class _Places:
    """A pre-hook of the output embedding: it sees some places of the batch only; soft-caps stay the model's."""

    def __init__(self, row_q: torch.Tensor, position_q: torch.Tensor) -> None:
        self.row_q = row_q
        self.position_q = position_q

    def __call__(self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_btd, *others = inputs
        device = hidden_btd.device
        return (hidden_btd[self.row_q.to(device), self.position_q.to(device), None], *others)


@contextmanager
def _head_at(model: Any, row_q: torch.Tensor, position_q: torch.Tensor) -> Iterator[None]:
    head = model.get_output_embeddings()
    try:
        if head is not None:
            head.register_forward_pre_hook(_Places(row_q, position_q))
        yield
    finally:
        _free_head(model)


def _free_head(model: Any) -> None:
    """Take our hooks off; not by their handle, which an exception from a signal could have kept us from getting."""
    head = model.get_output_embeddings()
    hooks = head._forward_pre_hooks if head is not None else {}
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Places)]:
        del hooks[key]


def _generate(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, ending: Ending) -> list[list[int]]:
    """The new tokens of each prompt by greedy decoding with a KV cache, the end token included where there is one."""
    neutral = model.generation_config
    end, pad = neutral.eos_token_id, neutral.pad_token_id
    longest = max(map(len, prompts))
    padded = [[*[pad] * (longest - len(prompt)), *prompt] for prompt in prompts]
    real = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    written_bt = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(real, device=model.device),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=_has_attention(model),
            eos_token_id=end,
            pad_token_id=pad,
            bos_token_id=neutral.bos_token_id,
        ),
        stopping_criteria=[_Settled(longest, ending)] if ending.is_settled is not None else None,
    )
    return [_until_end(tokens[longest:], ending) for tokens in written_bt.tolist()]


class _Settled(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Tells `generate` which rows are settled."""

    def __init__(self, prompt_tokens: int, ending: Ending) -> None:
        self._prompt_tokens = prompt_tokens
        self._ending = ending

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_kwargs: Any) -> torch.Tensor:
        del scores
        over = [self._ending.is_over(tokens[self._prompt_tokens :]) for tokens in input_ids.tolist()]
        return torch.tensor(over, device=input_ids.device)


def end_tokens(model: Any) -> set[int]:
    """Return the tokens that end a reply."""
    end = model.generation_config.eos_token_id
    return set(end) if isinstance(end, list) else {end} - {None}


def _has_attention(model: Any) -> bool:
    """Whether any layer left has attention: the cache of a hybrid model does not know its length without one."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    return kinds is None or any("attention" in kind and kind != "linear_attention" for kind in kinds)


def _until_end(tokens: list[int], ending: Ending) -> list[int]:
    return next((tokens[:count] for count in range(1, len(tokens)) if ending.is_over(tokens[:count])), tokens)
