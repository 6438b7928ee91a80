"""The whole search on a simulated cluster with a real store: the oracle's decisions, whatever happens on the way."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulation import MODEL, SimulatedExecutor, Table, TableRound, examples, table_search

from tale_ray.config import ModelSection, SearchConfig, StrategySection, TaskSection
from tale_ray.errors import BaselineZero, Interrupted, LeaseLost, PoisonUnit
from tale_ray.records import StopReason
from tale_ray.results.statistics import recommend
from tale_ray.results.summary import stored_history, summarize
from tale_ray.search.driver import Driver, SearchEnded
from tale_ray.search.interruption import Interruption
from tale_ray.search.pool import Pool
from tale_ray.search.strategy import make_strategy
from tale_ray.store.documents import Manifest
from tale_ray.store.reader import RunReader
from tale_ray.store.run import RunWriter

NUM_ROWS = 24
NUM_SELECT_ROWS = 11
NUM_TEST_ROWS = 9
EXAMPLES = {
    "search": examples(NUM_ROWS),
    "select": examples(NUM_SELECT_ROWS, "select"),
    "test": examples(NUM_TEST_ROWS, "test"),
}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power fails here, and a thousand small files are written."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Killed(BaseException):
    """Stands for the end of the process: nothing after it is done."""


def config(**strategy: object) -> SearchConfig:
    """Every candidate is scored on all rows, so that counts can be compared, unless a test says otherwise."""
    return SearchConfig(
        model=ModelSection(model="simulated"),
        task=TaskSection(task="simulated"),
        strategy=StrategySection(**{"exhaustive": True, **strategy}),  # type: ignore[arg-type]
    )


def manifest(search: SearchConfig) -> Manifest:
    return Manifest(
        run="simulated",
        created="2026-01-01T00:00:00+00:00",
        config=search.to_json(),
        identity={},
        model={"num_layers": MODEL.num_layers, "digest": "m", "dtype": "float32"},
        task={"name": "simulated"},
        rows={split: {"count": len(rows), "digest": split} for split, rows in EXAMPLES.items()},
        tokens={},
        versions={},
    )


@contextlib.contextmanager
def attempt(
    folder: Path, executor: SimulatedExecutor, interruption: Interruption | None = None, **strategy: object
) -> Iterator[Driver]:
    """A driver on the run in `folder`, whatever is there."""
    search = config(**strategy)
    with RunWriter.claim(str(folder)) as writer:
        writer.write_manifest(manifest(search))
        writer.start_attempt(options={}, versions={})
        yield Driver(
            strategy=make_strategy(search.strategy),
            history=stored_history(writer.reader, writer.reader.manifest()),
            examples=EXAMPLES,  # type: ignore[arg-type]
            pool=Pool(executor, interruption or Interruption()),
            writer=writer,
            recommend=recommend,
            loaded_at=time.monotonic(),
            exhaustive=search.strategy.exhaustive,
        )


def search(folder: Path, executor: SimulatedExecutor, **strategy: object) -> dict[str, object]:
    with attempt(folder, executor, **strategy) as driver:
        for _ in driver.run():
            pass
    return summarize(RunReader(str(folder)))


def as_table(summary: dict[str, object]) -> tuple[list[TableRound], TableRound | None, object]:
    """The part of a summary that the oracle knows, in its form."""

    def entry(found: dict[str, object]) -> TableRound:
        candidates = tuple((each["layer"], each["correct"]) for each in found["candidates"])  # type: ignore[attr-defined]
        return TableRound(found["removed_layer"], tuple(found["removed"]), found["correct"], candidates)  # type: ignore[arg-type]

    correct = summary["baseline"]["correct"]  # type: ignore[index]
    rounds = [TableRound(None, (), correct, ((None, correct),)), *map(entry, summary["rounds"])]  # type: ignore[call-overload]
    rejected = summary["rejected_round"]
    return rounds, entry(rejected) if rejected else None, summary["stop_reason"]  # type: ignore[arg-type]


def decisions(summary: dict[str, object]) -> dict[str, object]:
    """Everything of a summary that must not depend on what happened on the way."""
    names = (
        "baseline",
        "rounds",
        "rejected_round",
        "best",
        "bsba",
        "final",
        "selected",
        "test",
        "stop_reason",
        "state",
    )
    return {name: summary[name] for name in names}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("epsilon", ["0", "0.08", "0.3"])
def test_decisions_and_counts_equal_the_oracle(tmp_path: Path, seed: int, epsilon: str) -> None:
    table = Table(seed)
    summary = search(tmp_path / "run", SimulatedExecutor(table, seed=seed), epsilon=epsilon)
    assert as_table(summary) == table_search(table, NUM_ROWS, epsilon)
    assert summary["state"] == "finished"


@pytest.mark.parametrize("strategy", [{"max_removed": 2}, {"epsilon": "1"}])
def test_other_ends_equal_the_oracle(tmp_path: Path, strategy: dict[str, object]) -> None:
    table = Table(3)
    summary = search(tmp_path / "run", SimulatedExecutor(table), **strategy)
    assert as_table(summary) == table_search(
        table,
        NUM_ROWS,
        strategy.get("epsilon", "0.08"),
        strategy.get("max_removed"),  # type: ignore[arg-type]
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("epsilon", ["0", "0.08", "0.3"])
def test_racing_changes_no_decision(tmp_path: Path, seed: int, epsilon: str) -> None:
    """Slow rows make small units, so that candidates can be left out."""
    table = Table(seed, row_seconds=1.0)
    whole = search(tmp_path / "whole", SimulatedExecutor(table, num_workers=1), epsilon=epsilon)
    executor = SimulatedExecutor(table, num_workers=3, seed=seed)
    raced = search(tmp_path / "raced", executor, epsilon=epsilon, exhaustive=False)
    winners = [(entry["removed"], entry["correct"]) for entry in whole["rounds"]]  # type: ignore[attr-defined]
    assert [(entry["removed"], entry["correct"]) for entry in raced["rounds"]] == winners  # type: ignore[attr-defined]
    for name in ("baseline", "best", "bsba", "final", "test", "stop_reason"):
        assert raced[name] == whole[name]
    lost = [summary["rejected_round"] for summary in (raced, whole)]
    assert [entry and (entry["removed"], entry["correct"]) for entry in lost] == [  # type: ignore[index]
        entry and (entry["removed"], entry["correct"])  # type: ignore[index]
        for entry in [whole["rejected_round"]] * 2
    ]
    rounds = [*raced["rounds"], *([raced["rejected_round"]] if raced["rejected_round"] else [])]  # type: ignore[misc]
    scored = [each for entry in rounds for each in entry["candidates"]]
    is_shorter = raced["work"]["candidate_rows"] < whole["work"]["candidate_rows"]  # type: ignore[index]
    assert is_shorter == ("bounded_out" in {each["status"] for each in scored})
    assert is_shorter or epsilon == "0.3", "where the floor is near, candidates are left out"
    assert all((each["seen"] == NUM_ROWS) == (each["status"] == "exact") for each in scored)
    assert sum(each["seen"] for each in scored) == raced["work"]["candidate_rows"]  # type: ignore[index]


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), num_workers=st.integers(1, 7))
def test_trouble_changes_no_decision(tmp_path_factory: pytest.TempPathFactory, seed: int, num_workers: int) -> None:
    table = Table(5)
    quiet = search(tmp_path_factory.mktemp("quiet") / "run", SimulatedExecutor(table))
    rough = search(
        tmp_path_factory.mktemp("rough") / "run",
        SimulatedExecutor(table, num_workers=num_workers, trouble=0.03, seed=seed),
    )
    assert decisions(rough) == decisions(quiet)
    for count in ("candidate_rows", "layer_applications"):
        assert rough["work"][count] == quiet["work"][count]  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 9, 30])
def test_a_kill_at_any_poll_loses_only_what_was_in_flight(tmp_path: Path, step: int) -> None:
    """Attempts are killed again and again, every `step` polls, until one gets through."""
    table = Table(5)
    quiet_executor = SimulatedExecutor(table)
    quiet = search(tmp_path / "quiet", quiet_executor)
    scored, attempts = 0, 0
    while True:
        attempts += 1
        executor = SimulatedExecutor(table, seed=attempts, num_workers=1 + attempts % 3)
        with contextlib.suppress(Killed), attempt(tmp_path / "run", executor) as driver:
            kill_after(executor, step)
            for _ in driver.run():
                pass
            break
        scored += len(executor.scored)
        assert attempts < 500, "no attempt makes progress"
    summary = summarize(RunReader(str(tmp_path / "run")))
    assert decisions(summary) == decisions(quiet)
    assert summary["attempts"] == attempts
    work, quiet_work = summary["work"], quiet["work"]
    assert work["candidate_rows"] == quiet_work["candidate_rows"], "finished cells are never repeated"  # type: ignore[index]
    assert work["layer_applications"] == quiet_work["layer_applications"]  # type: ignore[index]


def kill_after(executor: SimulatedExecutor, polls: int) -> None:
    poll, left = executor.poll, polls

    def limited(timeout_seconds: float) -> object:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return poll(timeout_seconds)

    executor.poll = limited  # type: ignore[method-assign, assignment]


WRITES = ["write_unit", "write_answers", "write_round", "drop_partials", "update_attempt", "write_result"]


@pytest.mark.slow
@pytest.mark.parametrize("method", WRITES)
@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_around_any_write_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, nth: int, after: bool
) -> None:
    table = Table(5)
    quiet = search(tmp_path / "quiet", SimulatedExecutor(table))
    original, count = getattr(RunWriter, method), 0

    def deadly(self: RunWriter, *arguments: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count == nth and not after:
            raise Killed
        value = original(self, *arguments, **options)
        if count == nth:
            raise Killed
        return value

    monkeypatch.setattr(RunWriter, method, deadly)
    was_killed = False
    try:
        search(tmp_path / "run", SimulatedExecutor(table, seed=1))
    except Killed:
        was_killed = True
    monkeypatch.undo()
    assert was_killed or nth > count, "the kill did not happen although the write did"
    summary = search(tmp_path / "run", SimulatedExecutor(table, seed=2, num_workers=3))
    assert decisions(summary) == decisions(quiet)
    assert summary["work"]["candidate_rows"] == quiet["work"]["candidate_rows"]  # type: ignore[index]


def test_a_larger_epsilon_continues_without_scoring_the_rejected_round_again(tmp_path: Path) -> None:
    table = Table(2)
    first = search(tmp_path / "run", SimulatedExecutor(table), epsilon="0")
    assert first["stop_reason"] == "below_floor"
    executor = SimulatedExecutor(table)
    second = search(tmp_path / "run", executor, epsilon="0.3")
    assert as_table(second) == table_search(table, NUM_ROWS, "0.3")
    rejected = len(first["rounds"]) + 1  # type: ignore[arg-type]
    scopes = {unit.scope for unit in executor.scored}
    assert f"round-{rejected:04d}" not in scopes
    assert f"round-{rejected + 1:04d}" in scopes
    fresh = search(tmp_path / "fresh", SimulatedExecutor(table), epsilon="0.3")
    assert decisions(second) == decisions(fresh)


def test_a_larger_limit_continues(tmp_path: Path) -> None:
    table = Table(2)
    assert search(tmp_path / "run", SimulatedExecutor(table), max_removed=1)["stop_reason"] == "max_removed"
    second = search(tmp_path / "run", SimulatedExecutor(table), max_removed=2)
    assert as_table(second) == table_search(table, NUM_ROWS, max_removed=2)


def test_a_baseline_of_zero_is_kept_and_refused(tmp_path: Path) -> None:
    with pytest.raises(BaselineZero, match="0 of 24"):
        search(tmp_path / "run", SimulatedExecutor(Table(0, ease=0.0)))
    summary = summarize(RunReader(str(tmp_path / "run")))
    assert summary["baseline"] == {"correct": 0, "total": 24, "invalid": 8}
    assert (summary["state"], summary["stop_reason"]) == ("failed", "baseline_zero")


def test_a_poison_unit_ends_the_run_and_keeps_the_rest(tmp_path: Path) -> None:
    executor = SimulatedExecutor(Table(1), poison=[7])
    with pytest.raises(PoisonUnit, match="the row is poison"):
        search(tmp_path / "run", executor)
    kept = RunReader(str(tmp_path / "run")).unit_results("round-0000")
    assert {result.unit.number for result in kept} == {unit.number for unit in executor.scored}
    assert kept


def test_retries_are_counted(tmp_path: Path) -> None:
    summary = search(tmp_path / "run", SimulatedExecutor(Table(1), trouble=0.05, seed=4, num_workers=3))
    assert summary["work"]["retries"] > 0  # type: ignore[index]
    assert summary["work"]["wasted_rows"] > 0  # type: ignore[index]


def test_a_request_to_stop_is_honoured_between_units(tmp_path: Path) -> None:
    interruption = Interruption()
    executor = SimulatedExecutor(Table(1))
    with attempt(tmp_path / "run", executor, interruption) as driver, pytest.raises(Interrupted, match="enough"):
        for number, _ in enumerate(driver.run()):
            if number == 4:
                interruption.request("enough")
    assert len(RunReader(str(tmp_path / "run")).unit_results("round-0000")) == len(executor.scored) > 0


def test_a_writer_that_lost_its_lease_writes_nothing_more(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with contextlib.suppress(LeaseLost), attempt(folder, SimulatedExecutor(Table(1))) as driver:
        with pytest.raises(LeaseLost):
            for number, _ in enumerate(driver.run()):
                if number == 12:
                    lease = (folder / "lease.json").read_text()
                    (folder / "lease.json").write_text(lease.replace('"nonce": "', '"nonce": "stolen-'))
                    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == before


def test_the_end_is_told_with_its_history(tmp_path: Path) -> None:
    with attempt(tmp_path / "run", SimulatedExecutor(Table(3)), max_removed=1) as driver:
        ended = [event for event in driver.run() if isinstance(event, SearchEnded)]
    assert [event.reason for event in ended] == [StopReason.MAX_REMOVED]
    assert len(ended[0].history.final.removed) == 1


def test_scores_of_earlier_results_are_not_those_of_a_continued_run(tmp_path: Path) -> None:
    """Killed after the last round of a continued run: its results are not scored yet, and nothing says they are."""
    table = Table(2)
    search(tmp_path / "run", SimulatedExecutor(table), max_removed=1)
    executor = SimulatedExecutor(table)
    with contextlib.suppress(Killed), attempt(tmp_path / "run", executor, max_removed=2) as driver:
        for event in driver.run():
            if isinstance(event, SearchEnded):
                raise Killed
    assert summarize(RunReader(str(tmp_path / "run")))["test"] is None
    summary = search(tmp_path / "run", SimulatedExecutor(table), max_removed=2)
    assert summary["test"]["final"]["removed"] == summary["final"]["removed"]  # type: ignore[index]


def test_units_of_test_rows_are_dropped_when_their_answers_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RunWriter.drop_partials

    def deadly(self: RunWriter, scope: str) -> None:
        if scope == "test-0000":
            raise Killed
        original(self, scope)

    monkeypatch.setattr(RunWriter, "drop_partials", deadly)
    with contextlib.suppress(Killed):
        search(tmp_path / "run", SimulatedExecutor(Table(2)), max_removed=1)
    monkeypatch.undo()
    assert "test-0000" in RunReader(str(tmp_path / "run")).partial_scopes()
    search(tmp_path / "run", SimulatedExecutor(Table(2)), max_removed=1)
    assert "test-0000" not in RunReader(str(tmp_path / "run")).partial_scopes()
