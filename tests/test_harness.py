"""Tasks of lm-evaluation-harness against its own evaluator: likelihoods, replies, and the metrics of every row."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import save_tiny
from folders import Material, command, show, write_rows
from folders import material_fixture as material_fixture

from tale_ray.attempt.rows import prepare_rows
from tale_ray.config import ModelSection, TaskSection
from tale_ray.engine.score import Scorer
from tale_ray.errors import TaskError
from tale_ray.model.load import load_model
from tale_ray.records import Choice, RowAnswer, WorkUnit
from tale_ray.tasks import harness
from tale_ray.tasks.harness import judge_choices, judge_reply, load_harness_task
from tale_ray.tasks.prompts import encode_example

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of lm_eval and of what it imports
]

DATA_ROOT = os.environ.get("TALE_RAY_DATA_ROOT")
SMOLLM2 = Path(os.environ.get("TALE_RAY_SMOLLM2", ".cache/smollm2"))
NUM_ROWS = 60
CHOICES: dict[str, Any] = {
    "task": "tiny_choices",
    "dataset_path": "json",
    "test_split": "train",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}} t4",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
}
REPLIES: dict[str, Any] = {
    "task": "tiny_replies",
    "dataset_path": "json",
    "test_split": "train",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["t40", "t41"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "ignore_case": True}],
    "filter_list": [
        {"name": "first", "filter": [{"function": "regex", "regex_pattern": r"(t\d+)"}, {"function": "take_first"}]},
        {"name": "whole", "filter": [{"function": "take_first"}]},
    ],
}


@dataclass(frozen=True)
class Corner:
    """A model folder, and a folder of task files with their rows."""

    model: Path
    include_path: Path

    def write_task(self, config: dict[str, Any], rows: str = "rows.jsonl") -> str:
        """Write a task over rows of the folder and return what `--task` says."""
        files = {"data_files": {"train": str(self.include_path / rows)}}
        content = {"dataset_kwargs": files, "metadata": {"version": 1.0}, **config}
        (self.include_path / f"{config['task']}.yaml").write_text(yaml.safe_dump(content))
        return f"lm-eval:{config['task']}"

    def load(self, config: dict[str, Any], metric: str = "", shots: int = 0) -> tuple[Any, Any]:
        return load_harness_task(self.write_task(config) + metric, str(self.include_path), shots)


@pytest.fixture(scope="module", name="corner")
def corner_fixture(tmp_path_factory: pytest.TempPathFactory) -> Corner:
    folder = tmp_path_factory.mktemp("harness")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    corner = Corner(save_tiny("llama", folder / "model"), folder / "tasks")
    corner.include_path.mkdir()
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        return " ".join(f"t{word}" for word in torch.randint(3, 97, (count,), generator=generator).tolist())

    def row(number: int) -> dict[str, Any]:
        options = [words(1 + (number + at) % 4) for at in range(4)]
        return {"question": words(3 + number % 6), "options": options, "label": number % 4, "answer": words(1)}

    write_rows(corner.include_path / "rows.jsonl", [row(number) for number in range(NUM_ROWS)])
    write_rows(corner.include_path / "others.jsonl", [row(number) for number in range(10)])
    return corner


def ours(model: Path, name: str, include_path: Path, removed: Sequence[int], num_rows: int) -> list[RowAnswer]:
    """What the engine answers to the first rows, in the task's order."""
    spec, examples = load_harness_task(name, str(include_path), 0)
    loaded = load_model(ModelSection(model=str(model)), "float32")
    rows = tuple(encode_example(loaded.tokenizer, example) for example in examples[:num_rows])
    scorer = Scorer(loaded, None)
    unit = WorkUnit(0, "evaluation", "test", (), (None,), tuple(range(len(rows))))
    if removed:  # as a candidate, beside others: the whole round is scored together
        candidates = tuple(sorted({0, removed[-1], loaded.layers.num_layers - 1} - set(removed[:-1])))
        unit = replace(unit, removed=tuple(removed[:-1]), candidates=candidates)
    result = scorer.score(unit, rows, spec.answer, spec.max_new_tokens, "worker")
    wanted = removed[-1] if removed else None
    return list(next(each.answers for each in result.candidates if each.layer == wanted))


def theirs(model: Path, name: str, include_path: Path, removed: Sequence[int], num_rows: int) -> list[dict[str, Any]]:
    """What lm_eval's evaluator logs of the same rows, of a model that was loaded and cut without us."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    kept = [layer for at, layer in enumerate(whole.model.layers) if at not in removed]
    for at, layer in enumerate(kept):
        layer.self_attn.layer_idx = at
    whole.model.layers = torch.nn.ModuleList(kept)
    whole.config.num_hidden_layers = len(kept)
    reference = HFLM(pretrained=whole, tokenizer=AutoTokenizer.from_pretrained(model), batch_size=16)
    found = lm_eval.simple_evaluate(
        model=reference,
        tasks=[name.removeprefix("lm-eval:")],
        task_manager=TaskManager(include_path=str(include_path), include_defaults=False),
        limit=num_rows,
        bootstrap_iters=0,
        log_samples=True,
    )
    return [sample for samples in found["samples"].values() for sample in samples]


def assert_choices_agree(
    model: Path, name: str, include_path: Path, removed: Sequence[int], num_rows: int, metrics: Sequence[str]
) -> None:
    logged = {sample["doc_id"]: sample for sample in theirs(model, name, include_path, removed, num_rows)}
    assert len(logged) == num_rows
    for metric in metrics:
        answers = ours(model, f"{name}:{metric}", include_path, removed, num_rows)
        assert [answer.correct for answer in answers] == [bool(logged[row][metric]) for row in range(num_rows)]
        for row, answer in enumerate(answers):
            expected = [float(response[0][0]) for response in logged[row]["resps"]]
            assert answer.log_likelihoods == pytest.approx(expected, abs=1e-3)


def assert_replies_agree(
    model: Path, name: str, include_path: Path, removed: Sequence[int], num_rows: int, filters: Sequence[str]
) -> list[str]:
    samples = theirs(model, name, include_path, removed, num_rows)
    for chosen in filters:
        logged = {sample["doc_id"]: sample for sample in samples if sample["filter"] == chosen}
        assert len(logged) == num_rows
        answers = ours(model, f"{name}:exact_match,{chosen}", include_path, removed, num_rows)
        assert [answer.reply for answer in answers] == [logged[row]["resps"][0][0] for row in range(num_rows)]
        correct = [bool(logged[row]["exact_match"]) for row in range(num_rows)]
        assert [answer.correct for answer in answers] == correct
    return [answer.reply for answer in answers]


REMOVED = [(), (1,), (0, 2)]


@pytest.mark.parametrize("removed", REMOVED)
def test_choices_of_a_tiny_model_agree_with_lm_eval(corner: Corner, removed: tuple[int, ...]) -> None:
    name = corner.write_task(CHOICES)
    assert_choices_agree(corner.model, name, corner.include_path, removed, NUM_ROWS, ("acc", "acc_norm"))


@pytest.mark.parametrize("removed", REMOVED)
def test_replies_of_a_tiny_model_agree_with_lm_eval(corner: Corner, removed: tuple[int, ...]) -> None:
    name = corner.write_task(REPLIES)
    replies = assert_replies_agree(corner.model, name, corner.include_path, removed, NUM_ROWS, ("first", "whole"))
    assert sum(bool(reply) for reply in replies) > NUM_ROWS / 2


def real_tasks(folder: Path) -> dict[str, str]:
    """Task files over rows of the mirror; their names by kind."""
    assert DATA_ROOT is not None
    arc = {
        "task": "real_arc_easy",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": f"{DATA_ROOT}/allenai/ai2_arc/ARC-Easy/test.parquet"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    gsm = {
        "task": "real_gsm8k",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": f"{DATA_ROOT}/openai/gsm8k/main/test.parquet"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer: To find the answer, we",  # else many replies end at once
        "doc_to_target": "{{answer.split('####')[-1].strip()}}",
        "generation_kwargs": {"until": ["Question:", "\n\n\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [
            {
                "name": "number",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(-?[0-9.,]+)", "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
    }
    for task in (arc, gsm):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return {"choices": "lm-eval:real_arc_easy", "replies": "lm-eval:real_gsm8k"}


needs_smollm2 = pytest.mark.skipif(
    DATA_ROOT is None or not (SMOLLM2 / "config.json").exists() or not os.environ.get("TALE_RAY_ORACLE_ROWS"),
    reason="make test-oracle runs it, with TALE_RAY_DATA_ROOT",
)


@needs_smollm2
@pytest.mark.parametrize("removed", [(), (12,), (5, 12, 20)])
def test_real_choices_agree_with_lm_eval(tmp_path: Path, removed: tuple[int, ...]) -> None:
    name = real_tasks(tmp_path)["choices"]
    assert_choices_agree(SMOLLM2, name, tmp_path, removed, 100, ("acc", "acc_norm"))


@needs_smollm2
@pytest.mark.parametrize("removed", [(), (12,), (5, 12, 20)])
def test_real_replies_agree_with_lm_eval(tmp_path: Path, removed: tuple[int, ...]) -> None:
    name = real_tasks(tmp_path)["replies"]
    replies = assert_replies_agree(SMOLLM2, name, tmp_path, removed, 100, ("number",))
    assert sum(bool(reply.strip()) for reply in replies) > 50


# Searches.


def test_layers_found_on_one_task_are_tested_on_another(corner: Corner, tmp_path: Path) -> None:
    """One is judged by likelihoods, the other one by its replies; every cell is what `evaluate` says."""
    choices, replies = corner.write_task(CHOICES), f"{corner.write_task(REPLIES)}:exact_match,whole"
    options = ("--include-path", corner.include_path, "--local")
    search = ("search", "--model", corner.model, "--task", choices, *options, "--epsilon", "1", "--max-removed", "1")
    assert command(*search, "--run", tmp_path / "run").code == 0
    found = command("transfer", tmp_path / "run", "--task", replies, "--pick", "final", "--json", *options)
    assert found.code == 0, found.err
    (layer,) = found.json["searched_on"][0]["removed"]
    assert [score["is_own"] for score in found.json["scores"]] == [True, False]
    for score, task in zip(found.json["scores"], (choices, replies), strict=True):
        for side, removed in (("baseline", ""), ("pruned", layer)):
            alone = ("evaluate", "--model", corner.model, "--task", task, "--remove", removed, "--json", *options)
            scored = command(*alone)
            assert {name: scored.json[name] for name in score[side]} == score[side]


def test_a_search_of_a_task(corner: Corner, tmp_path: Path) -> None:
    name = corner.write_task({**CHOICES, "task": "searched"})
    options = ["--model", corner.model, "--include-path", corner.include_path, "--local", "--max-removed", "1"]
    outcome = command("search", "--task", f"{name}:acc_norm", *options, "--run", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    summary = show(tmp_path / "run")
    assert summary["task"] == "lm-eval:searched:acc_norm"
    assert summary["rows"] == {"shots": 0, "search": 30, "select": 12, "test": 18}
    again = command("search", "--task", f"{name}:acc_norm", *options, "--run", tmp_path / "run")
    assert again.out == outcome.out
    other = command("search", "--task", f"{name}:acc", *options, "--run", tmp_path / "run")
    assert other.code == 2
    assert "acc_norm" in other.err
    scored = command("evaluate", "--run", tmp_path / "run", "--pick", "final", "--json").json
    assert scored["correct"] == summary["test"]["final"]["correct"]


def test_the_default_folder_of_a_task_has_a_name_for_every_system(
    corner: Corner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = corner.write_task(CHOICES)
    options = ["--model", corner.model, "--include-path", corner.include_path, "--local", "--max-removed", "0"]
    assert command("search", "--task", name, *options).code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("lm-eval-tiny_choices-")


def test_a_worker_loads_the_task_by_itself(corner: Corner, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, examples = corner.load(CHOICES)
    monkeypatch.setattr(harness, "_tasks", {})  # as in another process
    choices = [Choice(text, (), ()) for text in examples[1].choices]
    answer = judge_choices(spec.answer.harness, choices, [-3.0, -1.0, -2.0, -4.0], "1")
    assert (answer.correct, answer.prediction) == (True, "1"), "label 1 is right in row 1"
    assert (examples[1].target, examples[1].reply) == ("1", examples[1].choices[1])
    changed = replace(spec.answer.harness, fingerprint="0" * 64)
    with pytest.raises(TaskError, match="is another one on this worker"):
        judge_choices(changed, choices, [-3.0, -1.0, -2.0, -4.0], "1")


def test_what_a_filter_does_not_read_is_invalid(corner: Corner) -> None:
    spec, examples = corner.load(REPLIES)
    right = json.loads((corner.include_path / "rows.jsonl").read_text().splitlines()[0])["answer"]
    assert examples[0].target == right
    assert judge_reply(spec.answer.harness, f"so {right} it is", "0") == RowAnswer(f"so {right} it is", right, True)
    assert judge_reply(spec.answer.harness, "nothing", "0").prediction is None


def test_demonstrations_come_from_other_rows(corner: Corner) -> None:
    files = {"train": str(corner.include_path / "others.jsonl"), "test": str(corner.include_path / "rows.jsonl")}
    task = {**CHOICES, "task": "with_shots", "test_split": "test", "dataset_kwargs": {"data_files": files}}
    alone = corner.load(task)[1]
    shown = corner.load({**task, "fewshot_split": "train"}, shots=2)[1]
    others = (corner.include_path / "others.jsonl").read_text()
    assert [each.digest for each in alone] == [each.digest for each in shown]
    for one, other in zip(alone, shown, strict=True):
        assert other.prompt.endswith(one.prompt)  # type: ignore[union-attr]
        demonstrations = other.prompt.removesuffix(one.prompt).split("\n\n")[:2]  # type: ignore[union-attr,arg-type]
        assert all(text.partition(" t4 ")[0] in others for text in demonstrations)
    with pytest.raises(TaskError, match="no demonstration may be scored"):
        corner.load({**task, "fewshot_split": "test"}, shots=2)


def test_a_row_is_shown_as_it_is_asked(corner: Corner) -> None:
    name = corner.write_task(CHOICES)
    options = ["--include-path", corner.include_path]
    shown = command("tasks", "show", name, "--model", corner.model, *options)
    assert shown.code == 0, shown.err
    example = prepare_rows(TaskSection(task=name, include_path=str(corner.include_path))).examples["search"][0]
    assert f"--- prompt ---\n{example.prompt}\n" in shown.out
    about = command("tasks", "show", name, *options)
    assert about.code == 0, about.err
    assert "multiple_choice of lm-evaluation-harness" in about.out
    assert "doc_to_choice" in about.out


@pytest.mark.parametrize(
    ("changes", "metric", "words"),
    [
        (
            {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "word_perplexity"}]},
            "",
            "asks for loglik",
        ),
        ({}, ":f2", "has no metric 'f2': its metrics are acc, acc_norm"),
        ({}, ":acc,strict", "has no metric 'acc,strict'"),
        ({"repeats": 4}, "", "asks for 4 replies"),
        ({"doc_to_text": "{{missing.column}}"}, "", "'missing' is undefined"),
        ({"metric_list": [{"metric": "brier_score"}]}, "", "has no metric of choices"),
        ({"metric_list": [{"metric": "exact_match"}]}, "", "has no metric of choices"),
    ],
)
def test_what_cannot_be_searched_is_refused(corner: Corner, changes: dict[str, Any], metric: str, words: str) -> None:
    with pytest.raises(TaskError, match=words):
        corner.load({**CHOICES, "task": "refused", **changes}, metric)


FUNCTIONS = """
import random
from functools import partial

def _text(doc, ending):
    return doc["question"] + ending

text = partial(_text, ending=" t4")

def right(doc, results):
    return {"acc": 1.0}

def shuffled(dataset):
    def shuffle(doc):
        return {**doc, "answer": random.choice(doc["options"])}
    return dataset.map(shuffle, load_from_cache_file=False)
"""


def functional(corner: Corner, name: str, lines: str) -> str:
    """A task with functions of its own, as only YAML text can name them."""
    (corner.include_path / "functions.py").write_text(FUNCTIONS)
    corner.write_task({**CHOICES, "task": name})
    path = corner.include_path / f"{name}.yaml"
    kept = [line for line in path.read_text().splitlines() if not line.startswith(lines.partition(":")[0])]
    path.write_text("\n".join([*kept, lines]) + "\n")
    return f"lm-eval:{name}"


@pytest.mark.parametrize(
    "lines", ["doc_to_text: !function functions.text", "process_docs: !function functions.shuffled"]
)
def test_a_task_with_functions_is_the_same_in_every_process(corner: Corner, lines: str) -> None:
    name = functional(corner, "functional", lines)
    program = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from tale_ray.tasks.harness import load_harness_task\n"
        f"print(load_harness_task({name!r}, {str(corner.include_path)!r}, 0)[0].answer.harness.fingerprint)"
    )
    here = load_harness_task(name, str(corner.include_path), 0)[0].answer.harness
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert here is not None
    assert there[-1] == here.fingerprint
    assert "0x" not in here.config


def test_choices_that_code_of_the_task_judges_are_refused(corner: Corner) -> None:
    name = functional(corner, "judging", "process_results: !function functions.right")
    with pytest.raises(TaskError, match="scores choices by code of its own"):
        load_harness_task(name, str(corner.include_path), 0)


def test_sampling_is_refused(corner: Corner) -> None:
    with pytest.raises(TaskError, match="samples its replies"):
        corner.load({**REPLIES, "generation_kwargs": {"do_sample": True, "temperature": 0.7}})


def test_missing_data_and_unknown_tasks_are_named(corner: Corner, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="task lm-eval:gone cannot be loaded"):
        name = corner.write_task({**CHOICES, "task": "gone"}, rows="gone.jsonl")
        load_harness_task(name, str(corner.include_path), 0)
    with pytest.raises(TaskError, match="lm-eval:no_such_task is not known"):
        load_harness_task("lm-eval:no_such_task", str(tmp_path), 0)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, material: Material) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    outcome = material.search("unused", "--task", "lm-eval:arc_easy")
    assert outcome.code == 2
    assert "pip install lm-eval" in outcome.err
