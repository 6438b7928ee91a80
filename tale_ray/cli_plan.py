"""The command `plan`: what a search would take, from the model's configuration alone."""

import json
from dataclasses import replace
from typing import Any

import click

from tale_ray.api import make_config
from tale_ray.attempt.gpus import FREE_SHARE, GPUS, find_gpu
from tale_ray.cli_options import json_option, model_options, task_options, with_options, working_memory_options
from tale_ray.errors import ConfigError
from tale_ray.option_texts import parse_bytes

_DEFAULT_GPU = "A100-80GB"


@click.command()
@model_options
@task_options
@with_options(
    click.option("--max-removed", type=int, metavar="N", help="Remove at most N layers.  [default: no limit]"),
    click.option("--remove", metavar="LAYERS", help="Start without these, e.g. 3,7."),
    click.option("--keep-layers", metavar="LAYERS", help="Never remove these."),
    click.option("--max-new-tokens", type=int, metavar="N", help="Of a reply.  [default: the task's]"),
    click.option(
        "--tokens-per-row",
        type=int,
        metavar="N",
        help="Tokens of a row; with --rows, no rows are read.  [default: counted, or estimated without a tokenizer]",
    ),
    click.option(
        "--gpu",
        metavar="NAME",
        help=f"One of {', '.join(GPUS)}.  [default: {_DEFAULT_GPU}, unless the memory is given]",
    ),
    click.option("--gpu-memory", metavar="B", help="Of each GPU, e.g. 80GiB.  [default: that of --gpu]"),
    click.option(
        "--gpus-per-worker",
        type=int,
        metavar="K",
        help="0 plans for this machine's RAM.  [default: the fewest that the model fits]",
    ),
    click.option("--workers", type=int, metavar="N", help="That share the work.  [default: 1]"),
)
@working_memory_options
@json_option
def plan(
    as_json: bool,
    gpu: str | None,
    gpu_memory: str | None,
    tokens_per_row: int | None,
    max_new_tokens: int | None,
    **options: Any,
) -> None:
    """Tell what a search would take: bytes, GPUs per worker, micro-batches, work, and an estimate of its time.

    Needs the model's configuration only: --model may be the path of a config.json. Loads no weights and downloads
    nothing. What a search would refuse for want of memory is refused with the same words.
    """
    from tale_ray.attempt.plan import Device, make_plan  # torch is wanted in this process only now
    from tale_ray.attempt.plan_text import plan_text
    from tale_ray.model.capacity import free_memory_bytes

    config = make_config(**{name: value for name, value in options.items() if value is not None})
    gpus_per_worker = options["gpus_per_worker"]
    if gpus_per_worker == 0:
        if named := gpu or gpu_memory:
            raise ConfigError(f"gpu {named!r} and gpus per worker 0 exclude each other: leave one out")
        device = Device(free_bytes=free_memory_bytes(), gpus_per_worker=0)
    else:
        card = find_gpu(gpu or _DEFAULT_GPU) if gpu or not gpu_memory else None
        if gpu_memory and card is not None:
            card = replace(card, memory_bytes=parse_bytes(gpu_memory))
        free = card.free_bytes if card is not None else int(FREE_SHARE * parse_bytes(str(gpu_memory)))
        device = Device(gpu=card, free_bytes=free, gpus_per_worker=gpus_per_worker)
    found = make_plan(config, device, tokens_per_row, max_new_tokens)
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else plan_text(found))
