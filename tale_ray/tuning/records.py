"""How far a training is, and what it tells on the way. Plain values: neither torch nor files are known here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

from tale_ray.records import ModelInfo

CHECKPOINT = "checkpoint.safetensors"  # its file


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The model on all select rows, after so many steps."""

    step: int
    loss: float  # nats per token that is scored
    exact: float  # share of rows whose reply is the likeliest at every such token
    train_loss: float | None  # mean over the steps since the last one


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What has been done so far."""

    digest: str  # of the training's configuration
    step: int = 0  # steps that are done
    losses: tuple[float, ...] = ()  # of every step, nats per reply token
    evaluations: tuple[Evaluation, ...] = ()
    best_step: int = 0  # the weights that are kept are those after so many steps
    seconds: float = 0.0  # of the steps that are done, all of them together, wall clock
    cpu_seconds: float = 0.0  # the same, of this process's CPU time
    ended: str | None = None  # "steps" or "patience"
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the model and the machine

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the lowest loss; None: there are no select rows."""
        return min(self.evaluations, key=lambda each: (each.loss, each.step)) if self.evaluations else None

    @property
    def num_stale(self) -> int:
        """Evaluations since the best one."""
        return sum(each.step > self.best_step for each in self.evaluations)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(replace(self, facts=dict(self.facts)))

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Progress":
        """Return what `to_json` wrote."""
        evaluations = tuple(Evaluation(**each) for each in values["evaluations"])
        return Progress(**{**values, "losses": tuple(values["losses"]), "evaluations": evaluations})


@dataclass(frozen=True, slots=True)
class TrainingBegun:
    """The model is loaded, and training goes on after `step` steps."""

    info: ModelInfo
    step: int
    steps: int
    num_trainable: int
    num_parameters: int  # of the model that is trained, the adapter left out


@dataclass(frozen=True, slots=True)
class StepDone:
    """The adapter has taken a step."""

    step: int  # steps that are done
    steps: int
    loss: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The model was evaluated on the select rows, and everything is stored."""

    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class TrainingEnded:
    """Training is over; the adapter has the weights that are kept."""

    progress: Progress


TrainingEvent: TypeAlias = TrainingBegun | StepDone | Evaluated | TrainingEnded
