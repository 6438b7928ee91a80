"""One search of one round in a process of its own, for `streaming.py`, which starts it and watches its memory.

It imports everything, says that it is ready, and begins when a line comes in. It ends with a line of JSON.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import click
import recording
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  # its memory is no part of what is measured

import tale_ray.cluster.worker  # noqa: F401
from tale_ray.errors import TaleRayError
from tale_ray.model.checkpoint import MappedFile


class Fetched:
    """Counts bytes that layers are fetched with; `is_cold`: what is given back leaves the page cache, too."""

    def __init__(self, *, is_cold: bool) -> None:
        self.bytes = 0
        fetch, drop = MappedFile.fetch, MappedFile.drop

        def counted(file: MappedFile, start: int, end: int) -> None:
            self.bytes += end - start
            fetch(file, start, end)

        def dropped(file: MappedFile, start: int, end: int) -> None:
            drop(file, start, end)
            if is_cold:
                os.posix_fadvise(file._descriptor, start, end - start, os.POSIX_FADV_DONTNEED)

        mock.patch.object(MappedFile, "fetch", counted).start()
        mock.patch.object(MappedFile, "drop", dropped).start()


def outcome(options: dict[str, Any], run: Path, fetched: Fetched) -> dict[str, Any]:
    """Return what a search took and answered, or how it failed."""
    try:
        found = recording.search(options, run)
    except TaleRayError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "load_seconds": found.summary["seconds"]["load"],
        "search_seconds": found.seconds,
        "scorer_seconds": found.scorer_seconds,
        "candidate_rows": found.candidate_rows,
        "fetched_bytes": fetched.bytes,
        "rounds": [*found.summary["rounds"], found.summary["rejected_round"]],
        "replies": sorted(
            [-1 if candidate.layer is None else candidate.layer, row, answer.reply]
            for result in found.results
            for candidate in result.candidates
            for row, answer in zip(result.unit.rows, candidate.answers, strict=True)
        ),
    }


@click.command()
@click.option("--model", required=True)
@click.option("--task", required=True)
@click.option("--run", type=click.Path(path_type=Path), required=True)
@click.option("--stream", required=True)
@click.option("--batch-bytes", type=int, required=True)
@click.option("--data-limit", type=int, help="RLIMIT_DATA, in bytes.")
@click.option("--cold", is_flag=True, help="Every pass reads from the disk.")
@click.option("--threads", type=int, required=True)
def main(
    model: str, task: str, run: Path, stream: str, batch_bytes: int, data_limit: int | None, cold: bool, threads: int
) -> None:
    """Search one round."""
    torch.set_num_threads(threads)
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # the threads are there
    fetched = Fetched(is_cold=cold)
    print("ready", flush=True)
    sys.stdin.readline()
    if data_limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (data_limit, data_limit))
    options = {
        **{"model": model, "task": task, "local": True, "stream": stream, "batch_bytes": batch_bytes},
        **{"max_removed": 1, "exhaustive": True, "splits": "search=1", "epsilon": "1"},
    }
    started = time.perf_counter()
    found = outcome(options, run, fetched)
    print(json.dumps({**found, "seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
