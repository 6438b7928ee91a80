"""Measurements of a model against plain transformers: hidden states that it outputs itself, and rebuilt models."""

import math
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_loaded, tiny_prompts
from oracles import hidden_states, log_likelihood, rebuild

from tale_ray.engine.measure import measure
from tale_ray.engine.score import Scorer
from tale_ray.errors import ConfigError, ModelError
from tale_ray.records import Measurement, Probe, PromptRow, WorkUnit
from tale_ray.tasks.spec import AnswerSpec

ROWS = [*tiny_prompts(5), (7,)]
CLOSE = 1e-5


def found(family: str, probe: Probe, batch_bytes: int | None = None, *, sweeps: bool = True) -> Measurement:
    loaded = tiny_loaded(family)
    return measure(loaded, Scorer(loaded, batch_bytes, sweeps=sweeps), probe, ROWS)


def cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("removed", [(), (1,)])
def test_hidden_states_are_those_of_plain_transformers(family: str, removed: tuple[int, ...]) -> None:
    pruned = rebuild(tiny_loaded(family).model, removed)
    by_row = [hidden_states(pruned, row) for row in ROWS]
    left = tuple(layer for layer in range(4) if layer not in removed)
    num_tokens = sum(map(len, ROWS))

    influence = found(family, Probe("block_influence", removed, left))
    assert (influence.num_rows, influence.num_tokens) == (len(ROWS), num_tokens)
    expected = [
        1 - sum(float(cosine(states[at], states[at + 1]).sum()) for states in by_row) / num_tokens
        for at in range(len(left))
    ]
    assert influence.values == pytest.approx(expected, abs=CLOSE)
    assert len({round(value, 3) for value in expected}) > 1, "equal layers show nothing"

    distance = found(family, Probe("angular_distance", removed, left[:-1], span=2))
    expected = [
        sum(math.acos(float(cosine(states[at][-1], states[at + 2][-1]))) / math.pi for states in by_row) / len(ROWS)
        for at in range(len(left) - 1)
    ]
    assert distance.values == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral_window", "lfm2"])
@pytest.mark.parametrize("sweeps", [True, False])
def test_perplexities_are_those_of_rebuilt_models(family: str, sweeps: bool) -> None:
    model = tiny_loaded(family).model
    asked = [row for row in ROWS if len(row) > 1]
    expected = []
    for layer in (0, 1, 3):
        pruned = rebuild(model, {2, layer})
        likely = sum(log_likelihood(pruned, row[:1], row[1:]) for row in asked)
        expected.append(math.exp(-likely / sum(len(row) - 1 for row in asked)))
    measurement = found(family, Probe("log_perplexity", (2,), (0, 1, 3)), sweeps=sweeps)
    assert [math.exp(value) for value in measurement.values if value is not None] == pytest.approx(expected, rel=CLOSE)
    assert measurement.num_rows == len(asked)


@pytest.mark.parametrize("kind", ["block_influence", "angular_distance", "log_perplexity"])
def test_micro_batches_change_nothing(kind: Any) -> None:
    probe = Probe(kind, (0,), (1, 2), span=2)
    whole = found("llama", probe)
    for batch_bytes in (60_000, 100_000):
        assert found("llama", probe, batch_bytes).values == pytest.approx(whole.values, abs=1e-6)
    with pytest.raises(ConfigError, match="the longest row"):
        found("llama", probe, 1000)


def test_the_model_is_whole_and_scores_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a measurement that an exception has ended; states of calibration rows are not taken for others."""
    loaded = tiny_loaded("llama")
    scorer = Scorer(loaded)
    rows = [PromptRow(prompt, "t9") for prompt in tiny_prompts(4, seed=1)]
    unit = WorkUnit(1, "round-0001", "search", (), (None, 0, 1), (0, 1, 2, 3))
    answer = AnswerSpec(type="regex", pattern=r"(t\d+)")
    before = [each.answers for each in scorer.score(unit, rows, answer, 1, "w").candidates]
    for kind in ("block_influence", "angular_distance", "log_perplexity"):
        measure(loaded, scorer, Probe(kind, (), (0, 1)), ROWS)  # type: ignore[arg-type]
        other = [row[::-1] for row in ROWS]  # as long, so that nothing but its tokens tells them apart
        first = measure(loaded, scorer, Probe(kind, (), (0, 1)), other)  # type: ignore[arg-type]
        again = measure(loaded, Scorer(loaded), Probe(kind, (), (0, 1)), other)  # type: ignore[arg-type]
        assert first.values == pytest.approx(again.values, abs=1e-6)

    def interrupted(_self: object) -> None:
        raise KeyboardInterrupt

    decoder = loaded.model.get_decoder()
    with monkeypatch.context() as patch:
        patch.setattr(type(decoder.norm), "forward", lambda *_: interrupted(None))
        with pytest.raises(KeyboardInterrupt):
            measure(loaded, scorer, Probe("block_influence", (1,), (0,)), ROWS)
    assert len(decoder.layers) == 4
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in decoder.layers)
    assert [each.answers for each in scorer.score(unit, rows, answer, 1, "w").candidates] == before


def test_what_is_no_number_is_said_to_be_none() -> None:
    loaded = tiny_loaded("llama")
    loaded.model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    values = measure(loaded, Scorer(loaded), Probe("log_perplexity", (), (0, 1)), ROWS).values
    assert values[0] is None
    assert values[1] is not None


def test_what_cannot_be_measured() -> None:
    loaded = tiny_loaded("llama")
    for rows in ([], [(5,)]):
        with pytest.raises(ConfigError, match="no calibration text"):
            measure(loaded, Scorer(loaded), Probe("log_perplexity", (), (0,)), rows)
    with pytest.raises(ModelError, match="layer 9"):
        measure(loaded, Scorer(loaded), Probe("block_influence", (9,), (0,)), ROWS)
