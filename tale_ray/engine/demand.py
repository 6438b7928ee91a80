"""What scoring candidates on rows takes: blocks of candidates, micro-batches, bytes. Knows a model by its cost only.

A scorer asks it before it computes; so can whoever has no model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tale_ray.engine.budget import Budget, RowCost, batches
from tale_ray.engine.layout import Layout, lay_lines, lay_packs, pack_rows
from tale_ray.engine.room import Room
from tale_ray.engine.streams import Node, Step, applications, final_node, most_nodes, plan_sweep
from tale_ray.errors import ConfigError

_USABLE_PERCENT = 75  # of the budget; the rest goes to what the allocator keeps and what is copied in passing
_MEMORY_SHARE = 4  # of the budget, for states that a later round goes on from: at most a quarter


@dataclass(frozen=True, slots=True)
class Block:
    """Candidates of one sweep, with its plan."""

    candidates: Sequence[int | None]
    steps: Sequence[Step]
    needed_bytes: int  # of one row (or the prefix) at work, with the prefix's keys and values and the row's own

    @property
    def nodes(self) -> int:
        """Hidden states that exist at once, at most."""
        return most_nodes(self.steps)

    @property
    def places(self) -> int:
        """(Layer, node) places, each of which holds the prefix's keys and values."""
        return applications(self.steps)


@dataclass(frozen=True, slots=True)
class Cut:
    """How a unit's candidates are cut for rows that share a prefix."""

    shared_tokens: int  # of the prefix; 0 where its keys and values do not fit
    blocks: tuple[Block, ...]

    @property
    def needed_bytes(self) -> int:
        """Of the block that needs most."""
        return max(block.needed_bytes for block in self.blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a model's rows cost, and the budget that they are scored in."""

    cost: RowCost
    budget: Budget
    num_layers: int  # of the full model
    num_stages: int = 1  # of the pipeline
    shares_lines: bool = True  # rows that begin alike may lie on one line

    def cut(
        self,
        removed: Sequence[int],
        candidates: Sequence[int | None],
        longest: int,
        prefix_tokens: int,
        max_new_tokens: int = 1,
    ) -> Cut:
        """Return how much of the prefix is shared, and the fewest contiguous blocks of candidates.

        Where the prefix's keys and values do not fit even for one candidate, they are computed with each row.

        Args:
            removed: layers that every candidate does without.
            candidates: of the unit.
            longest: tokens of the longest row, the prefix's included.
            prefix_tokens: that all rows begin with.
            max_new_tokens: of every reply.

        Raises:
            ConfigError: one candidate on the longest row does not fit either.
        """
        for shared in sorted({prefix_tokens, 0}, reverse=True):
            size = len(candidates)
            while size:
                blocks = [
                    self._block(removed, candidates[start : start + size], longest - shared, shared, max_new_tokens)
                    for start in range(0, len(candidates), size)
                ]
                found = Cut(shared, tuple(blocks))
                if found.needed_bytes <= self.budget.total:
                    return found
                size //= 2
        new = f" and {max_new_tokens} new ones" if max_new_tokens > 1 else ""
        raise ConfigError(
            f"batch bytes {self.budget.total} are too few: the longest row ({longest} tokens{new}) needs "
            f"{found.needed_bytes} for one candidate; raise --batch-bytes to at least that, or leave it out"
        )

    def _block(
        self,
        removed: Sequence[int],
        candidates: Sequence[int | None],
        longest: int,
        prefix_tokens: int,
        max_new_tokens: int,
    ) -> Block:
        steps = _steps(self.num_layers, tuple(final_node(removed, layer) for layer in candidates))
        nodes = most_nodes(steps)
        at_work = self.cost.sweep_bytes(longest, prefix_tokens, nodes)
        if max_new_tokens > 1:
            at_work += self.cost.decode_bytes(longest, prefix_tokens, max_new_tokens, len(candidates))
        needed = self.prefix_bytes(steps, prefix_tokens) + max(at_work, self.cost.sweep_bytes(prefix_tokens, 0, nodes))
        return Block(candidates, steps, needed)

    def prefix_bytes(self, steps: Sequence[Step], prefix_tokens: int) -> int:
        """Return the bytes of a prefix's keys and values at every place of a sweep."""
        return self.cost.prefix_bytes(prefix_tokens, applications(steps))

    def kept_bytes(self, cut: Cut) -> int:
        """Return how many bytes of states that a later round goes on from may be held.

        0 where micro-batches may take the whole budget.
        """
        spare = self.budget.total - max(cut.needed_bytes, self.budget.batch)
        return min(spare, self.budget.total // _MEMORY_SHARE)

    def at_work_bytes(self, cut: Cut, block: Block) -> int:
        """Return what a block needs beside the prefix's keys and values."""
        return block.needed_bytes - self.prefix_bytes(block.steps, cut.shared_tokens)

    def room(self, cut: Cut, block: Block, held_bytes: int) -> Room:
        """Return the memory for micro-batches while so much is held: prefixes, and states of a later round."""
        left = max(self.usable_bytes - held_bytes, self.at_work_bytes(cut, block))
        return Room(self.cost, self.budget, cut.shared_tokens, block.nodes, left)

    def prefix_room(self, steps: Sequence[Step]) -> Room:
        """Return the memory for a sweep over a prefix."""
        return Room(self.cost, self.budget, 0, most_nodes(steps), self.usable_bytes)

    @property
    def usable_bytes(self) -> int:
        """Bytes of the budget for prefixes, states and micro-batches."""
        return self.budget.total * _USABLE_PERCENT // 100

    @staticmethod
    def spare_bytes(taken_bytes: int) -> int:
        """Return what comes on top of so many bytes that are taken on purpose: the rest that `usable_bytes` leaves."""
        return taken_bytes * (100 - _USABLE_PERCENT) // _USABLE_PERCENT

    @property
    def least_batches(self) -> int:
        """So many micro-batches at least, where there are as many rows: each device waits a third at most."""
        return 2 * self.num_stages if self.num_stages > 1 else 1

    def layouts(self, rows: Sequence[Sequence[int]], room: Room) -> Iterator[tuple[list[int], Layout]]:
        """Yield micro-batches of a sweep: positions in `rows` (without the prefix's tokens), and how they lie."""
        lengths = [len(row) for row in rows]
        if not self.shares_lines:
            for batch in batches(lengths, room.total, room.line_bytes, self.least_batches):
                yield batch, lay_lines([rows[at] for at in batch])
            return
        most = max(max(lengths), self.cost.pack_tokens)
        while most > max(lengths) and room.line_bytes(most) > room.total:
            most = max(max(lengths), most // 2)
        packs = pack_rows(rows, most)
        for batch in batches([len(pack.tokens) for pack in packs], room.total, room.line_bytes, self.least_batches):
            chosen = [packs[at] for at in batch]
            yield [row for pack in chosen for row in pack.rows], lay_packs(chosen)

    def reply_batches(
        self, lengths: Sequence[int], room: Room, num_candidates: int, max_new_tokens: int
    ) -> Iterator[tuple[list[int], Room]]:
        """Yield rows that are decoded together, as positions in `lengths`, and the memory left to their prompts."""

        def reply_bytes(num_tokens: int) -> int:
            return self.cost.decode_bytes(num_tokens, room.prefix_tokens, max_new_tokens, num_candidates)

        for batch in batches(lengths, room.total - room.least_bytes(max(lengths)), reply_bytes):
            longest = max(lengths[at] for at in batch)
            yield batch, room.without(len(batch) * reply_bytes(longest))


@lru_cache(maxsize=1024)  # the same candidates are asked for by unit after unit
def _steps(num_layers: int, finals: tuple[Node, ...]) -> tuple[Step, ...]:
    return tuple(plan_sweep(num_layers, finals))
