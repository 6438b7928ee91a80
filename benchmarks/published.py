"""The published procedure, as a yardstick: faithfully slow, and the truth about decisions.

Task-aware layer elimination as its paper (TELL-TALE, arXiv 2510.22767) and its published code do it: in every round one
candidate after another, one row after another, for every new token the whole sequence again, no cache, logits at all
positions. So a round takes exactly (candidates x rows x new tokens) plain forwards of the pruned model, under
`torch.inference_mode`. Nothing of the package's engine, search or model view is used; rows and answers are its tasks'.

For models of transformers whose layers are at `model.model.layers` (Llama and its like).
"""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from tale_ray.tasks.answers import is_correct, parse_answer
from tale_ray.tasks.spec import AnswerSpec


@dataclass(frozen=True)
class Question:
    """One row: the prompt's tokens, and the answer that is right."""

    token_ids: tuple[int, ...]
    target: str


@dataclass
class Published:
    """The procedure on one model and its rows; `forwards` and `seconds` (of forwards and reading) add up."""

    model: Any
    tokenizer: Any
    questions: Sequence[Question]
    answer: AnswerSpec
    max_new_tokens: int
    forwards: int = 0
    seconds: float = 0.0
    answers: dict[tuple[int, ...], list[bool]] = field(default_factory=dict)  # by removed layers

    @torch.inference_mode()
    def count(self, removed: Collection[int], rows: Sequence[int] | None = None) -> int:
        """Return how many rows (positions; None: all) the model without `removed` answers correctly."""
        started = time.perf_counter()
        with self._without(removed):
            chosen = range(len(self.questions)) if rows is None else rows
            correct = [self._is_correct(self.questions[row]) for row in chosen]
        self.seconds += time.perf_counter() - started
        self.answers[tuple(sorted(removed))] = correct
        return sum(correct)

    def _is_correct(self, question: Question) -> bool:
        reply = self.tokenizer.decode(self._new_tokens(question.token_ids), skip_special_tokens=True)
        return is_correct(self.answer, parse_answer(self.answer, reply), question.target)

    def _new_tokens(self, prompt: Sequence[int]) -> list[int]:
        end = self.model.generation_config.eos_token_id
        ends = set(end) if isinstance(end, list) else {end}
        tokens = list(prompt)
        while len(tokens) < len(prompt) + self.max_new_tokens:
            logits = self.model(input_ids=torch.tensor([tokens])).logits
            self.forwards += 1
            tokens.append(int(logits[0, -1].argmax()))
            if tokens[-1] in ends:
                break
        return tokens[len(prompt) :]

    @contextmanager
    def _without(self, removed: Collection[int]) -> Iterator[None]:
        decoder, config = self.model.model, self.model.config
        layers, num_layers, use_cache = decoder.layers, config.num_hidden_layers, config.use_cache
        kept = [layer for number, layer in enumerate(layers) if number not in set(removed)]
        decoder.layers, config.num_hidden_layers, config.use_cache = torch.nn.ModuleList(kept), len(kept), False
        try:
            yield
        finally:
            decoder.layers, config.num_hidden_layers, config.use_cache = layers, num_layers, use_cache


@dataclass(frozen=True)
class Decisions:
    """What a search decided: (layer, correct rows) of every committed round, and of the rejected one."""

    baseline: int
    rounds: tuple[tuple[int, int], ...]
    rejected: tuple[int, int] | None


def search(procedure: Published, epsilon: str = "0.08", max_rounds: int | None = None) -> Decisions:
    """Search greedily until a winner falls below the floor, one layer is left, or so many rounds are done."""
    num_layers = procedure.model.config.num_hidden_layers
    baseline = procedure.count(())
    floor = baseline - Fraction(epsilon) * len(procedure.questions)
    removed: list[int] = []
    rounds: list[tuple[int, int]] = []
    while len(removed) < num_layers - 1 and (max_rounds is None or len(rounds) < max_rounds):
        surviving = [layer for layer in range(num_layers) if layer not in removed]
        counts = {layer: procedure.count((*removed, layer)) for layer in surviving}
        winner = max(surviving, key=lambda layer: (counts[layer], -layer))
        if counts[winner] < floor:
            return Decisions(baseline, tuple(rounds), (winner, counts[winner]))
        removed.append(winner)
        rounds.append((winner, counts[winner]))
    return Decisions(baseline, tuple(rounds), None)
