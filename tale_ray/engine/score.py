"""One unit of work scored: replies of every candidate on the unit's rows, read and compared with the targets.

The first token of a reply comes from the sweep, which runs all candidates in one pass, and later ones from decoding all
candidates together, where the model fits them; everything else takes the plain path. All give the same tokens.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tale_ray.engine.budget import Budget, RowCost, batches, make_budget, row_cost
from tale_ray.engine.choices import Key, PromptKeys, choose, key_choice, key_tokens, prompt_groups, row_keys
from tale_ray.engine.decode import Decoder
from tale_ray.engine.demand import Demand
from tale_ray.engine.devices import layer_devices
from tale_ray.engine.fit import Fit, fit_decoder, fit_sweep
from tale_ray.engine.layout import lay_lines
from tale_ray.engine.memory import StateMemory
from tale_ray.engine.prefix import PrefixStates
from tale_ray.engine.streams import Step, final_node
from tale_ray.engine.sweep import Sweep
from tale_ray.engine.view import Ending, end_tokens, view_log_likelihoods, view_tokens
from tale_ray.errors import TaskError
from tale_ray.model.load import LoadedModel
from tale_ray.records import CandidateAnswers, PromptRow, RowAnswer, UnitResult, WorkUnit
from tale_ray.tasks.answers import cut_reply, is_settled, read_reply
from tale_ray.tasks.spec import AnswerSpec

logger = logging.getLogger("tale_ray.engine")

_MOST_ANSWERS = 10_000  # that are remembered as they were read


@dataclass(slots=True)
class _Scored:
    """What is known of one candidate: new tokens of each row, the end token included; or how likely choices are."""

    tokens: dict[Key, list[int]] = field(default_factory=dict)
    log_likelihoods: dict[Key, float] = field(default_factory=dict)  # nats
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _InFlight:
    """What a micro-batch comes to, maybe not computed yet: tokens, or log-likelihoods, (candidates, rows)."""

    keys: Sequence[Key]
    values: torch.Tensor
    are_tokens: bool

    def land(self, scored: dict[int | None, _Scored], candidates: Sequence[int | None]) -> None:
        """Wait for it, and remember it."""
        for layer, found in zip(candidates, self.values.tolist(), strict=True):
            if self.are_tokens:
                scored[layer].tokens.update((key, [token]) for key, token in zip(self.keys, found, strict=True))
            else:
                scored[layer].log_likelihoods.update(zip(self.keys, found, strict=True))


class Scorer:
    """Scores units on one loaded model, within a budget of memory.

    Args:
        loaded: the model. It is whole again after every unit, also when an exception (a signal's, too) ends it.
        batch_bytes: of working memory; None: chosen from the device.
        sweeps: False takes the plain path for everything.
    """

    def __init__(self, loaded: LoadedModel, batch_bytes: int | None = None, *, sweeps: bool = True) -> None:
        self._loaded = loaded
        self._num_stages = loaded.num_stages
        self._cost: RowCost = row_cost(loaded.model)
        devices = set(layer_devices(loaded.layers))
        self.budget: Budget = make_budget(devices, batch_bytes, is_streamed=loaded.layers.is_streamed)
        self.fit: Fit = fit_sweep(loaded) if sweeps else Fit(None, False, False, "")
        self._decoder: Decoder | None = None
        self._decodes = self.fit.sweep is not None  # until it is found out that the model does not fit
        self._memory = StateMemory()
        self._answers: dict[tuple[AnswerSpec, tuple[int, ...], str], RowAnswer] = {}
        self._prefixes: dict[tuple[int, ...], PrefixStates] = {}
        self._groups: tuple[Sequence[PromptRow], list[PromptKeys]] = ((), [])

    def check_budget(self, rows: Sequence[PromptRow]) -> None:
        """Refuse a budget too small for any of the rows.

        Raises:
            ConfigError: it is.
        """
        for prefix, keys in self._prompt_groups(rows):
            self._demand.cut((), (None,), max(len(key_tokens(rows, key)) for key in keys), len(prefix))

    def forget(self) -> None:
        """Forget the states of rows, which are known by their positions: other rows are asked next."""
        self._memory = StateMemory()

    def halve_budget(self) -> None:
        """Work in half the memory from now on, after the device had too little."""
        self._prefixes.clear()
        self.budget = Budget(self.budget.total // 2, self.budget.batch // 2)
        self._memory.allow(0)

    def score(
        self, unit: WorkUnit, rows: Sequence[PromptRow], answer: AnswerSpec, max_new_tokens: int, worker: str
    ) -> UnitResult:
        """Return the answers of every candidate of a unit on the unit's rows.

        By greedy decoding; of rows with choices, by the log-likelihood of each.

        A pure function of model, unit, rows and answer, but for seconds and layer applications. One layer application
        is one layer run on one row (or on a prefix that rows share) for one forward step: the first new token takes
        one step over the prompt, each later one, up to and including the end token, one more. Of rows that are decoded
        together some have ended while others go on: until they leave the batch their steps count as well.

        Args:
            unit: which candidates and rows; candidate None is the model without `unit.removed` only.
            rows: all rows of the unit's split; `unit.rows` are positions in it.
            answer: how replies are read and compared.
            max_new_tokens: at most so many are decoded per row; nothing is decoded of rows with choices.
            worker: name of who computes, kept in the result.

        Raises:
            ModelError: a layer cannot be removed.
            ConfigError: not even one row fits into the budget.
            TaskError: a row has no tokens, or more than the model has positions.
        """
        started = time.monotonic()
        max_new_tokens = 1 if answer.type == "likelihood" else max_new_tokens
        if not all(rows[row].token_ids for row in unit.rows):
            raise TaskError("a row has no tokens: its prompt rendered to an empty text; check the task's messages")
        self._loaded.info.check_lengths([rows[row] for row in unit.rows], max_new_tokens)
        for layer in unit.candidates:
            self._loaded.layers.check_removal(final_node(unit.removed, layer))
        scored, layer_applications = self._tokens(unit, rows, max_new_tokens, self._ending(answer))
        answers = tuple(
            CandidateAnswers(
                layer,
                tuple(self._answer(answer, found, rows, row) for row in unit.rows),
                found.seconds,
            )
            for layer, found in scored.items()
        )
        return UnitResult(unit, answers, layer_applications, time.monotonic() - started, worker)

    def _answer(self, answer: AnswerSpec, found: _Scored, rows: Sequence[PromptRow], row: int) -> RowAnswer:
        if not rows[row].choices:
            return self._read(answer, found.tokens[row], rows[row].target)
        return choose(answer, rows[row], [found.log_likelihoods[row, at] for at in range(len(rows[row].choices))])

    def _read(self, answer: AnswerSpec, tokens: Sequence[int], target: str) -> RowAnswer:
        """Return what new tokens answer; most replies of one token have been read before."""
        key = (answer, tuple(tokens), target)
        if (known := self._answers.get(key)) is None:
            known = read_reply(answer, cut_reply(answer, self._text(tokens)), target)
            if len(self._answers) < _MOST_ANSWERS:
                self._answers[key] = known
        return known

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._loaded.tokenizer.decode(tokens, skip_special_tokens=True))

    def _ending(self, answer: AnswerSpec) -> Ending:
        """Return when a reply ends: at an end token, or once it cannot answer anything else."""
        may_settle = answer.stop or answer.type in ("choice", "word")
        return Ending(
            frozenset(end_tokens(self._loaded.model)),
            (lambda tokens: is_settled(answer, self._text(tokens))) if may_settle else None,
        )

    def _tokens(
        self, unit: WorkUnit, rows: Sequence[PromptRow], max_new_tokens: int, ending: Ending
    ) -> tuple[dict[int | None, _Scored], int]:
        """Return new tokens by candidate, by the fastest path that the model fits, and layer applications."""
        sweep = self.fit.sweep
        if sweep is None:
            return self._viewed(unit, rows, max_new_tokens, ending)
        try:
            decoder = self._fitted_decoder(sweep) if max_new_tokens > 1 else None
            if max_new_tokens > 1 and decoder is None:
                return self._viewed(unit, rows, max_new_tokens, ending)
            return self._swept(sweep, decoder, unit, rows, max_new_tokens, ending)
        finally:  # once more: a signal may have interrupted the tidying up itself
            sweep.widen()
            self._loaded.layers.restore()

    def _fitted_decoder(self, sweep: Sweep) -> Decoder | None:
        """Return the decoder, or None where the model does not fit; which is found out when it is needed first."""
        if self._decodes and self._decoder is None:
            self._decoder, note = fit_decoder(self._loaded, sweep)
            self._decodes = self._decoder is not None
            if note:
                logger.warning("%s", note)
        return self._decoder

    # The plain path.

    def _viewed(
        self, unit: WorkUnit, rows: Sequence[PromptRow], max_new_tokens: int, ending: Ending
    ) -> tuple[dict[int | None, _Scored], int]:
        prompts = [rows[row].token_ids for row in unit.rows]
        keys = row_keys(rows, unit.rows)
        scored: dict[int | None, _Scored] = {}
        layer_applications = 0
        for layer in unit.candidates:
            started = time.monotonic()
            removed = final_node(unit.removed, layer)
            if any(rows[row].choices for row in unit.rows):
                pairs = [key_choice(rows, key) for key in keys]
                likely = view_log_likelihoods(self._loaded, removed, pairs, self.budget)
                layer_applications += (self._loaded.layers.num_layers - len(removed)) * len(keys)
                found = dict(zip(keys, likely, strict=True))
                scored[layer] = _Scored(log_likelihoods=found, seconds=time.monotonic() - started)
                continue
            tokens = view_tokens(self._loaded, removed, prompts, max_new_tokens, self.budget.batch, ending)
            layer_applications += (self._loaded.layers.num_layers - len(removed)) * sum(map(len, tokens))
            scored[layer] = _Scored(dict(zip(unit.rows, tokens, strict=True)), seconds=time.monotonic() - started)
        return scored, layer_applications

    # The sweep, and decoding on from it.

    def _swept(
        self,
        sweep: Sweep,
        decoder: Decoder | None,
        unit: WorkUnit,
        rows: Sequence[PromptRow],
        max_new_tokens: int,
        ending: Ending,
    ) -> tuple[dict[int | None, _Scored], int]:
        before = _applications(sweep, decoder)
        self._memory.start(unit.removed)
        started = time.monotonic()
        scored: dict[int | None, _Scored] = {layer: _Scored() for layer in unit.candidates}
        own = set(row_keys(rows, unit.rows))
        groups = [
            (prefix, {key: key_tokens(rows, key) for key in keys if key in own})
            for prefix, keys in self._prompt_groups(rows)
        ]
        groups = [(prefix, found) for prefix, found in groups if found]
        for prefix, found in groups:  # whatever is refused is refused before anything runs
            longest = max(map(len, found.values()))
            self._demand.cut(unit.removed, unit.candidates, longest, len(prefix), max_new_tokens)
        for prefix, found in groups:
            self._sweep_group(sweep, decoder, unit, rows, prefix, found, max_new_tokens, ending, scored)
        seconds = time.monotonic() - started
        for each in scored.values():
            each.seconds = seconds / len(scored)
        return scored, _applications(sweep, decoder) - before

    def _prompt_groups(self, rows: Sequence[PromptRow]) -> list[PromptKeys]:
        """Return prefixes that a split's rows share, and who shares them."""
        if self._groups[0] is not rows:
            self._groups = (rows, prompt_groups(rows, shares_prefix=self.fit.prefix))
            self._prefixes.clear()
        return self._groups[1]

    def _sweep_group(
        self,
        sweep: Sweep,
        decoder: Decoder | None,
        unit: WorkUnit,
        rows: Sequence[PromptRow],
        prefix: tuple[int, ...],
        prompts: dict[Key, tuple[int, ...]],
        max_new_tokens: int,
        ending: Ending,
        scored: dict[int | None, _Scored],
    ) -> None:
        """Score all candidates on rows that share a prefix, in as few blocks of candidates as fit into memory."""
        longest = max(map(len, prompts.values()))
        demand = self._demand
        cut = demand.cut(unit.removed, unit.candidates, longest, len(prefix), max_new_tokens)
        prefix = prefix[: cut.shared_tokens]
        self._memory.allow(demand.kept_bytes(cut))
        order = list(prompts)
        suffixes = [prompts[row][len(prefix) :] for row in order]
        for block in cut.blocks:
            candidates = block.candidates
            finals = [final_node(unit.removed, layer) for layer in candidates]
            free = self.budget.total - self._memory.limit - demand.at_work_bytes(cut, block)  # for prefixes
            states = self._prefix_states(sweep, unit.removed, prefix, block.steps, free) if prefix else None
            held = sum(known.num_bytes for known in self._prefixes.values()) + self._memory.limit
            room = demand.room(cut, block, held)
            if decoder is None:
                in_flight: deque[_InFlight] = deque()
                for batch, layout in demand.layouts(suffixes, room):
                    own = [order[at] for at in batch]
                    memory = self._memory.of([(unit.split, len(prefix), key) for key in own], layout)
                    portions = room.portions(layout)
                    if any(isinstance(key, tuple) for key in own):
                        wanted = [key_choice(rows, key).continuation_ids for key in own]
                        likely = sweep.log_likelihoods(finals, layout, wanted, states, memory, portions)
                        in_flight.append(_InFlight(own, likely, are_tokens=False))
                    else:
                        found = sweep.next_tokens(finals, layout, states, memory, portions)
                        in_flight.append(_InFlight(own, found, are_tokens=True))
                    if len(in_flight) >= self._num_stages:
                        in_flight.popleft().land(scored, candidates)
                while in_flight:
                    in_flight.popleft().land(scored, candidates)
                continue
            lengths = [len(suffix) for suffix in suffixes]
            for batch, left in demand.reply_batches(lengths, room, len(candidates), max_new_tokens):
                ends = [suffixes[at] for at in batch]
                fills = [
                    (some, left.portions(lay_lines([ends[at] for at in some])))
                    for some in batches([len(suffix) for suffix in ends], left.total, left.line_bytes)
                ]
                new = decoder.new_tokens(
                    finals, ends, states, max_new_tokens, ending, fills, num_flights=self._num_stages
                )
                _note(scored, candidates, [order[at] for at in batch], new)

    @property
    def _demand(self) -> Demand:
        return Demand(
            cost=self._cost,
            budget=self.budget,
            num_layers=self._loaded.layers.num_layers,
            num_stages=self._num_stages,
            shares_lines=self.fit.trees,
        )

    def _prefix_states(
        self, sweep: Sweep, removed: Sequence[int], prefix: tuple[int, ...], steps: Sequence[Step], free: int
    ) -> PrefixStates:
        """Return the keys and values of a prefix at every place that rows will run at; earlier units' are kept.

        Those of other candidates of the round and of other prefixes, too, as far as `free` bytes and half of the
        budget hold them.
        """
        places = {(layer, node) for layer, step in enumerate(steps) for node in step.runs}
        free = min(free, self.budget.total // 2)
        states = self._prefixes.pop(prefix, None) or PrefixStates(len(prefix))
        others = sum(other.num_bytes for other in self._prefixes.values())
        if others + self._cost.prefix_bytes(len(prefix), len(places)) > free:
            self._prefixes.clear()
            others = 0
        self._prefixes[prefix] = states
        most_places = (free - others) // self._cost.prefix_bytes(len(prefix), 1)
        states.use(places, removed, max(len(places), most_places))
        if missing := {place for place in places if place not in states}:
            layout = lay_lines([prefix])
            portions = self._demand.prefix_room(steps).portions(layout)
            sweep.run_prefix(states, prefix, missing, self._memory.of([prefix], layout), portions)
        return states


def _applications(sweep: Sweep, decoder: Decoder | None) -> int:
    return sweep.layer_applications + (decoder.layer_applications if decoder is not None else 0)


def _note(
    scored: dict[int | None, _Scored],
    candidates: Sequence[int | None],
    keys: Sequence[Key],
    new: Sequence[Sequence[list[int]]],
) -> None:
    """Remember the new tokens (candidates, rows) of some rows."""
    for layer, found in zip(candidates, new, strict=True):
        scored[layer].tokens.update(zip(keys, found, strict=True))
