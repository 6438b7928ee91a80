"""Strategies side by side: the same search rows to choose by, the same test rows to be judged on, nothing healed.

python benchmarks/strategies.py --study bundled --study smollm2 --smollm2 .cache/smollm2

Every strategy removes layers with epsilon 1, so that all get as far; then each model that any of them came to is scored
on the test rows. What was measured goes to benchmarks/measured/strategies.json after every step, and from there to
benchmarks/strategies.md, which holds no number that is not in it: a measurement that is cut off leaves gaps.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from circumstances import circumstances

import tale_ray
from tale_ray.attempt.rows import prepare_rows
from tale_ray.cluster.worker import Worker
from tale_ray.config import ModelSection, ResourceSection, TaskSection
from tale_ray.records import WorkUnit
from tale_ray.results.statistics import adjust_holm, compare, wilson_interval
from tale_ray.search.executor import Questions
from tale_ray.search.orders import in_random_order
from tale_ray.store.reader import RunReader

FOLDER = Path(__file__).parent
MEASURED = FOLDER / "measured" / "strategies.json"
PAGE = FOLDER / "strategies.md"
MOST_REMOVED = 6
STRATEGIES = (
    "reverse",
    "random",
    "block_influence",
    "contiguous",
    "tale",
    "beam",
    "sleb",
)  # in the order of their cost
SHOWN = ("tale", "beam", "sleb", "block_influence", "contiguous", "reverse", "random")
OTHER_SEEDS = (1, 2, 3, 4)  # of more random orders, which need no search
STUDIES: Mapping[str, Mapping[str, Any]] = {
    "bundled": {"task": "boolean_synthetic", "rows": 200, "search": "0.5", "test": "0.5"},
    "smollm2": {"task": "boolean_expressions", "rows": 48, "search": "0.2", "test": "0.8"},
}


def search(options: Mapping[str, Any], strategy: str, runs: Path) -> dict[str, Any]:
    """Return the layers that a strategy removes, by their number, and what it computed for that.

    A block depends on its size: `contiguous` searches once for each.
    """
    sizes = range(1, MOST_REMOVED + 1) if strategy == "contiguous" else [MOST_REMOVED]
    removed: dict[int, list[int]] = {}
    candidate_rows = measured_rows = 0
    for size in sizes:
        chosen = {**options, "strategy": strategy, "max_removed": size, "epsilon": "1", "local": True}
        run = tale_ray.search(**chosen, run=str(runs / f"{strategy}-{size}"))
        rounds = run.summary["rounds"]
        assert len(rounds) == size, f"{strategy} stopped at {len(rounds)} layers"
        removed |= {len(each["removed"]): each["removed"] for each in (rounds[-1:] if len(sizes) > 1 else rounds)}
        candidate_rows += run.summary["work"]["candidate_rows"]
        for each in RunReader(run.uri).measurements():
            models = len(each.probe.layers) if each.probe.measure == "log_perplexity" else 1
            measured_rows += models * each.num_rows
    return {"removed": removed, "candidate_rows": candidate_rows, "measured_rows": measured_rows}


class Judge:
    """Scores models without some layers on the test rows."""

    def __init__(self, model: str, study: Mapping[str, Any]) -> None:
        section = TaskSection(
            task=study["task"], splits={"search": study["search"], "test": study["test"]}, data_root=study["data_root"]
        )
        prepared = prepare_rows(section)
        examples = prepared.examples["test"]
        self._worker = Worker("judge", ModelSection(model=model), "float32", ResourceSection(local=True))
        rows = self._worker.encode(examples)
        self._worker.share(Questions({"test": rows}, prepared.spec.answer, prepared.spec.max_new_tokens))
        self._rows = tuple(range(len(rows)))
        self.num_layers = self._worker.info.num_layers

    def answers(self, removed: Sequence[int]) -> str:
        """Return a digit for each test row: 1 if it is answered correctly."""
        candidate = removed[-1] if removed else None
        unit = WorkUnit(0, "test", "test", tuple(removed[:-1]), (candidate,), self._rows)
        (found,) = self._worker.score(unit).candidates
        return "".join(str(int(answer.correct)) for answer in found.answers)


def key(removed: Sequence[int]) -> str:
    """Return the name of a set of layers."""
    return ",".join(map(str, sorted(removed)))


def measure(name: str, model: str, data_root: str | None, runs: Path, measured: dict[str, Any]) -> None:
    """Measure a study, and write what is there after every step."""
    study = {**STUDIES[name], "data_root": data_root}
    options = {
        "model": model,
        "task": study["task"],
        "rows": study["rows"],
        "splits": f"search={study['search']}",
        **({"data_root": data_root} if data_root else {}),
    }
    found: dict[str, Any] = {"circumstances": circumstances(torch.get_num_threads()), "strategies": {}, "answers": {}}
    judge = Judge(model, study)
    found["num_layers"] = judge.num_layers
    measured[name] = found
    for strategy in STRATEGIES:
        click.echo(f"{name}: {strategy}")
        found["strategies"][strategy] = searched = search(options, strategy, runs / name)
        sets: list[Sequence[int]] = [(), *searched["removed"].values()]
        if strategy == "random":
            found["random_orders"] = [random_order(seed, judge.num_layers) for seed in OTHER_SEEDS]
            sets += [order[:size] for order in found["random_orders"] for size in range(1, MOST_REMOVED + 1)]
        for removed in sets:
            if key(removed) not in found["answers"]:
                found["answers"][key(removed)] = judge.answers(removed)
        MEASURED.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def random_order(seed: int, num_layers: int) -> list[int]:
    """Return the first layers of the random order of a seed."""
    order, left = in_random_order(seed), list(range(num_layers))
    removed = []
    for _ in range(MOST_REMOVED):
        layer = order(None, tuple(left))  # type: ignore[arg-type]  # the history plays no part
        assert isinstance(layer, int), "nothing is measured for it"
        left.remove(layer)
        removed.append(layer)
    return removed


def write_page(measured: Mapping[str, Any]) -> None:
    """Write the document from what was measured."""
    lines = [
        "# Strategies compared",
        "",
        "Written by `benchmarks/strategies.py` from `benchmarks/measured/strategies.json`.",
        "",
        "Each strategy chooses layers by the same search rows (epsilon 1, so that none stops early); what it comes to",
        "at 1 to 6 removed layers is scored on the same test rows, which no choice has seen. Accuracies have 95%",
        "Wilson intervals. Differences from TALE on the same rows are in points, with wins/losses, the exact two-sided",
        "McNemar p-value, and what Holm's correction over all comparisons of a table leaves of it. Calibration text is",
        "the prompts of the search rows. Nothing is trained after a removal. The papers of the other strategies report",
        "on large models and on other text, some after healing: this says nothing about those results.",
    ]
    for name, study in measured.items():
        lines += ["", *_study_lines(name, study)]
    missing = [name for name in STUDIES if name not in measured]
    lines += ["", *(f"Not measured: {name}." for name in missing)] if missing else []
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _study_lines(name: str, study: Mapping[str, Any]) -> list[str]:
    settings, answers, strategies = STUDIES[name], study["answers"], study["strategies"]
    shown = [strategy for strategy in SHOWN if strategy in strategies]
    sizes = range(1, MOST_REMOVED + 1)

    def correct(removed: Sequence[int]) -> list[bool]:
        return [digit == "1" for digit in answers[key(removed)]]

    def removed_by(strategy: str, size: int) -> list[int]:
        return strategies[strategy]["removed"][str(size)]  # type: ignore[no-any-return]

    def accuracy(removed: Sequence[int]) -> str:
        right = correct(removed)
        interval = wilson_interval(sum(right), len(right))
        return f"{100 * sum(right) / len(right):.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"

    num_test = len(answers[""])
    in_order = next(strategies[each] for each in ("reverse", "random", "block_influence") if each in strategies)
    num_search = (
        in_order["candidate_rows"] // MOST_REMOVED
    )  # one candidate a round; a task may have fewer than asked for
    lines = [
        f"## {name}: {settings['task']}, {study['num_layers']} layers",
        "",
        f"{num_search} search rows, {num_test} test rows. The full model: {accuracy(())}.",
        "",
        "| accuracy, % | " + " | ".join(f"{size} removed" for size in sizes) + " |",
        "| --- |" + " --- |" * len(sizes),
        *(
            f"| {strategy} | " + " | ".join(accuracy(removed_by(strategy, size)) for size in sizes) + " |"
            for strategy in shown
        ),
    ]
    if "tale" in strategies and len(shown) > 1:
        pairs = [(strategy, size) for strategy in shown if strategy != "tale" for size in sizes]
        found = {
            (strategy, size): compare(correct(removed_by(strategy, size)), correct(removed_by("tale", size)))
            for strategy, size in pairs
        }
        holm = dict(zip(pairs, adjust_holm([found[pair].p_value for pair in pairs]), strict=True))

        def cell(strategy: str, size: int) -> str:
            pair = found[strategy, size]
            points = 100 * (pair.wins - pair.losses) / num_test
            return f"{points:+.1f} ({pair.wins}/{pair.losses}, p {pair.p_value:.2g}, Holm {holm[strategy, size]:.2g})"

        lines += [
            "",
            "| against TALE, points | " + " | ".join(f"{size} removed" for size in sizes) + " |",
            "| --- |" + " --- |" * len(sizes),
            *(
                f"| {strategy} | " + " | ".join(cell(strategy, size) for size in sizes) + " |"
                for strategy in shown
                if strategy != "tale"
            ),
        ]
        better = [pair for pair in pairs if holm[pair] < 0.05 and found[pair].wins > found[pair].losses]
        worse = [pair for pair in pairs if holm[pair] < 0.05 and found[pair].wins < found[pair].losses]
        lines += [
            "",
            f"Of {len(pairs)} comparisons, {len(worse)} find a strategy worse than TALE and {len(better)} find one "
            "better, after Holm's correction at 0.05.",
        ]
    if orders := study.get("random_orders"):
        everyone = [removed_by("random", MOST_REMOVED), *orders]
        ranges = [sorted(100 * sum(correct(order[:size])) / num_test for order in everyone) for size in sizes]
        lines += [
            "",
            f"Random orders differ: {len(everyone)} of them, least to most accurate at 1 to {MOST_REMOVED} removed "
            f"layers: {', '.join(f'{each[0]:.1f} to {each[-1]:.1f}' for each in ranges)}.",
        ]
    lines += [
        "",
        "| | layers removed, in order | candidate-rows scored | rows measured |",
        "| --- | --- | --- | --- |",
        *(
            f"| {strategy} | {', '.join(map(str, removed_by(strategy, MOST_REMOVED)))} | "
            f"{strategies[strategy]['candidate_rows']} | {strategies[strategy]['measured_rows']} |"
            for strategy in shown
        ),
        "",
        "`contiguous` was searched once for each number of layers, and its costs are those of all six searches; rows",
        "measured are passes of a row through a model.",
    ]
    if gaps := [strategy for strategy in SHOWN if strategy not in strategies]:
        lines += ["", f"Not measured: {', '.join(gaps)}."]
    where = study["circumstances"]
    versions = ", ".join(f"{package} {number}" for package, number in where["versions"].items())
    lines += [
        "",
        f"`{where['command']}`, {where['date']}, commit {where['commit']}, {where['threads']} thread; "
        f"{where['machine']['cpu']}, {where['machine']['cores']} cores, {where['machine']['memory_gib']} GiB, load "
        f"{where['load']} before; {versions}",
    ]
    return lines


@click.command()
@click.option(
    "--study", "studies", type=click.Choice(list(STUDIES)), multiple=True, help="What to measure; none: write."
)
@click.option("--smollm2", metavar="DIR", help="Folder of SmolLM2-135M-Instruct.")
@click.option("--data-root", metavar="DIR", envvar="TALE_RAY_DATA_ROOT", help="Local mirror of hub data sets.")
@click.option("--threads", type=int, default=1, show_default=True)
def main(studies: Sequence[str], smollm2: str | None, data_root: str | None, threads: int) -> None:
    """Measure studies, and write the document."""
    torch.set_num_threads(threads)
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    for name in studies:
        if name == "smollm2" and smollm2 is None:
            raise click.UsageError("--smollm2 DIR is missing: study smollm2 needs the model's folder")
        model = "bundled" if name == "bundled" else str(smollm2)
        with tempfile.TemporaryDirectory() as runs:
            measure(name, model, data_root if name == "smollm2" else None, Path(runs), measured)
    if not measured:
        raise click.UsageError("nothing has been measured yet: name a --study")
    write_page(json.loads(json.dumps(measured)))


if __name__ == "__main__":
    main()
