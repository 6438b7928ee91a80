"""The command `finetune`: an adapter of low rank, trained on the finetune rows of a task and merged."""

import json
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console

from tale_ray.api import evaluated_config
from tale_ray.attempt.finetune import FinetuneConfig, Finetuned, TunedDType, run_finetune
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
from tale_ray.config import SearchConfig
from tale_ray.errors import ConfigError, Interrupted
from tale_ray.option_texts import parse_duration, splits_text
from tale_ray.output_file import check_place
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
        help="Steps between two looks at the select rows, each with a checkpoint.  [default: a tenth of the steps]",
    ),
    click.option(
        "--patience",
        type=int,
        metavar="N",
        default=_DEFAULTS.patience,
        show_default=True,
        help="Looks without a lower loss that end the training; 0: none do.",
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
    merged_dtype: TunedDType,
    as_json: bool,
    time_limit: str | None,
    training_seed: int | None,
    **options: Any,
) -> None:
    """Fine-tune a model, or a pruned one, on the finetune rows of a task, and merge what it has learned.

    Trains an adapter of low rank (LoRA) on the reference replies, stops by the loss on the select rows, and keeps the
    weights with the lowest. OUT gets the adapter and a checkpoint that plain transformers loads. The same command goes
    on with an unfinished training, and prints a finished one again. With --workers above 1 rows are shared through Ray.
    """
    tuning = {name: options.pop(name) for name in tuning_names()}
    given = changed(context, options)
    if run is None:
        given.setdefault("splits", options["splits"])
    config, expected = evaluated_config(run, pick, **placed(given))
    check_place(out, "--out")
    asked = FinetuneConfig(
        config=config,
        options=make_tuning(tuning, config, training_seed),
        out=str(out),
        expected=expected,
        pick=None if run is None else pick or "best",
        dtype=merged_dtype,
    )
    interruption = Interruption()
    limit = None if time_limit is None else parse_duration(time_limit)
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


def tuning_names() -> list[str]:
    """Return the names of the options of `tuning_options`, as parameters."""
    return [name for name in TuningOptions.__dataclass_fields__ if name != "seed"]


def make_tuning(given: dict[str, Any], config: SearchConfig, seed: int | None) -> TuningOptions:
    """Return how an adapter is trained, from the values of `tuning_options`.

    Raises:
        ConfigError: a value breaks a rule.
    """
    names = tuple(part.strip() for part in given["target_modules"].split(","))
    patience = given["patience"] or None
    return TuningOptions(
        **given | {"target_modules": names, "patience": patience}, seed=config.task.seed if seed is None else seed
    )


def resumable(error: Interrupted) -> Interrupted:
    """Return an interruption that says what to do, as those of a kind of their own do already."""
    return error if type(error) is not Interrupted else Interrupted(f"{error}: to go on, run the same command again")


def placed(options: dict[str, Any]) -> dict[str, Any]:
    """Return options that say where a training runs: in this process, unless more than one worker is asked for.

    Raises:
        ConfigError: an address is given, and nothing is to run there.
    """
    if (options.get("workers") or 1) > 1:
        return options
    if options.get("address"):
        raise ConfigError(
            f"address {options['address']!r} is given, and one worker trains in this process: ask for more --workers, "
            "or leave it out"
        )
    return {**options, "local": True}
