"""Making an executor, with the questions that its workers answer."""

from collections.abc import Callable, Mapping, Sequence

from tale_ray.attempt.rows import PreparedRows
from tale_ray.cluster.authentication import protect_private_cluster
from tale_ray.cluster.local import LocalExecutor
from tale_ray.config import SearchConfig
from tale_ray.records import Example, ModelInfo, PromptRow, SplitName
from tale_ray.search.executor import Executor, Questions
from tale_ray.search.interruption import Interruption
from tale_ray.tasks.prompts import digest_tokens


def make_executor(config: SearchConfig, name: str) -> Executor:
    """Return the executor that a configuration asks for; nothing is started yet. `name` appears in Ray's lists."""
    if config.resources.local:
        return LocalExecutor(config.model, config.dtype, config.resources)
    if config.resources.address is None:
        protect_private_cluster()
    from tale_ray.cluster.ray_executor import RayExecutor  # ray is wanted in this process only now

    return RayExecutor(config.model, config.dtype, config.resources, name)


def make_metrics(config: SearchConfig, run: str) -> Callable[[object], None]:
    """Return what is to be told every event of a search, so that Ray exports its metrics; nothing without Ray."""
    if config.resources.local:
        return lambda event: None  # noqa: ARG005
    from tale_ray.cluster.metrics import SearchMetrics  # ray is wanted in this process only now

    return SearchMetrics(run).note


def encode_questions(executor: Executor, prepared: PreparedRows, info: ModelInfo) -> Questions:
    """Return the rows of all splits as the loaded model is asked them.

    Raises:
        TaskError: the chat template rejects a prompt, or one is too long for the model.
        ModelError: a prompt has a token that the model has no embedding for.
    """
    rows = {split: executor.encode(examples) for split, examples in prepared.examples.items()}
    for prompt_rows in rows.values():
        info.check_rows(prompt_rows, prepared.spec.max_new_tokens)
    return Questions(rows=rows, answer=prepared.spec.answer, max_new_tokens=prepared.spec.max_new_tokens)


def connect(executor: Executor, interruption: Interruption) -> None:
    """Reach the executor's place. A request to stop waits until that is done, seconds as a rule.

    Half-made clients of Ray may wait for ever when an exception out of a signal handler throws them away.

    Raises:
        Interrupted: a stop was asked for before.
        InfeasibleError: the place cannot be reached, or can never give what a worker needs.
    """
    interruption.check()
    executor.connect()
    interruption.arm()  # ray.init installs a SIGTERM handler of its own


def encode_calibration(
    executor: Executor, calibration: Sequence[Example], info: ModelInfo
) -> tuple[tuple[int, ...], ...]:
    """Return rows of calibration text as tokens of the loaded model; nothing of no rows.

    Raises:
        TaskError: a row is too long for the model.
        ModelError: a row has a token that the model has no embedding for.
    """
    rows = executor.encode(calibration) if calibration else ()
    info.check_rows(rows, max_new_tokens=1)
    return tuple(row.token_ids for row in rows)


def token_digests(rows: Mapping[SplitName, Sequence[PromptRow]]) -> dict[str, str]:
    """Return the SHA-256 of the token sequences of every split, those of choices included."""
    return {
        split: digest_tokens(token_ids for row in prompt_rows for token_ids in row.sequences)
        for split, prompt_rows in rows.items()
    }


def similar_ranks(rows: Sequence[PromptRow]) -> tuple[int, ...]:
    """Return the rank of each row in an order in which prompts that begin alike are neighbours."""
    order = sorted(range(len(rows)), key=lambda row: rows[row].token_ids)
    ranks = {row: rank for rank, row in enumerate(order)}
    return tuple(ranks[row] for row in range(len(rows)))
