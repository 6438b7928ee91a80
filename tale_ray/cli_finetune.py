"""The command `finetune`: a low-rank adapter, trained on the finetune rows of a task and merged."""

import json
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console

from tale_ray.api_tuning import finetune_request
from tale_ray.attempt.finetune import Finetuned, TunedDType, run_finetune
from tale_ray.cli_options import (
    data_root_option,
    include_path_option,
    json_option,
    model_options,
    place_options,
    seed_option,
    shots_option,
    time_limit_option,
    with_options,
)
from tale_ray.cli_shown import changed
from tale_ray.errors import Interrupted
from tale_ray.option_texts import splits_text
from tale_ray.progress import Display
from tale_ray.results.finetune import finetune_table
from tale_ray.results.tables import output_console
from tale_ray.search.interruption import Interruption
from tale_ray.tuning.options import ALL_LINEAR, TUNED_SPLITS, TuningOptions

_DEFAULTS = TuningOptions()

tuning_options = with_options(
    click.option("--rank", type=int, metavar="R", default=_DEFAULTS.rank, show_default=True, help="Of the adapter."),
    click.option(
        "--alpha", type=float, default=_DEFAULTS.alpha, show_default=True, help="The adapter is scaled by alpha / rank."
    ),
    click.option("--dropout", type=float, default=_DEFAULTS.dropout, show_default=True, help="Of the adapter's input."),
    click.option(
        "--target-modules",
        metavar="NAMES",
        default=ALL_LINEAR,
        show_default=True,
        help="Layers that get one, e.g. q_proj,v_proj.",
    ),
    click.option("--learning-rate", type=float, metavar="X", default=_DEFAULTS.learning_rate, show_default=True),
    click.option(
        "--epochs",
        type=float,
        metavar="N",
        default=_DEFAULTS.epochs,
        show_default=True,
        help="Passes over the finetune rows.",
    ),
    click.option("--steps", type=int, metavar="N", help="Steps, instead of epochs."),
    click.option(
        "--batch-size",
        type=int,
        metavar="N",
        default=_DEFAULTS.batch_size,
        show_default=True,
        help="Rows computed together, by all workers.",
    ),
    click.option(
        "--accumulate",
        type=int,
        metavar="N",
        default=_DEFAULTS.accumulate,
        show_default=True,
        help="Batches in a step.",
    ),
    click.option("--warmup-steps", type=int, metavar="N", help="[default: a tenth of the steps]"),
    click.option("--weight-decay", type=float, metavar="X", default=_DEFAULTS.weight_decay, show_default=True),
    click.option("--max-grad-norm", type=float, metavar="X", default=_DEFAULTS.max_grad_norm, show_default=True),
    click.option(
        "--eval-every",
        type=int,
        metavar="N",
        help="Steps between evaluations of the select rows, each with a checkpoint.  [default: a tenth of the steps]",
    ),
    click.option(
        "--patience",
        type=int,
        metavar="N",
        default=_DEFAULTS.patience,
        show_default=True,
        help="Evaluations without a lower loss that end the training; 0: none do.",
    ),
)


@click.command()
@click.option("--run", metavar="RUN", help="Take model and rows from a run.")
@click.option("--pick", metavar="P", help="With --run: best, bsba, final, selected, or a round.  [default: best]")
@model_options
@click.option("--task", metavar="T", help="Built-in task, path of a task file, or lm-eval:NAME.")
@shots_option
@click.option(
    "--splits", metavar="SHARES", default=splits_text(TUNED_SPLITS), show_default=True, help="Shares of the rows."
)
@seed_option
@data_root_option
@include_path_option
@click.option("--remove", metavar="LAYERS", help="Train the model without these layers, e.g. 3,7.")
@tuning_options
@click.option("--training-seed", type=int, metavar="N", help="Of weights, order and dropout.  [default: --seed]")
@place_options
@time_limit_option
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder of the training.")
@click.option(
    "--merged-dtype",
    type=click.Choice(get_args(TunedDType)),
    default="trained",
    show_default=True,
    help="Of the merged checkpoint.",
)
@json_option
@click.pass_context
def finetune(
    context: click.Context,
    /,
    run: str | None,
    pick: str | None,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Fine-tune a model, or a pruned one, on the finetune rows of a task, and merge what it has learned.

    Trains a low-rank adapter (LoRA) on the reference replies, stops by the loss on the select rows, and keeps the
    weights with the lowest. OUT gets the adapter and a checkpoint that plain transformers loads. The same command goes
    on with an unfinished training, and prints a finished one again. With --workers above 1 rows are shared through Ray.
    """
    asked = finetune_request(out, run=run, pick=pick, **changed(context, options))
    interruption = Interruption()
    limit = asked.config.storage.time_limit_seconds
    done: Finetuned | None = None
    with interruption.on_signals(limit), Display(Console(stderr=True)) as display:
        try:
            for event in run_finetune(asked, interruption):
                if isinstance(event, Finetuned):
                    done = event
                else:
                    display.show(event)
        except Interrupted as error:
            raise resumable(error) from error
    assert done is not None
    if as_json:
        click.echo(json.dumps({"out": done.out, **done.record}, indent=2, ensure_ascii=False))
    else:
        output_console().print(finetune_table(done.out, done.record), soft_wrap=True)


def resumable(error: Interrupted) -> Interrupted:
    """Return an interruption that says what to do, as those of a kind of their own do already."""
    return error if type(error) is not Interrupted else Interrupted(f"{error}: to go on, run the same command again")
