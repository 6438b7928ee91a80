"""A model larger than the memory that a process may take: one round, streamed, beside the same round in memory.

    python benchmarks/streaming.py --threads 2

A random Llama is written to a temporary folder and searched four times, each time in a process of its own: loaded as
models are otherwise, under RLIMIT_DATA (which fails), streamed under it, streamed so that every pass reads from the
disk, and in memory. Resident memory is polled from /proc, as high-water marks do not tell file pages from others.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import random_models
import torch
from circumstances import circumstances
from document import table

HERE = Path(__file__).parent
LEAST_BYTES = 4 * 10**9  # of weights
MOST_SHARE = 0.25  # of the weights, for anonymous and for file pages each
DATA_SHARE = 0.5  # of the weights: RLIMIT_DATA
_POLL_SECONDS = 0.01
_READ_BYTES = 16 * 2**20
_TASK = r"""
name: random
source: {path: json, data_files: rows.jsonl}
messages:
  - {role: user, content: "{{ question }}"}
reply: "t"
target: "t"
answer: {type: regex, pattern: '(t)\d*[0-4]\W*$'}
max_new_tokens: 1
"""


def write_model(folder: Path, layers: int, hidden_size: int) -> None:
    """Write a random Llama; in a process of its own, whose memory is gone afterwards."""
    code = (
        "import pathlib, sys, random_models as r; "
        f"r.save(r.random_llama({layers}, {hidden_size}, layer_strength=0.3), pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=HERE)


def write_task(folder: Path, rows: int, words: int) -> Path:
    """Write a task of random words and return its file."""
    generator = torch.Generator().manual_seed(1)
    questions = [" ".join(f"t{token}" for token in row) for row in random_models.random_words(rows, words, generator)]
    lines = (json.dumps({"question": question}) for question in questions)
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = folder / "random.yaml"
    path.write_text(_TASK, encoding="utf-8")
    return path


def weight_files(folder: Path) -> list[Path]:
    """Return the files of the weights."""
    return sorted(folder.glob("*.safetensors"))


def disk_rate(files: list[Path]) -> float:
    """Return the bytes a second of a sequential reading of files that the page cache does not hold."""
    seconds, size = 0.0, 0
    buffer = bytearray(_READ_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while read := stream.readinto(buffer):
                size += read
            seconds += time.perf_counter() - started
    return size / seconds


def resident(pid: int) -> tuple[int, int]:
    """Return a process's resident (anonymous, file) bytes; zeros once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0, 0
    fields = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return tuple(int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssFile"))  # type: ignore[return-value]


def measure(model: Path, task: Path, run: Path, threads: int, batch_bytes: int, *more: str) -> dict[str, Any]:
    """Return what a search in a process of its own says, and the most memory that it took."""
    command = [sys.executable, HERE / "streamed_search.py", "--model", model, "--task", task, "--run", run]
    command += ["--threads", threads, "--batch-bytes", batch_bytes, *more]
    child = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE.parent
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        while child.stdout.readline() not in ("ready\n", ""):
            continue
        before = resident(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        most = before
        while child.poll() is None:
            now = resident(child.pid)
            most = (max(most[0], now[0]), max(most[1], now[1]))
            time.sleep(_POLL_SECONDS)
        lines = child.stdout.read().splitlines()
    finally:
        child.kill()
        child.wait()
    if not lines or child.returncode:
        return {"error": f"the process ended with {child.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1].replace(str(model), "MODEL"))
    return {**found, "anonymous_bytes": most[0] - before[0], "file_bytes": most[1], "before": before}


def page(found: dict[str, Any]) -> str:
    """Return the document of what was measured."""
    weights, rate = found["weight_bytes"], found["disk_rate"]
    rows = []
    for name, title in (
        ("memory", "in memory"),
        ("streamed", "streamed, limited"),
        ("cold", "streamed, limited, every pass from the disk"),
    ):
        each = found[name]
        rows.append(
            (
                title,
                f"{each['search_seconds']:.1f}",
                f"{each['candidate_rows'] / each['search_seconds']:.1f}",
                f"{each['load_seconds']:.1f}",
                f"{each['fetched_bytes'] / weights:.1f}",
                f"{each['anonymous_bytes'] / weights:.1%}",
                f"{each['file_bytes'] / weights:.1%}",
            )
        )
    about = found["circumstances"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    machine = about["machine"]
    header = (
        *("", "`seconds.search`", "candidate-rows a second", "`seconds.load`", "weights read, times"),
        *("anonymous memory, of the weights", "file pages, of the weights"),
    )
    return f"""# A model larger than the memory, measured ({about["date"].split()[0]})

Written by `benchmarks/streaming.py` from `benchmarks/measured/streaming.json`.

A random Llama of {found["layers"]} layers, hidden size {found["hidden_size"]}, {weights / 1e9:.2f} GB of float32
weights, {found["rows"]} rows of {found["words"]} words, baseline and one round of all candidates in process, one search
each. "Limited": RLIMIT_DATA is {found["data_limit"] / 1e9:.2f} GB. Loaded as models are otherwise under this limit it
fails:

> {found["plain"]["error"]}

{table(header, rows)}

Replies of all (candidate, row) pairs are the same: {"yes" if found["same"] else "NO"}. A search in memory is cut into
units of two seconds, of one or two rows here; a streamed one into units with as many rows as there are, which uses the
processor better: that is why it can be the faster one, not its reading. The disk, read in sequence without the page
cache: {rate / 1e9:.2f} GB/s, so that one pass over the weights takes {weights / rate:.1f} s at least where memory holds
none of them. "Weights read": to find out whether the model is causal and fits the sweep, and in all
passes of the search, whose number `--batch-bytes` decides ({found["batch_bytes"] / 2**20:.0f} MiB here). Anonymous
memory is without that of the interpreter and its imports; file pages are all, libraries too
({found["streamed"]["before"][1] / weights:.1%} of the weights before loading).

`{about["command"]}`, {about["date"]}, commit {about["commit"]}, {about["threads"]} threads; {machine["cpu"]},
{machine["cores"]} cores, {machine["memory_gib"]} GiB, load {about["load"]} before; {versions}
"""


@click.command()
@click.option("--layers", type=int, default=16, show_default=True)
@click.option("--hidden-size", type=int, default=2304, show_default=True)
@click.option("--rows", type=int, default=16, show_default=True)
@click.option("--words", type=int, default=6, show_default=True, help="In a row.")
@click.option("--batch-bytes", type=int, default=256 * 2**20, show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where the model is written.  [default: a temporary one]"
)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "measured" / "streaming.json")
def main(
    layers: int, hidden_size: int, rows: int, words: int, batch_bytes: int, threads: int, folder: Path | None, out: Path
) -> None:
    """Measure and write the document."""
    about = circumstances(threads)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        model, runs = Path(place) / "model", Path(place)
        write_model(model, layers, hidden_size)
        task = write_task(runs, rows, words)
        files = weight_files(model)
        weights = sum(path.stat().st_size for path in files)
        limit = int(DATA_SHARE * weights)
        limited = ("--data-limit", str(limit))
        found: dict[str, Any] = {
            **{"circumstances": about, "layers": layers, "hidden_size": hidden_size, "rows": rows, "words": words},
            **{"weight_bytes": weights, "data_limit": limit, "batch_bytes": batch_bytes, "disk_rate": disk_rate(files)},
        }
        for name, more in (
            ("plain", ("--stream", "never", *limited)),
            ("streamed", ("--stream", "auto", *limited)),
            ("cold", ("--stream", "auto", "--cold", *limited)),
            ("memory", ("--stream", "never")),
        ):
            found[name] = measure(model, task, runs / name, threads, batch_bytes, *more)
            summary = {key: value for key, value in found[name].items() if key not in ("replies", "rounds")}
            click.echo(f"{name}: {summary}", err=True)
    replies = [found[name].pop("replies", None) for name in ("streamed", "cold", "memory")]
    found["same"] = replies[0] is not None and all(each == replies[0] for each in replies)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if "error" not in found["plain"]:
        raise click.ClickException("plain loading did not fail under the limit")
    if not found["same"]:
        raise click.ClickException("streamed replies are not those in memory, or a search failed")
    (HERE / "streaming.md").write_text(page(found), encoding="utf-8")
    for name in ("streamed", "cold"):
        for kind in ("anonymous_bytes", "file_bytes"):
            if found[name][kind] > MOST_SHARE * weights:
                raise click.ClickException(f"{name}: {kind} are {found[name][kind] / weights:.1%} of the weights")
    if weights < LEAST_BYTES:
        raise click.ClickException(f"the model has {weights} bytes only: at least {LEAST_BYTES} are to be shown")


if __name__ == "__main__":
    main()
