"""Scoring one configuration of a model, once; nothing is stored, unless a run is to keep the answers."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from tale_ray.attempt.execution import connect, encode_questions, make_executor
from tale_ray.attempt.identity import with_absolute_paths
from tale_ray.attempt.request import check_request
from tale_ray.attempt.rows import PreparedRows, prepare_rows
from tale_ray.attempt.search import LoadingStarted, ModelLoaded, RowsPrepared
from tale_ray.config import SearchConfig
from tale_ray.errors import ConfigError, StoreError, TaskError
from tale_ray.records import ModelInfo, Round, RowAnswer, Score, SplitName
from tale_ray.results.held_out import baseline_answers, selected_result
from tale_ray.results.statistics import PairedComparison, compare
from tale_ray.results.summary import stored_history
from tale_ray.search.driver import held_out_scope
from tale_ray.search.instructions import Keep
from tale_ray.search.interruption import Interruption
from tale_ray.search.pace import Pace
from tale_ray.search.pool import Pool, PoolEvent
from tale_ray.search.scheduler import Scoring
from tale_ray.store.reader import RunReader
from tale_ray.store.run import RunWriter
from tale_ray.store.tables import AnswerSheet
from tale_ray.tasks.splits import digest_rows


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a configuration scored, and how it compares with the full model of its run on the same rows."""

    score: Score
    comparison: PairedComparison | None  # None: not a result of a run, or the run has no answers on these rows
    sheets: tuple[AnswerSheet, ...] = ()  # what was answered, split by split


EvaluationEvent: TypeAlias = RowsPrepared | LoadingStarted | ModelLoaded | PoolEvent | Evaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredIdentity:
    """What a run says of its model and its rows; what is scored as a result of that run has to be the same."""

    run: str = ""  # for people
    model: Mapping[str, str] = field(default_factory=dict)  # `digest` and `dtype`, those that have to be the same
    task: Mapping[str, Any] | None = None  # what can change a prediction or its score; None: may be another
    rows: Mapping[str, str] = field(default_factory=dict)  # digest by split, of those that have to be the same
    baseline: Mapping[SplitName, AnswerSheet] = field(default_factory=dict)  # the full model's, if all of these are
    may_differ: bool = True  # with --task and --model: what is refused says so

    def check_task(self, prepared: PreparedRows) -> None:
        """Refuse another task or other rows.

        Raises:
            StoreError: the message names what differs.
        """
        asked = prepared.spec.identity()
        if self.task is not None and (changed := [key for key in asked if self.task.get(key) != asked[key]]):
            way_out = ", or name it with --task to score the run on it as it is" if self.may_differ else ""
            raise StoreError(
                f"task {prepared.spec.name} is no longer what {self.run} was searched on: `{changed[0]}` has changed; "
                f"restore the task file{way_out}"
            )
        for split, examples in prepared.splits.items():
            digest = digest_rows([example.digest for example in examples])
            if (stored := self.rows.get(split, digest)) != digest:
                way_out = ", or name the task with --task to score the run on the rows as they are"
                raise StoreError(
                    f"the {split} rows of task {prepared.spec.name} are not those that {self.run} was searched on "
                    f"(SHA-256 {stored[:12]}, now {digest[:12]}); restore its data{way_out if self.may_differ else ''}"
                )

    def check_digest(self, digest: str, model: str) -> None:
        """Refuse another model, which need not be loaded for it.

        Raises:
            StoreError: the message names both.
        """
        if (stored := self.model.get("digest", digest)) != digest:
            way_out = "name it with --model to score it as it is" if self.may_differ else "say with --model where it is"
            raise StoreError(
                f"the model {model} is not the one that {self.run} was searched with "
                f"(SHA-256 {stored[:12]}, now {digest[:12]}); restore it, or {way_out}"
            )

    def check_model(self, info: ModelInfo, model: str) -> None:
        """Refuse another model, or the same one in another dtype.

        Raises:
            StoreError: the message names what differs.
        """
        self.check_digest(info.digest, model)
        if (stored := self.model.get("dtype", info.dtype)) != info.dtype:
            raise StoreError(
                f"the model would be scored in {info.dtype}, and {self.run} was searched in {stored}: ask for one of "
                f"them with --dtype"
            )


def stored_identity(reader: RunReader, options: Mapping[str, Any]) -> StoredIdentity:
    """Return what a run says of all that `options` (those given for this call) do not ask to be different."""
    manifest = reader.manifest()
    parts = {"digest": ("model", "gguf", "revision"), "dtype": ("model", "dtype")}
    same_task = "task" not in options
    same_rows = not {"task", "rows", "shots", "splits", "seed"} & set(options)
    model = {part: manifest.model[part] for part, names in parts.items() if not set(names) & set(options)}
    is_same = same_rows and len(model) == len(parts)
    return StoredIdentity(
        run=reader.uri,
        model=model,
        task=manifest.task if same_task else None,
        rows={split: values["digest"] for split, values in manifest.rows.items()} if same_rows else {},
        baseline=baseline_answers(reader) if is_same else {},
    )


def run_evaluation(
    config: SearchConfig, expected: StoredIdentity, split: SplitName | None, interruption: Interruption
) -> Iterator[EvaluationEvent]:
    """Score the model without `config.strategy.remove` on the rows of a split (None: of all). Ends with an Evaluation.

    Raises:
        UsageError: the request cannot be met, or model or rows are not the expected ones.
        Interrupted: asked to stop.
    """
    config = with_absolute_paths(config)
    with interruption.breakable():
        prepared = prepare_rows(config.task)
        expected.check_task(prepared)
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
        connect(executor, interruption)
        with interruption.breakable():
            info = executor.load()
        yield ModelLoaded(info)
        expected.check_model(info, config.model.model)
        with interruption.breakable():
            config.strategy.check_layers(info.num_layers)
            questions = encode_questions(
                executor, replace(prepared, examples={s: prepared.examples[s] for s in chosen}), info
            )
            executor.share(questions)
        pool = Pool(executor, interruption)
        answers: dict[SplitName, tuple[RowAnswer, ...]] = {}
        for name in chosen:
            scoring = Scoring("evaluation", name, config.strategy.remove, (None,), len(prepared.examples[name]))
            pace = Pace(info.num_layers, questions.max_new_tokens, is_streamed=info.is_streamed)
            scheduler = pool.scheduler(scoring, pace)
            for step in pool.run(scheduler):
                if not isinstance(step, Keep):
                    yield step
            answers[name] = scheduler.answers(None)
    yield _evaluation(prepared, answers, expected.baseline)


def _evaluation(
    prepared: PreparedRows,
    answers: Mapping[SplitName, Sequence[RowAnswer]],
    baseline: Mapping[SplitName, AnswerSheet],
) -> Evaluation:
    """Return what the answers come to, and how they compare with the full model's if all of those are there."""
    found = [answer for split in answers for answer in answers[split]]
    score = Score(
        correct=sum(answer.correct for answer in found),
        total=len(found),
        invalid=sum(answer.prediction is None for answer in found),
    )
    sheets = tuple(
        AnswerSheet(
            scope="evaluation",
            split=split,
            row_digests=tuple(example.digest for example in prepared.examples[split]),
            targets=tuple(example.target for example in prepared.examples[split]),
            answers=tuple(answers[split]),
        )
        for split in answers
    )
    for split, sheet in zip(answers, sheets, strict=True):
        if split not in baseline or baseline[split].row_digests != sheet.row_digests:
            return Evaluation(score, None, sheets)
    others = [answer.correct for split in answers for answer in baseline[split].answers]
    return Evaluation(score, compare([answer.correct for answer in found], others), sheets)


@contextlib.contextmanager
def kept_answers(
    run: str, config: SearchConfig, expected: StoredIdentity, split: str
) -> Iterator[Callable[[Evaluation], None]]:
    """Hold a run's lease, and give what stores an evaluation among the run's own answers on select or test rows.

    Raises:
        ConfigError: it would not be what the run's model says of the run's rows in one of its rounds.
        LeaseHeld: another process writes to the run.
    """
    if split not in ("select", "test"):
        raise ConfigError(f"split {split} cannot be stored: a run keeps answers to select or test rows; choose one")
    if expected.task is None or not expected.rows or expected.model.keys() != {"digest", "dtype"}:
        raise ConfigError(
            f"{expected.run} keeps what its own model says of its own rows: leave out the options that change either, "
            "or leave out --store"
        )
    with RunWriter.claim(run, wait=False) as writer:
        rounds = stored_history(writer.reader, writer.reader.manifest()).rounds
        removed = config.strategy.remove
        number = next((entry.number for entry in rounds if entry.removed == removed), None)
        if number is None:
            raise ConfigError(
                f"{expected.run} has no round without exactly layers {list(removed)}: name one with --pick"
            )
        scope = held_out_scope("select" if split == "select" else "test", number)

        def keep(evaluation: Evaluation) -> None:
            (sheet,) = evaluation.sheets
            writer.write_answers(replace(sheet, scope=scope))

        yield keep


def picked_round(reader: RunReader, pick: str) -> Round:
    """Return the round that is a result of a run: `best`, `bsba`, `final`, `selected`, or a committed round's number.

    Raises:
        ConfigError: the run has no such result.
    """
    history = stored_history(reader, reader.manifest())
    if not history.rounds:
        raise ConfigError(f"{reader.uri} has no finished round yet: go on with `tale-ray resume {reader.uri}`")
    if pick in ("best", "bsba", "final"):
        return history.picks[pick]
    if pick == "selected":
        if (selected := selected_result(reader, history)) is None:
            raise ConfigError(
                f"{reader.uri} has no selected round: it has one when the search has ended and its rounds are scored "
                "on select rows; go on with `tale-ray resume`, give the select split a share, or pick another result"
            )
        return history.rounds[int(selected["round"])]
    if pick.isdigit() and int(pick) < len(history.rounds):
        return history.rounds[int(pick)]
    raise ConfigError(
        f"pick {pick!r} is not a result of {reader.uri}: choose best, bsba, final, selected, or a round from 0 to "
        f"{len(history.rounds) - 1}"
    )


def pruned_round(reader: RunReader, pick: str, remedy: str) -> Round:
    """Return the round that is a result of a run, as `picked_round` does, of one that removes something.

    Raises:
        ConfigError: the run has no such result, or it is the full model; `remedy` says what to do then.
    """
    picked = picked_round(reader, pick)
    if not picked.removed:
        raise ConfigError(
            f"pick {pick!r} of {reader.uri} is round 0, the full model, from which nothing is removed: {remedy} "
            f"pick another round with --pick (see `tale-ray show {reader.uri}`)"
        )
    return picked
