"""Options that several commands share, and how they are put on a command."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from tale_ray.config import DEFAULT_BEAM_WIDTH, DEFAULT_SPLITS, MEASURING, DType, EpsilonMode, StrategyName, StreamMode
from tale_ray.option_texts import splits_text

Command = TypeVar("Command", bound=Callable[..., Any])


def with_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return a decorator that gives a command these options, in this order."""

    def decorate(command: Command) -> Command:
        return functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)

    return decorate


model_options = with_options(
    click.option("--model", metavar="M", help="Hub id, folder, or `bundled`."),
    click.option("--gguf", metavar="FILE", help="GGUF file in the model's folder."),
    click.option("--revision", metavar="R", help="Revision of a hub model."),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
    click.option(
        "--dtype", type=click.Choice(get_args(DType)), default="auto", show_default=True, help="Of the weights."
    ),
)
data_root_option = click.option(
    "--data-root", metavar="DIR", envvar="TALE_RAY_DATA_ROOT", help="Local mirror of hub data sets."
)
include_path_option = click.option(
    "--include-path", metavar="DIR", help="Folder of lm-eval task files, for `lm-eval:NAME`."
)
shots_option = click.option(
    "--shots", type=int, metavar="K", default=0, show_default=True, help="Demonstrations before every prompt."
)
splits_option = click.option(
    "--splits", metavar="SHARES", default=splits_text(DEFAULT_SPLITS), show_default=True, help="Shares of the rows."
)
seed_option = click.option(
    "--seed", type=int, default=0, show_default=True, help="Decides which rows are in which split, and which are shown."
)
task_options = with_options(
    click.option("--task", metavar="T", help="Built-in task, path of a task file, or lm-eval:NAME."),
    click.option("--rows", type=int, metavar="N", help="Use the first N search rows.  [default: all]"),
    shots_option,
    splits_option,
    seed_option,
    data_root_option,
    include_path_option,
)
strategy_options = with_options(
    click.option(
        "--strategy",
        metavar="NAME",
        default="tale",
        show_default=True,
        help=f"How layers are chosen: {', '.join(get_args(StrategyName))}.",
    ),
    click.option(
        "--beam-width",
        type=int,
        metavar="N",
        help=f"Sets of removed layers that strategy beam goes on from.  [default: {DEFAULT_BEAM_WIDTH}]",
    ),
    click.option(
        "--calibration",
        metavar="FILE",
        help=f"Text that {', '.join(MEASURING)} measure the model on.  [default: prompts of the search rows]",
    ),
    click.option("--epsilon", default="0.08", show_default=True, help="Accuracy that may be lost, absolute."),
    click.option(
        "--epsilon-mode",
        type=click.Choice(get_args(EpsilonMode)),
        default="baseline",
        show_default=True,
        help="Lost against the full model, or against the last accepted one.",
    ),
    click.option("--max-removed", type=int, metavar="N", help="Remove at most N layers.  [default: no limit]"),
    click.option("--keep-layers", metavar="LAYERS", help="Never remove these."),
)
working_memory_options = with_options(
    click.option(
        "--batch-bytes", metavar="B", help="Working memory of a worker, e.g. 2GiB.  [default: chosen from the device]"
    ),
    click.option(
        "--stream",
        type=click.Choice(get_args(StreamMode)),
        default="auto",
        show_default=True,
        help="Read layers from their files, one at a time: for models larger than the memory.",
    ),
)
resource_options = with_options(
    click.option("--local", is_flag=True, help="Run in this process, without Ray."),
    click.option("--address", metavar="A", help="Ray cluster to join.  [default: $RAY_ADDRESS, else a private one]"),
    click.option("--workers", type=int, metavar="N", help="At most N workers.  [default: as many as fit]"),
    click.option("--gpus-per-worker", type=int, metavar="K", default=0, show_default=True, help="0 runs on CPU."),
    click.option(
        "--cpus-per-worker", type=int, metavar="K", default=1, show_default=True, help="CPU cores of each process."
    ),
    click.option(
        "--tensor-parallel",
        type=int,
        metavar="K",
        default=1,
        show_default=True,
        help="Split each worker's weights among K processes, on a GPU each.",
    ),
    click.option(
        "--gang-timeout",
        metavar="SECONDS",
        default="300",
        show_default=True,
        help="How long these wait for one that does not answer.",
    ),
    click.option(
        "--wait-resources",
        metavar="SECONDS",
        default="60",
        show_default=True,
        help="How long the first worker may look for a place.",
    ),
    working_memory_options,
)
place_options = with_options(
    click.option("--workers", type=int, metavar="N", help="Processes that train together, on Ray.  [default: 1]"),
    click.option("--address", metavar="A", help="With --workers: Ray cluster to join.  [default: a private one]"),
    click.option("--gpus-per-worker", type=int, metavar="K", default=0, show_default=True, help="0 trains on CPU."),
    click.option("--cpus-per-worker", type=int, metavar="K", default=1, show_default=True, help="Of each process."),
)
time_limit_option = click.option(
    "--time-limit", metavar="DURATION", help="Stop after 90, 30m, 2h ...; exit 75, resumable."
)
log_json_option = click.option(
    "--log-json", is_flag=True, help="Write progress and logs to stderr as JSON, an object on a line."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
pick_option = click.option(
    "--pick", metavar="P", default="best", show_default=True, help="best, bsba, final, selected, or a round."
)
