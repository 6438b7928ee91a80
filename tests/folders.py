"""What a user would have: a model folder, a task file with its rows, and a command line. All tiny, all local."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf
from families import FAMILIES, VOCABULARY, tiny_tokenizer

from tale_ray.cli import main
from tale_ray.tasks.prompts import encode

NUM_LAYERS = 6
NUM_ROWS = 100  # by default 50 are searched, 20 select and 30 test
LAYER_STRENGTHS = (1.0, 0.02, 0.1, 0.03, 0.2, 1.0)  # how much a layer adds to what it gets: some are hardly missed

TASK = r"""
name: {name}
source: {{path: json, data_files: {rows}}}
messages:
  - {{role: user, content: "{{{{ question }}}}"}}
reply: "{{{{ answer }}}}"
target: "{{{{ answer }}}}"
answer: {{type: regex, pattern: '(t\d+)'}}
max_new_tokens: {num_tokens}
"""

DECISIONS = (  # of `show --json`: what a disturbed search has in common with an undisturbed one
    "num_layers",
    "rows",
    "baseline",
    "rounds",
    "rejected_round",
    "best",
    "bsba",
    "final",
    "test",
    "stop_reason",
)


@dataclass(frozen=True)
class Material:
    """Folders and files, and what `tale-ray` says to them."""

    model: Path
    other_model: Path  # the same configuration with other weights
    task: Path
    long_task: Path  # the same with long replies: a search that is still running when it is looked at
    zero_task: Path  # the model answers none of its rows
    folder: Path

    def search(self, run: Path | str, *more: Any) -> "Outcome":
        """Search the model on the task with an epsilon that leaves some rounds; all counts can be compared."""
        return command(*self.arguments(run, *more))

    def arguments(self, run: Path | str, *more: Any) -> list[str]:
        options = {"--model": self.model, "--task": self.task, "--epsilon": "0.1", "--run": run}
        given = [str(part) for part in more]
        flat = [str(part) for name, value in options.items() if name not in given for part in (name, value)]
        return ["search", "--local", "--exhaustive", *flat, *given]


@dataclass(frozen=True)
class Outcome:
    """What a call of the command line came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def command(*arguments: Any) -> Outcome:
    """Call `tale-ray` in this process, without waiting for the disk: no power fails here."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch("os.fsync"):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def show(run: Path | str) -> dict[str, Any]:
    """What `tale-ray show --json` says of a run."""
    shown = command("show", run, "--json")
    assert shown.code == 0, shown.err
    return shown.json  # type: ignore[no-any-return]


@pytest.fixture(scope="session", name="material")
def material_fixture(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("material"))


def make_material(folder: Path) -> Material:
    """Write everything into a folder. The rows' answers are mostly what the model itself replies."""
    model = _save_model(folder / "model", seed=0)
    _save_model(folder / "other", seed=1)
    rows = make_rows(model)
    write_rows(folder / "rows.jsonl", rows)
    (folder / "tiny.yaml").write_text(task_text("tiny"))
    (folder / "long.yaml").write_text(task_text("long", num_tokens=100))
    (folder / "zero.yaml").write_text(task_text("zero").replace("'(t", "'never (t"))
    return Material(
        model=folder / "model",
        other_model=folder / "other",
        task=folder / "tiny.yaml",
        long_task=folder / "long.yaml",
        zero_task=folder / "zero.yaml",
        folder=folder,
    )


def task_text(name: str, rows: str = "rows.jsonl", num_tokens: int = 1) -> str:
    """A task file over rows with a question and an answer."""
    return TASK.format(name=name, rows=rows, num_tokens=num_tokens)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _save_model(folder: Path, seed: int) -> Any:
    config: Any = FAMILIES["llama"]()
    config.num_hidden_layers = NUM_LAYERS
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for layer, strength in zip(model.model.layers, LAYER_STRENGTHS, strict=True):
            layer.self_attn.o_proj.weight.mul_(strength)
            layer.mlp.down_proj.weight.mul_(strength)
    model.eval().requires_grad_(False).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def make_rows(model: Any, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of random words; every fifth has an answer that the model does not give."""
    tokenizer = tiny_tokenizer()
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(NUM_ROWS):
        words = torch.randint(3, VOCABULARY, (6,), generator=generator).tolist()
        question = " ".join(f"t{word}" for word in words)
        token_ids = encode(tokenizer, [{"role": "user", "content": question}])
        reply = int(model(torch.tensor([token_ids])).logits[0, -1].argmax())
        rows.append({"question": question, "answer": f"t{max(3, reply)}" if number % 5 else "t3"})
    return rows
