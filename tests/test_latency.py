"""Latency is measured in turns, on the work that is said, and told with its spread; no test looks at a real clock."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny_loaded, tiny_prompts
from folders import Material, command, show
from folders import material_fixture as material_fixture
from oracles import greedy_tokens, rebuild

import tale_ray.model.load
from tale_ray.engine.timing import time_batch, time_layers, time_pass
from tale_ray.errors import ModelError
from tale_ray.model.load import LoadedModel
from tale_ray.records import BatchTimes, PassTime
from tale_ray.results.latency import batch_json, spread
from tale_ray.store.reader import RunReader
from tale_ray.store.run import RunWriter

LAYER_SECONDS = (1.0, 2.0, 4.0, 8.0)
HEAD_SECONDS = 5.0


class Machine:
    """A clock that only the model's own work moves: so long for each layer, so long for the head, and a slow-down."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.pace = 1.0
        self.passes: list[tuple[int, ...]] = []  # layers that ran, by forward

    def clock(self) -> float:
        return self.seconds

    @contextmanager
    def watching(self, loaded: LoadedModel) -> Iterator[None]:
        def layer(number: int) -> Any:
            def ran(*_: Any) -> None:
                self.seconds += self.pace * LAYER_SECONDS[number]
                self.passes[-1] += (number,)

            return ran

        def began(*_: Any) -> None:
            self.passes.append(())

        def ended(*_: Any) -> None:
            self.seconds += self.pace * HEAD_SECONDS
            self.pace *= 1.01  # the machine grows slower all the time

        # A layer's forward is replaced while layers are timed; hooks of the norm inside it are not.
        hooks = [
            module.post_attention_layernorm.register_forward_hook(layer(number))
            for number, module in enumerate(loaded.layers.full)
        ]
        hooks += [loaded.model.register_forward_pre_hook(began), loaded.model.lm_head.register_forward_hook(ended)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


FULL, CUT = (0, 1, 2, 3), (0, 3)


def test_models_take_turns_and_do_the_work_that_is_said() -> None:
    loaded, machine = tiny_loaded("llama"), Machine()
    with machine.watching(loaded):
        sizes = {"batch_size": 3, "prompt_tokens": 5, "new_tokens": 4, "repeats": 3}
        times = time_batch(loaded, (2, 1), **sizes, clock=machine.clock)
    full, cut = [FULL] * 4, [CUT] * 4  # a forward over the prompts and three over one token each
    assert machine.passes == (full + cut) + (full + cut) * 3 + full * 3
    assert times.batch_size == 3
    assert [len(passes) for passes in (times.base, times.pruned, times.layered)] == [3, 3, 3]


def test_times_are_those_of_the_layers_that_ran() -> None:
    loaded, machine = tiny_loaded("llama"), Machine()
    with machine.watching(loaded):
        sizes = {"batch_size": 1, "prompt_tokens": 5, "new_tokens": 4, "repeats": 5}
        times = time_batch(loaded, (2, 1), **sizes, clock=machine.clock)
    found = batch_json(times, (2, 1), new_tokens=4)
    expected = (2.0 + 4.0) / (sum(LAYER_SECONDS) + HEAD_SECONDS)
    for phase in ("first_token", "decode"):
        saved = found[phase]["saved"]
        assert saved["expected"]["median"] == pytest.approx(expected, abs=0.02)
        assert saved["measured"]["median"] == pytest.approx(expected, abs=0.04), "the slow-down is not in the pairs"
        assert sum(found[phase]["layer_shares"]) == pytest.approx(0.75, abs=0.02)
    assert found["first_token"]["layer_shares"] == pytest.approx([1 / 20, 2 / 20, 4 / 20, 8 / 20])


def test_layers_share_what_the_whole_takes() -> None:
    loaded, machine = tiny_loaded("llama"), Machine()
    with machine.watching(loaded):
        found = time_layers(loaded.layers, torch.tensor([[3, 4, 5]]), 2, machine.clock)
    assert found.first_layer_seconds == LAYER_SECONDS
    assert found.first_seconds == sum(LAYER_SECONDS) + HEAD_SECONDS
    assert found.decode_layer_seconds == pytest.approx([1.01 * seconds for seconds in LAYER_SECONDS])
    assert found.decode_seconds == pytest.approx(1.01 * found.first_seconds)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_timed_is_greedy_decoding(family: str) -> None:
    loaded, prompt = tiny_loaded(family), tiny_prompts(1)[0]
    removed = (1,)
    expected = greedy_tokens(rebuild(loaded.model, removed), prompt, 5, ends=())
    with loaded.layers.without(removed):
        _, tokens_bn = time_pass(loaded.model, torch.tensor([prompt, prompt]), 5, lambda: 0.0)
    assert tokens_bn.tolist() == [expected, expected]


def test_a_family_without_a_cache_is_refused_unless_one_token_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded("llama")
    own = loaded.model.forward

    def forward(input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int = 0) -> Any:
        return own(input_ids=input_ids, use_cache=False, logits_to_keep=logits_to_keep)

    monkeypatch.setattr(loaded.model, "forward", forward)
    prompts_bt = torch.tensor([[3, 4]])
    assert time_pass(loaded.model, prompts_bt, 1, lambda: 0.0)[1].shape == (1, 1)
    with pytest.raises(ModelError, match="llama hands out no cache"):
        time_pass(loaded.model, prompts_bt, 2, lambda: 0.0)


def test_spread_is_the_median_and_the_quartiles() -> None:
    samples = np.random.default_rng(0).random(11)
    ordered = sorted(samples)
    quartiles = {"low": (ordered[2] + ordered[3]) / 2, "high": (ordered[7] + ordered[8]) / 2}
    assert spread(samples) == pytest.approx({"median": ordered[5], **quartiles})
    assert spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_numbers_are_those_of_the_passes() -> None:
    layered = (PassTime(10.0, 20.0, (2.0, 3.0), (8.0, 8.0)), PassTime(10.0, 20.0, (4.0, 3.0), (8.0, 8.0)))
    times = BatchTimes(
        8, (PassTime(10.0, 20.0), PassTime(30.0, 40.0)), (PassTime(5.0, 15.0), PassTime(15.0, 30.0)), layered
    )
    found = batch_json(times, (0,), new_tokens=5)
    assert found["batch_size"] == 8
    assert found["first_token"]["seconds"]["base"]["median"] == 20.0
    assert found["first_token"]["saved"]["measured"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert found["first_token"]["saved"]["expected"]["median"] == pytest.approx(0.3)
    assert found["first_token"]["layer_shares"] == pytest.approx([0.3, 0.3])
    assert found["decode"]["tokens_per_second"]["pruned"]["median"] == pytest.approx((32 / 15 + 32 / 30) / 2)
    assert found["decode"]["saved"]["measured"]["median"] == 0.25
    assert found["decode"]["saved"]["expected"]["median"] == 0.4
    alone = batch_json(times, (0,), new_tokens=1)
    assert alone["decode"] is None
    assert alone["first_token"] == found["first_token"]


# The command.


@pytest.fixture(scope="module", name="run")
def run_fixture(material: Material) -> Path:
    run = material.folder / "measured"
    outcome = material.search(run)
    assert outcome.code == 0, outcome.err
    return run


FEW = ("--prompt-tokens", 4, "--new-tokens", 3, "--repeats", 2, "--batch-sizes", "1,2")


def test_json(run: Path) -> None:
    outcome = command("latency", run, "--pick", "final", "--json", *FEW)
    assert outcome.code == 0, outcome.err
    found, final = outcome.json, show(run)["final"]
    assert (found["round"], found["removed"]) == (final["round"], final["removed"])
    assert (found["num_layers"], found["dtype"], found["device"]) == (6, "float32", "cpu")
    assert (found["prompt_tokens"], found["new_tokens"], found["repeats"]) == (4, 3, 2)
    assert [batch["batch_size"] for batch in found["batches"]] == [1, 2]
    for batch in found["batches"]:
        for phase, quantity in (("first_token", "seconds"), ("decode", "tokens_per_second")):
            assert batch[phase][quantity].keys() == {"base", "pruned"}
            assert batch[phase]["saved"].keys() == {"measured", "expected"}
            assert len(batch[phase]["layer_shares"]) == 6
            for side in batch[phase][quantity].values():
                assert 0 < side["low"] <= side["median"] <= side["high"]
    assert RunReader(str(run)).result("latency") is None, "nothing is stored unasked"


def test_a_table_is_for_people(run: Path) -> None:
    outcome = command("latency", run, "--pick", "1", *FEW[:2], "--new-tokens", 1, *FEW[4:])
    assert outcome.code == 0, outcome.err
    assert "5 of 6 layers" in outcome.out
    assert outcome.out.count("first token, ms") == 2
    assert "tokens per second" not in outcome.out


def test_the_result_is_kept_if_that_is_asked_for(run: Path, tmp_path: Path) -> None:
    kept = Path(shutil.copytree(run, tmp_path / "run"))
    before = show(kept)
    outcome = command("latency", kept, "--pick", "1", "--json", "--store", *FEW)
    assert outcome.code == 0, outcome.err
    stored = json.loads((kept / "results" / "latency.json").read_text())
    assert {name: stored[name] for name in outcome.json} == outcome.json
    assert show(kept) == before
    RunReader(str(kept)).check()
    assert command("resume", kept).code == 0, "the run is as good as before"
    with RunWriter.claim(str(kept)):
        held = command("latency", kept, "--pick", "1", "--json", "--store", *FEW)
    assert held.code == 2
    assert held.json["round"] == 1, "what was measured is printed all the same"
    assert "is being written by process" in held.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pick", "0"], "is round 0, the full model, from which nothing is removed"),
        (["--pick", "wrst"], "pick 'wrst' is not a result of"),
        (["--pick", "1", "--batch-sizes", "1,x"], "batch sizes '1,x' is not a list of numbers: write it like 1,8"),
        (["--pick", "1", "--batch-sizes", "0"], "batch size 0: 0 is too small: it is at least 1"),
        (["--pick", "1", "--repeats", "0"], "repeats: 0 is too small"),
        (["--pick", "1", "--new-tokens", "0"], "new tokens: 0 is too small"),
        (["--pick", "1", "--prompt-tokens", "-3"], "prompt tokens: -3 is too small"),
        (["--pick", "1", "--gpus-per-worker", "3"], "3 GPUs per worker are asked for"),
        (["--pick", "1", "--model", "./nowhere"], "model folder ./nowhere does not exist"),
    ],
)
def test_refusals_before_a_model_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    def load_model(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(tale_ray.model.load, "load_model", load_model)
    outcome = command("latency", run, *options)
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert words in outcome.err


def test_refusals_of_the_model(run: Path, material: Material) -> None:
    other = command("latency", run, "--pick", "1", "--model", material.other_model)
    assert other.code == 2
    assert "is not the one that" in other.err
    long = command("latency", run, "--pick", "1", "--prompt-tokens", 127, "--new-tokens", 2)
    assert long.code == 2
    assert "prompts of 127 and 2 new tokens are longer than the 128 positions" in long.err
