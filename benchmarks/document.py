"""The document of all benchmarks, with its figures, from what was measured. Nothing in it is written by hand.

python benchmarks/document.py --from benchmarks/measured
"""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
_GIGA = 1e9


def spread(values: Sequence[float], digits: int) -> str:
    """Return median, least and most; one value alone as it is."""
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def ratios_section(workloads: Mapping[str, Any]) -> str:
    """Return ours beside the published procedure."""
    rows = []
    for name, each in measured(workloads):
        pairs = each["pairs"]
        ratios = [pair["ratio"] for pair in pairs]
        published = [pair["published"]["seconds"] for pair in pairs]
        exhaustive = each["exhaustive"]["ours"]
        rows.append(
            (
                f"`{name}`",
                each["title"],
                each["least_ratio"],
                f"**{spread(ratios, 1)}**",
                reached(statistics.median(ratios), each["least_ratio"]),
                spread([pair["ours"]["seconds"] for pair in pairs], 2),
                spread(published, 1),
                f"{statistics.median(published) / exhaustive['seconds']:.1f}",
            )
        )
    header = ("name", "workload", "at least", "times as fast", "reached", "seconds", "as published", "exhaustive")
    return f"""## Beside the published procedure

Medians (least to most) of pairs run in turns in one process. Ours are `seconds.search`: tokenising, prefix, baseline,
rounds and storage. Published: its forwards and the reading of its replies, baseline and all rounds, nothing else.
"Exhaustive" is the ratio of one search of ours that leaves no candidate out early.

![ratios](ratios.svg)

{table(header, rows)}

{sameness(workloads)}"""


def sameness(workloads: Mapping[str, Any]) -> str:
    """Return what was found to be the same, and how the published procedure was run."""
    rows = []
    for name, each in measured(workloads):
        pair = each["pairs"][-1]
        decisions = each["decisions"]
        committed = ", ".join(f"{layer} ({correct})" for layer, correct in decisions["rounds"]) or "none"
        rejected = "{} ({})".format(*decisions["rejected"]) if decisions["rejected"] else "none"
        method = pair["published"]["method"]
        if each["scaled"] is not None:
            method += f" ({each['scaled']['method']}: {each['scaled']['seconds']:.1f} s)"
        rows.append(
            (
                f"`{name}`",
                f"{decisions['baseline']} of {each['rows']}",
                committed,
                rejected,
                f"{pair['published']['same_answers']} / {each['exhaustive']['same_answers']}",
                pair["published"]["forwards"],
                method,
            )
        )
    header = ("name", "baseline", "removed (correct)", "rejected", "same answers", "forwards", "published was run")
    return f"""Where the published procedure ran in full, every decision (baseline, winners, counts, rejected
round) is compared; where it was sampled, the sampled answers only. A difference ends the benchmark.
"Same answers": (model, row) pairs known from both sides, by the search and by the exhaustive one; none
differed. The spread of sampled times leaves out the error of sampling.

{table(header, rows)}"""


def work_section(workloads: Mapping[str, Any]) -> str:
    """Return work, required FLOPs and their share of the GEMM rate."""
    rows = []
    for name, each in measured(workloads):
        ours = [pair["ours"] for pair in each["pairs"]]
        shares = [100 * one["share"] for one in ours]
        least = each["least_share"]
        rows.append(
            (
                f"`{name}`",
                spread([one["candidate_rows"] for one in ours], 0),
                spread([one["layer_applications"] for one in ours], 0),
                spread([100 * one["layer_applications"] / one["required"]["applications"] for one in ours], 0),
                spread([one["required"]["total"] / _GIGA for one in ours], 1),
                spread([one["gemm_rate"] / _GIGA for one in ours], 0),
                spread(shares, 1),
                spread([100 * one["scorer_share"] for one in ours], 1),
                "" if least is None else f"{100 * least:.0f} ({reached(statistics.median(shares), 100 * least)})",
            )
        )
    header = (
        *("name", "candidate-rows", "layer applications", "% of planned", "required GFLOP", "GEMM GFLOP/s"),
        *("share %", "share in the scorer %", "at least % (reached)"),
    )
    return f"""## Work, and the share of the GEMM rate

Required FLOPs are the matrix products of the prefix once per stream, of the candidates actually scored (from the units
of the search) on rows without padding, of the last position only in the last layer and the head, of attention for
causal pairs (`benchmarks/flops.py`). The GEMM rate is the best float32 `torch.mm` of 1024, 2048 and 4096 with the same
threads, right before or after each search. The share is required FLOPs by `seconds.search` by that rate; "in the
scorer" leaves out storage, scheduling and tokenising. "% of planned": layer applications that were run, of those that
the required FLOPs count; below 100 where a round goes on from states of an earlier one, above where more was run.

{table(header, rows)}"""


def workers_section(found: Mapping[str, Any]) -> str:
    """Return two workers beside one."""
    if "left_out" in found:
        return f"## Workers\n\nLeft out: {found['left_out']}."
    ratios = [pair["ratio"] for pair in found["pairs"]]
    row = (
        found["least_ratio"],
        f"**{spread(ratios, 2)}**",
        reached(statistics.median(ratios), found["least_ratio"]),
        spread([pair["one"] for pair in found["pairs"]], 1),
        spread([pair["two"] for pair in found["pairs"]], 1),
    )
    return f"""## Workers

SmolLM2-135M, boolean_expressions, {found["rows"]} rows, {found["rounds"]} rounds, exhaustive, on Ray: two workers of
one thread each beside one, in turns, on private clusters; `seconds.search`. They decided the same.

{table(("at least", "times as fast", "reached", "seconds, one worker", "seconds, two workers"), [row])}"""


def scaling_section(axes: Mapping[str, Any]) -> str:
    """Return how the cost grows."""
    parts = [
        """## How the cost grows

One exhaustive round of random Llamas, through the scorer alone. Layer applications of a round of S candidates are
(S-1) + S(S-1)/2 per row, once more for a shared prefix, and S(S-1) per row and later new token; "by formula" is their
number. Published: a few forwards timed, times their number, without the baseline.

![scaling](scaling.svg)"""
    ]
    for axis, points in axes.items():
        rows = [
            (
                point[axis] if axis != "shots" else f"{point[axis]} ({point['prefix_share']:.0%} of the prompt)",
                f"{point['seconds']:.2f} ({point['least_seconds']:.2f} to {point['most_seconds']:.2f})",
                f"{point['published_seconds']:.1f}",
                f"{point['published_seconds'] / point['seconds']:.1f}",
                point["layer_applications"],
                point["applications_by_formula"],
                f"{point['required_flops'] / _GIGA:.1f}",
                f"{100 * point['required_flops'] / point['seconds'] / point['gemm_rate']:.0f}",
            )
            for point in points
        ]
        fixed = {name: points[0][name] for name in ("rows", "layers", "hidden_size", "prompt_tokens", "shots")}
        fixed["new_tokens"] = points[0]["new_tokens"]
        others = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in fixed.items() if name != axis)
        header = (axis.replace("_", " "), "seconds", "published", "times as fast", "applications", "by formula")
        parts.append(f"{others}:\n\n{table((*header, 'required GFLOP', 'share of the GEMM rate %'), rows)}")
    return "\n\n".join(parts)


def about_section(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how, where and with what each part was measured."""
    lines = []
    for part, about in found.items():
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        machine = about["machine"]
        lines.append(
            f"- {part}: `{about['command']}`, {about['date']}, commit {about['commit']}, {about['threads']} "
            f"thread{'s' * (about['threads'] > 1)}; {machine['cpu']}, {machine['cores']} cores, "
            f"{machine['memory_gib']} GiB, load {about['load']} before; {versions}"
        )
    return "## How it was measured\n\n" + "\n".join(lines)


def measured(workloads: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the workloads that were not left out."""
    return [(name, each) for name, each in workloads.items() if "pairs" in each]


def reached(value: float, least: float) -> str:
    """Return whether a value is what it should be at least."""
    return "yes" if value >= least else "no"


def page(engine: Mapping[str, Any], scaling: Mapping[str, Any], workers: Mapping[str, Any], notes: str) -> str:
    """Return the document of whatever was measured."""
    about = {f"`{name}`": each["circumstances"] for name, each in measured(engine)}
    about |= {name: each["circumstances"] for name, each in (("scaling", scaling), ("workers", workers)) if each}
    parts: list[tuple[Any, Callable[[], str]]] = [
        (measured(engine), lambda: ratios_section(engine)),
        (measured(engine), lambda: work_section(engine)),
        (workers, lambda: workers_section(workers)),
        (scaling, lambda: scaling_section(scaling["axes"])),
    ]
    left_out = [f"- {each['title']}: {each['left_out']}" for each in engine.values() if "left_out" in each]
    days = sorted({each["date"].split()[0] for each in about.values()})
    return "\n\n".join(
        [
            f"# The engine, measured ({' to '.join(dict.fromkeys((days[0], days[-1])))})",
            "Written by `benchmarks/document.py` from `benchmarks/measured/*.json`, as `make bench` measured it.",
            *(write() for there, write in parts if there),
            *(["## Left out\n\n" + "\n".join(left_out)] if left_out else []),
            "## Notes, and what did not help\n\n" + notes.strip(),
            about_section(about) + "\n",
        ]
    )


@click.command()
@click.option("--from", "source", type=click.Path(path_type=Path, exists=True), default=HERE / "measured")
@click.option("--out", type=click.Path(path_type=Path), default=HERE, help="Folder of document and figures.")
def main(source: Path, out: Path) -> None:
    """Write the document and draw its figures."""

    def read(name: str) -> dict[str, Any]:
        path = source / f"{name}.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found

    engine, scaling, workers = read("engine"), read("scaling"), read("workers")
    if not (measured(engine) or scaling or workers):
        raise click.ClickException(f"{source} holds nothing that was measured: run make bench")
    from figures import draw_ratios, draw_scaling  # nothing else here needs matplotlib

    out.mkdir(parents=True, exist_ok=True)
    if measured(engine):
        draw_ratios(engine, out / "ratios.svg")
    if scaling:
        draw_scaling(scaling["axes"], out / "scaling.svg")
    notes = (HERE / "notes.md").read_text(encoding="utf-8")
    (out / "engine.md").write_text(page(engine, scaling, workers, notes), encoding="utf-8")


if __name__ == "__main__":
    main()
