"""Replies of many tokens: all candidates of a round are decoded together, as one batch of (candidate, example) rows.

A sweep over the prompts finds the first token of every row and leaves each layer's keys and values in caches of ours.
From then on each step is the model's own forward over one token of every row; a layer runs on the rows of all
candidates but the one that removes it (see `ring`). So weights are read once a step for all candidates.

Prompts end at the same slot of the caches (padding on the left): to the model's masks, windows included, it is an
ordinary left-padded batch.

Axes in tensor names: r rows in the ring, f final nodes, n nodes, b examples, k heads, t tokens, s slots, h head size,
d hidden size, v vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tale_ray.engine.arguments import LayerArguments, Place, learn_arguments
from tale_ray.engine.devices import Copies, layer_devices, sent
from tale_ray.engine.layout import lay_lines
from tale_ray.engine.prefix import OneLengthCache, PrefixStates
from tale_ray.engine.ring import Ring, Stretch, ring_order
from tale_ray.engine.streams import Node
from tale_ray.engine.sweep import Portions, Sweep
from tale_ray.engine.view import Ending
from tale_ray.model.load import LoadedModel

_LANDED = object()  # what a flight says that is over
_WORTH_LEAVING = 0.25  # of the rows have ended: copying the others' caches costs less than running them along


class DecodeCache(OneLengthCache):
    """Keys and values (rows that run a layer, heads, slots, size) of every layer; a step writes the last slot."""

    def __init__(self) -> None:
        super().__init__(0)
        self.states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of all tokens so far, the new one's included."""
        del layer_idx
        keys, values = self.states[self.layer]
        keys.select(2, self.length).copy_(key_states.select(2, 0))
        values.select(2, self.length).copy_(value_states.select(2, 0))
        return keys.narrow(2, 0, self.length + 1), values.narrow(2, 0, self.length + 1)

    def keep(self, layer: int, chosen: Sequence[int]) -> None:
        """Let go of all but some rows of a layer."""

        def kept(states_rksh: torch.Tensor) -> torch.Tensor:
            found = states_rksh.new_empty(len(chosen), *states_rksh.shape[1:])
            filled = states_rksh[:, :, : self.length]
            found[:, :, : self.length] = filled.index_select(0, sent(torch.tensor(chosen), states_rksh.device))
            return found

        keys, values = self.states.pop(layer)
        if chosen:
            self.states[layer] = (kept(keys), kept(values))


@dataclass
class _Batch:
    """Rows that are being decoded."""

    ring: Ring
    cache: DecodeCache
    mask_rs: torch.Tensor  # 0 where a slot is padding
    positions_r1: torch.Tensor  # of the next token
    tokens_r1: torch.Tensor  # the next token
    repeated: dict[int, tuple[Any, torch.Tensor]] = field(default_factory=dict)  # per-row arguments of this step
    copies: Copies = field(default_factory=Copies)  # of this step's arguments, on the devices of later layers


class Decoder:
    """Greedy decoding of all candidates of a round at once."""

    def __init__(self, loaded: LoadedModel, sweep: Sweep) -> None:
        self._loaded = loaded
        self._sweep = sweep
        self._adds_masks = getattr(loaded.model.config, "_attn_implementation", None) == "sdpa"
        self._takes_positions = "position_ids" in inspect.signature(loaded.model.forward).parameters
        self._arguments: LayerArguments = learn_arguments(loaded.layers, self._run_rows)
        self._devices = layer_devices(loaded.layers)
        self._batch: _Batch | None = None
        self.layer_applications = 0  # of decoding steps; those over prompts are the sweep's

    @torch.inference_mode()
    def new_tokens(
        self,
        finals: Sequence[Node],
        prompts: Sequence[Sequence[int]],
        prefix: PrefixStates | None,
        max_new_tokens: int,
        ending: Ending,
        prefills: Sequence[tuple[Sequence[int], Portions]],
        observe: Callable[[torch.Tensor], None] | None = None,
        num_flights: int = 1,
    ) -> list[list[list[int]]]:
        """Return the new tokens, the end token included, of each prompt at each final node.

        The model is whole again afterwards, also when an exception ends it halfway.

        Args:
            finals: nodes above all layers: a common set of removed layers, and at most one more each.
            prompts: without the prefix's tokens.
            prefix: keys and values of what all prompts begin with.
            max_new_tokens: at most so many, at least one.
            ending: when a reply ends before that.
            prefills: micro-batches of the sweep, as positions in `prompts`, and their portions.
            observe: is called with the logits (rows, vocabulary) of each decoding step, ordered by final node (those
                of `ring_order`) and prompt; of rows that have ended, too, until they leave. With one flight only.
            num_flights: into so many parts the prompts are divided, each of which is decoded for itself, a step of one
                after a step of the other: so that as many devices work at the same time.
        """
        order = ring_order(finals)
        new: dict[tuple[int, int], list[int]] = {}
        try:
            flights = [
                self._prefilled(
                    order, prompts, range(start, len(prompts), num_flights), prefix, max_new_tokens, prefills, new
                )
                for start in range(min(num_flights, len(prompts)))
            ]
            with self._loaded.layers.forwarding([self._forward(layer) for layer in range(len(self._devices))]):
                going = [self._decode(batch, new, max_new_tokens, ending, observe) for batch in flights]
                while going:
                    going = [flight for flight in going if next(flight, _LANDED) is not _LANDED]
        finally:
            self._batch = None
        position = {final: at for at, final in enumerate(order)}
        return [[new[position[final], at] for at in range(len(prompts))] for final in finals]

    def _prefilled(
        self,
        order: Sequence[Node],
        prompts: Sequence[Sequence[int]],
        examples: Sequence[int],
        prefix: PrefixStates | None,
        max_new_tokens: int,
        prefills: Sequence[tuple[Sequence[int], Portions]],
        new: dict[tuple[int, int], list[int]],
    ) -> "_Batch":
        """Return some of the prompts with their keys and values; put their first new tokens into `new`."""
        before = prefix.num_tokens if prefix is not None else 0
        lengths = {at: before + len(prompts[at]) for at in examples}
        longest = max(lengths.values())
        ring = Ring(order, [(final, at) for final in range(len(order)) for at in examples], len(self._devices))
        cache = DecodeCache()
        place = {example: at for at, example in enumerate(examples)}
        for prefill, portions in prefills:
            if not (own := [at for at in prefill if at in place]):
                continue
            fill = _Fill(
                ring, cache, prefix, [*lengths.values()], [place[at] for at in own], longest + max_new_tokens - 1
            )
            rows = [prompts[at] for at in own]
            found = self._sweep.next_tokens(order, lay_lines(rows), prefix, None, portions, fill.record)
            for final, tokens in enumerate(found.tolist()):
                new.update(((final, at), [token]) for at, token in zip(own, tokens, strict=True))
        device = self._loaded.model.device
        cache.length = longest
        padding_r = sent(torch.tensor([longest - lengths[at] for _, at in ring.rows]), device)
        slots_s = torch.arange(longest + max_new_tokens, device=device)
        return _Batch(
            ring,
            cache,
            mask_rs=(slots_s >= padding_r[:, None]).long(),
            positions_r1=(longest - padding_r)[:, None],
            tokens_r1=sent(torch.tensor([new[row] for row in ring.rows]), device),
        )

    def _decode(
        self,
        batch: "_Batch",
        new: dict[tuple[int, int], list[int]],
        max_new_tokens: int,
        ending: Ending,
        observe: Callable[[torch.Tensor], None] | None,
    ) -> Iterator[None]:
        """Lengthen the rows of a batch, which have one token, until each has ended or has `max_new_tokens`.

        Yields between asking for the next tokens of all rows and reading them.
        """
        over = {row for row in batch.ring.rows if ending.is_over(new[row])}
        for _ in range(max_new_tokens - 1):
            going = [at for at, row in enumerate(batch.ring.rows) if row not in over]
            if not going:
                return
            if len(going) <= (1 - _WORTH_LEAVING) * len(batch.ring.rows):
                self._leave(batch, going)
            logits_rv = self._step(batch)
            if observe is not None:
                observe(logits_rv.roll(batch.ring.turned, 0))
            tokens_r1 = logits_rv.argmax(-1, keepdim=True).roll(batch.ring.turned, 0)
            batch.tokens_r1 = sent(tokens_r1, self._loaded.model.device)
            yield
            for row, token in zip(batch.ring.rows, batch.tokens_r1[:, 0].tolist(), strict=True):
                if row not in over:
                    new[row].append(token)
                    if ending.is_over(new[row]):
                        over.add(row)

    def _leave(self, batch: _Batch, going: Sequence[int]) -> None:
        """Go on with some of the rows only."""
        ring = Ring(batch.ring.finals, [batch.ring.rows[at] for at in going], batch.ring.num_layers)
        staying = set(ring.rows)
        for layer in batch.ring.stretches:
            batch.cache.keep(layer, [at for at, row in enumerate(batch.ring.running(layer)) if row in staying])
        at_r = sent(torch.tensor(going), batch.tokens_r1.device)
        batch.ring = ring
        batch.mask_rs, batch.positions_r1, batch.tokens_r1 = (
            tensor.index_select(0, at_r) for tensor in (batch.mask_rs, batch.positions_r1, batch.tokens_r1)
        )

    def _step(self, batch: _Batch) -> torch.Tensor:
        """Return the logits (rows of the ring as it has turned, vocabulary) after one more token of every row."""
        self._batch = batch
        batch.repeated.clear()
        batch.copies = Copies()
        positions = {"position_ids": batch.positions_r1} if self._takes_positions else {}
        logits_r1v = self._loaded.model(
            input_ids=batch.tokens_r1,
            attention_mask=batch.mask_rs[:, : batch.cache.length + 1],
            past_key_values=batch.cache,
            use_cache=True,
            **positions,
        ).logits
        batch.cache.length += 1
        batch.positions_r1 = batch.positions_r1 + 1
        logits_rv: torch.Tensor = logits_r1v[:, -1]
        return logits_rv

    def _forward(self, layer: int) -> Any:
        own = self._loaded.layers.full[layer].forward

        def forward(hidden_r1d: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            batch = self._batch
            assert batch is not None, "layers are ours while a batch is decoded only"
            stretch = batch.ring.stretches.get(layer)
            if stretch is not None:
                batch.cache.layer = layer
                device = self._devices[layer]
                hidden_r1d = sent(hidden_r1d, device)
                found = own(
                    hidden_r1d[stretch.skipping :],
                    *(self._cut(batch, stretch, value, (at,), device) for at, value in enumerate(args)),
                    **{name: self._cut(batch, stretch, value, (name,), device) for name, value in kwargs.items()},
                )
                found = found[0] if isinstance(found, tuple) else found
                hidden_r1d = torch.cat((found, hidden_r1d[: stretch.skipping])) if stretch.skipping else found
                self.layer_applications += stretch.end - stretch.start
            return (hidden_r1d,) if self._arguments.returns_tuple else hidden_r1d

        return forward

    def _cut(self, batch: _Batch, stretch: Stretch, value: Any, place: Place, device: torch.device) -> Any:
        """Return a layer's argument for the rows that run it, on the layer's device."""
        if isinstance(value, tuple | list):
            return type(value)(self._cut(batch, stretch, item, (*place, at), device) for at, item in enumerate(value))
        if not isinstance(value, torch.Tensor):
            return value
        value = batch.copies.on(value, device)
        share = self._arguments.per_row.get(place)
        if not share or value.shape[0] != share * len(batch.ring.rows):
            return value
        if (known := batch.repeated.get(id(value))) is None:
            twice = torch.cat((value, value))
            if self._adds_masks and twice.dtype == torch.bool and twice.ndim == 4:  # once a step, not once a layer
                twice = torch.zeros_like(twice, dtype=self._loaded.model.dtype).masked_fill_(~twice, -torch.inf)
            known = batch.repeated[id(value)] = (value, twice)  # the value, too: its id stays its
        return known[1][share * stretch.start : share * stretch.end]

    def _run_rows(self, num_rows: int) -> None:
        """Run the model on rows of two tokens, the first of which is padding in one row."""
        device = self._loaded.model.device
        mask_rs = torch.ones((num_rows, 2), dtype=torch.long, device=device)
        mask_rs[0, 0] = 0
        positions = {"position_ids": (mask_rs.cumsum(-1) - 1).clamp(min=0)} if self._takes_positions else {}
        self._loaded.model(input_ids=torch.zeros_like(mask_rs), attention_mask=mask_rs, use_cache=False, **positions)


@dataclass(frozen=True)
class _Fill:
    """Puts what a sweep computes for some examples into the caches of the rows that go on from it."""

    ring: Ring
    cache: DecodeCache
    prefix: PrefixStates | None
    lengths: Sequence[int]  # of all prompts, with the prefix
    examples: Sequence[int]  # of the sweep
    num_slots: int

    def record(self, layer: int, nodes: tuple[Node, ...], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the keys and values (nodes x examples, heads, tokens, size) of some of a layer's nodes."""
        _, first = self.ring.rows[0]
        order = [final for final, at in self.ring.running(layer) if at == first]
        below = [tuple(removed for removed in self.ring.finals[final] if removed < layer) for final in order]
        runs = _runs([(row, nodes.index(node)) for row, node in enumerate(below) if node in nodes])
        num_rows = len(order) * len(self.lengths)
        if layer not in self.cache.states:
            self.cache.states[layer] = (
                keys.new_empty(num_rows, keys.shape[1], self.num_slots, keys.shape[3]),
                values.new_empty(num_rows, values.shape[1], self.num_slots, values.shape[3]),
            )
        before = self.prefix.get(layer, nodes) if self.prefix is not None else (None, None)
        for states, own, shared in zip(self.cache.states[layer], (keys, values), before, strict=True):
            states_fbksh = states.view(len(order), len(self.lengths), *states.shape[1:])
            own_nbkth = own.view(len(nodes), len(self.examples), *own.shape[1:])
            for at, example in enumerate(self.examples):
                states_fksh, own_nkth = states_fbksh[:, example], own_nbkth[:, at]
                end = max(self.lengths)
                start = end - self.lengths[example]
                states_fksh[:, :, :start] = 0  # not left as it is: no number times NaN is nothing
                middle = start + (shared.shape[2] if shared is not None else 0)
                for finals, found in runs:
                    if shared is not None:
                        states_fksh[finals, :, start:middle] = shared[found]
                    states_fksh[finals, :, middle:end] = own_nkth[found, :, : end - middle]


def _runs(places: Sequence[tuple[int, int]]) -> list[tuple[slice, slice]]:
    """Return which stretches of rows take which stretches of nodes: one node for all, or one after another."""
    runs: list[tuple[slice, slice]] = []
    for row, node in places:
        if runs and row == runs[-1][0].stop:
            rows, nodes = runs[-1]
            length, size = rows.stop - rows.start, nodes.stop - nodes.start
            if node == nodes.stop and length == size:
                runs[-1] = (slice(rows.start, row + 1), slice(nodes.start, node + 1))
                continue
            if node == nodes.start and size == 1:
                runs[-1] = (slice(rows.start, row + 1), nodes)
                continue
        runs.append((slice(row, row + 1), slice(node, node + 1)))
    return runs
