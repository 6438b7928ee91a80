"""Measuring what a result of a run saves: first-token latency and throughput, beside the full model."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tale_ray.attempt.evaluate import pruned_round
from tale_ray.attempt.export import found_model, hub_id
from tale_ray.attempt.identity import check_same_model
from tale_ray.cluster.local import LocalExecutor
from tale_ray.cluster.machine import installed_versions
from tale_ray.config import ResourceSection, SearchConfig
from tale_ray.errors import ConfigError
from tale_ray.results.latency import RESULT, batch_json
from tale_ray.store.reader import RunReader
from tale_ray.store.run import RunWriter

BATCH_SIZES = (1, 8)
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 128, 32, 5


def run_latency(
    run: str,
    *,
    pick: str = "best",
    batch_sizes: Sequence[int] = BATCH_SIZES,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    model: str | None = None,
    dtype: str | None = None,
    gpus_per_worker: int | None = None,
) -> dict[str, Any]:
    """Return how long the full model and a result of a run take, measured in turns in this process, as JSON values.

    Args:
        run: its folder or URI.
        pick: best, bsba, final, selected, or the number of a committed round.
        batch_sizes: prompts at a time, each measured for itself.
        prompt_tokens: of every prompt.
        new_tokens: of every reply; with 1 there is no throughput.
        repeats: passes of each model that are counted.
        model: where the run's model lies now.
        dtype: float32, bfloat16 or float16; None: as the run was searched.
        gpus_per_worker: 0 measures on CPU; None: as the run was searched.

    Raises:
        UsageError: there is no such run or result, it removes nothing, or its model is gone or another one.
        InfeasibleError: this machine does not have the GPUs.
    """
    counts = {"prompt tokens": prompt_tokens, "new tokens": new_tokens, "repeats": repeats}
    for name, value in (*((f"batch size {size}", size) for size in batch_sizes), *counts.items()):
        if value < 1:
            raise ConfigError(f"{name}: {value} is too small: it is at least 1")
    if not batch_sizes:
        raise ConfigError("batch sizes is empty: name one at least, such as 1,8")
    reader = RunReader(run)
    manifest = reader.manifest()
    config = SearchConfig.from_json(manifest.config)
    picked = pruned_round(reader, pick, "there is nothing to compare;")
    section = found_model(config.model, model, reader.uri)
    gpus = config.resources.gpus_per_worker if gpus_per_worker is None else gpus_per_worker
    resources = ResourceSection(local=True, gpus_per_worker=gpus)
    computed = dtype or str(manifest.model["dtype"])
    LocalExecutor(section, computed, resources).connect()

    import torch  # wanted in this process only now

    from tale_ray.engine.timing import time_batch
    from tale_ray.model.load import load_model
    from tale_ray.model.placement import worker_placement

    loaded = load_model(replace(section, dtype="auto"), computed, worker_placement(gpus, is_alone=True))
    info = loaded.info
    check_same_model(manifest, info, section.model, reader.uri)
    if info.max_positions is not None and prompt_tokens + new_tokens > info.max_positions:
        raise ConfigError(
            f"prompts of {prompt_tokens} and {new_tokens} new tokens are longer than the {info.max_positions} "
            "positions of the model: ask for fewer"
        )
    batches = []
    for size in batch_sizes:
        times = time_batch(
            loaded,
            picked.removed,
            batch_size=size,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
        )
        batches.append(batch_json(times, picked.removed, new_tokens))
    versions = installed_versions()
    return {
        "run": reader.uri,
        "pick": pick,
        "round": picked.number,
        "removed": list(picked.removed),
        "num_layers": info.num_layers,
        "model": hub_id(config.model, section) or Path(section.model).name,
        "dtype": info.dtype,
        "device": torch.cuda.get_device_name() if gpus else "cpu",
        "threads": torch.get_num_threads(),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "batches": batches,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: versions[name] for name in ("torch", "transformers", "tale-ray")},
    }


def store_latency(run: str, values: dict[str, Any]) -> None:
    """Keep what was measured in the run's folder, in place of what was measured before.

    Raises:
        LeaseHeld: another process writes to the run.
        StoreError: the folder cannot be written.
    """
    with RunWriter.claim(run, wait=False) as writer:
        writer.write_result(RESULT, values)
