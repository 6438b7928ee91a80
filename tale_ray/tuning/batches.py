"""Which rows a step learns from, and how rows become a batch: functions of seed and step, so nothing has to be stored.

Axes: B rows of a batch, T tokens.
"""

import functools
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tale_ray.tasks.replies import TrainingRow

IGNORED = -100  # the label of a token without a loss


def step_rows(seed: int, step: int, num_rows: int, rows_per_step: int) -> tuple[int, ...]:
    """Return the positions of the rows of a step, counted from 0: the next ones of one shuffled epoch after another."""
    first = step * rows_per_step
    return tuple(
        _epoch(seed, position // num_rows, num_rows)[position % num_rows]
        for position in range(first, first + rows_per_step)
    )


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, num_rows: int) -> tuple[int, ...]:
    order = list(range(num_rows))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return tuple(order)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of whatever is random in a step of one worker."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8]) >> 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right. Logits from the last `num_kept` positions on are all that labels ask for."""

    tokens_BT: torch.Tensor
    mask_BT: torch.Tensor  # 1 where there is a token
    labels_BT: torch.Tensor  # of the kept positions: the token that comes next, or `IGNORED`

    @property
    def num_kept(self) -> int:
        """Positions, from the end, whose logits are needed."""
        return int(self.labels_BT.shape[1])


def make_batch(rows: Sequence[TrainingRow], device: torch.device) -> Batch:
    """Return rows as a batch: every token of a reply is predicted at the position before it, nothing else is."""
    longest = max(map(len, rows))
    first = min(len(row.prompt_ids) for row in rows) - 1  # where the first reply token of all is predicted
    tokens_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    labels_BT = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
    for at, row in enumerate(rows):
        start = len(row.prompt_ids)
        tokens_BT[at, : len(row)] = torch.tensor((*row.prompt_ids, *row.reply_ids))
        mask_BT[at, : len(row)] = 1
        labels_BT[at, start - 1 : len(row) - 1] = torch.tensor(row.reply_ids)
    return Batch(tokens_BT.to(device), mask_BT.to(device), labels_BT[:, first:].contiguous().to(device))


def count_reply_tokens(rows: Sequence[TrainingRow]) -> int:
    """Return how many tokens of some rows have a loss."""
    return sum(len(row.reply_ids) for row in rows)
