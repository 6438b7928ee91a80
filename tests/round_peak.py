"""Peak memory of one round, to be run as a process of its own: `round_peak.py MODEL TASK_FILE ROWS BATCH_BYTES`.

The peak is the largest resident size (VmHWM: anonymous memory and pages of mapped files) from when the model is
loaded to after the round, less the resident size (VmRSS) before it was loaded, when everything was imported, the
tokenizer made and the rows read. Pages of the checkpoint that only loading needed are dropped first, as the kernel
would. The round is the baseline and all candidates of the first round on all rows, a unit each, in a `LocalExecutor`.
Prints JSON: this peak, that of loading, the bytes of the model's weights and buffers, and the layer applications of
both units.
"""

import ctypes
import json
import mmap
import re
import sys
from pathlib import Path

import torch

from tale_ray.attempt.execution import encode_questions
from tale_ray.attempt.rows import prepare_rows
from tale_ray.cluster.local import LocalExecutor
from tale_ray.cluster.worker import Worker  # noqa: F401  # imports what a worker imports
from tale_ray.config import ModelSection, ResourceSection, TaskSection
from tale_ray.model.configuration import read_configuration
from tale_ray.model.load import load_tokenizer
from tale_ray.model.outline import hollow_model, num_bytes
from tale_ray.records import WorkUnit
from tale_ray.search.executor import UnitDone


def status(name: str) -> int:
    """Return a size of this process, in bytes, as the kernel tells it."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def forget_highest() -> None:
    """Let the highest resident size be the present one."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def drop_pages(folder: str) -> None:
    """Take the pages of a folder's files out of this process; those that are needed come back from the page cache."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines():
        if folder in line and line.endswith(".safetensors"):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            assert madvise(start, end - start, mmap.MADV_DONTNEED) == 0


def main(model: str, task: str, rows: str, batch_bytes: str) -> None:
    torch.set_num_threads(1)
    section = ModelSection(model=model)
    prepared = prepare_rows(TaskSection(task=task, rows=int(rows), splits={"search": "1"}))
    hollow_model(read_configuration(section), torch.float32)  # imports the family's code
    tokenizer = load_tokenizer(section)
    executor = LocalExecutor(section, "float32", ResourceSection(local=True, batch_bytes=int(batch_bytes)))
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    forget_highest()
    before = status("VmRSS")
    del tokenizer
    info = executor.load()
    loading = status("VmHWM") - before
    drop_pages(model)
    forget_highest()
    executor.share(encode_questions(executor, prepared, info))
    executor.poll(0)
    applications = []
    for number, candidates in enumerate(((None,), tuple(range(info.num_layers)))):
        unit = WorkUnit(number, f"round-{number:04}", "search", (), candidates, tuple(range(int(rows))))
        executor.submit("local", unit)
        (done,) = executor.poll(0)
        assert isinstance(done, UnitDone), done
        applications.append(done.result.layer_applications)
    weights = num_bytes([executor._worker._loaded.model])
    found = {"peak": status("VmHWM") - before, "loading": loading, "weights": weights, "applications": applications}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
