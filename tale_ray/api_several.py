"""The Python API of several runs together: the same as the commands `compare` and `transfer`."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from tale_ray.api import Run, make_config, resumed_config
from tale_ray.attempt.transfer import TransferFinished, run_transfer
from tale_ray.attempt.transfer_plan import TransferRequest
from tale_ray.errors import ConfigError
from tale_ray.results.compare import compare_runs
from tale_ray.search.interruption import Interruption

_OF_FURTHER_TASKS = ("shots", "splits", "seed")  # options; runs have their own
_OF_ALL_TASKS = ("data_root", "include_path")


def compare(*runs: str | os.PathLike[str] | Run) -> dict[str, Any]:
    """Return what `tale-ray compare --json` prints: runs on the same test rows, at equal numbers of removed layers.

    Raises:
        ConfigError: there are fewer than two runs, or they cannot be compared.
        StoreError: there is no run, or a file of it is damaged.
    """
    return compare_runs([_uri(run) for run in runs])


def transfer(
    *runs: str | os.PathLike[str] | Run,
    tasks: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
    pick: str | int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return what `tale-ray transfer --json` prints: layers found on one task, tested on the others.

    Takes the options of that command, `tasks` for its `--task`. Scores what is missing, and stores it in the runs.

    Raises:
        UsageError: the request cannot be met.
        Interrupted: stopped before the end; what is scored is stored.
        TaleRayError: a unit of work failed on every try.
    """
    named = [tasks] if isinstance(tasks, str | os.PathLike) else list(tasks)
    request = transfer_request(
        [_uri(run) for run in runs], tasks=[os.fspath(task) for task in named], pick=pick, **options
    )
    interruption = Interruption()
    with interruption.on_signals():
        *_, finished = run_transfer(request, interruption)
    assert isinstance(finished, TransferFinished)
    return finished.values


def transfer_request(
    runs: Sequence[str], *, tasks: Sequence[str] = (), pick: str | int | None = None, **options: Any
) -> TransferRequest:
    """Return what is asked for, from options of `tale-ray transfer` that were given.

    Raises:
        ConfigError: no run is named, an option is unknown, or a value breaks a rule.
        StoreError: there is no run.
    """
    if not runs:
        raise ConfigError("no run is named: name the runs whose layers are to be tested")
    of_tasks = {name: options[name] for name in (*_OF_FURTHER_TASKS, *_OF_ALL_TASKS) if name in options}
    if not tasks and (idle := next((name for name in _OF_FURTHER_TASKS if name in options), None)):
        raise ConfigError(
            f"{idle} is for further tasks, and runs have their own: name one with --task, or leave it out"
        )
    of_runs = {name: value for name, value in options.items() if name not in _OF_FURTHER_TASKS}
    configs = tuple(resumed_config(run, **of_runs) for run in runs)
    stored = {name: getattr(configs[0].task, name) for name in _OF_ALL_TASKS}
    return TransferRequest(
        configs=configs,
        tasks=tuple(make_config(model="bundled", task=task, **{**stored, **of_tasks}).task for task in tasks),
        pick=None if pick is None else str(pick),
    )


def _uri(run: str | os.PathLike[str] | Run) -> str:
    return run.uri if isinstance(run, Run) else os.fspath(run)
