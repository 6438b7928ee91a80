"""Measurements of a model on calibration rows, by which strategies choose layers: hidden states, and perplexity.

Knows nothing of strategies. Axes in tensor names: b rows of a micro-batch, t tokens, d hidden size.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch.nn.functional import normalize

from tale_ray.engine.boundaries import See, see_boundaries, surviving_layers
from tale_ray.engine.score import Scorer
from tale_ray.errors import ConfigError
from tale_ray.model.load import LoadedModel
from tale_ray.records import Choice, Measurement, Probe, PromptRow, WorkUnit
from tale_ray.tasks.spec import AnswerSpec

_Tokens: TypeAlias = tuple[int, ...]

_DOUBLES_BYTES = 3 * 8  # hidden states in float64 that are at work at once
_REMEDY = "choose strategy tale, sleb, reverse or random"


def measure(loaded: LoadedModel, scorer: Scorer, probe: Probe, rows: Sequence[_Tokens]) -> Measurement:
    """Return what a probe comes to on rows of tokens.

    With x_i the hidden states below the i-th surviving layer, x_n those above the last of n (before the final norm):

    - block influence (ShortGPT, arXiv 2403.03853): 1 - the mean of cos(x_i, x_(i+1)) over all tokens of all rows;
    - angular distance (arXiv 2403.17887): the mean over rows of arccos(cos(x_i, x_(i+span))) / pi, of the last token;
    - log perplexity (as SLEB, arXiv 2402.09025, ranks layers): the mean negative log-likelihood, in nats, of all tokens
      but the first of each row, by the model without `probe.removed` and the layer.

    Args:
        loaded: the model; whole again afterwards, whatever happens.
        scorer: of that model; its budget of memory holds here, too.
        probe: what is measured.
        rows: calibration text as token ids.

    Raises:
        ConfigError: there is nothing to measure on, or not even one row fits into the budget.
        ModelError: a layer cannot be removed, or the family hides its hidden states.
        TaskError: a row has more tokens than the model has positions.
    """
    started = time.monotonic()
    used = [tuple(row) for row in rows if len(row) >= (2 if probe.measure == "log_perplexity" else 1)]
    if not used:
        raise ConfigError("there is no calibration text to measure on: give rows with two tokens at least")
    measures = {
        "block_influence": _block_influence,
        "angular_distance": _angular_distance,
        "log_perplexity": _log_perplexity,
    }
    values = measures[probe.measure](loaded, scorer, probe, used)
    return Measurement(
        probe=probe,
        values=tuple(value if math.isfinite(value) else None for value in values),
        num_rows=len(used),
        num_tokens=sum(map(len, used)),
        seconds=time.monotonic() - started,
    )


def _log_perplexity(_loaded: LoadedModel, scorer: Scorer, probe: Probe, rows: Sequence[_Tokens]) -> list[float]:
    """All candidates share sweeps, as choices of a task do; each row is one choice after its first token."""
    asked = [PromptRow(row[:1], "0", (Choice("", row[:1], row[1:]),)) for row in rows]
    unit = WorkUnit(0, "measurement", "search", probe.removed, probe.layers, tuple(range(len(asked))))
    scorer.forget()
    try:
        found = scorer.score(unit, asked, AnswerSpec(type="likelihood"), 1, "")
    finally:
        scorer.forget()
    num_predicted = sum(len(row) - 1 for row in rows)
    return [
        -math.fsum((answer.log_likelihoods or (math.nan,))[0] for answer in candidate.answers) / num_predicted
        for candidate in found.candidates
    ]


def _block_influence(loaded: LoadedModel, scorer: Scorer, probe: Probe, rows: Sequence[_Tokens]) -> list[float]:
    sums: dict[int, list[float]] = {}  # of cosines, by boundary above

    def watch(lengths: Sequence[int]) -> See:
        below_btd: torch.Tensor

        def see(boundary: int, hidden_btd: torch.Tensor) -> None:
            nonlocal below_btd
            unit_btd = normalize(hidden_btd.double(), dim=-1)
            if boundary:
                cosine_bt = (below_btd.to(unit_btd.device) * unit_btd).sum(-1)
                sums.setdefault(boundary, []).extend(
                    float(cosine_bt[row, :length].sum()) for row, length in enumerate(lengths)
                )
            below_btd = unit_btd

        return see

    _run(loaded, scorer, probe, rows, watch)
    position = {layer: at for at, layer in enumerate(surviving_layers(loaded, probe.removed))}
    num_tokens = sum(map(len, rows))
    return [1 - math.fsum(sums[position[layer] + 1]) / num_tokens for layer in probe.layers]


def _angular_distance(loaded: LoadedModel, scorer: Scorer, probe: Probe, rows: Sequence[_Tokens]) -> list[float]:
    lasts: dict[int, list[torch.Tensor]] = {}  # unit vectors (b, d) of last tokens, by boundary

    def watch(lengths: Sequence[int]) -> See:
        def see(boundary: int, hidden_btd: torch.Tensor) -> None:
            last = torch.tensor(lengths, device=hidden_btd.device) - 1
            last_bd = hidden_btd[torch.arange(len(lengths), device=hidden_btd.device), last]
            lasts.setdefault(boundary, []).append(normalize(last_bd.double(), dim=-1).cpu())

        return see

    _run(loaded, scorer, probe, rows, watch)
    position = {layer: at for at, layer in enumerate(surviving_layers(loaded, probe.removed))}
    distances = []
    for layer in probe.layers:
        below_bd, above_bd = (torch.cat(lasts[position[layer] + span]) for span in (0, probe.span))
        angle_b = (below_bd * above_bd).sum(-1).clamp(-1, 1).arccos() / math.pi
        distances.append(math.fsum(angle_b.tolist()) / len(rows))
    return distances


def _run(
    loaded: LoadedModel, scorer: Scorer, probe: Probe, rows: Sequence[_Tokens], watch: Callable[[Sequence[int]], See]
) -> None:
    see_boundaries(loaded, scorer, probe.removed, rows, watch, value_bytes=_DOUBLES_BYTES, remedy=_REMEDY)
