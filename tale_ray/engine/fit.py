"""Whether a model fits the fast paths: a few rows, scored both ways, must agree before anything is trusted to them."""

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from tale_ray.engine.decode import Decoder
from tale_ray.engine.layout import lay_lines, lay_packs, pack_rows
from tale_ray.engine.prefix import PrefixStates
from tale_ray.engine.ring import ring_order
from tale_ray.engine.streams import Node, final_node, plan_sweep
from tale_ray.engine.sweep import Portions, Sweep
from tale_ray.engine.view import Ending
from tale_ray.errors import Interrupted
from tale_ray.model.load import LoadedModel

logger = logging.getLogger("tale_ray.engine")

_PREFIX = 3  # tokens
_LENGTHS = (5, 2, 4)  # of the rows after it
_NEW_TOKENS = 3
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest logit
_COARSE = 5e-2  # of 16-bit numbers


@dataclass(frozen=True, slots=True)
class Fit:
    """The sweep over a model, or None; whether prefixes and later beginnings may be shared; what was given up."""

    sweep: Sweep | None
    prefix: bool
    trees: bool
    note: str  # for people, in words


def fit_sweep(loaded: LoadedModel) -> Fit:
    """Return the fastest sweep whose logits are those of the plain path on a few rows of the model's own tokens."""
    rows = _rows(loaded)
    reasons: list[str] = []
    truths: dict[tuple[int, ...], torch.Tensor] = {}
    for prefix, narrow in product((True, False), (True, False)):
        try:
            sweep = Sweep(loaded, narrow=narrow)
            difference = _difference(loaded, sweep, rows, truths, shares_prefix=prefix)
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001  # whatever an unknown family's code makes of it: there is another way
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if difference <= _TOLERANCE.get(loaded.model.dtype, _COARSE):
            given_up = ["shared prefixes"] * (not prefix) + ["narrow last layers"] * (not narrow)
            note = f"sweeps go without {' and '.join(given_up)}: {reasons[0]}" if given_up else ""
            return Fit(sweep, prefix, _fits_trees(loaded, sweep, rows, truths, shares_prefix=prefix), note)
        reasons.append(f"its logits differ by {difference:.1e} of the largest")
    return Fit(None, False, False, f"candidates are scored one after another, as the sweep does not fit: {reasons[-1]}")


def _fits_trees(
    loaded: LoadedModel,
    sweep: Sweep,
    rows: Sequence[Sequence[int]],
    truths: dict[tuple[int, ...], torch.Tensor],
    *,
    shares_prefix: bool,
) -> bool:
    """Return whether rows may share lines. If not, beginnings are computed with every row: nothing to tell a user."""
    try:
        sweep.learn_trees()
        difference = _difference(loaded, sweep, rows, truths, shares_prefix=shares_prefix, trees=True)
    except Interrupted:
        raise
    except Exception as error:  # noqa: BLE001  # as above
        logger.info("rows share no lines: %s: %s", type(error).__name__, error)
        return False
    return difference <= _TOLERANCE.get(loaded.model.dtype, _COARSE)


def fit_decoder(loaded: LoadedModel, sweep: Sweep) -> tuple[Decoder | None, str]:
    """Return a decoder whose logits are those of the plain path on a few rows, or None and in words why."""
    try:
        decoder = Decoder(loaded, sweep)
        difference = _decoded_difference(loaded, decoder, _rows(loaded))
    except Interrupted:
        raise
    except Exception as error:  # noqa: BLE001  # as above
        reason = f"{type(error).__name__}: {error}"
    else:
        if difference <= _TOLERANCE.get(loaded.model.dtype, _COARSE):
            return decoder, ""
        reason = f"its logits differ by {difference:.1e} of the largest"
    return (
        None,
        f"longer replies are decoded one candidate after another, as decoding all together does not fit: {reason}",
    )


def _decoded_difference(loaded: LoadedModel, decoder: Decoder, rows: Sequence[Sequence[int]]) -> float:
    """Return how far the logits of decoding steps are from the plain path's after the same tokens."""
    finals = ring_order(_finals(loaded))
    steps_nbv: list[torch.Tensor] = []

    def observe(logits_rv: torch.Tensor) -> None:
        steps_nbv.append(logits_rv.float().cpu().view(len(finals), len(rows), -1))

    everything = [(range(len(rows)), Portions())]
    new = decoder.new_tokens(finals, rows, None, _NEW_TOKENS, Ending(frozenset()), everything, observe)
    differences, largest = [0.0], 1e-6
    for at, final in enumerate(finals):
        for step, logits_nbv in enumerate(steps_nbv, start=1):
            so_far = [[*row, *tokens[:step]] for row, tokens in zip(rows, new[at], strict=True)]
            truth_bv = _plain_logits(loaded, final, so_far)
            differences.append(float((logits_nbv[at] - truth_bv).abs().max()))
            largest = max(largest, float(truth_bv.abs().max()))
    return max(differences) / largest


def _finals(loaded: LoadedModel) -> list[Node]:
    """Return final nodes of a current model and of some candidates, the first layer and the last among them.

    Where every pass reads the layers from the disk, the current model has few: the first two of each kind, and the
    last.
    """
    num_layers = loaded.layers.num_layers
    removed = {num_layers // 2} if num_layers > 2 else set()
    if loaded.layers.is_streamed:
        removed = set(range(num_layers)) - _few_of_each_kind(loaded)
    candidates = [layer for layer in sorted({0, num_layers - 1}) if num_layers > len(removed) + 1]
    return [final_node(sorted(removed), layer) for layer in (None, *candidates)]


def _few_of_each_kind(loaded: LoadedModel) -> set[int]:
    """Return the last layer and the first two of those that have the same modules, shapes and type."""
    layers = loaded.layers.full
    types = getattr(loaded.model.config.get_text_config(decoder=True), "layer_types", None) or [None] * len(layers)
    kinds: dict[Hashable, list[int]] = {}
    for number, layer in enumerate(layers):
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
        kinds.setdefault((types[number], shapes), []).append(number)
    return {len(layers) - 1, *(number for numbers in kinds.values() for number in numbers[:2])}


def _rows(loaded: LoadedModel) -> list[list[int]]:
    """Return rows of arbitrary tokens that share a prefix; two of them, one token more."""
    generator = torch.Generator().manual_seed(0)
    size = min(loaded.model.get_input_embeddings().num_embeddings, 1000)
    prefix = torch.randint(size, (_PREFIX,), generator=generator).tolist()
    first, *others = (torch.randint(size, (length,), generator=generator).tolist() for length in _LENGTHS)
    return [[*prefix, *first], *([*prefix, *other] for other in others), [*prefix, first[0], *others[0]]]


def _difference(
    loaded: LoadedModel,
    sweep: Sweep,
    rows: Sequence[Sequence[int]],
    truths: dict[tuple[int, ...], torch.Tensor],
    *,
    shares_prefix: bool,
    trees: bool = False,
) -> float:
    """Return how far the sweep's logits are from the plain path's, as a share of the largest logit."""
    total = loaded.layers.num_layers
    finals = _finals(loaded)
    for node in finals:
        if node not in truths:
            truths[node] = _plain_logits(loaded, node, rows)
    steps = plan_sweep(total, finals)
    states = None
    if shares_prefix:
        states = PrefixStates(_PREFIX)
        sweep.run_prefix(states, rows[0][:_PREFIX], {(at, node) for at, step in enumerate(steps) for node in step.runs})
        rows = [row[_PREFIX:] for row in rows]
    layout = lay_lines(rows)
    if trees:
        packs = pack_rows(rows, len(rows[0]) + _LENGTHS[1])  # more than one line, more than one row on a line
        layout = lay_packs(packs)
    logits_nbv = sweep.next_logits(finals, layout, states).float().cpu()
    if trees:
        at = [row for pack in packs for row in pack.rows]
        logits_nbv = logits_nbv[:, [at.index(row) for row in range(len(rows))]]
    truth_nbv = torch.stack([truths[node] for node in finals])
    return float((logits_nbv - truth_nbv).abs().max() / truth_nbv.abs().max().clamp(min=1e-6))


@torch.inference_mode()
def _plain_logits(loaded: LoadedModel, removed: Sequence[int], rows: Sequence[Sequence[int]]) -> torch.Tensor:
    with loaded.layers.without(removed):
        logits = [
            loaded.model(input_ids=torch.tensor([row], device=loaded.model.device), use_cache=False).logits[0, -1]
            for row in rows
        ]
    return torch.stack(logits).float().cpu()
