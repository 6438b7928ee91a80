"""The command `latency`: what removed layers save in time, measured."""

import json
from typing import Any, get_args

import click

from tale_ray.attempt.latency import BATCH_SIZES, NEW_TOKENS, PROMPT_TOKENS, REPEATS, run_latency, store_latency
from tale_ray.cli_options import json_option, pick_option
from tale_ray.config import DType
from tale_ray.errors import ConfigError
from tale_ray.results.latency import latency_table
from tale_ray.results.tables import output_console


@click.command()
@click.argument("run")
@pick_option
@click.option(
    "--batch-sizes",
    default=",".join(map(str, BATCH_SIZES)),
    show_default=True,
    help="Prompts at a time.",
    metavar="LIST",
)
@click.option(
    "--prompt-tokens", type=int, default=PROMPT_TOKENS, show_default=True, help="Of every prompt.", metavar="N"
)
@click.option("--new-tokens", type=int, default=NEW_TOKENS, show_default=True, help="Of every reply.", metavar="N")
@click.option("--repeats", type=int, default=REPEATS, show_default=True, help="Passes that are counted.", metavar="N")
@click.option("--model", metavar="PATH", help="Where the same model lies now.")
@click.option(
    "--dtype",
    type=click.Choice([name for name in get_args(DType) if name != "auto"]),
    help="Of the weights.  [default: as the run was searched]",
)
@click.option("--gpus-per-worker", type=int, metavar="K", help="0 runs on CPU.  [default: as the run was searched]")
@click.option("--store", is_flag=True, help="Keep the result in the run's folder.")
@json_option
def latency(run: str, batch_sizes: str, store: bool, as_json: bool, **options: Any) -> None:
    """Measure what a result of a run saves: time to the first token, and tokens per second after it.

    The full model and the pruned one take turns in this process. Beside what is saved stands what the removed layers'
    own share of the full model's time lets expect. Let nothing else run meanwhile.
    """
    values = run_latency(run, batch_sizes=_sizes(batch_sizes), **options)
    if as_json:
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        output_console().print(latency_table(values), soft_wrap=True)
    if store:
        store_latency(run, values)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"batch sizes {text!r} is not a list of numbers: write it like 1,8") from None
