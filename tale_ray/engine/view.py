"""The plain path: one candidate after another, each the model without some layers, rows in micro-batches.

The model's own forward and `generate` do all the computing. It works for every family, is what the sweep falls back
on, and what it is compared with. Axes in tensor names: b rows of a micro-batch, t tokens, d hidden size, v vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria

from tale_ray.engine.budget import batches, row_cost
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
    loaded: LoadedModel, removed: Collection[int], choices: Sequence[Choice], budget_bytes: int
) -> list[float]:
    """Return the log-likelihood, in nats, of each choice's continuation by the model without the layers `removed`.

    Raises:
        ModelError: a layer cannot be removed.
        ConfigError: not even one choice fits into `budget_bytes`.
    """
    rows = [(*choice.context_ids, *choice.continuation_ids[:-1]) for choice in choices]
    cost = row_cost(loaded.model)
    plan = batches(
        [len(row) for row in rows], budget_bytes, lambda tokens: cost.row_bytes(tokens, 1) + tokens * cost.logit_bytes
    )
    found: dict[int, float] = {}
    try:
        with loaded.layers.without(removed):
            for batch in plan:
                longest = max(len(rows[at]) for at in batch)
                padded = [[*rows[at], *[rows[at][-1]] * (longest - len(rows[at]))] for at in batch]
                logits_btv = loaded.model(
                    input_ids=torch.tensor(padded, device=loaded.model.device), use_cache=False
                ).logits
                for at, logits_tv in zip(batch, logits_btv, strict=True):
                    wanted = torch.tensor(choices[at].continuation_ids, device=logits_tv.device)
                    own_tv = logits_tv[len(rows[at]) - len(wanted) : len(rows[at])].float().log_softmax(-1)
                    found[at] = float(own_tv.gather(1, wanted[:, None]).double().sum())
    finally:  # once more: a signal may have interrupted the tidying up itself
        loaded.layers.restore()
    return [value for _, value in sorted(found.items())]


def _next_tokens(model: Any, prompts: Sequence[Sequence[int]]) -> list[int]:
    """The most likely next token of each prompt.

    Padding is on the right and there is no mask: with causal attention no prompt token sees it. The head runs on
    each row's last prompt token only.
    """
    longest = max(map(len, prompts))
    # Any token pads; the prompt's own last one needs no check that it exists.
    padded = [[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts]
    tokens_bt = torch.tensor(padded, device=model.device)
    last_b = torch.tensor([len(prompt) - 1 for prompt in prompts])
    with _head_at(model, last_b):
        logits_btv = model(input_ids=tokens_bt, use_cache=False).logits
    if logits_btv.shape[1] > 1:  # a model whose head is not known runs it everywhere
        logits_btv = logits_btv[torch.arange(len(prompts)), last_b, None]
    return [int(token) for token in logits_btv[:, -1].argmax(-1)]


class _LastTokens:
    """A pre-hook of the output embedding: it sees position `last_b` of each row only; soft-caps stay the model's."""

    def __init__(self, last_b: torch.Tensor) -> None:
        self.last_b = last_b

    def __call__(self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_btd, *others = inputs
        at = self.last_b.to(hidden_btd.device)
        return (hidden_btd[torch.arange(len(at), device=at.device), at, None], *others)


@contextmanager
def _head_at(model: Any, last_b: torch.Tensor) -> Iterator[None]:
    head = model.get_output_embeddings()
    try:
        if head is not None:
            head.register_forward_pre_hook(_LastTokens(last_b))
        yield
    finally:
        _free_head(model)


def _free_head(model: Any) -> None:
    """Take our hooks off; not by their handle, which an exception from a signal could have kept us from getting."""
    head = model.get_output_embeddings()
    hooks = head._forward_pre_hooks if head is not None else {}
    for key in [key for key, hook in hooks.items() if isinstance(hook, _LastTokens)]:
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
