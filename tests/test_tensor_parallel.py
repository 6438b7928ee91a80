"""Gangs: which weights their processes split, and that together they predict what one process predicts. Without Ray."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_tiny
from gang import Found, examined, gang

from tale_ray.api import make_config, search
from tale_ray.config import ModelSection, ResourceSection, SearchConfig, TaskSection
from tale_ray.errors import ConfigError, ModelError
from tale_ray.model.outline import hollow_model
from tale_ray.model.tensor_parallel import WHOLE, check_sizes, held_whole, split_plan

SMOLLM2 = Path(os.environ.get("TALE_RAY_SMOLLM2", ".cache/smollm2"))
WITHOUT_PLAN = ("bloom", "gpt2", "gpt_oss", "lfm2")
SPLIT_IN_2 = {  # 4 heads, 2 key-value heads, 48 wide: by the last part of their module's name
    **{family: {"self_attn", "mlp"} for family in FAMILIES},
    "gpt_neox": {"attention", "mlp"},
    "mixtral": {"self_attn", "experts"},
    "qwen3_moe": {"self_attn", "mlp", "experts"},
    "deepseek_v3": {"mlp", "experts", "shared_experts"},
}
SPLIT_IN_3 = {
    **{family: parts - {"self_attn", "attention"} for family, parts in SPLIT_IN_2.items()},
    "deepseek_v3": {"mlp"},
}
splittable = sorted(set(FAMILIES) - set(WITHOUT_PLAN))


# What is split.


def model_of(family: str) -> tuple[Any, dict[str, Any]]:
    """A model without storage and the fields of its configuration."""
    model = hollow_model(FAMILIES[family](), torch.float32)
    return model, model.config.get_text_config(decoder=True).to_dict()


def split_modules(plan: dict[str, str]) -> set[str]:
    """The parts of which a module that has columns or rows is split."""
    split = [name for name, style in plan.items() if "wise" in style]
    return {name.rpartition(".")[0].rpartition(".")[2] for name in split}


@pytest.mark.parametrize(("num_members", "expected"), [(2, SPLIT_IN_2), (3, SPLIT_IN_3)])
@pytest.mark.parametrize("family", splittable)
def test_what_is_split_in_each_family(family: str, num_members: int, expected: dict[str, set[str]]) -> None:
    model, fields = model_of(family)
    plan = split_plan(model.tp_plan, fields, num_members)
    assert split_modules(plan) == expected[family]
    assert plan.keys() == model.tp_plan.keys()
    for name, style in plan.items():
        assert style in (model.tp_plan[name], WHOLE)
    for name in ("lm_head", "model.embed_tokens"):
        assert plan.get(name, WHOLE) == WHOLE
    whole = held_whole(plan, fields)
    assert bool(whole) == (expected[family] != SPLIT_IN_2[family])


@pytest.mark.parametrize("family", splittable)
def test_a_gang_among_which_nothing_splits(family: str) -> None:
    model, fields = model_of(family)
    with pytest.raises(ModelError, match=r"cannot be split among 5 processes, as nothing .* divisible by 5: .*48 wide"):
        split_plan(model.tp_plan, fields, 5)


@pytest.mark.parametrize("family", WITHOUT_PLAN)
def test_a_family_that_transformers_has_no_plan_for(family: str) -> None:
    model, fields = model_of(family)
    with pytest.raises(ModelError, match=r"transformers has no tensor-parallel plan for its layers; leave out"):
        split_plan(model.tp_plan, fields, 2)


def rules(**changes: str) -> dict[str, str]:
    attention = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise", **changes}
    mlp = {"up_proj": "colwise", "down_proj": "rowwise"}
    return {
        **{f"layers.*.self_attn.{name}": style for name, style in attention.items()},
        **{f"layers.*.mlp.{name}": style for name, style in mlp.items()},
    }


SIZES: dict[str, Any] = {"model_type": "x", "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        ({}, {"num_key_value_heads": 3}),
        ({}, {"num_attention_heads": 9}),
        ({}, {"num_key_value_heads": [4, 4, 1]}),  # of each layer
        ({}, {"num_global_key_value_heads": 1}),
        ({}, {"num_attention_heads": None}),
        ({"o_proj": "replicate"}, {}),  # no sum ends the part
        ({"kv_a_proj": "mla_kv_a_proj"}, {}),  # a rule that is not known to keep what we rely on
    ],
)
def test_attention_that_is_held_whole(changed: dict[str, str], fields: dict[str, Any]) -> None:
    fields = {**SIZES, **fields}
    assert split_modules(split_plan(rules(), SIZES, 2)) == {"self_attn", "mlp"}
    plan = split_plan(rules(**changed), fields, 2)
    assert split_modules(plan) == {"mlp"}
    assert len(held_whole(plan, fields)) == 1


def test_sizes_that_the_configuration_tells() -> None:
    check_sizes(SIZES, 4)
    check_sizes({**SIZES, "num_key_value_heads": 3}, 4)
    check_sizes({**SIZES, "moe_intermediate_size": 21}, 7)
    check_sizes({name: SIZES[name] for name in ("model_type", "intermediate_size")}, 7)  # heads are not told
    with pytest.raises(
        ModelError, match=r"divisible by 7: attention \(8 and 4 heads\); feed-forward \(64 wide\)\. Give"
    ):
        check_sizes(SIZES, 7)


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 0}, "tensor parallel 0 is too small"),
        ({"gang_timeout_seconds": 0.0}, r"gang timeout 0\.0 is too small"),
        ({"tensor_parallel": 2, "stream": "always"}, "tensor parallel 2 and stream always exclude each other"),
        ({"tensor_parallel": 2, "gpus_per_worker": 1}, "tensor parallel 2 and gpus per worker 1 exclude each other"),
        ({"tensor_parallel": 2, "gpus_per_worker": 4}, r"gpus per worker 4 .*; give 2 GPUs per worker, or 0"),
        ({"tensor_parallel": 2, "local": True}, "tensor parallel 2 and local exclude each other"),
    ],
)
def test_what_goes_with_no_gang(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ResourceSection(**options)


def test_a_gguf_file_goes_with_no_gang() -> None:
    with pytest.raises(ConfigError, match=r"tensor parallel 2 and gguf 'm\.gguf' exclude each other"):
        SearchConfig(
            model=ModelSection(model="m", gguf="m.gguf"),
            task=TaskSection(task="t"),
            resources=ResourceSection(tensor_parallel=2),
        )


def test_what_a_gang_needs() -> None:
    resources = ResourceSection(tensor_parallel=4, gpus_per_worker=4, cpus_per_worker=2)
    assert resources.worker_cpus == 8
    assert ResourceSection(cpus_per_worker=2).worker_cpus == 2
    texts = make_config(model="m", task="t", tensor_parallel=2, gang_timeout="2m")
    assert texts.resources.gang_timeout_seconds == 120


def test_a_gang_that_fits_nothing_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """Not even Ray is started: there is no cluster at that address."""
    with pytest.raises(ModelError, match=r"among 7 processes, .*: attention \(4 heads\); feed-forward \(240 wide\)"):
        search(
            **{"model": "bundled", "task": "boolean_synthetic", "rows": 4, "run": str(tmp_path / "run")},
            **{"tensor_parallel": 7, "address": "127.0.0.1:1"},
        )
    assert not (tmp_path / "run").exists()


# What is predicted.


def check_alike(one: Found, members: list[Found], largest: float) -> float:
    """Check that all members have found what one process has; return the largest difference of logits."""
    lead, *others = members
    for other in others:
        assert torch.equal(other.logits, lead.logits)  # to the bit: what one decides, all decide
        assert (other.decoded.candidates[0].answers, other.likely.candidates[0].answers) == (
            lead.decoded.candidates[0].answers,
            lead.likely.candidates[0].answers,
        )
    for ours, theirs in ((lead.decoded, one.decoded), (lead.likely, one.likely)):
        assert [each.layer for each in ours.candidates] == [each.layer for each in theirs.candidates]
        for mine, alone in zip(ours.candidates, theirs.candidates, strict=True):
            for answer, other in zip(mine.answers, alone.answers, strict=True):
                assert (answer.reply, answer.prediction) == (other.reply, other.prediction)
                if other.log_likelihoods is not None:
                    assert answer.log_likelihoods == pytest.approx(other.log_likelihoods, rel=1e-4, abs=1e-3)
    assert all(member.has_our_group for member in members)
    assert len({member.budget for member in members}) == 1
    assert frozenset().union(*(member.listens_to for member in members)) == {"127.0.0.1"}
    difference = float((lead.logits - one.logits).abs().max())
    assert difference < largest * float(one.logits.abs().max())
    return difference


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a tiny model of a family."""
    root = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    return lambda family: str(save_tiny(family, root / family))


@pytest.mark.slow
@pytest.mark.parametrize("num_members", [2, 3])
def test_a_gang_predicts_what_one_process_predicts(
    num_members: int, tiny: Callable[[str], str], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    families = splittable if num_members == 2 else ["llama", "qwen3_moe", "deepseek_v3"]
    models = ["bundled", *map(tiny, families), tiny("gpt2")]
    members = gang(num_members, models, tmp_path)
    for at, model in enumerate(models[:-1]):
        one = examined(model)
        found = [each[at] for each in members]
        assert isinstance(one, Found)
        assert all(isinstance(each, Found) for each in found), found
        difference = check_alike(one, found, 5e-5)  # type: ignore[arg-type]  # checked above
        record_property(f"largest logit difference, {Path(model).name}", difference)
        print(f"{num_members} processes, {Path(model).name}: logits differ by {difference:.1e} at most")
    assert all("no tensor-parallel plan" in str(each[-1]) for each in members)


@pytest.mark.slow
@pytest.mark.skipif(not (SMOLLM2 / "config.json").exists(), reason="make smollm2 prepares this model")
@pytest.mark.parametrize(("num_members", "share"), [(2, 1 / 2), (3, 1 / 3)])
def test_smollm2_in_a_gang(
    num_members: int, share: float, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """9 heads and 3 key-value heads: two processes split the feed-forward parts only, three split everything."""
    members = gang(num_members, [str(SMOLLM2.resolve())], tmp_path)
    one = examined(str(SMOLLM2.resolve()))
    found = [each[0] for each in members]
    assert isinstance(one, Found)
    assert all(isinstance(each, Found) for each in found), found
    assert [each.first_width for each in found] == [share * one.first_width] * num_members  # type: ignore[union-attr]
    difference = check_alike(one, found, 5e-5)  # type: ignore[arg-type]  # checked above
    record_property("largest logit difference", difference)
    print(f"{num_members} processes, SmolLM2: logits differ by {difference:.1e} at most")


def test_a_quantised_model_is_refused(tiny: Callable[[str], str]) -> None:
    from tale_ray.model.load import load_model
    from tale_ray.model.placement import Placement

    folder = Path(tiny("llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match="is quantised, and a gang splits plain weights only"):
        load_model(ModelSection(model=str(folder)), "float32", Placement(num_members=2))
