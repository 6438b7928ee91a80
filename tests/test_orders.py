"""Strategies beside TALE: their orders are pure functions of history, and a search decides by what it has stored."""

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import MODEL, SimulatedExecutor, Table, measured
from test_driver import NUM_ROWS, Killed, attempt, decisions, kill_after, search

from tale_ray.config import StrategySection
from tale_ray.errors import StoreError
from tale_ray.records import Branch, CandidateScore, Measurement, Probe, Round, Score, StopReason
from tale_ray.results.summary import summarize
from tale_ray.search.history import History
from tale_ray.search.strategy import make_strategy
from tale_ray.store.reader import RunReader
from tale_ray.store.run import RunWriter

ALL = ["sleb", "block_influence", "contiguous", "reverse", "random"]
NUM_LAYERS = MODEL.num_layers


def options(strategy: str) -> dict[str, Any]:
    return {"strategy": strategy, "epsilon": "1", **({"max_removed": 3} if strategy == "contiguous" else {})}


def history(removed: Sequence[int] = (), start: tuple[int, ...] = (), num_layers: int = NUM_LAYERS) -> History:
    """Rounds that remove some layers one after another, and lose nothing."""
    rounds = [Round(0, None, (), Score(80, 100, 0), (), True)]
    for number, layer in enumerate(removed, start=1):
        rounds.append(Round(number, layer, (*start, *removed[:number]), Score(80, 100, 0), (), True))
    return History.of(rounds, num_layers=num_layers, start=start)


def proposed(section: StrategySection, so_far: History, values: Sequence[float | None] = (), seed: int = 0) -> Any:
    """What a strategy proposes; what it asks to be measured has these values."""
    strategy = make_strategy(section, seed)
    found = strategy.propose(so_far)
    if not isinstance(found, Probe):
        return found
    measurement = Measurement(found, tuple(values[: len(found.layers)]), 1, 1, 0.0)
    return strategy.propose(so_far.with_measurement(measurement))


def whole_order(
    section: StrategySection, values: Sequence[float | None] = (), seed: int = 0, **first: Any
) -> list[int]:
    """The layers that a search removes which never falls below the floor."""
    removed: list[int] = []
    while isinstance(found := proposed(section, history(removed, **first), values, seed), tuple):
        (branch,) = found
        assert branch.removed == (*first.get("start", ()), *removed)
        (layer,) = branch.candidates
        removed.append(layer)
    assert isinstance(found, StopReason)
    return removed


def test_reverse_removes_the_deepest_first() -> None:
    assert whole_order(StrategySection(strategy="reverse")) == [5, 4, 3, 2, 1]
    kept = StrategySection(strategy="reverse", keep_layers=(4,), remove=(5,))
    assert whole_order(kept, start=(5,)) == [3, 2, 1, 0]


@given(st.integers(0, 10**9), st.integers(2, 40))
def test_random_order_is_that_of_the_hashes_of_seed_and_layer(seed: int, num_layers: int) -> None:
    digests = [hashlib.sha256(f"{seed}:{layer}".encode()).hexdigest() for layer in range(num_layers)]
    expected = sorted(range(num_layers), key=digests.__getitem__)
    found = whole_order(StrategySection(strategy="random"), seed=seed, num_layers=num_layers)
    assert found == expected[:-1]


def test_random_orders_differ_by_seed() -> None:
    section = StrategySection(strategy="random")
    assert len({tuple(whole_order(section, seed=seed, num_layers=30)) for seed in range(10)}) == 10


def test_block_influence_is_measured_once_and_ties_go_to_the_lowest_layer() -> None:
    values = [0.5, 0.1, 0.1, None, 0.0, 0.9]
    section = StrategySection(strategy="block_influence")
    assert make_strategy(section).propose(history()) == Probe("block_influence", (), tuple(range(6)))
    assert whole_order(section, values) == [4, 1, 2, 0, 5]
    later = history((1,), start=(0,))
    assert make_strategy(section).propose(later) == Probe("block_influence", (0,), (1, 2, 3, 4, 5))


def test_sleb_measures_the_candidates_of_every_round() -> None:
    section = StrategySection(strategy="sleb", keep_layers=(3,))
    assert make_strategy(section).propose(history((2,))) == Probe("log_perplexity", (2,), (0, 1, 4, 5))
    assert proposed(section, history((2,)), [3.0, 2.0, 2.0, 2.5]) == (Branch((2,), (1,)),)
    assert proposed(section, history((2,)), [None, None, 7.0, None]) == (Branch((2,), (4,)),)
    assert proposed(section, history((2,)), [None, None, None, None]) == (Branch((2,), (0,)),)


def test_contiguous_removes_the_nearest_block_from_its_end() -> None:
    section = StrategySection(strategy="contiguous", max_removed=3)
    assert make_strategy(section).propose(history()) == Probe("angular_distance", (), (0, 1, 2, 3), span=3)
    assert whole_order(section, [0.4, 0.2, 0.2, 0.3]) == [3, 2, 1]
    assert proposed(section, history((3, 2, 1))) is StopReason.MAX_REMOVED


def test_contiguous_passes_over_layers_that_are_kept_or_were_never_there() -> None:
    section = StrategySection(strategy="contiguous", max_removed=3, keep_layers=(2,), remove=(4,))
    # Surviving are 0 1 2 3 5: blocks of two that do not hold 2 begin with 0 and with 3.
    assert make_strategy(section).propose(history(start=(4,))) == Probe("angular_distance", (4,), (0, 1, 2, 3), span=2)
    assert whole_order(section, [0.4, 0.1, 0.1, 0.3], start=(4,)) == [5, 3]


@pytest.mark.parametrize("name", ALL)
def test_floor_and_ends_are_those_of_tale(name: str) -> None:
    section = StrategySection(**options(name) | {"epsilon": "0.08"})
    strategy = make_strategy(section)
    assert strategy.race_floor(history()) is None
    for correct, accepted in ((72, True), (71, False)):
        decision = strategy.decide(history(), [CandidateScore(2, correct, 100, 0, "exact", 0.0)])
        assert (decision.winner.layer, decision.accepted) == (2, accepted)
    low = Round(1, 2, (2,), Score(71, 100, 0), (), committed=False)
    assert strategy.propose(history().with_round(low)) is StopReason.BELOW_FLOOR
    zero = History.of([Round(0, None, (), Score(0, 100, 0), (), True)], num_layers=6, start=())
    assert strategy.propose(zero) is StopReason.BASELINE_ZERO


# Whole searches on a simulated cluster.


def expected_order(name: str, seed: int) -> list[int]:
    """The order of a search on a table, from the numbers of the table."""
    everything = tuple(range(NUM_LAYERS))
    if name == "reverse":
        return [5, 4, 3, 2, 1]
    if name == "random":
        return sorted(everything, key=lambda layer: hashlib.sha256(f"0:{layer}".encode()).digest())[:-1]
    if name == "contiguous":
        values = measured(seed, Probe("angular_distance", (), (0, 1, 2, 3), 3))
        start = values.index(min(values))
        return [start + 2, start + 1, start]
    if name == "block_influence":
        values = measured(seed, Probe("block_influence", (), everything))
        return sorted(everything, key=values.__getitem__)[:-1]
    removed: list[int] = []
    while len(removed) < NUM_LAYERS - 1:
        left = tuple(layer for layer in everything if layer not in removed)
        values = measured(seed, Probe("log_perplexity", tuple(removed), left))
        removed.append(left[values.index(min(values))])
    return removed


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", [3, 5])
def test_a_search_scores_one_candidate_a_round_and_stores_what_it_measured(
    tmp_path: Path, name: str, seed: int
) -> None:
    executor = SimulatedExecutor(Table(seed))
    summary: Any = search(tmp_path / "run", executor, **options(name))
    order = expected_order(name, seed)
    assert summary["rounds"][-1]["removed"] == order
    assert all(len(entry["candidates"]) == 1 for entry in summary["rounds"])
    assert summary["work"]["candidate_rows"] == NUM_ROWS * len(order)
    assert summary["stop_reason"] == ("max_removed" if name == "contiguous" else "one_layer_left")
    stored = RunReader(str(tmp_path / "run")).measurements()
    assert [each.probe for each in stored] == executor.probes
    assert [each.values for each in stored] == [measured(seed, each.probe) for each in stored]
    assert len(stored) == {"sleb": len(order), "block_influence": 1, "contiguous": 1}.get(name, 0)


@pytest.mark.parametrize("name", ["sleb", "block_influence", "contiguous"])
@pytest.mark.parametrize("step", [2, 5])
def test_a_search_that_is_killed_decides_the_same_and_measures_nothing_again(
    tmp_path: Path, name: str, step: int
) -> None:
    quiet_executor = SimulatedExecutor(Table(5))
    quiet = search(tmp_path / "quiet", quiet_executor, **options(name))
    probes: list[Probe] = []
    for number in range(500):
        executor = SimulatedExecutor(Table(5), seed=number)
        with contextlib.suppress(Killed), attempt(tmp_path / "run", executor, **options(name)) as driver:
            kill_after(executor, step)
            for _ in driver.run():
                pass
            break
        probes += executor.probes
    assert number > 2, "it was never killed"
    assert probes + executor.probes == quiet_executor.probes
    assert decisions(summarize(RunReader(str(tmp_path / "run")))) == decisions(quiet)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("nth", [1, 3])
def test_a_kill_around_the_writing_of_a_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, after: bool
) -> None:
    """What is stored decides, even where a measurement would now come to something else."""
    quiet = search(tmp_path / "quiet", SimulatedExecutor(Table(5)), **options("sleb"))
    original, count = RunWriter.write_measurement, 0

    def deadly(self: RunWriter, number: int, measurement: Measurement) -> None:
        nonlocal count
        count += 1
        if count < nth or after:
            original(self, number, measurement)
        if count == nth:
            raise Killed

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(RunWriter, "write_measurement", deadly)
        search(tmp_path / "run", SimulatedExecutor(Table(5)), **options("sleb"))
    stored = RunReader(str(tmp_path / "run")).measurements()
    assert len(stored) == nth - 1 + after
    executor = SimulatedExecutor(Table(5))
    again = search(tmp_path / "run", executor, **options("sleb"))
    assert decisions(again) == decisions(quiet)
    assert len(executor.probes) == len(again["rounds"]) - len(stored)  # type: ignore[arg-type]


def test_what_is_stored_decides_and_not_what_would_be_measured_now(tmp_path: Path) -> None:
    with (
        contextlib.suppress(Killed),
        attempt(tmp_path / "run", SimulatedExecutor(Table(5)), **options("sleb")) as first,
    ):
        for event in first.run():
            if type(event).__name__ == "ModelMeasured":
                raise Killed
    other = SimulatedExecutor(Table(6))
    summary: Any = search(tmp_path / "run", other, **options("sleb"))
    (first_layer, *_) = expected_order("sleb", 5)
    assert summary["rounds"][0]["removed_layer"] == first_layer != expected_order("sleb", 6)[0]


def test_a_larger_epsilon_takes_up_the_rejected_round(tmp_path: Path) -> None:
    executor = SimulatedExecutor(Table(5))
    stopped: Any = search(tmp_path / "run", executor, strategy="sleb", epsilon="0.05")
    assert stopped["stop_reason"] == "below_floor"
    later = SimulatedExecutor(Table(5))
    summary: Any = search(tmp_path / "run", later, **options("sleb"))
    assert summary["rounds"][-1]["removed"] == expected_order("sleb", 5)
    assert not set(executor.probes) & set(later.probes)


def test_a_measurement_that_was_changed_is_named(tmp_path: Path) -> None:
    search(tmp_path / "run", SimulatedExecutor(Table(5)), **options("block_influence"))
    path = tmp_path / "run" / "measurements" / "round-0001.json"
    whole = path.read_text()
    for text, words in (
        (whole[:40], "truncated or was changed"),
        (whole.replace('"span": 1', '"span": "1"'), "span is '1'"),
        (whole.replace("block_influence", "influence"), "measure is 'influence'"),
        (whole.replace("    0,\n", "", 1), "6 values of 5 layers"),
    ):
        path.write_text(text)
        with pytest.raises(StoreError, match=words):
            RunReader(str(tmp_path / "run")).check()
