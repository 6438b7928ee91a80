"""What the last tokens hold between layers, against plain transformers: every family, full and cut, in any batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, save_tiny, tiny_loaded, tiny_prompts
from oracles import hidden_states, rebuild

from tale_ray.config import ModelSection
from tale_ray.engine.score import Scorer
from tale_ray.engine.states import last_states
from tale_ray.errors import ConfigError, ModelError
from tale_ray.model.load import load_model
from tale_ray.model.placement import ON_CPU, Placement

ROWS = [*tiny_prompts(6), (7,), *tiny_prompts(3, seed=1)]  # of all lengths, not sorted by it
CLOSE = 1e-5  # of the largest number


def check_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()


def plain(model: Any, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """One row at a time, by the model's own account."""
    by_row = [torch.stack([state[-1] for state in hidden_states(model, row)]) for row in rows]
    return torch.stack(by_row, dim=1).numpy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("removed", [(), (1,), (0, 3)])
def test_they_are_those_of_plain_transformers(family: str, removed: tuple[int, ...]) -> None:
    loaded = tiny_loaded(family)
    found = last_states(loaded, Scorer(loaded), removed, ROWS)
    expected = plain(rebuild(loaded.model, removed), ROWS)
    assert found.dtype == np.float32
    assert found.shape == (loaded.layers.num_layers - len(removed) + 1, len(ROWS), 32)
    check_close(found, expected)
    assert np.ptp(expected, axis=1).max() > 0.1, "equal rows show nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_change_nothing(family: str) -> None:
    loaded = tiny_loaded(family)
    whole = last_states(loaded, Scorer(loaded), (2,), ROWS)
    scorer = Scorer(loaded, 70_000)
    passes = []
    decoder = loaded.model.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda *call: passes.append(call[-1]["input_ids"].shape[0]), with_kwargs=True
    )
    few = last_states(loaded, scorer, (2,), ROWS)
    hook.remove()
    assert len(passes) > 1
    assert sum(passes) == len(ROWS), "one forward over the rows gathers all layers"
    check_close(few, whole)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2_window", "bloom"])
def test_padding_on_the_left_in_plain_transformers_is_the_same(family: str) -> None:
    loaded = tiny_loaded(family)
    longest = max(map(len, ROWS))
    padded = torch.tensor([[0] * (longest - len(row)) + list(row) for row in ROWS])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ROWS])
    places = {} if family == "bloom" else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.inference_mode():
        output = loaded.model(
            input_ids=padded, attention_mask=mask, output_hidden_states=True, use_cache=False, **places
        )
    found = last_states(loaded, Scorer(loaded), (), ROWS)
    for at, state_btd in enumerate(output.hidden_states[:-1]):
        check_close(found[at], state_btd[:, -1].numpy())


def test_the_last_is_before_the_final_norm_and_chooses_the_reply() -> None:
    loaded = tiny_loaded("llama")
    found = torch.from_numpy(last_states(loaded, Scorer(loaded), (), ROWS)[-1])
    with torch.inference_mode():
        normed = loaded.model.model.norm(found)
        for at, row in enumerate(ROWS):
            output = loaded.model(input_ids=torch.tensor([row]), output_hidden_states=True)
            torch.testing.assert_close(normed[at], output.hidden_states[-1][0, -1], atol=CLOSE, rtol=CLOSE)
            torch.testing.assert_close(loaded.model.lm_head(normed[at]), output.logits[0, -1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(normed, found, atol=0.1)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_streamed_models_hold_the_same(family: str, tmp_path: Any) -> None:
    section = ModelSection(model=str(save_tiny(family, tmp_path)))
    whole, streamed = (load_model(section, "float32", placement) for placement in (ON_CPU, Placement(is_streamed=True)))
    expected = last_states(whole, Scorer(whole), (1,), ROWS)
    check_close(last_states(streamed, Scorer(streamed), (1,), ROWS), expected)


def test_numbers_of_few_bits_are_told_as_float32() -> None:
    loaded = tiny_loaded("llama")
    loaded.model.to(torch.bfloat16)
    found = last_states(loaded, Scorer(loaded), (), ROWS)
    assert found.dtype == np.float32
    assert (torch.from_numpy(found).bfloat16().float().numpy() == found).all()


def test_the_model_is_whole_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded("llama")
    decoder = loaded.model.get_decoder()
    with monkeypatch.context() as patch:
        patch.setattr(type(decoder.norm), "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            last_states(loaded, Scorer(loaded), (1,), ROWS)
    assert len(decoder.layers) == 4
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in decoder.layers)


def test_refusals() -> None:
    loaded = tiny_loaded("llama")
    with pytest.raises(ModelError, match="layer 9"):
        last_states(loaded, Scorer(loaded), (9,), ROWS)
    with pytest.raises(ConfigError, match="the longest row"):
        last_states(loaded, Scorer(loaded, 1000), (), ROWS)
    loaded.layers.full[0].register_forward_pre_hook(  # before ours: as a family that names its hidden states
        lambda _, args, kwargs: ((), {"hidden_states": args[0], **kwargs}), with_kwargs=True
    )
    with pytest.raises(ModelError, match="do not take hidden states first"):
        last_states(loaded, Scorer(loaded), (), ROWS)
