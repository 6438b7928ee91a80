"""The command line: parse, call, print. Errors become exit codes here and nowhere else."""

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import yaml
from click.core import ParameterSource
from rich.console import Console

import tale_ray
from tale_ray.api import make_config, resumed_config
from tale_ray.attempt.evaluate import picked_removal, run_evaluation
from tale_ray.attempt.search import RunOpened, SearchPlan, plan_search, run_search
from tale_ray.config import (
    DEFAULT_SPLITS,
    DType,
    EpsilonMode,
    ResumeMode,
    SearchConfig,
    parse_bytes,
    parse_duration,
    parse_layers,
    splits_text,
)
from tale_ray.errors import ConfigError, TaleRayError
from tale_ray.progress import Display
from tale_ray.records import Score
from tale_ray.results.summary import summarize
from tale_ray.results.tables import accuracy_text, layers_text, output_console, run_table, score_json
from tale_ray.search.interruption import Interruption
from tale_ray.store.reader import RunReader
from tale_ray.tasks.spec import builtin_tasks, describe_task, load_task

Command = TypeVar("Command", bound=Callable[..., Any])


def _parsed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """Return a callback that reads an option's text by a function of `config`, whose errors say all there is."""

    def read(_context: click.Context, _parameter: click.Parameter, text: str | None) -> Any:
        return None if text is None else parse(str(text))

    return read


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        return functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)

    return decorate


def _option_file(context: click.Context, _parameter: click.Parameter, path: str | None) -> None:
    """Take the values of a YAML file as defaults; the command line wins."""
    if path is None:
        return
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from error
    known = {parameter.name for parameter in context.command.params if parameter.name} - {"config"}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"config file {path} is not a mapping: write one `option: value` a line")
    if unknown := sorted(set(values) - known):
        raise ConfigError(
            f"config file {path}: option {unknown[0]!r} is not known: write one of {', '.join(sorted(known))}"
        )
    lists = {key: ",".join(map(str, value)) for key, value in values.items() if isinstance(value, list)}
    context.default_map = {**values, **lists}


_layers = functools.partial(parse_layers, name="layers")

model_options = _options(
    click.option("--model", metavar="M", help="Hub id, folder, or `bundled`."),
    click.option("--gguf", metavar="FILE", help="GGUF file in the model's folder."),
    click.option("--revision", metavar="R", help="Revision of a hub model."),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
    click.option("--dtype", type=click.Choice(get_args(DType)), default="auto", show_default=True),
)
data_root_option = click.option(
    "--data-root", metavar="DIR", envvar="TALE_RAY_DATA_ROOT", help="Local mirror of hub data sets."
)
task_options = _options(
    click.option("--task", metavar="T", help="Built-in task, or path of a task file (`tale-ray tasks`)."),
    click.option("--rows", type=int, metavar="N", help="Use the first N search rows.  [default: all]"),
    click.option("--splits", metavar="SHARES", default=splits_text(DEFAULT_SPLITS), show_default=True),
    click.option("--seed", type=int, default=0, show_default=True, help="Decides which rows are in which split."),
    data_root_option,
)
resource_options = _options(
    click.option("--local", is_flag=True, help="Run in this process, without Ray."),
    click.option("--address", metavar="A", help="Ray cluster to join.  [default: $RAY_ADDRESS, else a private one]"),
    click.option("--workers", type=int, metavar="N", help="At most N workers.  [default: as many as fit]"),
    click.option("--gpus-per-worker", type=int, metavar="K", default=0, show_default=True),
    click.option("--cpus-per-worker", type=int, metavar="K", default=1, show_default=True),
    click.option(
        "--wait-resources",
        metavar="SECONDS",
        callback=_parsed(parse_duration),
        default="60",
        show_default=True,
        help="How long the first worker may look for a place.",
    ),
    click.option(
        "--batch-bytes",
        metavar="B",
        callback=_parsed(parse_bytes),
        help="Memory of one micro-batch.  [default: chosen from the device]",
    ),
)
time_limit_option = click.option(
    "--time-limit",
    metavar="DURATION",
    callback=_parsed(parse_duration),
    help="Stop after 90, 30m, 2h ...; exit 75, resumable.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(tale_ray.__version__)
def cli() -> None:
    """Find the transformer layers that a task is better off without."""


@cli.command()
@click.option(
    "--config",
    is_eager=True,
    expose_value=False,
    callback=_option_file,
    metavar="FILE",
    help="Flat YAML of long option names with underscores; the command line wins.",
)
@model_options
@task_options
@_options(
    click.option("--strategy", default="tale", show_default=True),
    click.option("--epsilon", default="0.08", show_default=True, help="Accuracy that may be lost, absolute."),
    click.option(
        "--epsilon-mode",
        type=click.Choice(get_args(EpsilonMode)),
        default="baseline",
        show_default=True,
        help="Lost against the full model, or against the last accepted one.",
    ),
    click.option("--max-removed", type=int, metavar="N", help="Remove at most N layers.  [default: no limit]"),
    click.option(
        "--remove", metavar="LAYERS", callback=_parsed(_layers), default="", help="Start without these, e.g. 3,7."
    ),
    click.option("--keep-layers", metavar="LAYERS", callback=_parsed(_layers), default="", help="Never remove these."),
    click.option("--exhaustive", is_flag=True, help="Score every candidate on every row."),
)
@resource_options
@_options(
    click.option("--run", metavar="DIR_OR_URI", help="Run folder.  [default: runs/<task>-<digest>]"),
    click.option("--resume", type=click.Choice(get_args(ResumeMode)), default="auto", show_default=True),
    time_limit_option,
    click.option("--dry-run", is_flag=True, help="Check everything that needs no model, print it, and stop."),
)
def search(dry_run: bool, **options: Any) -> None:
    """Search for the layers that a task is better off without, or go on with an unfinished search."""
    config = make_config(**_with_ray_address(_described(options)))
    if dry_run:
        _print_plan(plan_search(config))
    else:
        _search(config)


@cli.command()
@click.argument("run")
@click.option("--model", metavar="PATH", help="Where the same model lies now.")
@data_root_option
@resource_options
@time_limit_option
@click.pass_context
def resume(context: click.Context, /, run: str, **options: Any) -> None:
    """Go on with a run from its folder, wherever it is now."""
    _search(resumed_config(run, **_with_ray_address(_changed(context, options))))


@cli.command()
@click.argument("run")
@json_option
def show(run: str, as_json: bool) -> None:
    """Show what a run has found, from its folder alone: while it runs, after a kill, when the cluster is gone."""
    _show(run, as_json)


@cli.command()
@click.option("--run", metavar="RUN", help="Take model, task and rows from a run.")
@click.option("--pick", default="best", show_default=True, help="With --run: best, bsba, final, or a round.")
@model_options
@task_options
@click.option(
    "--remove", metavar="LAYERS", callback=_parsed(_layers), default="", help="Score without these layers, e.g. 3,7."
)
@click.option("--split", type=click.Choice(["search", "select", "test", "all"]), default="test", show_default=True)
@resource_options
@json_option
@click.pass_context
def evaluate(context: click.Context, /, run: str | None, pick: str, split: str, as_json: bool, **options: Any) -> None:
    """Score a model, without some of its layers, on the rows of a task."""
    if run is not None:
        given = _changed(context, options)
        given.setdefault("remove", picked_removal(RunReader(run), pick))
        config = resumed_config(run, **_with_ray_address(given))
    else:
        config = make_config(**_with_ray_address(_described(options)))
    interruption = Interruption()
    console = Console(stderr=True)
    score = None
    with interruption.on_signals(), Display(console) as display:
        for event in run_evaluation(config, None if split == "all" else split, interruption):  # type: ignore[arg-type]
            if isinstance(event, Score):
                score = event
            else:
                display.show(event)
    assert score is not None
    values = score_json(score, config.strategy.remove, split)
    if as_json:
        click.echo(json.dumps(values, indent=2))
    else:
        click.echo(
            f"{split} rows, layers removed: {layers_text(config.strategy.remove)}: {accuracy_text(values)}, "
            f"{score.invalid} without a readable answer"
        )


@cli.group(invoke_without_command=True)
@click.pass_context
def tasks(context: click.Context) -> None:
    """List the built-in tasks."""
    if context.invoked_subcommand is None:
        for name in builtin_tasks():
            click.echo(describe_task(load_task(name)))


@tasks.command("show")
@click.argument("name")
def show_task(name: str) -> None:
    """Show a task: its source, prompt and answers."""
    spec = load_task(name)
    click.echo(describe_task(spec))
    click.echo(yaml.safe_dump(spec.identity(), sort_keys=False, allow_unicode=True).rstrip())


def _described(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are given; a model and a task have to be."""
    for name in ("model", "task"):
        if options.get(name) is None:
            raise ConfigError(f"--{name} is missing: say what to search with --{name}, or name it in the --config file")
    return {name: value for name, value in options.items() if value is not None}


def _changed(context: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were set for this call, by whatever means."""
    return {
        name: value
        for name, value in options.items()
        if value is not None and context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }


def _with_ray_address(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with the address that Ray's own tools would use, unless another place is asked for."""
    if not options.get("local") and not options.get("address") and os.environ.get("RAY_ADDRESS"):
        return {**options, "address": os.environ["RAY_ADDRESS"]}
    return options


def _search(config: SearchConfig) -> None:
    """Search, show how it goes on stderr, and print the result on stdout."""
    interruption = Interruption()
    run = None
    with interruption.on_signals(config.storage.time_limit_seconds), Display(Console(stderr=True)) as display:
        try:
            for event in run_search(config, interruption):
                if isinstance(event, RunOpened):
                    run = event.run
                display.show(event)
        except TaleRayError as error:
            if error.exit_code == 75 and run is not None:
                error.args = (f"{error}. Everything finished is stored; go on with: tale-ray resume {run}",)
            raise
    assert run is not None
    _show(run, as_json=False)


def _show(run: str, as_json: bool) -> None:
    summary = summarize(RunReader(run))
    if as_json:
        click.echo(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        output_console().print(run_table(summary))


def _print_plan(plan: SearchPlan) -> None:
    counts = ", ".join(f"{count} {split} rows" for split, count in plan.prepared.counts.items())
    click.echo(f"task {plan.prepared.spec.name}: {counts}")
    for note in plan.prepared.notes:
        click.echo(f"note: {note}")
    click.echo(f"model {plan.config.model.model}: {'present' if plan.identity else 'loaded by the workers'}")
    click.echo(f"run folder: {plan.run or 'named when the model is known'}")


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 usage, 75 interrupted and resumable."""
    try:
        cli.main(standalone_mode=False)
    except TaleRayError as error:
        click.echo(f"tale-ray: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("tale-ray: interrupted before anything was started", err=True)
        sys.exit(75)
