"""The nouns that cross a boundary: between driver and workers, search and store, store and reader.

All are frozen, picklable and hold plain Python values only. Layers are numbered from 0 in the full model. A
candidate is named by the layer whose removal it proposes; `None` stands for removing nothing further.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

from tale_ray.errors import ModelError, TaskError

SplitName: TypeAlias = Literal["shots", "search", "select", "test", "finetune"]
CandidateStatus: TypeAlias = Literal["exact", "bounded_out"]
Measure: TypeAlias = Literal["block_influence", "angular_distance", "log_perplexity"]
Message: TypeAlias = Mapping[str, str]  # {"role": ..., "content": ...}


class StopReason(StrEnum):
    """Why a search has ended."""

    BELOW_FLOOR = "below_floor"
    MAX_REMOVED = "max_removed"
    ONE_LAYER_LEFT = "one_layer_left"
    NO_CANDIDATES = "no_candidates"
    BASELINE_ZERO = "baseline_zero"
    ERROR = "error"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a task, rendered: what is asked and what should be answered."""

    digest: str  # SHA-256 of the row's source columns, hex
    messages: tuple[Message, ...]  # the chat prompt, without the reply
    reply: str  # the reference reply, as a demonstration would show it
    target: str  # what the answer parsed from a reply is compared with; of choices: the number of the right one
    choices: tuple[str, ...] = ()  # replies that are compared by their log-likelihoods, where nothing is decoded
    demonstrations: tuple["Example", ...] = ()  # shown before it, in this order
    prompt: str | None = None  # all of the prompt as plain text, where the task writes it itself: there are no messages
    contexts: tuple[str, ...] = ()  # what comes before each choice, with such a prompt
    number: int | None = None  # of the row in its task, where the task judges answers itself


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the replies whose log-likelihoods are compared."""

    text: str
    context_ids: tuple[int, ...]  # tokens of the prompt; the same for all choices of a row, but for odd tasks
    continuation_ids: tuple[int, ...]  # tokens of the text after it

    @property
    def num_characters(self) -> int:
        """What a normalised log-likelihood is divided by."""
        return len(self.text)


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One row as a worker scores it."""

    token_ids: tuple[int, ...]  # of the prompt; with choices, of the first one's context
    target: str  # with choices, the number of the right one; where the task judges answers itself, that of the row
    choices: tuple[Choice, ...] = ()

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """All tokens that the row is made of: the prompt, or each choice's context and continuation."""
        if not self.choices:
            return (self.token_ids,)
        return tuple(ids for choice in self.choices for ids in (choice.context_ids, choice.continuation_ids))


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a worker says of the model that it has loaded."""

    num_layers: int
    family: str  # model_type of the configuration
    digest: str  # SHA-256 over configuration, tokenizer and weight files, hex
    dtype: str
    device: str
    load_seconds: float
    max_positions: int | None = None  # None: not limited by the model
    notes: tuple[str, ...] = ()  # what a user should know, e.g. "the tokenizer has no chat template"
    num_embeddings: int | None = None  # tokens that have one; None: not known
    is_streamed: bool = False  # every unit reads the weights from the disk, however few its rows

    def check_tokens(self, token_ids: Iterable[int]) -> None:
        """Refuse a prompt with a token that the model has no embedding for.

        Raises:
            ModelError: names the token.
        """
        highest = max(token_ids)
        if self.num_embeddings is not None and highest >= self.num_embeddings:
            raise ModelError(
                f"token {highest} is in a prompt, but the model embeds {self.num_embeddings} tokens, numbered 0 to "
                f"{self.num_embeddings - 1}: use the tokenizer and the chat template that belong to the checkpoint"
            )

    def check_rows(self, rows: Collection[PromptRow], max_new_tokens: int) -> None:
        """Refuse rows with tokens that the model does not have, or with more tokens than it has positions.

        Raises:
            ModelError: the model has no embedding for a token.
            TaskError: a row leaves no room for its reply.
        """
        for row in rows:
            for token_ids in row.sequences:
                self.check_tokens(token_ids)
        self.check_lengths(rows, max_new_tokens)

    def check_lengths(self, rows: Iterable[PromptRow], max_new_tokens: int) -> None:
        """Refuse rows that leave no room for their replies, or for their choices.

        Raises:
            TaskError: names the lengths.
        """
        for row in rows:
            for choice in row.choices:
                self.check_length(len(choice.context_ids), len(choice.continuation_ids))
            if not row.choices:
                self.check_length(len(row.token_ids), max_new_tokens)

    def check_length(self, num_prompt_tokens: int, max_new_tokens: int) -> None:
        """Refuse a prompt that leaves no room for its reply.

        Raises:
            TaskError: the model has fewer positions than the row needs.
        """
        if self.max_positions is not None and num_prompt_tokens + max_new_tokens - 1 > self.max_positions:
            raise TaskError(
                f"a row has {num_prompt_tokens} prompt tokens and gets up to {max_new_tokens} new ones, but the model "
                f"has {self.max_positions} positions: use shorter prompts, fewer demonstrations, or a model with a "
                "longer context"
            )


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """What a model said about one row."""

    reply: str
    prediction: str | None  # None: no answer could be read from the reply (invalid)
    correct: bool
    log_likelihoods: tuple[float, ...] | None = None  # of every choice, in nats; None: the reply was decoded


@dataclass(frozen=True, slots=True)
class CandidateAnswers:
    """The answers of one candidate, in the order of the unit's rows."""

    layer: int | None
    answers: tuple[RowAnswer, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """Some rows of one split times some candidates: the piece of work that is done, lost and stored as a whole."""

    number: int
    scope: str  # what it belongs to, e.g. "round-0003": the folder of its result in the store
    split: SplitName
    removed: tuple[int, ...]  # layers that every candidate does without
    candidates: tuple[int | None, ...]
    rows: tuple[int, ...]  # positions in the split

    @property
    def candidate_rows(self) -> int:
        """Number of (candidate, row) pairs."""
        return len(self.candidates) * len(self.rows)


@dataclass(frozen=True, slots=True)
class UnitResult:
    """A pure function of the unit, but for seconds and worker."""

    unit: WorkUnit
    candidates: tuple[CandidateAnswers, ...]
    layer_applications: int  # rows times layers run; batching and new tokens are in
    seconds: float
    worker: str


@dataclass(frozen=True, slots=True)
class Probe:
    """What a strategy asks to be measured of a model on calibration rows: one number for each of some layers."""

    measure: Measure
    removed: tuple[int, ...]  # layers that the model does without
    layers: tuple[int, ...]
    span: int = 1  # of angular distances: surviving layers in the block that begins with each of `layers`


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a probe came to. A pure function of the probe and the rows, but for rounding errors and seconds."""

    probe: Probe
    values: tuple[float | None, ...]  # by layer of the probe; None: not a finite number
    num_rows: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Score:
    """How many rows were answered correctly, of how many; `invalid` of the wrong ones had no readable answer."""

    correct: int
    total: int
    invalid: int

    @property
    def accuracy(self) -> float:
        """Share of correct rows, in [0, 1]."""
        return self.correct / self.total


@dataclass(frozen=True, slots=True)
class CandidateScore:
    """The score of one candidate: over all rows if `exact`, else over the `seen` rows after which it could not win."""

    layer: int | None
    correct: int
    seen: int
    invalid: int
    status: CandidateStatus
    seconds: float
    without: tuple[int, ...] | None = None  # what else it does without, where candidates of a round differ in that


@dataclass(frozen=True, slots=True)
class Branch:
    """Candidates that all extend one set of removed layers."""

    removed: tuple[int, ...]  # in order of removal
    candidates: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """A finished round. Round 0 scores the full model and removes nothing."""

    number: int
    removed_layer: int | None  # the winner
    removed: tuple[int, ...]  # cumulative, in order of removal, the winner included
    score: Score  # of the winner
    candidates: tuple[CandidateScore, ...]
    committed: bool

    def is_won_by(self, candidate: CandidateScore) -> bool:
        """Return whether a candidate of the round is the one that it removes."""
        return candidate.layer == self.removed_layer and candidate.without in (None, self.removed[:-1])


@dataclass(frozen=True, slots=True)
class Work:
    """What was computed, durable units only."""

    units: int = 0
    candidate_rows: int = 0  # without the baseline
    layer_applications: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.units + other.units,
            self.candidate_rows + other.candidate_rows,
            self.layer_applications + other.layer_applications,
        )


@dataclass(frozen=True, slots=True)
class PassTime:
    """How long a model took for a batch of prompts: until each had its first new token, and for the tokens after it."""

    first_seconds: float
    decode_seconds: float
    first_layer_seconds: tuple[float, ...] = ()  # of it, by layer; empty: layers were not timed
    decode_layer_seconds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """Repeated passes over one batch: by the full model and the pruned one in turns, then by the full one by layer."""

    batch_size: int
    base: tuple[PassTime, ...]
    pruned: tuple[PassTime, ...]  # each right after the one of the full model
    layered: tuple[PassTime, ...]
