"""Scoring one configuration of a model, once, with nothing stored."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeAlias

from tale_ray.attempt.execution import encode_questions, make_executor
from tale_ray.attempt.identity import with_absolute_paths
from tale_ray.attempt.request import check_request
from tale_ray.attempt.rows import prepare_rows
from tale_ray.attempt.search import LoadingStarted, ModelLoaded, RowsPrepared
from tale_ray.config import SearchConfig
from tale_ray.errors import ConfigError, TaskError
from tale_ray.records import Score, SplitName
from tale_ray.results.summary import stored_history
from tale_ray.search.driver import unit_shape
from tale_ray.search.interruption import Interruption
from tale_ray.search.pool import Pool, PoolEvent
from tale_ray.search.scheduler import Keep, Scheduler, Scoring
from tale_ray.store.reader import RunReader

EvaluationEvent: TypeAlias = RowsPrepared | LoadingStarted | ModelLoaded | PoolEvent | Score


def run_evaluation(
    config: SearchConfig, split: SplitName | None, interruption: Interruption
) -> Iterator[EvaluationEvent]:
    """Score the model without `config.strategy.remove` on the rows of a split (None: of all); the score comes last.

    Raises:
        UsageError: the request cannot be met.
        Interrupted: asked to stop.
    """
    config = with_absolute_paths(config)
    with interruption.breakable():
        prepared = prepare_rows(config.task)
        check_request(config)
    yield RowsPrepared(prepared.spec.name, prepared.counts, prepared.notes)
    if split is not None and split not in prepared.examples:
        raise TaskError(
            f"split {split} of task {prepared.spec.name} is empty: its rows are {prepared.counts}; "
            "choose another split, or give it a share with --splits"
        )
    chosen = [split] if split is not None else list(prepared.examples)
    yield LoadingStarted()
    executor = make_executor(config, f"evaluate-{prepared.spec.name}")
    with contextlib.closing(executor):
        with interruption.breakable():
            executor.connect()
        interruption.arm()
        with interruption.breakable():
            info = executor.load()
            yield ModelLoaded(info)
            config.strategy.check_layers(info.num_layers)
            questions = encode_questions(
                executor, replace(prepared, examples={s: prepared.examples[s] for s in chosen}), info
            )
            executor.share(questions)
        pool = Pool(executor, interruption)
        total = Score(correct=0, total=0, invalid=0)
        for name in chosen:
            scoring = Scoring("evaluation", name, config.strategy.remove, (None,), len(prepared.examples[name]))
            scheduler = Scheduler(scoring, unit_shape(scoring, None), workers=pool.workers)
            for step in pool.run(scheduler):
                if not isinstance(step, Keep):
                    yield step
            score = scheduler.scores()[0]
            total = Score(total.correct + score.correct, total.total + score.seen, total.invalid + score.invalid)
        yield total


def picked_removal(reader: RunReader, pick: str) -> tuple[int, ...]:
    """Return the layers removed by a result of a run: `best`, `bsba`, `final`, or the number of a committed round.

    Raises:
        ConfigError: the run has no such result.
    """
    history = stored_history(reader, reader.manifest())
    if not history.rounds:
        raise ConfigError(f"{reader.uri} has no finished round yet: go on with `tale-ray resume {reader.uri}`")
    if pick in ("best", "bsba", "final"):
        return history.picks[pick].removed
    if pick.isdigit() and int(pick) < len(history.rounds):
        return history.rounds[int(pick)].removed
    raise ConfigError(
        f"pick {pick!r} is not a result of {reader.uri}: choose best, bsba, final, or a round from 0 to "
        f"{len(history.rounds) - 1}"
    )
