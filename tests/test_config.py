"""What a configuration accepts, what it refuses and with which words, and that it survives its JSON."""

import json
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tale_ray.config import ModelSection, ResourceSection, SearchConfig, StorageSection, StrategySection, TaskSection
from tale_ray.errors import ConfigError
from tale_ray.option_texts import epsilon_text, parse_bytes, parse_duration, parse_epsilon, parse_layers, parse_splits


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("0.5", 0.5),
        ("30m", 1800),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1d", 86400),
        (" 2h1s ", 7201),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "soon", "-5", "1.5h", "30m2h", "nan", "inf"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ConfigError, match=f"duration {text!r} is not understood: give seconds"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 2**20),
        (f"{2**60 - 1}", 2**60 - 1),
        ("1k", 1000),
        ("256MiB", 2**28),
        ("8GiB", 2**33),
        ("2GB", 2 * 10**9),
        ("1.5 KiB", 1536),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1PB", "many"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=f"size {text!r} is not understood"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 5000, f"{2**60 + 1}", "99999999999T"], ids=len)
def test_a_size_that_no_machine_has(text: str) -> None:
    with pytest.raises(ConfigError, match=f"size '{text}' is too large: it is at most {2**60} bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "layers"), [("", ()), ("  ", ()), ("3", (3,)), ("7, 3", (7, 3)), ("-1", (-1,))])
def test_layers(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, "remove") == layers


@pytest.mark.parametrize("text", ["3,", "a", "1-3", "1.0"])
def test_what_are_no_layers(text: str) -> None:
    with pytest.raises(ConfigError, match=f"remove '{text}' is not a list of layers: write numbers such as 3,7"):
        parse_layers(text, "remove")


def test_splits() -> None:
    assert parse_splits("test = 0.25, search=1e-1") == {"test": "0.25", "search": "1e-1"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is not NAME=SHARE"),
        ("search", "'search' is not NAME=SHARE"),
        ("search=0.5,", "'' is not NAME=SHARE"),
        ("train=0.5", "'train=0.5' is not NAME=SHARE with a name out of shots, search, select, test, finetune"),
        ("search=0.5,search=0.2", "search is given twice"),
    ],
)
def test_what_are_no_splits(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_splits(text)


@given(st.decimals(0, 1, allow_nan=False, places=6))
def test_epsilon_is_exactly_what_its_text_says(value: Any) -> None:
    assert parse_epsilon(str(value)) == Fraction(value)


@pytest.mark.parametrize("text", ["-0.1", "1.01", "nan", "sNaN", "inf", "-inf", "much", "", "0,08"])
def test_what_is_no_epsilon(text: str) -> None:
    with pytest.raises(ConfigError, match=f"epsilon {text!r} is (out of range|not a number).*0 to 1, such as 0.08"):
        parse_epsilon(text)


TASK = {"task": "t"}
REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (ModelSection, {"model": " "}, "model '' is empty"),
    (ModelSection, {"model": 5}, "model 5 is not a text"),
    (ModelSection, {"model": "a\0b"}, "model 'a\\x00b' holds a character that no path or name can have"),
    (ModelSection, {"model": "m", "gguf": "\udcff"}, "gguf '\\udcff' holds a character"),
    (ModelSection, {"model": "m", "trust_remote_code": "no"}, "trust remote code 'no' is not true or false"),
    (ModelSection, {"model": "m", "dtype": 4}, "dtype 4 is not known"),
    (ModelSection, {"model": "m", "dtype": "int4"}, "dtype 'int4' is not known: choose one of auto, float32"),
    (TaskSection, {"task": None}, "task None is not a text"),
    (TaskSection, {**TASK, "data_root": 1}, "data root 1 is not a text"),
    (TaskSection, {**TASK, "splits": {"search": 0.5}}, "share of the search split 0.5 is not a text"),
    (TaskSection, {**TASK, "rows": 0}, "rows 0 is too small: it is at least 1"),
    (TaskSection, {**TASK, "rows": "9"}, "rows '9' is not a whole number"),
    (TaskSection, {**TASK, "rows": 2.5}, "rows 2.5 is not a whole number"),
    (TaskSection, {**TASK, "rows": True}, "rows True is not a whole number"),
    (TaskSection, {**TASK, "seed": "x"}, "seed 'x' is not a whole number"),
    (TaskSection, {**TASK, "splits": {"search": "0.5", "test": "0.6"}}, "sum to 1.1: shares sum to at most 1"),
    (TaskSection, {**TASK, "splits": {"search": "-0.5"}}, "share of the search split '-0.5' is out of range"),
    (TaskSection, {**TASK, "splits": {"search": "0", "test": "1"}}, "leave no search rows"),
    (TaskSection, {**TASK, "splits": {"test": "1"}}, "leave no search rows"),
    (
        TaskSection,
        {**TASK, "splits": {"search": "0.5", "train": "0.2"}},
        "splits: 'train' is not known: the splits are shots, search, select, test, finetune",
    ),
    (TaskSection, {**TASK, "splits": 0.5}, "splits 0.5 are no shares by name: write them like search=0.5,test=0.3"),
    (StrategySection, {"epsilon": 0.08}, "epsilon 0.08 is not a text"),
    (StrategySection, {"exhaustive": "no"}, "exhaustive 'no' is not true or false"),
    (StrategySection, {"remove": 3}, "remove 3 is not a list of layers"),
    (StrategySection, {"strategy": "greedy"}, "strategy 'greedy' is not known: choose one of tale, beam, sleb"),
    (StrategySection, {"strategy": "Block-Influense"}, "is not known: did you mean block_influence? Choose one of"),
    (StrategySection, {"strategy": "contiguous"}, "strategy contiguous needs max removed"),
    (StrategySection, {"calibration": "c.txt"}, "strategy tale measures nothing: leave it out, or choose one of sleb"),
    (StrategySection, {"epsilon_mode": "last"}, "epsilon mode 'last' is not known: choose one of baseline, current"),
    (StrategySection, {"max_removed": -1}, "max removed -1 is too small: it is at least 0"),
    (StrategySection, {"remove": (-1,)}, "remove: layer -1 does not exist: layers are numbered from 0"),
    (StrategySection, {"remove": (3, 3)}, "remove 3,3: a layer is named twice"),
    (StrategySection, {"remove": ("3",)}, "remove: layer '3' is not a whole number"),
    (StrategySection, {"keep_layers": (1, 2, 1)}, "keep layers 1,2,1: a layer is named twice"),
    (StrategySection, {"remove": (3,), "keep_layers": (2, 3)}, "layer 3 is in remove and in keep layers"),
    (StrategySection, {"remove": (1, 2), "max_removed": 1}, "remove names 2 layers but max removed is 1"),
    (ResourceSection, {"local": "yes"}, "local 'yes' is not true or false"),
    (ResourceSection, {"address": 6379}, "address 6379 is not a text"),
    (ResourceSection, {"workers": 1.5}, "workers 1.5 is not a whole number"),
    (ResourceSection, {"batch_bytes": 2**61}, f"batch bytes {2**61} is too large: it is at most {2**60}"),
    (ResourceSection, {"wait_resources_seconds": float("inf")}, "wait resources inf is too large"),
    (ResourceSection, {"workers": 0}, "workers 0 is too small: it is at least 1"),
    (ResourceSection, {"gpus_per_worker": -1}, "gpus per worker -1 is too small"),
    (ResourceSection, {"cpus_per_worker": 0}, "cpus per worker 0 is too small"),
    (ResourceSection, {"batch_bytes": 0}, "batch bytes 0 is too small"),
    (ResourceSection, {"wait_resources_seconds": float("nan")}, "wait resources nan is too small"),
    (ResourceSection, {"local": True, "workers": 2}, "local runs one worker, not 2"),
    (ResourceSection, {"local": True, "address": "auto"}, "local and address 'auto' exclude each other"),
    (StorageSection, {"resume": "maybe"}, "resume 'maybe' is not known: choose one of auto, must, never"),
    (StorageSection, {"time_limit_seconds": 0.5}, "time limit 0.5 is too small: it is at least 1"),
    (StorageSection, {"run": True}, "run True is not a text"),
    (StorageSection, {"time_limit_seconds": True}, "time limit True is not a number of seconds"),
    (StorageSection, {"time_limit_seconds": 1e9}, "time limit 1000000000.0 is too large: it is at most 315360000"),
    (StorageSection, {"time_limit_seconds": "2h"}, "time limit '2h' is not a number of seconds"),
]


@pytest.mark.parametrize(("section", "values", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_a_value_that_breaks_a_rule_is_refused_in_words(section: type, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        section(**values)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"remove": (4,)}, "layer 4 cannot be removed: the model has 4 layers, numbered 0 to 3"),
        ({"keep_layers": (9,)}, "layer 9 cannot be kept: the model has 4 layers, numbered 0 to 3"),
        ({"remove": (0, 1, 2, 3)}, "all 4 layers cannot be removed: a model keeps at least one"),
    ],
)
def test_layers_that_a_model_does_not_have(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StrategySection(**values).check_layers(4)


@pytest.mark.parametrize(
    "change",
    [
        *({"model": value} for value in ([], {}, {"model": 5}, {"model": "m", "colour": "red"})),
        *({"strategy": value} for value in (5, {"remove": 5}, {"keep_layers": ["a"]}, {"epsilon": "much"})),
        {"task": {"task": "t", "splits": {"search": 1}}},
    ],
)
def test_json_of_no_configuration(change: dict[str, Any]) -> None:
    stored = SearchConfig(model=ModelSection(model="m"), task=TaskSection(task="t")).to_json()
    with pytest.raises(ConfigError):
        SearchConfig.from_json({**stored, **change})
    for name in change:
        del stored[name]
    with pytest.raises(ConfigError, match="not a configuration"):
        SearchConfig.from_json(stored)


def test_splits_are_cut_in_one_order_however_they_are_written() -> None:
    one = TaskSection(task="t", splits=parse_splits("search=0.5,test=0.3"))
    other = TaskSection(task="t", splits=parse_splits("test=0.3,search=0.5"))
    assert list(one.shares.items()) == list(other.shares.items())


shares = st.sampled_from(["0", "0.1", "0.125", "0.2"])
configs = st.builds(
    SearchConfig,
    model=st.builds(
        ModelSection,
        model=st.sampled_from(["bundled", "/models/ä", "owner/name"]),
        gguf=st.none() | st.just("weights.gguf"),
        revision=st.none() | st.just("main"),
        trust_remote_code=st.booleans(),
        dtype=st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
    ),
    task=st.builds(
        TaskSection,
        task=st.sampled_from(["boolq", "tasks/own.yaml"]),
        rows=st.none() | st.integers(1, 10**6),
        shots=st.integers(0, 99),
        splits=st.fixed_dictionaries(
            {"search": st.sampled_from(["0.2", "0.125"])},
            optional={"shots": shares, "select": shares, "test": shares, "finetune": shares},
        ),
        seed=st.integers(),
        data_root=st.none() | st.just("/data"),
    ),
    strategy=st.builds(
        StrategySection,
        epsilon=st.sampled_from(["0", "0.08", "8e-2", "1"]),
        epsilon_mode=st.sampled_from(["baseline", "current"]),
        max_removed=st.none() | st.integers(5, 50),
        remove=st.lists(st.integers(0, 9), unique=True, max_size=5).map(tuple),
        keep_layers=st.lists(st.integers(10, 99), unique=True).map(tuple),
        exhaustive=st.booleans(),
    ),
    resources=st.builds(
        ResourceSection,
        local=st.just(False),
        address=st.none() | st.just("ray://head:10001"),
        workers=st.none() | st.integers(1, 1000),
        gpus_per_worker=st.integers(0, 8),
        cpus_per_worker=st.integers(1, 64),
        wait_resources_seconds=st.floats(0, 1e6),
        batch_bytes=st.none() | st.integers(1, 2**40),
    ),
    storage=st.builds(
        StorageSection,
        run=st.none() | st.just("s3://bucket/run"),
        resume=st.sampled_from(["auto", "must", "never"]),
        time_limit_seconds=st.none() | st.floats(1, 1e6),
    ),
)


@given(configs)
def test_a_configuration_survives_its_json(config: SearchConfig) -> None:
    """Keys are sorted in a file: no order may be lost that counts."""
    stored = json.loads(json.dumps(config.to_json(), sort_keys=True))
    again = SearchConfig.from_json(stored)
    assert again == config
    assert list(again.task.shares.items()) == list(config.task.shares.items())
    assert again.decision_options() == config.decision_options()


def test_strategies_beside_tale_leave_the_identity_of_its_runs() -> None:
    tale = SearchConfig(model=ModelSection(model="m"), task=TaskSection(task="t"))
    assert tale.decision_options() == {
        "dtype": "float32",
        "seed": 0,
        "strategy": "tale",
        "epsilon": "0.08",
        "epsilon_mode": "baseline",
        "max_removed": None,
        "remove": [],
        "keep_layers": [],
    }
    block = replace(tale, strategy=StrategySection(strategy="contiguous", max_removed=3)).decision_options()
    assert block == {**tale.decision_options(), "strategy": "contiguous", "max_removed": 3, "block": 3}
    old = tale.to_json()
    del old["strategy"]["calibration"]
    assert SearchConfig.from_json(old) == tale


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        ({"max_removed": 3}, True),
        ({"max_removed": 4}, False),
        ({"max_removed": 0}, True),
        ({"max_removed": 2, "keep_layers": (1,)}, True),
        ({"max_removed": 3, "keep_layers": (1,)}, False),
        ({"max_removed": 3, "remove": (1,)}, True),
        ({"max_removed": 4, "remove": (1,)}, False),
    ],
)
def test_a_block_of_layers_has_to_be_there(values: dict[str, Any], fits: bool) -> None:
    section = StrategySection(strategy="contiguous", **values)
    if fits:
        section.check_layers(4)
        return
    with pytest.raises(ConfigError, match="too large for strategy contiguous: the model has 4 layers"):
        section.check_layers(4)


@given(configs, configs)
def test_only_decisions_are_in_the_identity(one: SearchConfig, other: SearchConfig) -> None:
    """Where it runs and where it is kept is not (but for GPUs, which decide what dtype `auto` is)."""
    elsewhere = SearchConfig(
        model=one.model,
        task=one.task,
        strategy=one.strategy,
        resources=other.resources,
        storage=other.storage,
    )
    same_dtype = one.dtype == elsewhere.dtype
    assert (elsewhere.decision_options() == one.decision_options()) is same_dtype


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        *[(text, "0.08") for text in ("0.08", "0.080", "8e-2", " .08")],
        *[(text, "0") for text in ("0", "-0", "0.00", "0e3")],
        *[(text, "1") for text in ("1", "1.0", "1e0", "10e-1")],
        ("0." + "1" * 40, "0." + "1" * 40),
    ],
)
def test_an_epsilon_has_one_text(text: str, plain: str) -> None:
    assert epsilon_text(text) == plain
    assert parse_epsilon(plain) == parse_epsilon(text)


def test_equal_numbers_are_one_epsilon() -> None:
    options = [
        SearchConfig(
            model=ModelSection(model="m"), task=TaskSection(task="t"), strategy=StrategySection(epsilon=epsilon)
        ).decision_options()
        for epsilon in ("0.08", "0.080", "8e-2", " 0.08 ")
    ]
    assert all(each == options[0] for each in options)


@pytest.mark.parametrize("text", ["1e-999999999", "0." + "0" * 101 + "1"])
def test_a_share_of_endless_decimals_is_refused_at_once(text: str) -> None:
    with pytest.raises(ConfigError, match="too many decimals"):
        parse_epsilon(text)
