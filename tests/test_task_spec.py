"""Task files: what a correct one says, and that each broken rule is named with file, key, value and remedy."""

import importlib.util
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tale_ray.errors import TaskError
from tale_ray.tasks.data import count_rows
from tale_ray.tasks.description import describe_task
from tale_ray.tasks.prompts import render_rows
from tale_ray.tasks.spec import (
    AnswerSpec,
    FileSource,
    GeneratorSource,
    HubSource,
    builtin_tasks,
    load_task,
)

BASE: dict[str, Any] = {
    "name": "colours",
    "source": {"path": "csv", "data_files": "rows.csv"},
    "messages": [{"role": "user", "content": "{{ question }}"}],
    "reply": "{{ answer }}",
    "target": "{{ answer }}",
    "answer": {"type": "choice", "labels": ["A", "B"]},
    "max_new_tokens": 1,
}


def write_task(folder: Path, **changes: Any) -> str:
    path = folder / "task.yaml"
    content = {key: value for key, value in {**BASE, **changes}.items() if value != "absent"}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def test_every_key_of_the_documented_example_is_read(tmp_path: Path) -> None:
    path = tmp_path / "boolq.yaml"
    path.write_text(
        """
name: boolq
source: {path: google/boolq, split: validation}
shots: {path: google/boolq, split: train, revision: abc}
group_by: null
messages:
  - {role: system, content: "Answer."}
  - {role: user, content: "{{ passage }} ... {{ question }}"}
reply: "{{ 'A' if answer else 'B' }}"
target: "{{ 'A' if answer else 'B' }}"
answer: {type: choice, labels: [A, B]}
max_new_tokens: 1
metric: accuracy
""",
        encoding="utf-8",
    )
    spec = load_task(str(path))

    assert spec.name == "boolq"
    assert spec.description == ""
    assert spec.source == HubSource(path="google/boolq", name=None, split="validation", revision=None)
    assert spec.shots == HubSource(path="google/boolq", name=None, split="train", revision="abc")
    assert spec.group_by is None
    assert spec.messages == (
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": "{{ passage }} ... {{ question }}"},
    )
    assert spec.reply == spec.target == "{{ 'A' if answer else 'B' }}"
    assert spec.answer == AnswerSpec(type="choice", labels=("A", "B"))
    assert (spec.max_new_tokens, spec.metric, spec.folder) == (1, "accuracy", tmp_path)
    assert pickle.loads(pickle.dumps(spec)) == spec


GUIDE = Path(__file__).resolve().parent.parent / "docs" / "tasks.md"


def test_the_examples_of_the_guide_are_tasks(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    files = [block for block in blocks if block.startswith("name: ")]
    assert len(files) == 3
    for block in files:
        (tmp_path / "task.yaml").write_text(block, encoding="utf-8")
        assert load_task(str(tmp_path / "task.yaml")).text == block
    (sources,) = [block.strip().splitlines() for block in blocks if block.startswith("source: ")]
    for line in sources:
        load_task(write_task(tmp_path, **yaml.safe_load(line)))
    for name in re.findall(r"^\| `\{(.*?)\}` \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE):
        answer = yaml.safe_load(f"{{{name}}}")
        tokens = "absent" if answer["type"] == "likelihood" else 1
        if answer["type"] != "math" or importlib.util.find_spec("math_verify"):
            assert load_task(write_task(tmp_path, answer=answer, max_new_tokens=tokens)).answer.type == answer["type"]


def test_the_rows_of_the_guide_are_asked(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(name: .*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    rows = [
        {"text": "Dull.", "stars": 1},
        {"question": "1 + 1?", "options": ["1", "3", "2"], "correct": 2},
        {"question": "How many?", "answer": "One and two.\n#### 3"},
    ]
    for block, row, target in zip(blocks, rows, ["bad", "C", "3"], strict=True):
        (tmp_path / "task.yaml").write_text(block, encoding="utf-8")
        (example,) = render_rows(load_task(str(tmp_path / "task.yaml")), [row])
        assert example.target == target


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"path": "csv", "data_files": "a.csv"}, FileSource(format="csv", data_files=("a.csv",))),
        (
            {"path": "json", "data_files": ["a.json", "b/*.json"], "split": "train"},
            FileSource(format="json", data_files=("a.json", "b/*.json")),
        ),
        ({"generator": "boolean", "seed": 3, "rows": 9}, GeneratorSource(generator="boolean", seed=3, rows=9)),
        (
            {"path": "cais/mmlu", "name": "all", "split": "test"},
            HubSource(path="cais/mmlu", name="all", split="test", revision=None),
        ),
    ],
)
def test_source_forms(tmp_path: Path, source: dict[str, Any], expected: object) -> None:
    assert load_task(write_task(tmp_path, source=source)).source == expected


def test_identity_ignores_where_rows_come_from_and_nothing_else(tmp_path: Path) -> None:
    def identity(**changes: Any) -> str:
        return json.dumps(load_task(write_task(tmp_path, **changes)).identity(), sort_keys=True)

    base = identity()
    assert identity(name="other", description="text", source={"generator": "boolean", "seed": 1, "rows": 2}) == base
    changes: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "{{ question }}?"}]},
        {"reply": "({{ answer }})"},
        {"target": "({{ answer }})"},
        {"answer": {"type": "word", "labels": ["A", "B"]}},
        {"answer": {"type": "choice", "labels": ["B", "A"]}},
        {"answer": {"type": "regex", "pattern": "(a)"}},
        {"max_new_tokens": 2},
        {"group_by": "subject"},
    ]
    assert len({base, *(identity(**change) for change in changes)}) == len(changes) + 1


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"max_new_tokens": "absent"}, ["`max_new_tokens` is missing", "add it"]),
        ({"max_new_tokens": "absent", "max_new_token": 4}, ["`max_new_tokens` is missing", "is it max_new_token?"]),
        ({"max_new_tokens": 0}, ["`max_new_tokens` is 0", "at least 1"]),
        ({"max_new_tokens": True}, ["`max_new_tokens` is True", "whole number"]),
        ({"max_new_tokens": "1"}, ["`max_new_tokens` is '1'", "whole number"]),
        ({"gruop_by": "x"}, ["`gruop_by` is not known", "did you mean group_by?"]),
        ({"metric": "f1"}, ["`metric` is 'f1'", "accuracy"]),
        ({"name": "a/b"}, ["`name` is 'a/b'", "letters, digits"]),
        ({"reply": True}, ["`reply` is True", "its quotes"]),
        ({"reply": "{{ x"}, ["`reply` is '{{ x'", "jinja2"]),
        ({"target": "{% if %}"}, ["`target`", "jinja2"]),
        ({"target": "{{ x | nope }}"}, ["`target`", "nope"]),
        ({"target": "{{ " + "(" * 300 + "1" + ")" * 300 + " }}"}, ["`target`", "RecursionError", "simpler"]),
        ({"target": "{{ " + "9" * 5000 + " }}"}, ["`target`", "4300 digits", "simpler"]),
        ({"target": "{% macro a(b, b) %}{% endmacro %}"}, ["`target`", "duplicate argument", "simpler"]),
        ({"target": "{% for a in b %}" * 50 + "{% endfor %}" * 50}, ["`target`", "nested blocks", "simpler"]),
        ({"target": ""}, ["`target` is ''", "not empty"]),
        ({"messages": "hi"}, ["`messages` is 'hi'", "list"]),
        ({"messages": []}, ["`messages` is []", "at least one"]),
        ({"messages": [{"role": "bot", "content": "x"}]}, ["`messages[0].role` is 'bot'", "system, user, assistant"]),
        ({"messages": [{"role": "user"}]}, ["`messages[0].content` is missing"]),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, ["`messages[0].name` is not known"]),
        ({"messages": [{"role": "system", "content": "x"}]}, ["`messages`", "last message has the role user"]),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]},
            ["`messages`", "first message"],
        ),
        ({"answer": "choice"}, ["`answer` is 'choice'", "mapping"]),
        ({"answer": {"type": "choise"}}, ["`answer.type` is 'choise'", "did you mean choice?"]),
        ({"answer": {"type": "choice"}}, ["`answer.labels` is missing"]),
        ({"answer": {"type": "choice", "labels": []}}, ["`answer.labels` is []", "at least one"]),
        ({"answer": {"type": "choice", "labels": ["A", "A"]}}, ["`answer.labels`", "once"]),
        ({"answer": {"type": "word", "labels": ["Yes", "yes"]}}, ["`answer.labels`", "in any case"]),
        ({"answer": {"type": "word", "labels": [True, False]}}, ["`answer.labels`", "entry True", "its quotes"]),
        ({"answer": {"type": "choice", "labels": [1, 2]}}, ["`answer.labels`", "entry 1", "quotes"]),
        ({"answer": {"type": "choice", "labels": ["A "]}}, ["`answer.labels`", "space"]),
        ({"answer": {"type": "number", "labels": ["A"]}}, ["`answer.labels` is not known"]),
        ({"answer": {"type": "regex"}}, ["`answer.pattern` is missing"]),
        ({"answer": {"type": "regex", "pattern": "(a"}}, ["`answer.pattern` is '(a'", "regular expression"]),
        ({"answer": {"type": "regex", "pattern": "(a{99999999999})"}}, ["`answer.pattern`", "too large"]),
        ({"answer": {"type": "regex", "pattern": "(" * 5000 + ")" * 5000}}, ["`answer.pattern`", "recursion depth"]),
        ({"answer": {"type": "regex", "pattern": "a"}}, ["`answer.pattern` is 'a'", "parentheses"]),
        ({"source": {"path": "csv"}}, ["`source.data_files` is missing"]),
        ({"source": {"path": "csv", "data_files": "x", "split": "test"}}, ["`source.split` is 'test'", "train"]),
        ({"source": {"path": "text", "data_files": "x"}}, ["`source.path` is 'text'", "csv, json, parquet"]),
        ({"source": {"path": "../x", "split": "test"}}, ["`source.path` is '../x'"]),
        ({"source": {"path": "a/b"}}, ["`source.split` is missing"]),
        ({"source": {"path": "a/b", "split": "test[:10]"}}, ["`source.split` is 'test[:10]'", "--rows"]),
        ({"source": {"path": "a/b", "name": "../c", "split": "test"}}, ["`source.name` is '../c'"]),
        ({"source": {"generator": "random", "seed": 0, "rows": 1}}, ["`source.generator` is 'random'", "boolean"]),
        ({"source": {"generator": "boolean", "seed": 0, "rows": 0}}, ["`source.rows` is 0", "at least 1"]),
        ({"source": {"generator": "boolean", "rows": 1}}, ["`source.seed` is missing"]),
        ({"shots": {"path": "a/b"}}, ["`shots.split` is missing"]),
        ({"answer": {"type": "word", "labels": ["A", "\ud83d"]}}, ["`answer.labels`", "\\ud83d", "half a character"]),
        ({"description": "\ud83d"}, ["`description` is '\\ud83d'", "half a character"]),
        ({"reply": "\ud83d"}, ["`reply` is '\\ud83d'", "half a character"]),
    ],
)
def test_a_broken_rule_names_file_key_value_and_remedy(
    tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    path = write_task(tmp_path, **changes)
    with pytest.raises(TaskError) as error:
        load_task(path)
    for part in [path, *parts]:
        assert part in str(error.value)


def test_math_answers_need_their_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_task(tmp_path, answer={"type": "math"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match="pip install math-verify"):
        load_task(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert load_task(path).answer.type == "math"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"a: [", "not valid YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"\xff\xfe\xff", "cannot be read"),
        (b"", "mapping"),
        (b"- a", "mapping"),
    ],
)
def test_a_file_that_is_no_task(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(TaskError, match=part) as error:
        load_task(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("arc_esay", ["'arc_esay'", "did you mean arc_easy?", *builtin_tasks()]),
        ("zzz", ["'zzz'", *builtin_tasks()]),
        ("missing/file.yaml", ["missing/file.yaml", "does not exist"]),
    ],
)
def test_an_unknown_task(name: str, parts: list[str]) -> None:
    with pytest.raises(TaskError) as error:
        load_task(name)
    for part in parts:
        assert part in str(error.value)


def test_builtin_tasks_load_under_their_own_name() -> None:
    assert {"arc_easy", "boolean_expressions", "boolean_synthetic"} <= set(builtin_tasks())
    for name in builtin_tasks():
        spec = load_task(name)
        assert spec.name == name
        assert spec.description


def test_description_says_source_rows_demonstrations_answer_and_metric() -> None:
    assert describe_task(load_task("arc_easy"), 900).splitlines()[1:] == [
        "  source          allenai/ai2_arc, ARC-Easy, split test",
        "  rows            900",
        "  demonstrations  allenai/ai2_arc, ARC-Easy, split train",
        "  answer          choice of A, B, C, D, E; at most 1 new token",
        "  metric          accuracy",
    ]
    assert "carved out of the rows" in describe_task(load_task("boolean_synthetic"), None)
    assert "counted with --data-root" in describe_task(load_task("boolean_synthetic"), None)


def test_rows_are_counted_where_no_hub_has_to_be_asked(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\na,A\nb,B\n")
    assert count_rows(load_task(write_task(tmp_path)), None) == 2
    assert count_rows(load_task("boolean_synthetic"), None) == 1200
    assert count_rows(load_task("boolq"), None) is None
    assert count_rows(load_task("boolq"), str(tmp_path)) is None
    (tmp_path / "google/boolq/default").mkdir(parents=True)
    (tmp_path / "google/boolq/default/validation.jsonl").write_text('{"question": "is it"}\n')
    assert count_rows(load_task("boolq"), str(tmp_path)) == 1


def test_importing_tasks_imports_no_heavy_library() -> None:
    code = (
        "import sys, tale_ray.tasks.data, tale_ray.tasks.prompts, tale_ray.tasks.spec\n"
        "print([name for name in ('torch', 'transformers', 'ray', 'datasets', 'math_verify') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("value", ["2020-99-99", "!!int x", "[" * 3000])
def test_yaml_that_makes_no_value_is_refused_in_words(tmp_path: Path, value: str) -> None:
    (tmp_path / "task.yaml").write_text(f"description: {value}\n")
    with pytest.raises(TaskError, match=r"task\.yaml is not valid YAML"):
        load_task(str(tmp_path / "task.yaml"))
