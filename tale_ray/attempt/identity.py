"""What makes two attempts the same run: everything that can change a prediction or a decision, and nothing else."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from tale_ray.attempt.rows import PreparedRows
from tale_ray.config import SearchConfig
from tale_ray.errors import ConfigError
from tale_ray.paths import existing
from tale_ray.records import Example, ModelInfo
from tale_ray.store.documents import Manifest
from tale_ray.tasks.splits import digest_rows


def run_identity(
    config: SearchConfig, prepared: PreparedRows, model_digest: str, calibration: Sequence[Example] = ()
) -> dict[str, Any]:
    """Return the identity as flat JSON values, so that two of them can be compared line by line.

    `calibration` are the rows of a file of calibration text; none where the model is measured on the search rows, or
    not at all.
    """
    task = {f"task.{name}": value for name, value in prepared.spec.identity().items()}
    rows = {
        f"rows.{split}": f"{len(examples)} rows, SHA-256 {digest_rows([example.digest for example in examples])}"
        for split, examples in prepared.splits.items()
        if split != "finetune"  # decides nothing
    }
    if calibration:
        rows["calibration"] = f"{len(calibration)} rows, SHA-256 {digest_rows([each.digest for each in calibration])}"
    return {"model": model_digest, **config.decision_options(), **task, **rows}


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an identity, hex."""
    canonical = json.dumps(identity, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Return in words what would change a decision that was taken.

    A larger epsilon or a larger limit on removed layers continues a run: every committed round stands under them.
    """
    return [
        f"{name}: the run has {_short(stored.get(name))}, asked for is {_short(asked.get(name))}"
        + " (only a larger one goes on)" * (name in ("epsilon", "max_removed"))
        for name in sorted({*stored, *asked})
        if stored.get(name) != asked.get(name) and not _continues(name, stored.get(name), asked.get(name))
    ]


def _continues(name: str, stored: Any, asked: Any) -> bool:
    try:
        if name == "epsilon":
            return Fraction(asked) >= Fraction(stored)  # exact, for 0.08 as for 2/25
        if name == "max_removed":
            return stored is not None and (asked is None or asked > stored)
    except (TypeError, ValueError):  # the stored one was changed
        return False
    return False


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_same_model(manifest: Manifest, info: ModelInfo, model: str, run: str) -> None:
    """Refuse a model that is not the one that a run was searched with.

    Raises:
        ConfigError: names both.
    """
    if (expected := manifest.model["digest"]) != info.digest:
        raise ConfigError(
            f"the model {model} is not the one that {run} was searched with (SHA-256 {expected[:12]}, "
            f"now {info.digest[:12]}): restore its files, or say with --model where they are"
        )


def with_absolute_paths(config: SearchConfig) -> SearchConfig:
    """Return the configuration with existing folders and files made absolute, so that it means the same elsewhere."""
    model, task = config.model.model, config.task.task
    data_root, include_path = config.task.data_root, config.task.include_path
    calibration = config.strategy.calibration
    return replace(
        config,
        model=replace(config.model, model=model if model == "bundled" else _absolute(model, Path.is_dir)),
        task=replace(
            config.task,
            task=_absolute(task, Path.is_file),
            data_root=None if data_root is None else _absolute(data_root, Path.is_dir),
            include_path=None if include_path is None else _absolute(include_path, Path.is_dir),
        ),
        strategy=replace(
            config.strategy, calibration=None if calibration is None else _absolute(calibration, Path.is_file)
        ),
    )


def _absolute(text: str, is_meant: Callable[[Path], bool]) -> str:
    path = existing(text, is_meant)
    return text if path is None else str(path.resolve())
