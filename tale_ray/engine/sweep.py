"""Every candidate of a round in one pass: the model's own forward, its layers run on all hidden states that differ.

For the length of a sweep each decoder layer's `forward` is ours. It keeps the hidden states of all nodes (see
`streams`) beside the model, runs the layer once on those that need it, stacked along the batch axis, and lets the rest
pass. Embedding, masks, rotary embedding, final norm and head stay the model's. Axes in tensor names: n nodes, b rows
of a micro-batch, t tokens, d hidden size, v vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tale_ray.engine.arguments import learn_arguments
from tale_ray.engine.memory import BatchMemory
from tale_ray.engine.prefix import PrefixStates, Record, SweepCache, stack
from tale_ray.engine.streams import Node, Step, plan_sweep
from tale_ray.model.load import LoadedModel

_MLPS = ("mlp", "feed_forward", "block_sparse_moe", "moe")  # what a layer calls its feed-forward part
_OUTPUTS = ("o_proj", "out_proj")  # what attention calls its last projection


class _LastTokens:
    """A pre-hook: the module sees one position of each row only. What it returns is added to all, and right there."""

    def __init__(self, last_b: torch.Tensor) -> None:
        self.last_b = last_b

    def __call__(self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *others = inputs
        last = self.last_b.to(hidden.device).repeat(hidden.shape[0] // len(self.last_b))
        return (hidden[torch.arange(len(last), device=hidden.device), last, None], *others)


class Unfit(Exception):  # no error of the user's: the caller goes another way
    """The model's forward does something that a sweep does not know."""


@dataclass
class _Pass:
    """One pass of some rows through all layers."""

    steps: Sequence[Step]
    last_b: torch.Tensor | None  # position of each row's last token; None: keys and values are all that is wanted
    cache: SweepCache | None
    memory: BatchMemory | None
    states: dict[Node, tuple[torch.Tensor, int]] = field(default_factory=dict)  # of the boundary: (n b t d, position)
    block: torch.Tensor | None = None  # what the last layer that ran has computed


class Sweep:
    """The sweep over one loaded model. `narrow` runs feed-forward parts on last tokens only where no more is needed."""

    def __init__(self, loaded: LoadedModel, *, narrow: bool = True) -> None:
        self._loaded = loaded
        self._decoder: Any = loaded.model.get_decoder()
        self._narrow = narrow
        self._pass: _Pass | None = None
        self._rows = 0
        self.layer_applications = 0
        self._arguments = learn_arguments(loaded.layers, self._run_rows)

    @torch.inference_mode()
    def run_prefix(
        self,
        prefix: PrefixStates,
        token_ids: Sequence[int],
        wanted: Collection[tuple[int, Node]],
        memory: BatchMemory | None = None,
    ) -> None:
        """Compute the keys and values of the tokens at some (layer, node) places."""
        steps = plan_sweep(self._loaded.layers.num_layers, (), wanted, _known(memory))
        cache = SweepCache(prefix, writes=True)
        self._run(_Pass(steps, None, cache, memory), [list(token_ids)])

    @torch.inference_mode()
    def next_tokens(
        self,
        finals: Sequence[Node],
        rows: Sequence[Sequence[int]],
        prefix: PrefixStates | None,
        memory: BatchMemory | None,
        head_rows: int,
        record: Record | None = None,
    ) -> list[list[int]]:
        """Return the most likely next token of each row (without the prefix's tokens) at each final node.

        The head runs on `head_rows` rows at a time. Every layer's keys and values are handed to `record`.
        """
        last_nbd = self._last_states(finals, rows, prefix, memory, record)
        last_rd = last_nbd.flatten(0, 1)
        parts = [
            self._head(last_rd[start : start + head_rows]).argmax(-1) for start in range(0, len(last_rd), head_rows)
        ]
        found: list[list[int]] = torch.cat(parts).view(last_nbd.shape[:2]).tolist()
        return found

    @torch.inference_mode()
    def next_logits(
        self, finals: Sequence[Node], rows: Sequence[Sequence[int]], prefix: PrefixStates | None
    ) -> torch.Tensor:
        """Return the logits (nodes, rows, vocabulary) after each row at each final node."""
        last_nbd = self._last_states(finals, rows, prefix, None)
        return self._head(last_nbd.flatten(0, 1)).view(*last_nbd.shape[:2], -1)

    def _last_states(
        self,
        finals: Sequence[Node],
        rows: Sequence[Sequence[int]],
        prefix: PrefixStates | None,
        memory: BatchMemory | None,
        record: Record | None = None,
    ) -> torch.Tensor:
        """Return the hidden states (nodes, rows, hidden size) of each row's last token, before the final norm.

        Padding is on the right and there is no mask: with causal attention no token of a row sees it.
        """
        steps = plan_sweep(self._loaded.layers.num_layers, finals, (), _known(memory))
        longest = max(map(len, rows))
        padded = [[*row, *[row[-1]] * (longest - len(row))] for row in rows]
        last_b = torch.tensor([len(row) - 1 for row in rows])
        cache = SweepCache(prefix, writes=False, record=record) if prefix is not None or record is not None else None
        states = self._run(_Pass(steps, last_b, cache, memory), padded)
        return torch.cat([self._last(states[node], last_b) for node in finals])

    def _last(self, state: tuple[torch.Tensor, int], last_b: torch.Tensor) -> torch.Tensor:
        tensor_nbtd, position = state
        state_btd = tensor_nbtd[position]
        if state_btd.shape[1] == 1:
            return state_btd[None, :, 0]
        return state_btd[None, torch.arange(len(last_b)), last_b.to(state_btd.device)]

    def _run(self, work: _Pass, rows: Sequence[Sequence[int]]) -> dict[Node, tuple[torch.Tensor, int]]:
        """Run the decoder over rows of equal length and return the states above all layers."""
        tokens_bt = torch.tensor(rows, device=self._loaded.model.device)
        self._pass, self._rows = work, len(rows)
        try:
            self._narrow_layers(work)
            with self._loaded.layers.forwarding(self._forwards()):
                self._decoder(input_ids=tokens_bt, past_key_values=work.cache, use_cache=work.cache is not None)
        finally:
            self._pass = None
            self.widen()
        if any(step.runs for step in work.steps) and work.block is None:
            raise Unfit("the decoder did not call its layers")
        return work.states

    def _run_rows(self, num_rows: int) -> None:
        tokens_bt = torch.zeros((num_rows, 2), dtype=torch.long, device=self._loaded.model.device)
        self._decoder(input_ids=tokens_bt, use_cache=False)

    def _head(self, last_rd: torch.Tensor) -> torch.Tensor:
        """Return the logits (rows, vocabulary) of final hidden states, by the model's forward past all layers."""
        states_rtd = last_rd[:, None]

        def hand_over(_hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
            return (states_rtd,) if self._arguments.returns_tuple else states_rtd

        tokens_rt = torch.zeros((len(last_rd), 1), dtype=torch.long, device=self._loaded.model.device)
        with self._loaded.layers.forwarding([hand_over] * self._loaded.layers.num_layers):
            logits_rtv: torch.Tensor = self._loaded.model(input_ids=tokens_rt, use_cache=False).logits
        last_rv: torch.Tensor = logits_rtv[:, -1]
        return last_rv

    # Inside the model's forward.

    def _forwards(self) -> list[Any]:
        def forward_of(layer: int) -> Any:
            own = self._loaded.layers.full[layer].forward

            def forward(hidden_btd: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                self._at_layer(layer, own, hidden_btd, args, kwargs)
                return (hidden_btd,) if self._arguments.returns_tuple else hidden_btd

            return forward

        return [forward_of(layer) for layer in range(self._loaded.layers.num_layers)]

    def _at_layer(self, layer: int, own: Any, hidden_btd: torch.Tensor, args: Any, kwargs: Any) -> None:
        work = self._pass
        assert work is not None, "layers are ours during a pass only"
        if layer == 0:
            work.states = {(): (hidden_btd[None], 0)}
        step = work.steps[layer]
        below, above = work.states, {}
        for node in step.passes:
            above[node] = below[node[:-1]]
        if step.runs:
            order = sorted(step.runs, key=lambda node: (below[node][0] is not work.block, below[node][1], node))
            stacked_nbtd = stack([below[node] for node in order])
            num_nodes = len(order)
            if work.cache is not None:
                work.cache.layer, work.cache.nodes = layer, tuple(order)
            found = own(
                stacked_nbtd.flatten(0, 1),
                *(self._fit(value, num_nodes, (at,)) for at, value in enumerate(args)),
                **{name: self._fit(value, num_nodes, (name,)) for name, value in kwargs.items()},
            )
            found = found[0] if isinstance(found, tuple) else found
            work.block = found.reshape(num_nodes, self._rows, *found.shape[1:])
            above.update((node, (work.block, at)) for at, node in enumerate(order) if node in step.kept)
            if work.memory is not None and not step.last_only:
                work.memory.add(layer + 1, order, work.block)
            self.layer_applications += num_nodes * self._rows
        if work.memory is not None:
            above.update((node, (work.memory.load(layer + 1, node), 0)) for node in step.loads)
        work.states = above

    def _fit(self, value: Any, num_nodes: int, place: tuple[Any, ...]) -> Any:
        """Return a layer's argument for all nodes: what is the same for all rows once, the rest once a node."""
        if isinstance(value, tuple | list):
            return type(value)(self._fit(item, num_nodes, (*place, at)) for at, item in enumerate(value))
        if not isinstance(value, torch.Tensor):
            return value
        if value.ndim == 4:
            return value[:1]  # a mask: without padding it is the same for all rows
        if place in self._arguments.per_row:
            return value.repeat(num_nodes, *(1 for _ in value.shape[1:]))
        return value

    def _narrow_layers(self, work: _Pass) -> None:
        """Let the feed-forward part of layers whose outcome is needed at last positions only run there."""
        if not self._narrow:
            return
        last_b = work.last_b if work.last_b is not None else torch.zeros(self._rows, dtype=torch.long)
        for step, layer in zip(work.steps, self._loaded.layers.full, strict=True):
            if step.runs and step.last_only:
                for module in _narrowable(layer):
                    module.register_forward_pre_hook(_LastTokens(last_b))

    def widen(self) -> None:
        """Take our hooks off; not by their handles: an exception from a signal could have kept us from getting them."""
        for layer in self._loaded.layers.full:
            for module in _narrowable(layer):
                hooks = module._forward_pre_hooks
                for key in [key for key, hook in hooks.items() if isinstance(hook, _LastTokens)]:
                    del hooks[key]


def _known(memory: BatchMemory | None) -> Callable[[int, Node], bool]:
    return memory.knows if memory is not None else lambda _boundary, _node: False


def _narrowable(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the parts of a layer that treat each position for itself and whose outcome is added to its input."""
    found = [module for name, module in layer.named_children() if name in _MLPS]
    attention = [module for name, module in layer.named_modules() if name.rpartition(".")[2] in _OUTPUTS]
    return found + attention[:1]
