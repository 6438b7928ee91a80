"""The frozen, validated description of a run.

`SearchConfig` holds five sections. Everything that can be checked without a model is checked when a section is made.
What can change a prediction or a decision is the run's *identity* (see `SearchConfig.decision_options`); workers,
devices, batch budget and folders are not part of it and may differ from one attempt to the next.
"""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from typing import Any, Literal, get_args

from tale_ray.annotations import fits
from tale_ray.errors import ConfigError
from tale_ray.option_texts import MAX_BYTES, epsilon_text, parse_epsilon, share, splits_text
from tale_ray.records import SplitName

StrategyName = Literal["tale", "beam", "sleb", "block_influence", "contiguous", "reverse", "random"]
EpsilonMode = Literal["baseline", "current"]
ResumeMode = Literal["auto", "must", "never"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
StreamMode = Literal["auto", "always", "never"]

_MAX_SECONDS = 10 * 365 * 24 * 60 * 60  # the timers of some systems overflow soon after
_KINDS: Mapping[Any, str] = {
    str | None: "a text",
    bool | None: "true or false",
    int | None: "a whole number",
    float | None: "a number of seconds",
}
_BROKEN_TEXT = re.compile("[\0\ud800-\udfff]")

MEASURING: tuple[StrategyName, ...] = ("sleb", "block_influence", "contiguous")  # strategies that need calibration text
DEFAULT_BEAM_WIDTH = 3
DEFAULT_SPLITS: Mapping[SplitName, str] = {"search": "0.5", "select": "0.2", "test": "0.3"}


def removable_blocks(surviving: Sequence[int], span: int, keep_layers: Collection[int]) -> tuple[tuple[int, ...], ...]:
    """Return the blocks of `span` consecutive surviving layers that hold none to be kept and leave one layer."""
    if span >= len(surviving):
        return ()
    blocks = (tuple(surviving[at : at + span]) for at in range(len(surviving) - span + 1))
    return tuple(block for block in blocks if not set(block) & set(keep_layers))


def _check_kinds(section: Any) -> None:
    """Refuse texts, truth values and numbers that are of another type than their field."""
    for item in fields(section):
        value, name = getattr(section, item.name), item.name.removesuffix("_seconds").replace("_", " ")
        kind: Any = item.type
        if (words := _KINDS.get(kind | None)) and not fits(value, kind):
            raise ConfigError(f"{name} {value!r} is not {words}: write one")
        if isinstance(value, str) and _BROKEN_TEXT.search(value):
            raise ConfigError(f"{name} {value!r} holds a character that no path or name can have: correct it")


def _at_least(value: float | None, minimum: float, name: str, remedy: str) -> None:
    if value is not None and not value >= minimum:
        raise ConfigError(f"{name} {value} is too small: it is at least {minimum}; {remedy}")


def _at_most(value: float | None, maximum: int, name: str, unit: str, remedy: str) -> None:
    if value is not None and value > maximum:
        raise ConfigError(f"{name} {value} is too large: it is at most {maximum} {unit}; {remedy}")


def _one_of(value: str, choices: Any, name: str) -> None:
    if value not in get_args(choices):
        near = difflib.get_close_matches(str(value).lower().replace("-", "_"), get_args(choices), n=1)
        meant = f"did you mean {near[0]}? Choose" if near else "choose"
        raise ConfigError(f"{name} {value!r} is not known: {meant} one of {', '.join(get_args(choices))}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """Which model: a hub id, a folder, or `bundled`."""

    model: str
    gguf: str | None = None  # file in the folder or repository
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: DType = "auto"

    def __post_init__(self) -> None:
        _check_kinds(self)
        if not self.model.strip():
            raise ConfigError("model '' is empty: give a hub id, a folder, or 'bundled'")
        _one_of(self.dtype, DType, "dtype")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSection:
    """Which rows are asked."""

    task: str
    rows: int | None = None  # of the search split; None: all
    shots: int = 0  # demonstrations before every prompt
    splits: Mapping[SplitName, str] = field(default_factory=lambda: dict(DEFAULT_SPLITS))
    seed: int = 0
    data_root: str | None = None
    include_path: str | None = None  # of lm-evaluation-harness tasks: a folder of task files beside its own

    def __post_init__(self) -> None:
        _check_kinds(self)
        _at_least(self.rows, 1, "rows", "leave the option out to use all search rows")
        _at_least(self.shots, 0, "shots", "0 shows no demonstrations")
        known = get_args(SplitName)
        if not isinstance(self.splits, Mapping):
            raise ConfigError(f"splits {self.splits!r} are no shares by name: write them like search=0.5,test=0.3")
        if unknown := [name for name in self.splits if name not in known]:
            raise ConfigError(f"splits: {unknown[0]!r} is not known: the splits are {', '.join(known)}")
        shares = self.shares
        if sum(shares.values()) > 1:
            total = float(sum(shares.values()))
            raise ConfigError(
                f"splits {splits_text(self.splits)!r} sum to {total:g}: shares sum to at most 1; lower one"
            )
        if not shares.get("search"):
            raise ConfigError(f"splits {splits_text(self.splits)!r} leave no search rows: give search a share above 0")

    @property
    def shares(self) -> dict[SplitName, Fraction]:
        """Share of the rows by split, exactly as written, in the order in which they are cut."""
        names = [name for name in get_args(SplitName) if name in self.splits]
        return {name: share(self.splits[name], f"share of the {name} split") for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class StrategySection:
    """What is decided, and how."""

    strategy: StrategyName = "tale"
    epsilon: str = "0.08"
    epsilon_mode: EpsilonMode = "baseline"
    max_removed: int | None = None
    remove: tuple[int, ...] = ()  # start from the model without these
    keep_layers: tuple[int, ...] = ()  # never candidates
    exhaustive: bool = False
    calibration: str | None = None  # file of the text that the model is measured on; None: the search rows' prompts
    beam_width: int | None = None  # sets of removed layers that each round of a beam goes on from; None: the default

    def __post_init__(self) -> None:
        _check_kinds(self)
        _one_of(self.strategy, StrategyName, "strategy")
        parse_epsilon(self.epsilon)
        _one_of(self.epsilon_mode, EpsilonMode, "epsilon mode")
        _at_least(self.max_removed, 0, "max removed", "leave the option out for no limit")
        for name, layers in (("remove", self.remove), ("keep layers", self.keep_layers)):
            if not isinstance(layers, tuple):
                raise ConfigError(f"{name} {layers!r} is not a list of layers: write numbers such as 3,7")
            if wrong := [layer for layer in layers if not fits(layer, int)]:
                raise ConfigError(f"{name}: layer {wrong[0]!r} is not a whole number: write one")
            if min(layers, default=0) < 0:
                raise ConfigError(f"{name}: layer {min(layers)} does not exist: layers are numbered from 0")
            if len(set(layers)) < len(layers):
                raise ConfigError(f"{name} {','.join(map(str, layers))}: a layer is named twice; name each once")
        if both := sorted(set(self.remove) & set(self.keep_layers)):
            raise ConfigError(f"layer {both[0]} is in remove and in keep layers: take it out of one of them")
        if self.max_removed is not None and len(self.remove) > self.max_removed:
            raise ConfigError(
                f"remove names {len(self.remove)} layers but max removed is {self.max_removed}: "
                "raise the one or shorten the other"
            )
        _at_least(self.beam_width, 1, "beam width", "1 is the strategy tale")
        if self.beam_width is not None and self.strategy != "beam":
            raise ConfigError(
                f"beam width {self.beam_width} is given, and strategy {self.strategy} has no beam: leave it out, or "
                "choose beam"
            )
        if self.strategy == "contiguous" and self.max_removed is None:
            raise ConfigError(
                "strategy contiguous needs max removed: it removes one block of so many layers; give --max-removed N"
            )
        if self.calibration is not None and self.strategy not in MEASURING:
            raise ConfigError(
                f"calibration {self.calibration!r} is given, and strategy {self.strategy} measures nothing: leave it "
                f"out, or choose one of {', '.join(MEASURING)}"
            )

    @property
    def width(self) -> int:
        """Sets of removed layers that each round of a beam goes on from."""
        return DEFAULT_BEAM_WIDTH if self.beam_width is None else self.beam_width

    def check_layers(self, num_layers: int) -> None:
        """Refuse layers that a model of `num_layers` layers does not have.

        Raises:
            ConfigError: a layer is out of range, or nothing would be left.
        """
        for name, layers in (("removed", self.remove), ("kept", self.keep_layers)):
            for layer in layers:
                if layer >= num_layers:
                    raise ConfigError(
                        f"layer {layer} cannot be {name}: "
                        f"the model has {num_layers} layers, numbered 0 to {num_layers - 1}"
                    )
        if len(self.remove) >= num_layers:
            raise ConfigError(f"all {num_layers} layers cannot be removed: a model keeps at least one; shorten remove")
        if self.strategy == "contiguous":
            self._check_block(num_layers)

    def _check_block(self, num_layers: int) -> None:
        """Refuse a block of layers that the model does not have beside those that are kept."""
        assert self.max_removed is not None, "it was checked"
        surviving = [layer for layer in range(num_layers) if layer not in self.remove]
        span = self.max_removed - len(self.remove)
        if not removable_blocks(surviving, span, self.keep_layers):
            raise ConfigError(
                f"max removed {self.max_removed} is too large for strategy contiguous: the model has {num_layers} "
                f"layers, {len(surviving)} of them at the start, and no {span} in a row can go that leave "
                "one layer and all that are kept; lower it"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourceSection:
    """Where it runs. Never changes a decision."""

    local: bool = False  # in this process, without Ray
    address: str | None = None  # of a running Ray cluster; None: a private one
    workers: int | None = None  # at most; None: as many as fit
    gpus_per_worker: int = 0
    cpus_per_worker: int = 1  # of each process
    tensor_parallel: int = 1  # processes that split the weights of one worker, each on a GPU of its own
    gang_timeout_seconds: float = 300.0  # that such a process waits for the others, within a unit
    wait_resources_seconds: float = 60.0
    batch_bytes: int | None = None  # working memory of a worker, beside the model; None: chosen from the device
    stream: StreamMode = "auto"  # layers from their files one at a time; auto: if the weights do not fit

    def __post_init__(self) -> None:
        _check_kinds(self)
        _at_least(self.workers, 1, "workers", "leave the option out for as many as fit")
        _at_least(self.gpus_per_worker, 0, "gpus per worker", "0 runs on CPU")
        _at_least(self.cpus_per_worker, 1, "cpus per worker", "every worker needs one")
        _at_least(self.tensor_parallel, 1, "tensor parallel", "1 leaves a worker in one process")
        _at_least(self.gang_timeout_seconds, 1, "gang timeout", "leave the option out for five minutes")
        _at_most(self.gang_timeout_seconds, _MAX_SECONDS, "gang timeout", "seconds", "wait less")
        _at_least(self.wait_resources_seconds, 0, "wait resources", "0 does not wait")
        _at_most(self.wait_resources_seconds, _MAX_SECONDS, "wait resources", "seconds", "wait less")
        _at_least(self.batch_bytes, 1, "batch bytes", "leave the option out to choose from the device")
        _at_most(self.batch_bytes, MAX_BYTES, "batch bytes", "bytes", "leave the option out to choose from the device")
        _one_of(self.stream, StreamMode, "stream")
        if self.local and self.address is not None:
            raise ConfigError(f"local and address {self.address!r} exclude each other: leave one out")
        if self.local and (self.workers or 1) > 1:
            raise ConfigError(f"local runs one worker, not {self.workers}: leave out local to run workers on Ray")
        if self.tensor_parallel > 1:
            self._check_gang()

    def _check_gang(self) -> None:
        """Refuse what a worker of several processes cannot be."""
        asked = f"tensor parallel {self.tensor_parallel}"
        if self.local:
            raise ConfigError(f"{asked} and local exclude each other: local is one process; leave one out")
        if self.stream == "always":
            raise ConfigError(f"{asked} and stream always exclude each other: a gang holds its weights; leave one out")
        if self.gpus_per_worker not in (0, self.tensor_parallel):
            raise ConfigError(
                f"{asked} and gpus per worker {self.gpus_per_worker} exclude each other: every process has one GPU, "
                f"and gangs make no pipeline stages; give {self.tensor_parallel} GPUs per worker, or 0 for the CPU"
            )

    @property
    def worker_cpus(self) -> int:
        """CPU cores of a worker, all its processes together."""
        return self.cpus_per_worker * self.tensor_parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageSection:
    """Where the run is kept. Never changes a decision."""

    run: str | None = None  # folder or URI; None: runs/<task>-<digest>
    resume: ResumeMode = "auto"
    time_limit_seconds: float | None = None

    def __post_init__(self) -> None:
        _check_kinds(self)
        _one_of(self.resume, ResumeMode, "resume")
        _at_least(self.time_limit_seconds, 1, "time limit", "give it in seconds or like 30m, 2h")
        _at_most(self.time_limit_seconds, _MAX_SECONDS, "time limit", "seconds", "leave the option out for no limit")


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """One search, whole."""

    model: ModelSection
    task: TaskSection
    strategy: StrategySection = field(default_factory=StrategySection)
    resources: ResourceSection = field(default_factory=ResourceSection)
    storage: StorageSection = field(default_factory=StorageSection)

    def __post_init__(self) -> None:
        if self.resources.tensor_parallel > 1 and self.model.gguf is not None:
            raise ConfigError(
                f"tensor parallel {self.resources.tensor_parallel} and gguf {self.model.gguf!r} exclude each other: "
                "weights that are de-quantised while they are loaded cannot be split; leave one out, or convert the "
                "file to safetensors"
            )

    @property
    def dtype(self) -> str:
        """The dtype asked for; `auto` is float32 on CPU (which emulates bfloat16), and the checkpoint's on GPU."""
        if self.model.dtype != "auto":
            return self.model.dtype
        return "checkpoint" if self.resources.gpus_per_worker else "float32"

    def decision_options(self) -> dict[str, Any]:
        """Return the options that can change a prediction or a decision, as canonical JSON values."""
        return {
            "dtype": self.dtype,
            "seed": self.task.seed,
            **({"shots": self.task.shots} if self.task.shots else {}),  # runs without keep the digest that they had
            "strategy": self.strategy.strategy,
            "epsilon": epsilon_text(self.strategy.epsilon),
            "epsilon_mode": self.strategy.epsilon_mode,
            "max_removed": self.strategy.max_removed,
            "remove": list(self.strategy.remove),
            "keep_layers": sorted(self.strategy.keep_layers),
            # A larger limit goes on with a run, but of this strategy it is another block.
            **({"block": self.strategy.max_removed} if self.strategy.strategy == "contiguous" else {}),
            **({"beam_width": self.strategy.width} if self.strategy.strategy == "beam" else {}),
        }

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return the sections as JSON values; `from_json` reverses it."""
        return {section.name: asdict(getattr(self, section.name)) for section in fields(self)}

    @staticmethod
    def from_json(sections: Mapping[str, Mapping[str, Any]]) -> "SearchConfig":
        """Return the configuration that `to_json` wrote; fields that an older version lacked get their default.

        Raises:
            ConfigError: it did not write them, or a value breaks a rule.
        """
        try:
            strategy = dict(sections["strategy"])
            for name in ("remove", "keep_layers"):
                strategy[name] = tuple(strategy.get(name, ()))
            return SearchConfig(
                model=ModelSection(**sections["model"]),
                task=TaskSection(**sections["task"]),
                strategy=StrategySection(**strategy),
                resources=ResourceSection(**sections["resources"]),
                storage=StorageSection(**sections["storage"]),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"not a configuration: {error}; it has the sections and fields of this version") from None
