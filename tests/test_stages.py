"""Pipelines: a model on several devices scores as it does on one.

On a machine without GPUs the stages of a real model all lie on the CPU. That every tensor is on the device of whoever
uses it is tested with tensors that have a device but no storage (torch refuses to mix devices all the same).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from families import FAMILIES, tiny_loaded, tiny_prompts
from torch._subclasses.fake_tensor import FakeTensorMode

from tale_ray.engine.decode import Decoder
from tale_ray.engine.devices import Copies, layer_devices, sent
from tale_ray.engine.layout import lay_lines, lay_packs, pack_rows
from tale_ray.engine.prefix import PrefixStates
from tale_ray.engine.score import Scorer, _InFlight
from tale_ray.engine.streams import plan_sweep
from tale_ray.engine.sweep import Portions, Sweep
from tale_ray.errors import ModelError
from tale_ray.model.load import LoadedModel
from tale_ray.model.outline import hollow_model, num_bytes
from tale_ray.model.stages import check_fits, device_map
from tale_ray.records import Choice, PromptRow, UnitResult, WorkUnit
from tale_ray.tasks.spec import AnswerSpec

ANSWER = AnswerSpec(type="regex", pattern="(t\\d+)")
DEVICES = ("meta:0", "meta:1", "meta:2")
FINALS = [(), (0,), (2,), (3,)]
PREFIX = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14)
PROMPTS = tiny_prompts(4)
some_families = pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_window", "gpt2", "qwen3_moe", "bloom"])


def rows(count: int = 16) -> list[PromptRow]:
    return [PromptRow((*PREFIX, *prompt), "t5") for prompt in tiny_prompts(count)]


def scored(
    loaded: LoadedModel,
    asked: list[PromptRow],
    answer: AnswerSpec,
    new_tokens: int,
    begin: Callable[[], None] = lambda: None,
) -> UnitResult:
    """All candidates on all rows; `begin` is called after the model was checked."""
    candidates = (None, *range(loaded.layers.num_layers))
    unit = WorkUnit(0, "round-0001", "search", (), candidates, tuple(range(len(asked))))
    scorer = Scorer(loaded, 2**24)
    begin()
    return scorer.score(unit, asked, answer, new_tokens, "w")


def replies(result: UnitResult) -> list[Any]:
    return [found.answers for found in result.candidates]


@pytest.fixture
def flights(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """How many micro-batches there were, and how many of them at once had not been waited for."""
    seen = SimpleNamespace()
    seen.begin = lambda: seen.__dict__.update(total=0, now=0, most=0)
    seen.begin()
    land, start = _InFlight.land, Sweep._last_states

    def starting(sweep: Sweep, *arguments: Any, **named: Any) -> torch.Tensor:
        found = start(sweep, *arguments, **named)
        seen.total += 1
        seen.now += 1
        seen.most = max(seen.most, seen.now)
        return found

    def landing(flight: _InFlight, *arguments: Any) -> None:
        seen.now -= 1
        land(flight, *arguments)

    monkeypatch.setattr(Sweep, "_last_states", starting)
    monkeypatch.setattr(_InFlight, "land", landing)
    return seen


@pytest.mark.parametrize("num_stages", [2, 3, 5])
@some_families
def test_predictions_equal_those_of_one_stage(family: str, num_stages: int, flights: SimpleNamespace) -> None:
    loaded = tiny_loaded(family, num_layers=6)
    one = scored(loaded, rows(), ANSWER, 1)
    several = scored(replace(loaded, num_stages=num_stages), rows(), ANSWER, 1, flights.begin)
    assert replies(several) == replies(one)
    assert flights.total >= 4
    assert flights.most == min(num_stages, flights.total)
    assert flights.now == 0


@pytest.mark.parametrize("num_stages", [2, 3, 5])
@some_families
def test_replies_of_many_tokens_equal_those_of_one_stage(family: str, num_stages: int) -> None:
    loaded = tiny_loaded(family)
    one = scored(loaded, rows(9), ANSWER, 5)
    assert replies(scored(replace(loaded, num_stages=num_stages), rows(9), ANSWER, 5)) == replies(one)


def test_log_likelihoods_equal_those_of_one_stage() -> None:
    loaded = tiny_loaded("qwen2")
    answer = AnswerSpec(type="likelihood")
    asked = [
        replace(
            row, choices=tuple(Choice(str(ids), row.token_ids, ids) for ids in ((4,), (5, 6), (7, 8, 9))), target="0"
        )
        for row in rows(8)
    ]
    several, one = (scored(replace(loaded, num_stages=count), asked, answer, 1) for count in (3, 1))
    for ours, theirs in zip(several.candidates, one.candidates, strict=True):
        for mine, other in zip(ours.answers, theirs.answers, strict=True):
            assert mine.prediction == other.prediction
            assert mine.log_likelihoods == pytest.approx(other.log_likelihoods, rel=1e-5)


# Where tensors are.


def hollowed(loaded: LoadedModel, mode: FakeTensorMode) -> LoadedModel:
    """The model with its weights on three devices, without their values."""
    places = device_map(loaded.model, DEVICES)
    for name, device in places.items():
        for module in loaded.model.get_submodule(name).modules():
            for entries, kind in ((module._parameters, torch.nn.Parameter), (module._buffers, lambda t, **_: t)):
                for key, tensor in entries.items():
                    if tensor is not None:
                        entries[key] = kind(mode.from_tensor(tensor.detach()).to(device), requires_grad=False)
    dispatch_model(loaded.model, places, skip_keys=loaded.model._skip_keys_device_placement, force_hooks=True)
    return loaded


@pytest.fixture
def hollow() -> Iterator[Callable[[str], tuple[LoadedModel, Sweep, Decoder]]]:
    """Makes models on three devices. What is learned by looking at values is learned before."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():

        def make(family: str) -> tuple[LoadedModel, Sweep, Decoder]:
            loaded = tiny_loaded(family)
            sweep = Sweep(loaded)
            sweep.learn_trees()
            decoder = Decoder(loaded, sweep)
            mode.__enter__()
            hollowed(loaded, mode)
            sweep._devices = decoder._devices = layer_devices(loaded.layers)
            assert {str(device) for device in sweep._devices} == set(DEVICES)
            for owner, name in ((Sweep, "next_tokens"), (Sweep, "log_likelihoods"), (Sweep, "run_prefix")):
                patch.setattr(owner, name, getattr(owner, name).__wrapped__)  # inference mode knows no such tensors
            return loaded, sweep, decoder

        try:
            yield make
        finally:
            mode.__exit__(None, None, None)


hollow_families = pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_window", "gpt2", "olmo2"])
quiet = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")  # accelerate does


@quiet
@hollow_families
def test_every_tensor_of_a_sweep_is_where_it_is_used(family: str, hollow: Any) -> None:
    _, sweep, _ = hollow(family)
    prompts = PROMPTS
    found = sweep.next_tokens(FINALS, lay_lines(prompts), None)
    assert found.shape == (len(FINALS), 4)
    packs = pack_rows(prompts, 64)
    assert sweep.next_tokens(FINALS, lay_packs(packs), None).shape == (len(FINALS), 4)
    prefix = PrefixStates(len(PREFIX))
    wanted = {(at, node) for at, step in enumerate(plan_sweep(4, FINALS)) for node in step.runs}
    sweep.run_prefix(prefix, PREFIX, wanted)
    for layer, node in wanted:
        keys, values = prefix.get(layer, (node,))
        assert keys.device == values.device == sweep._devices[layer]
    assert sweep.next_tokens(FINALS, lay_lines(prompts), prefix).shape == (len(FINALS), 4)
    likely = sweep.log_likelihoods(FINALS, lay_lines(prompts), [(3,), (4,), (5,), (6,)], prefix)
    assert likely.shape == (len(FINALS), 4)


@quiet
@hollow_families
def test_every_tensor_of_a_decoding_step_is_where_it_is_used(
    family: str, hollow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, decoder = hollow(family)
    prompts = PROMPTS[:3]
    found = Sweep.next_tokens
    monkeypatch.setattr(
        Sweep, "next_tokens", lambda *given: (found(*given), SimpleNamespace(tolist=lambda: [[3] * 3] * 4))[1]
    )
    whole = range(len(prompts))
    steps = []
    batch = decoder._prefilled([(0,), (2,), (3,), ()], prompts, whole, None, 3, [(whole, Portions())], {})
    with decoder._loaded.layers.forwarding([decoder._forward(layer) for layer in range(4)]):
        steps.append(decoder._step(batch))
        decoder._leave(batch, [0, 2, 5, 7, 10])
        steps.append(decoder._step(batch))
    assert [step.shape[0] for step in steps] == [12, 5]
    for layer, (keys, values) in batch.cache.states.items():
        assert keys.device == values.device == decoder._devices[layer]


@quiet
def test_devices_that_are_mixed_are_found_out(hollow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two tests above can fail."""
    _, sweep, _ = hollow("llama")
    monkeypatch.setattr("tale_ray.engine.sweep.sent", lambda tensor, device: tensor)
    with pytest.raises(Exception, match="found at least two devices"):
        sweep.next_tokens(FINALS, lay_lines(PROMPTS), None)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_weight_has_a_device_and_shared_ones_the_same(family: str) -> None:
    model = hollow_model(FAMILIES[family](), torch.float32)
    places = device_map(model, DEVICES)
    for name, _ in model.named_parameters():
        assert sum(name == part or name.startswith(f"{part}.") for part in places) == 1, name
    stages = [device for name, device in places.items() if name.rpartition(".")[2].isdigit()]
    assert stages == sorted(stages)
    assert set(stages) == set(DEVICES)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    assert places[names[id(embedding)]] == DEVICES[0]
    assert places[names[id(head)]] == (DEVICES[0] if head.weight is embedding.weight else DEVICES[-1])
    assert num_bytes([model]) == sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 80 * 2**30))
    check_fits(9 * 2**30, "cuda:1", 2)
    check_fits(99 * 2**30, "cpu", 1)
    with pytest.raises(ModelError, match=r"memory of 2 GPUs: 9\.1 GiB of weights are to go to cuda:1, which has 10\.0"):
        check_fits(int(9.1 * 2**30), "cuda:1", 2)


def test_copies_are_sent_once() -> None:
    copies, tensor = Copies(), torch.ones(2)
    assert copies.on(tensor, torch.device("cpu")) is tensor
    there = copies.on(tensor, torch.device("meta"))
    assert there.device.type == "meta"
    assert copies.on(tensor, torch.device("meta")) is there
    assert sent(tensor, torch.device("cpu")) is tensor
