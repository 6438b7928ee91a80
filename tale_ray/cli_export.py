"""The command `export`: a result of a run as a checkpoint that plain transformers loads."""

from typing import Any, get_args

import click

from tale_ray.attempt.export import ExportDType, run_export
from tale_ray.cli_options import pick_option
from tale_ray.results.tables import count_text, layers_text


@click.command()
@click.argument("run")
@click.argument("out", type=click.Path())
@pick_option
@click.option("--model", metavar="PATH", help="Where the same model lies now.")
@click.option(
    "--dtype",
    type=click.Choice(get_args(ExportDType)),
    default="checkpoint",
    show_default=True,
    help="Of the weights; `checkpoint` is the one that they are stored in.",
)
@click.option("--base-model", metavar="ID", help="The model's id at the hub, for the card, if a folder was searched.")
@click.option("--push-to-hub", metavar="ID", help="Upload it to this repository, which is made private if it is new.")
def export(run: str, out: str, **options: Any) -> None:
    """Write a result of a run as a checkpoint that plain transformers loads.

    OUT is a folder that is empty or absent. It gets weights, configuration, tokenizer, generation defaults, a model
    card, and the same cut for mergekit and llama.cpp. A run that has not ended may be exported, too.
    """
    done = run_export(run, out, **options)
    left = done.num_layers - len(done.removed)
    click.echo(
        f"{done.folder}: {left} of {count_text(done.num_layers, 'layer')}, {done.num_parameters:,} parameters in "
        f"{done.dtype}, {done.num_bytes / 1e6:.1f} MB"
    )
    click.echo(f"layers removed (round {done.round}): {layers_text(done.removed)}")
    if done.code_files:
        click.echo(f"it needs code that was copied with it, and trust_remote_code=True: {', '.join(done.code_files)}")
    if done.pushed is None:
        click.echo(f"load it with: AutoModelForCausalLM.from_pretrained({str(done.folder)!r})")
    else:
        click.echo(f"uploaded to {done.pushed}")
