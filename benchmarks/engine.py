"""The engine beside the published procedure: same searches, same process, same threads, in turns.

    python benchmarks/engine.py --pairs 3 --threads 2

Measures ours, published, ours, published ... on every workload, refuses results that are not the same, and writes what
it measured as JSON; `document.py` makes the document of it. An exhaustive search of ours is run once beside, and its
every answer is compared, so that one sees what racing saves.
"""

import gc
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from circumstances import circumstances
from flops import Required, Shape, gemm_rate, required
from recording import Recorded, search
from workloads import WORKLOADS, Missing, Places, Workload, load, search_options
from yardstick import Timed, Yardstick, engine_decisions

HERE = Path(__file__).parent


def measure_ours(options: Mapping[str, Any], folder: Path) -> tuple[Recorded, float]:
    """Return a search and the GEMM rate around it, the better of before and after."""
    gc.collect()
    before = gemm_rate()
    with tempfile.TemporaryDirectory(dir=folder) as run:
        recorded = search(options, Path(run) / "run")
    return recorded, max(before, gemm_rate())


def ours_entry(recorded: Recorded, rate: float, needed: Required) -> dict[str, Any]:
    """Return what is kept of one search of ours."""
    return {
        "seconds": recorded.seconds,
        "scorer_seconds": recorded.scorer_seconds,
        "gemm_rate": rate,
        "required": {**asdict(needed), "total": needed.total},
        "share": needed.total / recorded.seconds / rate,
        "scorer_share": needed.total / recorded.scorer_seconds / rate,
        "candidate_rows": recorded.candidate_rows,
        "layer_applications": recorded.layer_applications,
        "units": len(recorded.units),
    }


def measure(
    workload: Workload, places: Places, num_pairs: int, limit_seconds: float, *, full: bool, rows: int | None
) -> dict[str, Any]:
    """Return everything measured of one workload.

    Raises:
        Missing: the workload's model or rows are not here.
        Disagreement: engine and published procedure do not say the same.
    """
    options = search_options(workload, places, rows)
    model, tokenizer, questions = load(options)
    shape = Shape.of(model.config)
    prompts = [row.token_ids for row in questions.rows["search"]]
    yardstick = Yardstick(model, tokenizer, questions, workload.max_removed)

    def ours(**more: Any) -> tuple[Recorded, dict[str, Any]]:
        recorded, rate = measure_ours({**options, **more}, places.folder)
        needed = required(shape, recorded.units, prompts, questions.max_new_tokens)
        return recorded, ours_entry(recorded, rate, needed)

    def published_entry(timed: Timed, recorded: Recorded) -> dict[str, Any]:
        return {
            "seconds": timed.seconds,
            "forwards": timed.forwards,
            "method": timed.method,
            "same_answers": timed.compare(recorded),
        }

    pairs: list[dict[str, Any]] = []
    in_full = full
    for number in range(num_pairs):
        recorded, own = ours()
        if not pairs:
            in_full = full or yardstick.estimate(recorded) <= limit_seconds
        timed = yardstick.full(recorded) if in_full else yardstick.sampled(recorded, limit_seconds)
        ratio = timed.seconds / recorded.seconds
        pairs.append({"ours": own, "published": published_entry(timed, recorded), "ratio": ratio})
        click.echo(f"  pair {number + 1}: {recorded.seconds:.2f} s, {timed.seconds:.1f} s, {ratio:.1f}x", err=True)
    everything, exhaustive = ours(exhaustive=True)
    scaled = yardstick.sampled(everything, limit_seconds) if full else None
    return {
        **{name: value for name, value in asdict(workload).items() if name not in ("model", "task")},
        "rows": len(prompts),
        "prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "decisions": asdict(engine_decisions(recorded)),
        "pairs": pairs,
        "exhaustive": {"ours": exhaustive, "same_answers": timed.compare(everything)},
        "scaled": published_entry(scaled, everything) if scaled else None,
    }


@click.command()
@click.option("--pairs", type=click.IntRange(min=1), default=3, show_default=True, help="Ours and published, in turns.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--only", type=click.Choice([each.name for each in WORKLOADS]), multiple=True, help="Leave out others.")
@click.option("--rows", type=click.IntRange(min=1), help="Another number of rows, to try it out.")
@click.option("--full", is_flag=True, help="Never sample the published procedure; show beside what sampling would say.")
@click.option(
    "--limit", default=600.0, show_default=True, help="Seconds above which the published procedure is sampled."
)
@click.option("--smollm2", type=click.Path(path_type=Path), default=".cache/smollm2", show_default=True)
@click.option("--data-root", type=click.Path(path_type=Path), envvar="TALE_RAY_DATA_ROOT")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "measured" / "engine.json")
def main(
    pairs: int,
    threads: int,
    only: tuple[str, ...],
    rows: int | None,
    full: bool,
    limit: float,
    smollm2: Path,
    data_root: Path | None,
    out: Path,
) -> None:
    """Measure the workloads; with --only the others keep what was measured before."""
    torch.set_num_threads(threads)
    found = json.loads(out.read_text(encoding="utf-8")) if only and out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        places = Places(smollm2, data_root, Path(folder))
        for workload in WORKLOADS:
            if only and workload.name not in only:
                continue
            click.echo(workload.title, err=True)
            about = circumstances(threads)
            try:
                measured = measure(workload, places, pairs, limit, full=full, rows=rows)
            except Missing as error:
                click.echo(f"  left out: {error}", err=True)
                found[workload.name] = {"title": workload.title, "left_out": str(error)}
            else:
                found[workload.name] = {"circumstances": about, **measured}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
