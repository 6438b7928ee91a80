"""The memory that a sweep's micro-batches may take, and what fits into it. Knows nothing of candidates or answers."""

from dataclasses import dataclass, replace

from tale_ray.engine.budget import Budget, RowCost
from tale_ray.engine.layout import Layout
from tale_ray.engine.sweep import Portions


@dataclass(frozen=True, slots=True)
class Room:
    """`total` bytes for micro-batches, `budget.batch` of them for what a layer or the head works in."""

    cost: RowCost
    budget: Budget
    prefix_tokens: int
    nodes: int
    total: int

    def without(self, held_bytes: int) -> "Room":
        """Return what is left while so much is held."""
        return replace(self, total=self.total - held_bytes)

    def line_bytes(self, num_tokens: int) -> int:
        """Return the share of a line in `total`: its bytes, or as much as its work takes of the bytes for work.

        A line whose work alone takes more than those is one by itself.
        """
        work = self.cost.work_bytes(num_tokens, self.prefix_tokens) * self.total // self.budget.batch
        return max(self.least_bytes(num_tokens), min(work, self.total))

    def least_bytes(self, num_tokens: int) -> int:
        """Return what one line takes at least: a layer at work on one node at a time."""
        return self.cost.sweep_bytes(num_tokens, self.prefix_tokens, self.nodes)

    def portions(self, layout: Layout) -> Portions:
        """Return on how many nodes a layer works at once, and on how many rows the head."""
        work = layout.num_lines * self.cost.work_bytes(layout.num_slots, self.prefix_tokens)
        states = layout.num_lines * self.cost.sweep_bytes(layout.num_slots, self.prefix_tokens, self.nodes) - work
        free = min(self.budget.batch, self.total - states)
        return Portions(max(1, free // work), max(1, self.budget.batch // self.cost.logit_bytes))

    def working_bytes(self, layout: Layout, portions: Portions, num_logits: int) -> int:
        """Return what a micro-batch takes: all nodes' states with a layer at work on its portion; then the head."""
        work = layout.num_lines * self.cost.work_bytes(layout.num_slots, self.prefix_tokens)
        head = min(num_logits, portions.head_rows or num_logits) * self.cost.logit_bytes
        states = 3 * self.nodes * layout.num_lines * layout.num_slots * self.cost.state_bytes
        return max(states + min(self.nodes, portions.nodes or self.nodes) * work, head)
