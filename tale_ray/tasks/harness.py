"""Tasks of lm-evaluation-harness (`lm-eval:NAME`): its rows, prompts, filters and metrics, by its own code.

It is an optional library, imported when a task of it is asked for. Its requests go to our engine, and its own
`process_results` says of every row whether that is right, as its evaluator would. Its cache of requests is not used.

This module does not tokenise, and knows nothing of models.
"""

import functools
import hashlib
import importlib.util
import inspect
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from tale_ray.errors import TaskError
from tale_ray.records import Choice, Example, RowAnswer
from tale_ray.tasks.spec import AnswerSpec, HarnessScoring, HarnessSource, TaskSpec
from tale_ray.tasks.splits import row_digest

PREFIX: Final = "lm-eval:"
FEWSHOT_SEED: Final = 1234  # what lm_eval's evaluator draws demonstrations with, whatever the seed of a run
_NEW_TOKENS: Final = 256  # where a task sets no limit, as in lm_eval
_LIMITS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one of its names, in order
_CHOICE_METRICS: Final = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # no others go by likelihoods alone
_NO_ANSWERS: Final = ("", "[invalid]")  # what its filters leave of a reply without an answer

_tasks: dict[str, "_Task"] = {}  # the task loaded last, by its fingerprint: driver and worker may be one process


@dataclass(frozen=True, slots=True)
class _Task:
    """A task of lm_eval with the rows that are scored."""

    task: Any
    docs: tuple[Mapping[str, Any], ...]


def load_harness_task(name: str, include_path: str | None, num_shots: int) -> tuple[TaskSpec, tuple[Example, ...]]:
    """Return a task of lm-evaluation-harness and all of its rows, rendered by it, in its order.

    `name` is `lm-eval:TASK`, `lm-eval:TASK:METRIC` or `lm-eval:TASK:METRIC,FILTER`; without them it is the first of
    the task. `num_shots` 0 shows as many demonstrations as the task asks for itself.

    Raises:
        TaskError: the library is missing, there is no such task, its rows cannot be read, or the engine or a count of
            right and wrong rows cannot serve it.
    """
    source, asked = _parse(name, include_path, num_shots)
    found = _load(source)
    task = found.task
    kind = task.OUTPUT_TYPE
    if kind not in ("multiple_choice", "generate_until"):
        raise TaskError(
            f"task {name}: it asks for {kind}, and rows are right or wrong by multiple_choice or generate_until only; "
            "use a task of one of these"
        )
    if kind == "multiple_choice" and callable(task.config.process_results):
        raise TaskError(
            f"task {name} scores choices by code of its own, which may ask whether one would have been decoded: that "
            "is not computed here; use a task with metrics such as acc"
        )
    requests = _requests(name, found)
    settings = _generation(name, task) if kind == "generate_until" else {}
    metric, chosen_filter = _metric(name, task, asked)
    fingerprint = _fingerprint(found)
    _tasks.clear()
    _tasks[fingerprint] = found
    scoring = HarnessScoring(
        source=source,
        metric=metric,
        filter=chosen_filter,
        fingerprint=fingerprint,
        config=_config_text(task),
    )
    answer = AnswerSpec(type="harness", stop=tuple(settings.get("until", ())), harness=scoring)
    examples = tuple(
        _example(number, task, doc, instances)
        for number, (doc, instances) in enumerate(zip(found.docs, requests, strict=True))
    )
    _check_scoring(name, answer, examples[0])
    spec = TaskSpec(
        name=name,
        description=f"{kind} of lm-evaluation-harness, version {task.VERSION}",
        source=source,
        shots=None,
        group_by=None,
        messages=(),
        reply="",
        target="",
        answer=answer,
        max_new_tokens=settings.get("max_new_tokens", 1),
        metric=metric,
        folder=Path(include_path or ".").absolute(),
        text=yaml.safe_dump(json.loads(scoring.config), sort_keys=True, allow_unicode=True),
    )
    return spec, examples


def judge_reply(scoring: HarnessScoring, reply: str, target: str) -> RowAnswer:
    """Return what a reply to a row answers by the task's filter, and whether its metric calls that right.

    `target` is the number of the row among all of the task's.

    Raises:
        TaskError: the metric is neither 0 nor 1, or the task is another one here.
    """
    found = _task_of(scoring)
    doc = found.docs[int(target)]
    filtered = _filtered(found.task, scoring.filter, reply, doc)
    correct = _is_right(scoring, found.task.process_results(doc, [filtered]))
    shown = filtered if isinstance(filtered, str) else json.dumps(filtered, default=str)
    return RowAnswer(reply, None if shown.strip() in _NO_ANSWERS else shown, correct)


def judge_choices(
    scoring: HarnessScoring, choices: Sequence[Choice], log_likelihoods: Sequence[float], target: str
) -> RowAnswer:
    """Return the most likely choice of a row, and whether the task's metric calls it right.

    Raises:
        TaskError: the metric is neither 0 nor 1, or the task is another one here.
    """
    found = _task_of(scoring)
    doc = found.docs[int(target)]
    correct = _is_right(scoring, found.task.process_results(doc, [(value, False) for value in log_likelihoods]))
    texts = found.task.doc_to_choice(doc)
    best = _best(scoring.metric, texts, log_likelihoods)
    return RowAnswer(choices[best].text, str(best), correct, tuple(log_likelihoods))


def _best(metric: str, texts: Sequence[str], log_likelihoods: Sequence[float]) -> int:
    """Return the choice that a metric of lm_eval looks at: the most likely one, by its own way of weighing them."""
    values = list(log_likelihoods[: len(texts)])
    if metric == "acc_norm":
        values = [value / max(1, len(text)) for value, text in zip(values, texts, strict=True)]
    elif metric == "acc_bytes":
        values = [value / max(1, len(text.encode())) for value, text in zip(values, texts, strict=True)]
    elif metric == "acc_mutual_info":
        values = [value - alone for value, alone in zip(values, log_likelihoods[len(texts) :], strict=True)]
    return values.index(max(values))


def _is_right(scoring: HarnessScoring, results: Mapping[str, Any]) -> bool:
    value: Any = results.get(scoring.metric)
    if not isinstance(value, bool | int | float) and not hasattr(value, "item"):
        raise TaskError(
            f"metric {scoring.metric} of task {scoring.source.task} gives {value!r} for a row: a search counts rows "
            f"that are right or wrong; choose another one of {', '.join(results)}"
        )
    if value not in (0, 1):
        raise TaskError(
            f"metric {scoring.metric} of task {scoring.source.task} gives {float(value):g} for a row: a search counts "
            "rows that are right (1) or wrong (0); choose a metric such as acc or exact_match"
        )
    return bool(value)


# Loading.


def _parse(name: str, include_path: str | None, num_shots: int) -> tuple[HarnessSource, str]:
    if importlib.util.find_spec("lm_eval") is None:
        raise TaskError(f"task {name} needs lm-evaluation-harness, which is not installed; run: pip install lm-eval")
    if include_path is not None and not Path(include_path).is_dir():
        raise TaskError(f"include path {include_path} is not a folder: give the folder of lm-eval task files")
    task, _, asked = name.removeprefix(PREFIX).partition(":")
    if not task:
        raise TaskError(f"task {name!r} names no task: write lm-eval:NAME, or lm-eval:NAME:METRIC")
    return HarnessSource(task=task, include_path=include_path, num_shots=num_shots), asked


def _load(source: HarnessSource) -> _Task:
    from lm_eval.tasks import TaskManager, get_task_dict

    with _quiet():
        manager = TaskManager(include_path=source.include_path, include_defaults=source.include_path is None)
        if source.include_path is not None and source.task not in manager.all_tasks:
            manager = TaskManager(include_path=source.include_path)  # indexes thousands of files
        if source.task not in manager.all_tasks:
            raise TaskError(
                f"task lm-eval:{source.task} is not known: it is neither a task of lm-evaluation-harness nor in a YAML "
                "file under --include-path; see `lm-eval ls tasks`"
            )
        try:
            loaded = get_task_dict([source.task], manager)
            task = loaded.get(source.task)
            if isinstance(task, Mapping) or not hasattr(task, "OUTPUT_TYPE"):
                raise TaskError(
                    f"lm-eval:{source.task} is a group of tasks, and a search has one: choose one of "
                    f"{', '.join(sorted(_leaves(loaded)))}"
                )
            if source.num_shots:
                task.set_config(key="num_fewshot", value=source.num_shots)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            with _seeded():
                return _Task(task, tuple(dict(doc) for doc in task.eval_docs))
        except TaskError:
            raise
        except Exception as error:  # whatever data sets, the hub, templates and code of the task come up with
            raise TaskError(
                f"task lm-eval:{source.task} cannot be loaded: {type(error).__name__}: {error}; tasks of the hub need "
                "it or its cache, those of --include-path the files that they name"
            ) from error


def _leaves(loaded: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in loaded.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield str(key)


def _requests(name: str, found: _Task) -> list[list[Any]]:
    """Return the requests of every row, as lm_eval builds them."""
    if not found.docs:
        raise TaskError(f"task {name} has no rows: check its data")
    task = found.task
    shots = task.config.num_fewshot or 0
    scored = [row_digest(doc) for doc in found.docs]
    if shots:
        try:
            shown = {row_digest(dict(doc)) for doc in task.fewshot_docs()}
        except Exception as error:  # data sets and code of the task
            raise TaskError(
                f"task {name} has no demonstrations: {type(error).__name__}: {error}; ask for none, or correct it"
            ) from error
        if common := sorted(shown & set(scored)):
            raise TaskError(
                f"task {name} takes its {shots} demonstrations from rows of which {len(common)} are scored as well "
                f"(digests {', '.join(digest[:12] for digest in common[:5])}): no demonstration may be scored; give it "
                "a fewshot_split of other rows, or set num_fewshot: 0"
            )
    if (task.config.repeats or 1) > 1:
        raise TaskError(
            f"task {name} asks for {task.config.repeats} replies to a row: greedy ones are all the same; set repeats: 1"
        )
    try:
        with _quiet(), _seeded():
            task.build_all_requests()
    except Exception as error:  # templates and code of the task
        raise TaskError(f"task {name} cannot be rendered: {type(error).__name__}: {error}; correct it") from error
    requests: list[list[Any]] = [[] for _ in found.docs]
    for instance in task.instances:
        requests[instance.doc_id].append(instance)
    if [row_digest(dict(instances[0].doc)) for instances in requests] != scored:
        raise TaskError(f"task {name} makes other rows each time they are read: let its process_docs be deterministic")
    return [sorted(instances, key=lambda instance: instance.idx) for instances in requests]


def _example(number: int, task: Any, doc: Mapping[str, Any], instances: Sequence[Any]) -> Example:
    digest, gold = row_digest(doc), task.doc_to_target(doc)
    if instances[0].request_type == "generate_until":
        if task.config.doc_to_choice is not None:
            gold = task.doc_to_choice(doc)[gold]
        shown = gold if isinstance(gold, str) else json.dumps(gold, default=str)
        prompt = instances[0].args[0]
        return Example(digest=digest, messages=(), reply=shown, target=shown, prompt=prompt, number=number)
    choices = tuple(instance.args[1] for instance in instances)
    if task.multiple_input:
        gold = task.doc_to_text(doc)
    if isinstance(gold, str) and gold in (texts := task.doc_to_choice(doc)):
        gold = texts.index(gold)
    return Example(
        digest=digest,
        messages=(),
        reply=choices[gold] if isinstance(gold, int) and 0 <= gold < len(choices) else "",
        target=str(gold),
        choices=choices,
        prompt=instances[0].args[0],
        contexts=tuple(instance.args[0] for instance in instances),
        number=number,
    )


def _generation(name: str, task: Any) -> dict[str, Any]:
    """Return stop strings and the limit of new tokens; anything but greedy decoding is refused."""
    given = dict(task.config.generation_kwargs or {})
    if given.get("do_sample") or float(given.get("temperature") or 0) > 0:
        raise TaskError(
            f"task {name} samples its replies (generation_kwargs {given}): they are decoded greedily here; set "
            "do_sample: false and temperature: 0"
        )
    until = given.get("until") or ()
    limits = [given[limit] for limit in _LIMITS if given.get(limit) is not None]
    return {
        "until": tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        "max_new_tokens": int(limits[0]) if limits else _NEW_TOKENS,
    }


def _metric(name: str, task: Any, asked: str) -> tuple[str, str]:
    """Return metric and filter, from `METRIC`, `METRIC,FILTER` or nothing."""
    metrics, filters = list(task.aggregation()), [each.name for each in task._filters]
    if task.OUTPUT_TYPE == "multiple_choice":
        metrics = [each for each in metrics if each in _CHOICE_METRICS]
        if not metrics:
            raise TaskError(
                f"task {name} has no metric of choices that says of a row whether it is right: these are "
                f"{', '.join(_CHOICE_METRICS)}; use another task"
            )
    metric, _, chosen = asked.partition(",")
    metric, chosen = metric or metrics[0], chosen or filters[0]
    if metric not in metrics or chosen not in filters:
        raise TaskError(
            f"task {name}: it has no metric {asked!r}: its metrics are {', '.join(metrics)}, its filters "
            f"{', '.join(filters)}; write lm-eval:{task.config.task}:METRIC or lm-eval:{task.config.task}:METRIC,FILTER"
        )
    return metric, chosen


def _check_scoring(name: str, answer: AnswerSpec, example: Example) -> None:
    """Refuse a metric that is no count of rows, by what it says of a reply that nobody gave."""
    assert answer.harness is not None
    try:
        if example.choices:
            choices = [Choice(text, (), ()) for text in example.choices]
            judge_choices(answer.harness, choices, [-1.0 - at for at in range(len(choices))], str(example.number))
        else:
            judge_reply(answer.harness, "", str(example.number))
    except TaskError:
        raise
    except Exception as error:  # code of the task
        raise TaskError(f"task {name} cannot score a reply: {type(error).__name__}: {error}; correct it") from error


# What is the same task.


def _config_text(task: Any) -> str:
    """Return all of a task's configuration that can change a prediction or its score, as canonical JSON.

    Functions are their source: how they are shown otherwise has addresses in it, which are others in every process.
    """
    config = {
        key: value
        for key, value in task.config.to_dict(keep_callable=True).items()
        if key not in ("task_alias", "tag", "metadata", "dataset_path", "dataset_name", "dataset_kwargs", "group")
    }
    return json.dumps({**config, "version": task.VERSION}, sort_keys=True, default=_named)


def _named(value: Any) -> Any:
    if isinstance(value, functools.partial):
        return {"function": value.func, "arguments": list(value.args), "keywords": value.keywords}
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):  # no function, or one without source
        return getattr(value, "__qualname__", type(value).__qualname__)


def _fingerprint(found: _Task) -> str:
    digest = hashlib.sha256(_config_text(found.task).encode())
    for doc in found.docs:
        digest.update(row_digest(doc).encode())
    return digest.hexdigest()


def load_for_scoring(scoring: HarnessScoring) -> None:
    """Load the task whose rows a worker is going to judge.

    Raises:
        TaskError: it cannot be loaded, or is not the one whose rows were shared.
    """
    _task_of(scoring)


def _task_of(scoring: HarnessScoring) -> _Task:
    """Return the task of a worker's units, loading it there first.

    Raises:
        TaskError: it is not the one whose rows were shared.
    """
    found = _tasks.get(scoring.fingerprint)
    if found is None:
        found = _load(scoring.source)
        if _fingerprint(found) != scoring.fingerprint:
            raise TaskError(
                f"task lm-eval:{scoring.source.task} is another one on this worker: its files or rows differ from what "
                "the search began with; give all machines the same, and start again"
            )
        _tasks.clear()
        _tasks[scoring.fingerprint] = found
    return found


def _filtered(task: Any, name: str, reply: str, doc: Mapping[str, Any]) -> Any:
    from lm_eval.api.instance import Instance

    instance = Instance(request_type="generate_until", doc=doc, arguments=("", {}), idx=0, metadata=(None, 0, 1))
    instance.resps = [reply]
    next(each for each in task._filters if each.name == name).apply([instance])
    return instance.filtered_resps[name]


@contextmanager
def _seeded() -> Iterator[None]:
    """Let code of a task draw what it would draw first in lm_eval, and leave the generators as they were."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(FEWSHOT_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what lm_eval and datasets say of their progress away from the terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
