"""The simulated cluster: the product's own driver and scheduler on many workers, whatever happens to them."""

from collections import Counter
from dataclasses import replace

import pytest
from scale import decisions, efficiency, timed_scheduler
from scale_scenarios import LEAST_EFFICIENCY, scenarios
from simulated import Costs, PaperModel, Plan, Searched, Workload, simulate
from unit_times import UnitTimes, first_units, fit_unit_times

from tale_ray.config import StrategySection
from tale_ray.records import WorkUnit
from tale_ray.search.cells import OpenCells

TIMES = UnitTimes(num_layers=12, fixed_seconds=0.05, layer_seconds=0.001, application_seconds=0.01, noise=0.2)


def workload(*, exhaustive: bool, num_rows: int = 100, layers: int = 12) -> Workload:
    return Workload(
        num_rows=num_rows,
        times=replace(TIMES, num_layers=layers),
        correct=PaperModel(layers),
        strategy=StrategySection(exhaustive=exhaustive, max_removed=2),
    )


def scored_cells(searched: Searched) -> Counter[tuple[str, int | None, int]]:
    return Counter(
        (result.unit.scope, candidate, row)
        for result in searched.stored
        for candidate in result.unit.candidates
        for row in result.unit.rows
    )


def test_a_thousand_workers_that_fail_score_every_cell_once_and_decide_as_one_does() -> None:
    searched = workload(exhaustive=True, num_rows=550, layers=16)
    one = simulate(searched, Plan(num_workers=1))
    plan = Plan(
        num_workers=1024,
        late_workers=300,
        late_seconds=0.5,
        mean_lifetime_seconds=60.0,
        rejoin_seconds=1.0,
        slow_workers=20,
        slow_units=0.02,
        slowness=4.0,
    )
    many = simulate(searched, plan)
    assert many.retries > 20, "workers were lost while they had units"
    assert decisions(many) == decisions(one)
    assert len(one.history.rounds) == 3
    cells = scored_cells(many)
    assert set(cells.values()) == {1}
    assert cells.keys() == scored_cells(one).keys()
    assert len(cells) == 550 * (1 + 16 + 15)


@pytest.mark.parametrize("seed", range(5))
def test_races_are_decided_the_same_whatever_happens(seed: int) -> None:
    searched = workload(exhaustive=False)
    one = simulate(searched, Plan(num_workers=1))
    plan = Plan(num_workers=16, mean_lifetime_seconds=20.0, rejoin_seconds=1.0, slow_units=0.1, slowness=9.0, seed=seed)
    many = simulate(searched, plan)
    assert many.retries > 0
    assert decisions(many) == decisions(one) == decisions(simulate(workload(exhaustive=True), Plan(num_workers=1)))
    assert set(scored_cells(many).values()) == {1}


def test_the_same_plan_takes_the_same_seconds() -> None:
    plan = Plan(num_workers=8, mean_lifetime_seconds=30.0, rejoin_seconds=1.0)
    first, second = (simulate(workload(exhaustive=True), plan) for _ in range(2))
    assert first.seconds == second.seconds
    assert first.seconds != simulate(workload(exhaustive=True), replace(plan, seed=1)).seconds


def test_one_worker_takes_what_its_units_and_the_driver_take() -> None:
    costs = Costs(unit_write=0.0, round_commit=3.0, dispatch=0.0, handling=0.0)
    found = simulate(workload(exhaustive=True), Plan(num_workers=1), costs)
    assert found.seconds == pytest.approx(sum(result.seconds for result in found.stored) + 3 * 3.0)
    assert found.available_seconds == found.seconds


@pytest.mark.slow
def test_sixty_four_workers_are_kept_busy() -> None:
    """Simulated seconds do not depend on this machine."""
    searched = scenarios()[0].workload
    one = simulate(searched, Plan(num_workers=1))
    with timed_scheduler() as scheduler:
        many = simulate(searched, Plan(num_workers=64))
    assert decisions(many) == decisions(one)
    assert efficiency(one, many) >= LEAST_EFFICIENCY[64]
    assert scheduler.calls


def test_idle_workers_cost_the_scheduler_nothing() -> None:
    """Work counts instead of seconds: how often a worker without work is looked for some."""
    looked = Counter[str]()
    find = OpenCells.find

    def counted(*arguments: object) -> object:
        looked["times"] += 1
        return find(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenCells, "find", counted)
        found = simulate(workload(exhaustive=True), Plan(num_workers=500))
    assert looked["times"] <= 2 * (len(found.stored) + 500), "units, and workers that joined"


def test_fitted_times_are_those_that_units_were_given() -> None:
    times = UnitTimes(
        num_layers=12, fixed_seconds=0.3, layer_seconds=0.002, application_seconds=0.01, opening_seconds=0.004
    )
    results = simulate(replace(workload(exhaustive=True), times=times), Plan(num_workers=3)).stored
    fitted = fit_unit_times(sorted(results, key=lambda each: each.unit.scope), 12)
    assert fitted.noise < 1e-6
    unit = WorkUnit(0, "round-0001", "search", (), (1, 5), tuple(range(7)))
    for is_first in (True, False):
        assert fitted.seconds(unit, is_first=is_first) == pytest.approx(times.seconds(unit, is_first=is_first))
    assert sum(first_units(results)) == 3 * 3, "three workers, a baseline and two rounds"
    with pytest.raises(ValueError, match="2 units are too few"):
        fit_unit_times(results[:2], 12)
