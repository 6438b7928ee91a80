"""How an adapter is trained: frozen, validated before any model is loaded."""

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tale_ray.annotations import fits
from tale_ray.errors import ConfigError
from tale_ray.records import SplitName

TUNED_SPLITS: Mapping[SplitName, str] = {"search": "0.2", "select": "0.1", "test": "0.3", "finetune": "0.4"}
ALL_LINEAR = "all-linear"
MIN_ROWS = 16
EVALUATIONS = 10  # of select rows, where it is not said how often
WARMUP_SHARE = 0.1
_MOST_STEPS = 1e12


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningOptions:
    """LoRA (Hu et al. 2021, arXiv 2106.09685) by AdamW, linear warm-up and half a cosine down to zero.

    A step takes `batch_size * accumulate` rows, however many workers share them. Everything depends on the number of
    the step, nothing on the clock.
    """

    rank: int = 16
    alpha: float = 32.0  # the adapter's output is scaled by alpha / rank
    dropout: float = 0.05  # of the adapter's input
    target_modules: tuple[str, ...] = (ALL_LINEAR,)  # names of layers that get one, as peft matches them
    learning_rate: float = 2e-4
    epochs: float = 3.0  # passes over the finetune rows; not heeded where steps are given
    steps: int | None = None
    batch_size: int = 8  # rows that are computed together, by all workers
    accumulate: int = 1  # batches in a step
    warmup_steps: int | None = None  # None: a tenth of the steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_every: int | None = None  # steps; None: a tenth of them
    patience: int | None = 5  # evaluations without a lower loss after which training ends; None: it goes on
    seed: int = 0  # of the adapter's first weights, the order of rows, and dropout

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int) and not isinstance(value, bool) and item.type is float:
                object.__setattr__(self, item.name, float(value))
            elif not fits(value, item.type):
                raise ConfigError(f"{_words(item.name)} {value!r} is not of the right kind: give a number")
        for name in ("rank", "steps", "batch_size", "accumulate", "eval_every", "patience"):
            self._check(name, lambda value: value >= 1, "it is at least 1")
        for name in ("alpha", "epochs", "max_grad_norm"):
            self._check(name, lambda value: 0 < value < math.inf, "it is above 0")
        self._check("learning_rate", lambda value: 0 < value <= 1, "it is above 0 and at most 1, such as 2e-4")
        self._check("dropout", lambda value: 0 <= value < 1, "it is a share from 0 to below 1")
        self._check("weight_decay", lambda value: 0 <= value <= 1, "it is from 0 to 1")
        self._check("warmup_steps", lambda value: value >= 0, "it is at least 0")
        self._check("seed", lambda value: -(2**63) <= value < 2**64, "torch takes seeds of 64 bits")
        if self.steps is not None:
            self._check_within(self.steps)
        self._check_targets()

    @property
    def rows_per_step(self) -> int:
        """Rows that a step learns from."""
        return self.batch_size * self.accumulate

    def num_steps(self, num_rows: int) -> int:
        """Return how many steps training has at most, with so many finetune rows.

        Raises:
            ConfigError: warm-up or evaluations do not fit into them.
        """
        steps = self.steps
        if steps is None:
            asked = self.epochs * num_rows / self.rows_per_step
            self._check("epochs", lambda _: asked < _MOST_STEPS, f"that is more than {_MOST_STEPS:.0e} steps")
            steps = max(1, math.ceil(asked))
        self._check_within(steps)
        return steps

    def eval_interval(self, steps: int) -> int:
        """Return the number of steps between two evaluations of the select rows."""
        return self.eval_every or max(1, math.ceil(steps / EVALUATIONS))

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0, of so many."""
        warmup = math.ceil(WARMUP_SHARE * steps) if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return asdict(self) | {"target_modules": list(self.target_modules)}

    def _check(self, name: str, is_right: Any, rule: str) -> None:
        value = getattr(self, name)
        if value is not None and not is_right(value):
            raise ConfigError(f"{_words(name)} {value} is out of range: {rule}; correct it, or leave the option out")

    def _check_within(self, steps: int) -> None:
        if self.warmup_steps is not None and self.warmup_steps >= steps:
            raise ConfigError(
                f"warmup steps {self.warmup_steps} are as many as the {steps} steps of the training, or more: "
                "warm up for fewer, or train for longer"
            )
        if self.eval_every is not None and self.eval_every > steps:
            raise ConfigError(
                f"eval every {self.eval_every} steps is never in a training of {steps}: look more often, or train "
                "for longer"
            )

    def _check_targets(self) -> None:
        names = self.target_modules
        if not names or (ALL_LINEAR in names and len(names) > 1):
            raise ConfigError(
                f"target modules {','.join(names)!r} are no list of layers: write names such as q_proj,v_proj, or "
                f"{ALL_LINEAR} alone"
            )
        if wrong := [name for name in names if not re.fullmatch(r"[\w.-]+", name)]:
            raise ConfigError(f"target modules: {wrong[0]!r} is no name of a layer: write names such as q_proj,v_proj")


def _words(name: str) -> str:
    return name.replace("_", " ")


def check_peft() -> None:
    """Refuse to train where peft is missing.

    Raises:
        ConfigError: says how to install it.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "fine-tuning needs the package peft, which is not installed: pip install 'tale-ray[finetune]'"
        )
