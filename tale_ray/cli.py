"""The command line: parse, call, print. Errors become exit codes here and nowhere else."""

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any, get_args

import click
from click.core import ParameterSource

import tale_ray
from tale_ray import watch
from tale_ray.api import evaluated_config, make_config, resumed_config, resumed_study
from tale_ray.attempt.evaluate import Evaluation, kept_answers, run_evaluation
from tale_ray.attempt.preview import preview_row, preview_text
from tale_ray.attempt.search import RunOpened, SearchPlan, plan_search, run_search
from tale_ray.attempt.study import StudyOpened, plan_study, run_study
from tale_ray.cli_doctor import doctor
from tale_ray.cli_export import export
from tale_ray.cli_finetune import finetune
from tale_ray.cli_information import information
from tale_ray.cli_jobs import COMMANDS as JOB_COMMANDS
from tale_ray.cli_latency import latency
from tale_ray.cli_options import (
    data_root_option,
    include_path_option,
    json_option,
    log_json_option,
    model_options,
    resource_options,
    seed_option,
    shots_option,
    splits_option,
    strategy_options,
    task_options,
    time_limit_option,
    with_options,
)
from tale_ray.cli_plan import plan
from tale_ray.cli_report import COMMANDS as REPORT_COMMANDS
from tale_ray.cli_shown import changed, given, shown
from tale_ray.cli_synergy import synergy
from tale_ray.cli_transfer import transfer
from tale_ray.config import ResumeMode, SearchConfig
from tale_ray.errors import ConfigError, Interrupted, TaleRayError
from tale_ray.option_file import read_option_file
from tale_ray.option_texts import parse_seeds
from tale_ray.results.tables import count_text, evaluation_json, evaluation_text
from tale_ray.search.interruption import Interruption
from tale_ray.store.study import StudyFolder
from tale_ray.store.uris import strip_credentials
from tale_ray.tasks.data import count_rows
from tale_ray.tasks.description import describe_task
from tale_ray.tasks.harness import PREFIX as HARNESS
from tale_ray.tasks.harness import load_harness_task
from tale_ray.tasks.spec import builtin_tasks, load_task


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(tale_ray.__version__)
def cli() -> None:
    """Find the transformer layers that a task is better off without."""


@cli.command()
@click.option(
    "--config",
    is_eager=True,
    expose_value=False,
    callback=read_option_file,
    metavar="FILE",
    help="Flat YAML of long option names with underscores; the command line wins.",
)
@model_options
@task_options
@click.option("--seeds", metavar="LIST", help="Search once with each seed, e.g. 0,1,2, and compare: a study.")
@strategy_options
@with_options(
    click.option("--remove", metavar="LAYERS", help="Start without these, e.g. 3,7."),
    click.option("--exhaustive", is_flag=True, help="Score every candidate on every row."),
)
@resource_options
@with_options(
    click.option(
        "--run", metavar="DIR_OR_URI", help="Run folder, or that of a study.  [default: runs/<task>-<digest>]"
    ),
    click.option(
        "--resume",
        type=click.Choice(get_args(ResumeMode)),
        default="auto",
        show_default=True,
        help="Go on with what the run folder holds: if there is something, always, or never.",
    ),
    time_limit_option,
    log_json_option,
    click.option("--dry-run", is_flag=True, help="Check everything that needs no model, print it, and stop."),
)
@click.pass_context
def search(context: click.Context, /, dry_run: bool, log_json: bool, seeds: str | None, **options: Any) -> None:
    """Search for the layers that a task is better off without.

    Goes on with an unfinished search, and prints the result of a finished one again.
    """
    config = make_config(**given(options))
    chosen = _chosen_seeds(context, seeds, config.task.seed)
    if dry_run:
        for each in [config] if chosen is None else plan_study(config, chosen)[1]:
            _print_plan(plan_search(each))
    else:
        _search(config, chosen, log_json)


@cli.command()
@click.argument("run")
@click.option("--model", metavar="PATH", help="Where the same model lies now.")
@click.option("--task", metavar="PATH", help="Where the same task file lies now.")
@click.option("--calibration", metavar="PATH", help="Where the same calibration text lies now.")
@data_root_option
@include_path_option
@click.option("--epsilon", help="A larger one than the run has.")
@click.option("--max-removed", type=int, metavar="N", help="A larger one than the run has.")
@resource_options
@time_limit_option
@log_json_option
@click.pass_context
def resume(context: click.Context, /, run: str, log_json: bool, **options: Any) -> None:
    """Go on with a run from its folder, wherever it is now.

    On the cluster that it was on, unless --address or --local names another place. A finished run goes on too where
    --epsilon or --max-removed is larger than it was. A study goes on with each of its runs.
    """
    if StudyFolder(run).exists():
        _search(*resumed_study(run, **changed(context, options)), log_json)
    else:
        _search(resumed_config(run, **changed(context, options)), None, log_json)


@cli.command()
@click.argument("run")
@json_option
@click.option("--watch", "is_watched", is_flag=True, help="Show it again whenever it has changed, until it has ended.")
def show(run: str, as_json: bool, is_watched: bool) -> None:
    """Show what a run, or a study, has found.

    Reads its folder alone: while it runs, after a kill, when the cluster is gone. With --watch and --json, every change
    is an object on a line.
    """
    (watch.watch if is_watched else watch.show)(run, as_json)


@cli.command()
@click.option("--run", metavar="RUN", help="Take model, task and rows from a run.")
@click.option("--pick", metavar="P", help="With --run: best, bsba, final, selected, or a round.  [default: best]")
@model_options
@task_options
@click.option("--remove", metavar="LAYERS", help="Score without these layers, e.g. 3,7.")
@click.option(
    "--split",
    type=click.Choice(["search", "select", "test", "all"]),
    default="test",
    show_default=True,
    help="Rows to score.",
)
@click.option("--store", is_flag=True, help="With --run: keep the answers there, for `report` and `compare`.")
@resource_options
@log_json_option
@json_option
@click.pass_context
def evaluate(
    context: click.Context,
    /,
    run: str | None,
    pick: str | None,
    split: str,
    store: bool,
    log_json: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Score a model without some of its layers.

    With --run, model and rows have to be those of the run, but for what other options ask to be different.
    """
    chosen_options = given(options) if run is None else changed(context, options)
    config, expected = evaluated_config(run, pick, **chosen_options)
    if store and run is None:
        raise ConfigError("--store keeps answers in a run: name it with --run, or leave the option out")
    interruption = Interruption()
    evaluation = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(interruption.on_signals())
        display = stack.enter_context(shown(log_json))
        keep = stack.enter_context(kept_answers(run, config, expected, split)) if store and run else None
        chosen: Any = None if split == "all" else split
        for event in run_evaluation(config, expected, chosen, interruption):
            if isinstance(event, Evaluation):
                evaluation = event
            else:
                display.show(event)
        assert evaluation is not None
        if keep is not None:
            keep(evaluation)
    values = evaluation_json(evaluation.score, evaluation.comparison, config.strategy.remove, split)
    click.echo(json.dumps(values, indent=2) if as_json else evaluation_text(values))


@cli.group(invoke_without_command=True)
@data_root_option
@click.pass_context
def tasks(context: click.Context, data_root: str | None) -> None:
    """List the built-in tasks: where their rows are and how many, and how they are scored."""
    if context.invoked_subcommand is None:
        for name in builtin_tasks():
            spec = load_task(name)
            click.echo(describe_task(spec, count_rows(spec, data_root)))


@tasks.command("show")
@click.argument("name")
@with_options(
    click.option("--model", metavar="M", help="Show a row as this model is asked it; its tokenizer is enough."),
    click.option("--row", type=int, metavar="N", help="Which row of the search split, from 0.  [default: 0]"),
    shots_option,
    seed_option,
    splits_option,
    data_root_option,
    include_path_option,
)
@click.pass_context
def show_task(context: click.Context, /, name: str, model: str | None, row: int | None, **options: Any) -> None:
    """Print the file of a task, to copy from: its source, prompt and answers.

    With --model, print one row instead, exactly as that model is asked it: text, token ids, the reference reply and
    the target.
    """
    if model is not None:
        config = make_config(model=model, task=name, **given(options))
        click.echo(preview_text(preview_row(config.model, config.task, row or 0)))
        return
    if idle := sorted({"row", "shots", "seed", "splits"} & changed(context, {"row": row, **options}).keys()):
        raise ConfigError(f"--{idle[0]} is about a row as a model is asked it: name the model with --model")
    if name.startswith(HARNESS):
        spec, examples = load_harness_task(name, options["include_path"], num_shots=0)
        click.echo(describe_task(spec, len(examples)))
        click.echo("# Its configuration. Change it in a file of your own under --include-path.")
        click.echo(spec.text.rstrip())
        return
    spec = load_task(name)
    click.echo(f"# The file of the task {spec.name}. Copy and change it, and search with --task PATH.")
    click.echo(spec.text.rstrip())


_TRAINING = (finetune, synergy)
for _command in (export, *REPORT_COMMANDS, transfer, latency, information, *_TRAINING, plan, doctor, *JOB_COMMANDS):
    cli.add_command(_command)


def _chosen_seeds(context: click.Context, seeds: str | None, seed: int) -> tuple[int, ...] | None:
    """Return the seeds of a study, or None if one run is asked for; the command line wins over the config file."""
    if seeds is None:
        return None
    one, several = (context.get_parameter_source(name) for name in ("seed", "seeds"))
    if one is several:
        raise ConfigError(f"seed {seed} and seeds {seeds} exclude each other: leave one out")
    return None if one is ParameterSource.COMMANDLINE else parse_seeds(seeds)


def _search(config: SearchConfig, seeds: Sequence[int] | None, log_json: bool) -> None:
    """Search, once or with each seed, show how it goes on stderr, and print the result on stdout."""
    interruption = Interruption()
    run = None
    with interruption.on_signals(config.storage.time_limit_seconds), shown(log_json) as display:
        try:
            for event in run_search(config, interruption) if seeds is None else run_study(config, seeds, interruption):
                if isinstance(event, StudyOpened):
                    run = event.study
                elif isinstance(event, RunOpened) and seeds is None:
                    run = event.run
                display.show(event)
        except Interrupted as error:
            if type(error) is not Interrupted:  # the others say what to do
                raise
            remedy = (
                "nothing is lost; run the same command again"
                if run is None
                else f"everything finished is stored; go on with: tale-ray resume {shlex.quote(strip_credentials(run))}"
            )
            raise Interrupted(f"{error}: {remedy}") from error
    assert run is not None
    watch.show(run, as_json=False)


def _print_plan(plan: SearchPlan) -> None:
    counts = ", ".join(count_text(count, f"{split} row") for split, count in plan.prepared.counts.items())
    click.echo(f"task {plan.prepared.spec.name}: {counts}")
    for note in plan.prepared.notes:
        click.echo(f"note: {note}")
    click.echo(f"model {plan.config.model.model}: {'present' if plan.identity else 'loaded by the workers'}")
    click.echo(f"run folder: {strip_credentials(plan.run) if plan.run else 'named when the model is known'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 usage, 75 interrupted and resumable.

    Args:
        arguments: what follows the name of the program; None: as this process was called.
    """
    try:
        cli.main(arguments, standalone_mode=False)
    except TaleRayError as error:
        click.echo(f"tale-ray: {strip_credentials(str(error))}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("tale-ray: interrupted before anything was started", err=True)
        sys.exit(75)
