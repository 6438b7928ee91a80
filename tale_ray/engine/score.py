"""One unit of work scored the plain way: one candidate after another, rows in micro-batches.

The model's own forward and `generate` do all the computing; what is ours is which layers are there, how rows are
batched, and how replies are read. Axes in tensor names: b rows of a micro-batch, t tokens, d hidden size, v vocabulary.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from tale_ray.engine.budget import RowCost, batches, default_budget, row_cost
from tale_ray.errors import TaskError
from tale_ray.model.load import LoadedModel
from tale_ray.records import CandidateAnswers, PromptRow, RowAnswer, UnitResult, WorkUnit
from tale_ray.tasks.answers import is_correct, parse_answer
from tale_ray.tasks.spec import AnswerSpec


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model wrote after one prompt."""

    text: str  # decoded without special tokens
    num_tokens: int  # decoded, the end token included


def score_unit(
    loaded: LoadedModel,
    unit: WorkUnit,
    rows: Sequence[PromptRow],
    answer: AnswerSpec,
    max_new_tokens: int,
    batch_bytes: int | None,
    worker: str,
) -> UnitResult:
    """Return the answers of every candidate of a unit on the unit's rows, by greedy decoding.

    A pure function of model, unit, rows and answer, but for the seconds; the model is whole again afterwards, also
    when an exception (a signal's, too) ends it halfway.

    One layer application is one layer run on one row for one forward step. The first new token of a row takes one
    step over its prompt, each later one, up to and including its end token, one more. So a candidate with L layers
    applies L x (new tokens) layers for each row, whatever the micro-batches.

    Args:
        loaded: the model.
        unit: which candidates and rows; candidate None is the model without `unit.removed` only.
        rows: all rows of the unit's split; `unit.rows` are positions in it.
        answer: how replies are read and compared.
        max_new_tokens: at most so many are decoded per row.
        batch_bytes: memory of one micro-batch; None: chosen from the device.
        worker: name of who computes, kept in the result.

    Raises:
        ModelError: a layer cannot be removed.
        ConfigError: not even one row fits into `batch_bytes`.
        TaskError: a row has no tokens, or more than the model has positions.
    """
    started = time.monotonic()
    chosen = [rows[position] for position in unit.rows]
    prompts = [row.token_ids for row in chosen]
    if any(not prompt for prompt in prompts):
        raise TaskError("a row has no tokens: its prompt rendered to an empty text; check the task's messages")
    loaded.info.check_length(max(map(len, prompts), default=0), max_new_tokens)
    budget_bytes = batch_bytes if batch_bytes is not None else default_budget(loaded.model.device)
    plan = _plan(prompts, max_new_tokens, budget_bytes, row_cost(loaded.model))
    scored: list[CandidateAnswers] = []
    layer_applications = 0
    try:
        for layer in unit.candidates:
            candidate_started = time.monotonic()
            removed = unit.removed if layer is None else (*unit.removed, layer)
            with loaded.layers.without(removed):
                replies = _replies(loaded, prompts, plan, max_new_tokens)
            num_layers = loaded.layers.num_layers - len(removed)
            layer_applications += num_layers * sum(reply.num_tokens for reply in replies)
            answers = tuple(_read(answer, reply.text, row.target) for reply, row in zip(replies, chosen, strict=True))
            scored.append(CandidateAnswers(layer, answers, time.monotonic() - candidate_started))
    finally:  # once more: a signal may have interrupted the tidying up itself
        _free_head(loaded.model)
        loaded.layers.restore()
    return UnitResult(unit, tuple(scored), layer_applications, time.monotonic() - started, worker)


def _plan(
    prompts: Sequence[Sequence[int]], new_tokens: int, budget_bytes: int, cost: RowCost
) -> tuple[tuple[int, ...], ...]:
    lengths = [len(prompt) for prompt in prompts]
    return tuple(tuple(batch) for batch in batches(lengths, new_tokens, budget_bytes, cost.row_bytes))


@torch.inference_mode()
def _replies(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], plan: Sequence[Sequence[int]], max_new_tokens: int
) -> list[Reply]:
    """The model's reply to each prompt, in the order of the prompts."""
    new_tokens: dict[int, list[int]] = {}
    for batch in plan:
        chosen = [prompts[row] for row in batch]
        if max_new_tokens == 1:
            found = [[token] for token in _next_tokens(loaded.model, chosen)]
        else:
            found = _generate(loaded.model, chosen, max_new_tokens)
        new_tokens.update(zip(batch, found, strict=True))
    return [
        Reply(loaded.tokenizer.decode(tokens, skip_special_tokens=True), len(tokens))
        for _, tokens in sorted(new_tokens.items())
    ]


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


def _generate(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
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
    )
    ends = set(end) if isinstance(end, list) else {end}
    return [_until_end(tokens[longest:], ends) for tokens in written_bt.tolist()]


def _has_attention(model: Any) -> bool:
    """Whether any layer left has attention: the cache of a hybrid model does not know its length without one."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    return kinds is None or any("attention" in kind and kind != "linear_attention" for kind in kinds)


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in ends:
            return tokens[: position + 1]
    return tokens


def _read(answer: AnswerSpec, reply: str, target: str) -> RowAnswer:
    prediction = parse_answer(answer, reply)
    return RowAnswer(reply, prediction, is_correct(answer, prediction, target))
