"""Beam search: equal to a plain beam on a table, to TALE with a width of one, and to itself after kills."""

import contextlib
import itertools
from collections.abc import Collection
from fractions import Fraction
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from folders import Material
from folders import material_fixture as material_fixture
from simulation import SimulatedExecutor, Table, TableRound
from test_driver import NUM_ROWS, Killed, as_table, attempt, decisions, kill_after, search
from test_driver import no_waiting_for_the_disk as no_waiting_for_the_disk

from tale_ray.api import make_config
from tale_ray.attempt.search import run_search
from tale_ray.config import StrategySection
from tale_ray.errors import ConfigError
from tale_ray.records import StopReason
from tale_ray.results.report.data import heat_map
from tale_ray.results.summary import stored_history, summarize
from tale_ray.search.interruption import Interruption
from tale_ray.store.reader import RunReader
from tale_ray.store.run import RunWriter

BEAM = {"strategy": "beam", "beam_width": 3}


def table_beam(
    table: Table, width: int, epsilon: str = "0.08", max_removed: int | None = None, kept: Collection[int] = ()
) -> tuple[list[TableRound], TableRound | None, str]:
    """A beam in plain lines: the committed rounds, the rejected one, and why it stopped."""

    def count(removed: Collection[int]) -> int:
        return sum(table.correct(row, removed) for row in range(NUM_ROWS))

    baseline = count(())
    rounds, beam = [TableRound(None, (), baseline, ((None, baseline),))], [()]
    while True:
        if max_removed is not None and len(beam[0]) >= max_removed:
            return rounds, None, "max_removed"
        if len(beam[0]) == table.num_layers - 1:
            return rounds, None, "one_layer_left"
        lines: dict[frozenset[int], tuple[int, int, int, tuple[int, ...]]] = {}
        for rank, removed in enumerate(beam):
            for layer in sorted(set(range(table.num_layers)) - {*removed, *kept}):
                if frozenset((*removed, layer)) not in lines:
                    found = (-count((*removed, layer)), rank, layer, (*removed, layer))
                    lines[frozenset((*removed, layer))] = found
        in_order = sorted(lines.values())
        wrong, _, layer, best = in_order[0]
        entry = TableRound(layer, best, -wrong, tuple((line[2], -line[0]) for line in lines.values()))
        if Fraction(-wrong) < baseline - Fraction(epsilon) * NUM_ROWS:
            return rounds, entry, "below_floor"
        rounds.append(entry)
        beam = [line[3] for line in in_order[:width]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("epsilon", ["0.08", "1"])
def test_rounds_and_counts_equal_a_plain_beam(tmp_path: Path, seed: int, width: int, epsilon: str) -> None:
    table, run = Table(seed), tmp_path / "run"
    summary = search(run, SimulatedExecutor(table, seed=seed), strategy="beam", beam_width=width, epsilon=epsilon)
    assert as_table(summary) == table_beam(table, width, epsilon)
    assert summary["state"] == "finished"


def test_a_beam_may_end_with_a_set_that_does_not_extend_the_one_before(tmp_path: Path) -> None:
    """Without such a table the tests here would show nothing that greedy rounds do not."""
    for seed in itertools.count():
        rounds, _, _ = table_beam(Table(seed), 3, "1")
        if any(late.removed[:-1] != early.removed for early, late in itertools.pairwise(rounds)):
            break
    run = tmp_path / "run"
    summary = search(run, SimulatedExecutor(Table(seed)), **BEAM, epsilon="1")
    assert as_table(summary)[0] == rounds
    changed = next(
        late for early, late in itertools.pairwise(summary["rounds"]) if late["removed"][:-1] != early["removed"]
    )
    winners = pq.read_table(run / f"rounds/round-{changed['round']:04d}.parquet").to_pylist()
    (winner,) = [each for each in winners if each["winner"]]
    assert (winner["layer"], winner["without"]) == (changed["removed_layer"], changed["removed"][:-1])
    shown = heat_map(stored_history(RunReader(str(run)), RunReader(str(run)).manifest()))
    assert shown is not None
    marked = [[cell.layer for cell in column if cell.is_winner] for column in zip(*shown.cells, strict=True)]
    assert marked == [[entry["removed_layer"]] for entry in summary["rounds"]]


def test_a_beam_as_wide_as_there_are_sets_finds_the_best_of_each_size(tmp_path: Path) -> None:
    table = Table(3)
    summary = search(
        tmp_path / "run", SimulatedExecutor(table), strategy="beam", beam_width=20, epsilon="1", max_removed=4
    )

    def count(removed: Collection[int]) -> int:
        return sum(table.correct(row, removed) for row in range(NUM_ROWS))

    for entry in summary["rounds"]:
        sets = list(itertools.combinations(range(table.num_layers), entry["round"]))
        assert entry["correct"] == max(map(count, sets))
        scored = {frozenset((*each.get("without", ()), each["layer"])) for each in entry["candidates"]}
        assert len(entry["candidates"]) == len(scored) == len(sets), "each set is scored, and once"


@pytest.mark.parametrize("exhaustive", [False, True])
def test_a_beam_of_one_is_tale(tmp_path: Path, exhaustive: bool) -> None:
    digests = []
    for strategy in ({"strategy": "tale"}, {"strategy": "beam", "beam_width": 1}):
        run = tmp_path / strategy["strategy"]
        search(run, SimulatedExecutor(Table(5), num_workers=1), epsilon="0.3", exhaustive=exhaustive, **strategy)
        digests.append([stored.digest for stored in RunReader(str(run)).rounds()])
    assert digests[0] == digests[1]
    assert len(digests[0]) > 3


@pytest.mark.slow
def test_a_beam_of_one_is_tale_on_a_model(material: Material, tmp_path: Path) -> None:
    """All rounds, candidates, scores on select and test rows, of real searches."""
    found = []
    for strategy in ({"strategy": "tale"}, {"strategy": "beam", "beam_width": 1}):
        run = tmp_path / strategy["strategy"]
        config = make_config(
            model=material.model, task=material.task, run=run, local=True, epsilon="1", max_removed=3, **strategy
        )
        for _ in run_search(config, Interruption()):
            pass
        stored = RunReader(str(run)).rounds()
        found.append(([each.digest for each in stored], decisions(summarize(RunReader(str(run))))))
    assert found[0] == found[1]
    assert len(found[0][0]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 30])
def test_kills_and_troubles_change_nothing(tmp_path: Path, step: int) -> None:
    table = Table(5)
    quiet = search(tmp_path / "quiet", SimulatedExecutor(table), **BEAM, epsilon="0.3")
    assert len(quiet["rounds"]) > 2
    attempts = 0
    while True:
        attempts += 1
        executor = SimulatedExecutor(table, seed=attempts, num_workers=1 + attempts % 3, trouble=0.02)
        with contextlib.suppress(Killed), attempt(tmp_path / "run", executor, **BEAM, epsilon="0.3") as driver:
            kill_after(executor, step)
            for _ in driver.run():
                pass
            break
        assert attempts < 500, "no attempt makes progress"
        between = summarize(RunReader(str(tmp_path / "run")))["work"]["candidate_rows"]
    summary = summarize(RunReader(str(tmp_path / "run")))
    assert attempts > 2
    assert decisions(summary) == decisions(quiet)
    assert between <= summary["work"]["candidate_rows"] == quiet["work"]["candidate_rows"]
    assert not list((tmp_path / "run" / "partial").glob(f"round-000[0-{len(quiet['rounds'])}]*")), "all are committed"


def test_branches_of_a_round_that_is_stored_are_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill after the round was stored, and before its units were deleted."""
    run, drop = tmp_path / "run", RunWriter.drop_partials

    def deadly(self: RunWriter, scope: str) -> None:
        if scope == "round-0002":
            raise Killed
        drop(self, scope)

    monkeypatch.setattr(RunWriter, "drop_partials", deadly)
    with pytest.raises(Killed):
        search(run, SimulatedExecutor(Table(5)), **BEAM, epsilon="1", max_removed=3)
    monkeypatch.undo()
    left = ["round-0002", "round-0002-branch-01", "round-0002-branch-02"]
    assert sorted(path.name for path in (run / "partial").iterdir()) == left
    with RunWriter.claim(str(run)) as writer:
        writer.clean()
    assert not list(run.glob("partial/*"))


def test_a_larger_epsilon_goes_on_as_a_fresh_beam(tmp_path: Path) -> None:
    table = Table(2)
    first = search(tmp_path / "run", SimulatedExecutor(table), **BEAM, epsilon="0")
    assert first["stop_reason"] == StopReason.BELOW_FLOOR
    executor = SimulatedExecutor(table)
    second = search(tmp_path / "run", executor, **BEAM, epsilon="0.5")
    assert as_table(second) == table_beam(table, 3, "0.5")
    rejected = f"round-{len(first['rounds']) + 1:04d}"
    assert not [unit for unit in executor.scored if unit.scope.startswith(rejected)], "all of its branches were kept"


def test_layers_that_are_kept_are_in_no_branch(tmp_path: Path) -> None:
    table = Table(4)
    summary = search(tmp_path / "run", SimulatedExecutor(table), **BEAM, epsilon="1", keep_layers=(0, 5), max_removed=3)
    assert as_table(summary) == table_beam(table, 3, "1", 3, kept=(0, 5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "beam", "beam_width": 0}, "beam width 0 is too small: it is at least 1"),
        ({"strategy": "tale", "beam_width": 2}, "beam width 2 is given, and strategy tale has no beam"),
    ],
)
def test_bad_widths_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StrategySection(**options)


def test_the_default_width_is_that_width() -> None:
    def decisive(**strategy: object) -> dict[str, object]:
        return make_config(model="bundled", task="boolean_synthetic", **strategy).decision_options()

    assert decisive(strategy="beam") == decisive(strategy="beam", beam_width=3)
    assert decisive(strategy="beam") != decisive(strategy="beam", beam_width=2)
    assert "beam_width" not in decisive(), "runs of other strategies keep the digest that they had"
