"""Quick trainings of tiny models, by the command, and what they leave."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import Material, command
from safetensors.torch import load_file

SPLITS = "search=0.2,select=0.2,test=0.2,finetune=0.4"
FAST = ("--epochs", 1, "--batch-size", 4, "--rank", 2, "--learning-rate", 0.0005, "--eval-every", 3)


def tune(material: Material, out: Path, *more: Any) -> Any:
    given = [str(part) for part in more]
    options = {"--model": material.model, "--task": material.task, "--splits": SPLITS}
    flat = [
        part for name, value in options.items() if name not in given and "--run" not in given for part in (name, value)
    ]
    return command("finetune", *flat, "--out", out, *FAST, *given)


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "finetune.json").read_text())  # type: ignore[no-any-return]


def adapters(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module", name="trained")
def trained_fixture(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing disturbed, of the model without two of its layers."""
    out = tmp_path_factory.mktemp("trained") / "out"
    outcome = tune(material, out, "--remove", "3,1")
    assert outcome.code == 0, outcome.err
    return out


@pytest.fixture(scope="module", name="run")
def run_fixture(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    assert material.search(run, "--splits", SPLITS).code == 0
    return run
