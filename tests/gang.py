"""A gang without Ray: processes that split a model, each of which writes down what it has found."""

import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from families import tiny_prompts

from tale_ray.cluster.process_group import join_group, open_store
from tale_ray.cluster.worker import Worker
from tale_ray.config import ModelSection, ResourceSection
from tale_ray.engine.layout import lay_lines
from tale_ray.errors import ModelError
from tale_ray.records import Choice, PromptRow, UnitResult, WorkUnit
from tale_ray.search.executor import Questions
from tale_ray.tasks.spec import AnswerSpec

NUM_ROWS = 6
PROMPTS = [(5, 6, 7, *prompt) for prompt in tiny_prompts(NUM_ROWS)]
DECODED = AnswerSpec(type="regex", pattern="(.+)")
LIKELY = AnswerSpec(type="likelihood")


@dataclass(frozen=True)
class Found:
    """What one process has found of one model."""

    logits: torch.Tensor  # (removed layers, rows, vocabulary)
    decoded: UnitResult
    likely: UnitResult
    first_width: int  # of the first layer's largest weight, as it lies here
    listens_to: frozenset[str]  # addresses at which this process can be reached
    has_our_group: bool  # whether weights are summed over the group whose timeout is ours
    budget: int


def gang(num_members: int, models: Sequence[str], folder: Path) -> list[list[Found | str]]:
    """What each member finds of each model; a text: why it was refused."""
    spawned = multiprocessing.get_context("spawn")
    ports: Any = spawned.Queue()
    processes = [
        spawned.Process(target=_member, args=(rank, num_members, ports, list(models), str(folder), sys.path))
        for rank in range(num_members)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * num_members
    return [torch.load(folder / f"member-{rank}.pt", weights_only=False) for rank in range(num_members)]


def _member(rank: int, num_members: int, ports: Any, models: list[str], folder: str, path: list[str]) -> None:
    torch.set_num_threads(1)
    store = None
    if rank == 0:
        store, port = open_store(num_members, 60)
        for _ in range(num_members - 1):
            ports.put(port)
    else:
        port = ports.get(timeout=60)
    join_group(rank, num_members, port, 60, on_gpu=False, store=store)
    # The last member has less memory than the others.
    found = [examined(model, num_members, batch_bytes=2**25 >> (rank == num_members - 1)) for model in models]
    torch.save(found, Path(folder) / f"member-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def examined(model: str, num_members: int = 1, batch_bytes: int = 2**24) -> Found | str:
    """What this process finds of a model; all of them work together."""
    resources = ResourceSection(tensor_parallel=num_members, batch_bytes=batch_bytes)
    try:
        worker = Worker("w", ModelSection(model=model), "float32", resources)
    except ModelError as error:
        return str(error)
    layers, sweep = worker._loaded.layers, worker._scorer.fit.sweep
    assert sweep is not None, worker._scorer.fit.note
    finals = [(), (0,), (layers.num_layers - 1,), (0, 1)]
    manager = getattr(worker._loaded.model, "_mesh_manager", None)
    everything = WorkUnit(1, "round-0001", "search", (2,), (None, 0, 1, 3), tuple(range(NUM_ROWS)))
    results = []
    for answer, rows, new_tokens in ((DECODED, decoded_rows(), 4), (LIKELY, likely_rows(), 1)):
        worker.share(Questions({"search": rows}, answer, new_tokens))
        results.append(worker.score(everything))
    return Found(
        sweep.next_logits(finals, lay_lines(PROMPTS), None),
        *results,
        first_width=max(_local(weight).numel() for weight in layers.full[0].parameters()),
        listens_to=listening(),
        has_our_group=manager is not None and manager.get_mesh("tp").get_group() is dist.group.WORLD,
        budget=worker._scorer.budget.total,
    )


def listening() -> frozenset[str]:
    """Addresses at which this process can be reached by others."""
    found = psutil.Process().net_connections("tcp")
    return frozenset(each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN)


def _local(weight: Any) -> torch.Tensor:
    return weight.to_local() if hasattr(weight, "to_local") else weight  # type: ignore[no-any-return]


def decoded_rows() -> list[PromptRow]:
    return [PromptRow(prompt, "t9") for prompt in PROMPTS]


def likely_rows() -> list[PromptRow]:
    ends = [((9, 11), (12,)), ((3,), (14, 15, 16))]
    return [
        PromptRow(prompt, "0", tuple(Choice(str(end), prompt, end) for end in ends[at % 2]))
        for at, prompt in enumerate(PROMPTS)
    ]
