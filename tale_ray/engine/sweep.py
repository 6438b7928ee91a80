"""Every candidate of a round in one pass: the model's own forward, its layers run on all hidden states that differ.

For the length of a sweep each decoder layer's `forward` is ours. It keeps the hidden states of all nodes (see
`streams`) beside the model, runs the layer once on those that need it, stacked along the batch axis, and lets the rest
pass. Embedding, masks, rotary embedding, final norm and head stay the model's. Axes in tensor names: n nodes, b rows
of a micro-batch, r states that are read, q predicted tokens, t tokens, d hidden size, v vocabulary.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tale_ray.engine.arguments import learn_arguments
from tale_ray.engine.devices import Copies, layer_devices, sent
from tale_ray.engine.layout import Layout, lay_lines
from tale_ray.engine.masks import TreeMasks, Unfit, learn_windows
from tale_ray.engine.memory import BatchMemory
from tale_ray.engine.prefix import PrefixStates, Record, SweepCache, stack
from tale_ray.engine.streams import Node, Step, most_nodes, plan_sweep
from tale_ray.model.load import LoadedModel

_MLPS = ("mlp", "feed_forward", "block_sparse_moe", "moe")  # what a layer calls its feed-forward part
_OUTPUTS = ("o_proj", "out_proj")  # what attention calls its last projection


class _Gather:
    """A pre-hook: the module sees some slots of each node only."""

    def __init__(self, slots_r: torch.Tensor, num_slots: int, copies: Copies) -> None:
        self.slots_r = slots_r
        self.copies = copies
        self.num_slots = num_slots  # of a node: all lines

    def __call__(self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(self._gathered(value) if value.shape == inputs[0].shape else value for value in inputs)

    def _gathered(self, hidden_btd: torch.Tensor) -> torch.Tensor:
        hidden_nsd = hidden_btd.reshape(-1, self.num_slots, hidden_btd.shape[-1])
        return hidden_nsd.index_select(1, self.copies.on(self.slots_r, hidden_btd.device))


class _Scatter:
    """The hook that goes with it: what the module returns is put where it belongs, among zeros."""

    def __init__(self, slots_r: torch.Tensor, num_lines: int, length: int, copies: Copies) -> None:
        self.slots_r = slots_r
        self.copies = copies
        self.num_lines = num_lines
        self.length = length

    def __call__(self, _module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        found_nrd = output[0] if isinstance(output, tuple) else output
        num_nodes, _, size = found_nrd.shape
        all_nsd = found_nrd.new_zeros(num_nodes, self.num_lines * self.length, size)
        all_nsd.index_copy_(1, self.copies.on(self.slots_r, found_nrd.device), found_nrd)
        all_btd = all_nsd.view(-1, self.length, size)
        return (all_btd, *output[1:]) if isinstance(output, tuple) else all_btd


@dataclass
class _Pass:
    """One pass of some rows through all layers."""

    steps: Sequence[Step]
    layout: Layout
    reads_r: torch.Tensor | None  # slots whose final states are wanted; None: keys and values are all that is wanted
    cache: SweepCache | None
    memory: BatchMemory | None
    trees: TreeMasks | None  # of a layout of trees
    most_nodes: int  # that a layer is applied to at once
    states: dict[Node, tuple[torch.Tensor, int]] = field(default_factory=dict)  # of the boundary: (n b t d, position)
    ran: bool = False  # any layer
    repeated: dict[int, tuple[Any, torch.Tensor]] = field(default_factory=dict)  # per-row arguments, once a node
    copies: Copies = field(default_factory=Copies)  # on the devices of later layers


@dataclass(frozen=True, slots=True)
class Portions:
    """How much of a sweep is at work at once, for memory's sake and so that it stays in a CPU's caches."""

    nodes: int | None = None  # that a layer is applied to; None: all
    head_rows: int | None = None  # that the head is applied to; None: all


class Sweep:
    """The sweep over one loaded model. `narrow` runs feed-forward parts on wanted slots only where no more is needed.

    Rows on lines of their own need neither mask nor positions; trees get masks and positions of ours.
    """

    def __init__(self, loaded: LoadedModel, *, narrow: bool = True) -> None:
        self._loaded = loaded
        self._decoder: Any = loaded.model.get_decoder()
        self._narrowable = [_narrowable(layer) for layer in loaded.layers.full] if narrow else []
        self._devices = layer_devices(loaded.layers)
        self._pass: _Pass | None = None
        self.layer_applications = 0
        self._arguments = learn_arguments(loaded.layers, self._run_lines)
        self._windows: tuple[int | None, ...] | None = None

    @torch.inference_mode()
    def learn_trees(self) -> None:
        """Find out how layers mask tokens, which layouts of trees need.

        Raises:
            Unfit: other than causally, within a window.
        """
        self._tree_arguments = learn_arguments(self._loaded.layers, self._run_padded)
        if not self._tree_arguments.masks:
            raise Unfit("its layers take no masks")
        self._windows = learn_windows(self._loaded, self._tree_arguments)

    @torch.inference_mode()
    def run_prefix(
        self,
        prefix: PrefixStates,
        token_ids: Sequence[int],
        wanted: Collection[tuple[int, Node]],
        memory: BatchMemory | None = None,
        portions: Portions = Portions(),
    ) -> None:
        """Compute the keys and values of the tokens at some (layer, node) places."""
        steps = plan_sweep(self._loaded.layers.num_layers, (), wanted, _known(memory))
        cache = SweepCache(prefix, writes=True)
        self._run(_Pass(steps, lay_lines([token_ids]), None, cache, memory, None, _nodes(steps, portions)))

    @torch.inference_mode()
    def next_tokens(
        self,
        finals: Sequence[Node],
        layout: Layout,
        prefix: PrefixStates | None,
        memory: BatchMemory | None = None,
        portions: Portions = Portions(),
        record: Record | None = None,
    ) -> torch.Tensor:
        """Return the most likely next token (nodes, rows) of each row (without the prefix's tokens) at each final node.

        It lies on the device of the head, which may still be at work. Every layer's keys and values are handed to
        `record`, those of all nodes together.
        """
        last_nrd = self._last_states(finals, layout, prefix, memory, portions, record)
        last_sd = last_nrd.flatten(0, 1)
        size = portions.head_rows or len(last_sd)
        parts = [self._head(last_sd[start : start + size]).argmax(-1) for start in range(0, len(last_sd), size)]
        return torch.cat(parts).view(last_nrd.shape[:2])

    @torch.inference_mode()
    def log_likelihoods(
        self,
        finals: Sequence[Node],
        layout: Layout,
        continuations: Sequence[Sequence[int]],
        prefix: PrefixStates | None,
        memory: BatchMemory | None = None,
        portions: Portions = Portions(),
    ) -> torch.Tensor:
        """Return the log-likelihood (nodes, rows), in nats, of each row's continuation at each final node.

        It lies on the device of the head, which may still be at work. A row's tokens are context and continuation,
        without the last token.
        """
        asked = sorted(  # by predicted token: slot, token, row
            (slot, token, row)
            for row, (slots, tokens) in enumerate(zip(layout.slots, continuations, strict=True))
            for slot, token in zip(slots[len(slots) - len(tokens) :], tokens, strict=True)
        )
        slots = sorted({slot for slot, _, _ in asked})
        states_nrd = self._last_states(finals, layout, prefix, memory, portions, slots=slots)
        states_rd = states_nrd.flatten(0, 1)
        place = {slot: at for at, slot in enumerate(slots)}
        num_rows = len(layout.slots)
        asked_of_all = [  # of every node, too: state, token, row
            (node * len(slots) + place[slot], token, node * num_rows + row)
            for node in range(len(finals))
            for slot, token, row in asked
        ]
        found_b = torch.zeros(len(finals) * num_rows, dtype=torch.float64, device=states_rd.device)
        size = portions.head_rows or len(states_rd)
        for start in range(0, len(states_rd), size):
            log_probabilities_rv = self._head(states_rd[start : start + size]).float().log_softmax(-1)
            first, end = (bisect_left(asked_of_all, (at,)) for at in (start, start + size))
            state_q, token_q, row_q = torch.tensor(asked_of_all[first:end]).unbind(1)
            device = log_probabilities_rv.device
            values_q = log_probabilities_rv[sent(state_q - start, device), sent(token_q, device)]
            found_b.index_add_(0, sent(row_q, found_b.device), sent(values_q.double(), found_b.device))
        return found_b.view(len(finals), -1)

    @torch.inference_mode()
    def next_logits(self, finals: Sequence[Node], layout: Layout, prefix: PrefixStates | None) -> torch.Tensor:
        """Return the logits (nodes, rows, vocabulary) after each row at each final node."""
        last_nrd = self._last_states(finals, layout, prefix)
        return self._head(last_nrd.flatten(0, 1)).view(*last_nrd.shape[:2], -1)

    def _last_states(
        self,
        finals: Sequence[Node],
        layout: Layout,
        prefix: PrefixStates | None,
        memory: BatchMemory | None = None,
        portions: Portions = Portions(),
        record: Record | None = None,
        slots: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return the hidden states (nodes, rows, hidden size) before the final norm, of each row's last token.

        Or those (nodes, slots, hidden size) of some slots.
        """
        steps = plan_sweep(self._loaded.layers.num_layers, finals, (), _known(memory))
        reads_r = torch.tensor(layout.last_slots if slots is None else slots)
        cache = SweepCache(prefix, writes=False, record=record) if prefix is not None or record is not None else None
        at_once = _nodes(steps, portions) if record is None else most_nodes(steps)
        trees = self._tree_masks(layout, prefix, at_once) if layout.is_tree else None
        work = _Pass(steps, layout, reads_r, cache, memory, trees, at_once)
        states, device = self._run(work), self._devices[-1]
        return torch.stack([sent(_read(states[node], reads_r, work.copies), device) for node in finals])

    def _tree_masks(self, layout: Layout, prefix: PrefixStates | None, num_nodes: int) -> TreeMasks:
        if self._windows is None:
            raise Unfit("trees were not learned")
        before = prefix.num_tokens if prefix is not None else 0
        return TreeMasks(layout, before, num_nodes, self._loaded.model.dtype, self._loaded.model.device)

    def _run(self, work: _Pass) -> dict[Node, tuple[torch.Tensor, int]]:
        """Run the decoder over rows and return the states above all layers."""
        tokens_bt = sent(torch.tensor(work.layout.tokens), self._loaded.model.device)
        ours: dict[str, Any] = {}
        if work.trees is not None:
            ours = {
                "position_ids": work.trees.positions_bt,
                "attention_mask": work.trees.mask(None, 1, tokens_bt.device),
            }
        self._pass = work
        try:
            self._narrow_layers(work)
            with self._loaded.layers.forwarding(self._forwards()):
                self._decoder(input_ids=tokens_bt, past_key_values=work.cache, use_cache=work.cache is not None, **ours)
        finally:
            self._pass = None
            self.widen()
        if any(step.runs for step in work.steps) and not work.ran:
            raise Unfit("the decoder did not call its layers")
        return work.states

    def _run_lines(self, num_rows: int) -> None:
        tokens_bt = torch.zeros((num_rows, 2), dtype=torch.long, device=self._loaded.model.device)
        self._decoder(input_ids=tokens_bt, use_cache=False)

    def _run_padded(self, num_rows: int) -> None:
        """Run the decoder on rows of two tokens with positions of their own, the first of which is padding in one."""
        mask_bt = torch.ones((num_rows, 2), dtype=torch.long, device=self._loaded.model.device)
        mask_bt[0, 0] = 0
        positions_bt = (mask_bt.cumsum(-1) - 1).clamp(min=0)
        self._decoder(
            input_ids=torch.zeros_like(mask_bt), attention_mask=mask_bt, position_ids=positions_bt, use_cache=False
        )

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
        block_order = {id(tensor): at for at, (tensor, _) in enumerate(below.values())}  # what lies together runs so
        order = sorted(step.runs, key=lambda node: (block_order[id(below[node][0])], below[node][1], node))
        for start in range(0, len(order), work.most_nodes):
            nodes = tuple(order[start : start + work.most_nodes])
            block_nbtd = self._apply(work, layer, own, nodes, args, kwargs)
            above.update((node, (block_nbtd, at)) for at, node in enumerate(nodes) if node in step.kept)
            if work.memory is not None and not step.last_only:
                work.memory.add(layer + 1, nodes, block_nbtd)
        if work.memory is not None:
            above.update((node, (work.memory.load(layer + 1, node), 0)) for node in step.loads)
        work.states = above

    def _apply(
        self, work: _Pass, layer: int, own: Any, nodes: tuple[Node, ...], args: Any, kwargs: Any
    ) -> torch.Tensor:
        """Return what a layer makes of some nodes (nodes, lines, slots, hidden size)."""
        stacked_nbtd = sent(stack([work.states[node] for node in nodes]), self._devices[layer])
        if work.cache is not None:
            work.cache.layer, work.cache.nodes = layer, nodes
        found = own(
            stacked_nbtd.flatten(0, 1),
            *(self._fit(work, layer, value, len(nodes), (at,)) for at, value in enumerate(args)),
            **{name: self._fit(work, layer, value, len(nodes), (name,)) for name, value in kwargs.items()},
        )
        found = found[0] if isinstance(found, tuple) else found
        work.ran = True
        self.layer_applications += len(nodes) * len(work.layout.slots)
        block_nbtd: torch.Tensor = found.reshape(len(nodes), work.layout.num_lines, *found.shape[1:])
        return block_nbtd

    def _fit(self, work: _Pass, layer: int, value: Any, num_nodes: int, place: tuple[Any, ...]) -> Any:
        """Return a layer's argument for all nodes: what is the same for all rows once, the rest once a node."""
        if isinstance(value, tuple | list):
            return type(value)(self._fit(work, layer, item, num_nodes, (*place, at)) for at, item in enumerate(value))
        arguments = self._arguments
        if work.trees is not None:
            assert self._windows is not None, "trees have been learned"
            arguments = self._tree_arguments
            if place in arguments.masks:
                return work.trees.mask(self._windows[layer], num_nodes, self._devices[layer])
        if not isinstance(value, torch.Tensor):
            return value
        value = work.copies.on(value, self._devices[layer])
        if value.ndim == 4:
            return value[:1]  # a mask: without padding it is the same for all rows
        if place not in arguments.per_row or value.shape[0] == 1:
            return value
        if (known := work.repeated.get(id(value))) is None:  # once a pass, not once a layer
            repeated = value.repeat(work.most_nodes, *(1 for _ in value.shape[1:]))
            known = work.repeated[id(value)] = (value, repeated)  # the value, too: its id stays its
        return known[1][: num_nodes * value.shape[0]]

    def _narrow_layers(self, work: _Pass) -> None:
        """Let the feed-forward part of layers of which only some slots are needed run there only."""
        layout = work.layout
        slots_r = torch.zeros(1, dtype=torch.long) if work.reads_r is None else work.reads_r
        gather = _Gather(slots_r, layout.num_lines * layout.num_slots, work.copies)
        scatter = _Scatter(slots_r, layout.num_lines, layout.num_slots, work.copies)
        for step, modules in zip(work.steps, self._narrowable, strict=False):
            if step.runs and step.last_only:
                for module in modules:
                    module.register_forward_pre_hook(gather)
                    module.register_forward_hook(scatter)

    def widen(self) -> None:
        """Take our hooks off; not by their handles: an exception from a signal could have kept us from getting them."""
        for modules in self._narrowable:
            for module in modules:
                for hooks in (module._forward_pre_hooks, module._forward_hooks):
                    for key in [key for key, hook in hooks.items() if isinstance(hook, _Gather | _Scatter)]:
                        del hooks[key]


def _nodes(steps: Sequence[Step], portions: Portions) -> int:
    return min(most_nodes(steps), portions.nodes or most_nodes(steps))


def _read(state: tuple[torch.Tensor, int], reads_r: torch.Tensor, copies: Copies) -> torch.Tensor:
    """Return a state (lines, slots, size) at some slots."""
    tensor_nbtd, position = state
    return tensor_nbtd[position].flatten(0, 1).index_select(0, copies.on(reads_r, tensor_nbtd.device))


def _known(memory: BatchMemory | None) -> Callable[[int, Node], bool]:
    return memory.knows if memory is not None else lambda _boundary, _node: False


def _narrowable(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the parts of a layer that treat each position for itself and whose outcome is added to its input."""
    found = [module for name, module in layer.named_children() if name in _MLPS]
    attention = [module for name, module in layer.named_modules() if name.rpartition(".")[2] in _OUTPUTS]
    return found + attention[:1]
