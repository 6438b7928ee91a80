"""Demonstrations: which rows are shown, that none of them is scored, and what a run remembers of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from folders import Material, command, show, write_rows
from folders import material_fixture as material_fixture

import tale_ray
from tale_ray.attempt.rows import PreparedRows, prepare_rows
from tale_ray.cluster.worker import Worker
from tale_ray.config import ModelSection, ResourceSection, TaskSection
from tale_ray.errors import TaskError
from tale_ray.records import Example
from tale_ray.tasks.shots import question_of

Rows = list[dict[str, Any]]


def numbered(prefix: str, count: int, **more: Any) -> Rows:
    return [{"question": f"{prefix}{number}", "answer": "t3", **more} for number in range(count)]


def by_subject(prefix: str, counts: dict[str, int]) -> Rows:
    return [
        row for subject, count in counts.items() for row in numbered(f"{prefix}-{subject}-", count, subject=subject)
    ]


def write_task(folder: Path, rows: Rows, shots: Rows | dict[str, str] | None = None, **changes: Any) -> str:
    """Write a task over the rows; demonstrations are rows of their own, a source, or carved out."""
    write_rows(folder / "rows.jsonl", rows)
    content: dict[str, Any] = {
        "name": "asked",
        "source": {"path": "json", "data_files": "rows.jsonl"},
        "messages": [{"role": "user", "content": "{{ question }}"}],
        "reply": "{{ answer }}",
        "target": "{{ answer }}",
        "answer": {"type": "regex", "pattern": r"(t\d+)"},
        "max_new_tokens": 1,
        **changes,
    }
    if isinstance(shots, list):
        write_rows(folder / "shots.jsonl", shots)
        content["shots"] = {"path": "json", "data_files": "shots.jsonl"}
    elif shots is not None:
        content["shots"] = shots
    (folder / "task.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(folder / "task.yaml")


def scored(prepared: PreparedRows) -> list[Example]:
    return [example for examples in prepared.examples.values() for example in examples]


def asked(examples: Any) -> list[str]:
    return [example.messages[-1]["content"] for example in examples]


def test_every_row_is_shown_the_same_demonstrations_of_the_source(tmp_path: Path) -> None:
    task = write_task(tmp_path, numbered("q", 40), numbered("s", 10))
    prepared = prepare_rows(TaskSection(task=task, shots=3))
    assert all(example.demonstrations == prepared.shots for example in scored(prepared))
    assert len(set(asked(prepared.shots))) == 3
    assert all(question.startswith("s") for question in asked(prepared.shots))
    assert prepared.counts == {"shots": 3, "search": 20, "select": 8, "test": 12}
    assert prepared.notes == ()

    without = prepare_rows(TaskSection(task=task))
    assert without.counts == {"search": 20, "select": 8, "test": 12}
    assert asked(scored(without)) == asked(scored(prepared))
    assert not any(example.demonstrations for example in scored(without))


def test_the_seed_and_the_content_choose_and_not_the_order_of_the_file(tmp_path: Path) -> None:
    def chosen(shots: Rows, seed: int) -> list[str]:
        task = write_task(tmp_path, numbered("q", 40), shots)
        return asked(prepare_rows(TaskSection(task=task, shots=4, seed=seed)).shots)

    rows = numbered("s", 30)
    assert chosen(rows, 0) == chosen(rows[::-1], 0)
    assert len({tuple(chosen(rows, seed)) for seed in range(5)}) == 5
    assert chosen(rows, 0)[:2] == asked(
        prepare_rows(TaskSection(task=write_task(tmp_path, numbered("q", 40), rows), shots=2)).shots
    )


def test_without_a_source_they_are_carved_out_of_the_rows_and_a_user_is_told(tmp_path: Path) -> None:
    task = write_task(tmp_path, numbered("q", 40))
    prepared = prepare_rows(TaskSection(task=task, shots=4, splits={"search": "0.5", "test": "0.5"}))
    assert prepared.counts == {"shots": 4, "search": 18, "test": 18}
    assert not {question_of(example) for example in prepared.shots} & {question_of(row) for row in scored(prepared)}
    assert prepared.notes == (
        "the task names no source of demonstrations: demonstrations are carved out of the rows, "
        "which leaves 36 of 40 to score",
    )


@pytest.mark.parametrize("is_there", [True, False])
def test_a_mirror_without_the_split_of_demonstrations(tmp_path: Path, is_there: bool) -> None:
    folder = tmp_path / "mirror" / "owner" / "set" / "default"
    folder.mkdir(parents=True)
    write_rows(folder / "test.jsonl", numbered("q", 20))
    if is_there:
        write_rows(folder / "train.jsonl", numbered("s", 20))
    source = {"path": "owner/set", "split": "test"}
    task = write_task(tmp_path, [], source=source, shots={**source, "split": "train"})
    prepared = prepare_rows(TaskSection(task=task, shots=2, data_root=str(tmp_path / "mirror")))
    assert {question[0] for question in asked(prepared.shots)} == {"s" if is_there else "q"}
    assert len(scored(prepared)) == (20 if is_there else 18)
    assert prepared.notes == (
        ()
        if is_there
        else (
            "owner/set, split train is not in the data root: demonstrations are carved out of the rows, "
            "which leaves 18 of 20 to score",
        )
    )


def test_a_share_of_the_rows_is_asked_for(tmp_path: Path) -> None:
    task = write_task(tmp_path, numbered("q", 40), numbered("s", 10))
    splits = {"shots": "0.25", "search": "0.5", "test": "0.25"}
    prepared = prepare_rows(TaskSection(task=task, shots=3, splits=splits))
    assert prepared.counts == {"shots": 3, "search": 20, "test": 10}
    assert not set(asked(prepared.shots)) & set(asked(scored(prepared)))
    assert prepared.notes == ("demonstrations are the shots share of the rows, as --splits asks for it",)
    with pytest.raises(TaskError, match="shots 11 is too many: there are 10 rows"):
        prepare_rows(TaskSection(task=task, shots=11, splits=splits))


def test_rows_that_are_scored_cannot_be_demonstrations_and_are_named(tmp_path: Path) -> None:
    rows = numbered("q", 40)
    also_shown = [{**row, "id": "another column hides nothing"} for row in rows[:2]]
    task = write_task(tmp_path, rows, numbered("s", 10) + also_shown)
    with pytest.raises(
        TaskError, match=r"rows are both in shots and in \w+: .*take them out of one.* 'q[01]'"
    ) as error:
        prepare_rows(TaskSection(task=task, shots=1))
    assert "splits share no row" in str(error.value)
    assert prepare_rows(TaskSection(task=task)).shots == ()  # nothing is shown


def test_what_is_asked_before_is_shown_last_and_said(tmp_path: Path) -> None:
    task = write_task(tmp_path, numbered("q", 40), numbered("s", 1) * 3 + numbered("s", 3))

    def chosen(shots: int) -> PreparedRows:
        return prepare_rows(TaskSection(task=task, shots=shots))

    assert set(asked(chosen(3).shots)) == {"s0", "s1", "s2"}
    assert chosen(3).notes == ()
    assert asked(chosen(4).shots) == [*asked(chosen(3).shots), "s0"]
    assert chosen(4).counts["shots"] == 4
    assert chosen(4).notes == ("too few demonstrations ask different things: some are shown twice",)
    with pytest.raises(TaskError, match=r"shots 7 is too many: there are 6 rows .* ask for at most 6"):
        chosen(7)


def test_what_is_asked_twice_is_neither_carved_nor_lost(tmp_path: Path) -> None:
    twice = [{**row, "id": number} for number in range(2) for row in numbered("q", 10)]
    once = numbered("o", 3) * 2  # equal rows stay together
    prepared = prepare_rows(TaskSection(task=write_task(tmp_path, twice + once), shots=2, splits={"search": "1"}))
    assert all(question.startswith("o") for question in asked(prepared.shots))
    assert sorted(asked(scored(prepared))) == sorted(
        row["question"] for row in twice + once if row["question"] not in asked(prepared.shots)
    )


def test_an_empty_split_is_refused_with_shots_too(tmp_path: Path) -> None:
    task = write_task(tmp_path, numbered("q", 4))
    with pytest.raises(TaskError, match="the search split of task asked is empty"):
        prepare_rows(TaskSection(task=task, shots=3, splits={"search": "0.5"}))


@pytest.mark.parametrize("carved", [True, False])
def test_a_row_is_shown_rows_of_its_own_group(tmp_path: Path, carved: bool) -> None:
    counts = {"law": 20, "art": 10, "chess": 14}
    shots = None if carved else by_subject("s", {"art": 3, "chess": 2, "law": 4, "no one asks": 1})
    task = write_task(tmp_path, by_subject("q", counts), shots, group_by="subject")
    prepared = prepare_rows(TaskSection(task=task, shots=2))
    assert prepared.counts["shots"] == 6
    for examples in prepared.examples.values():
        groups = [question.split("-")[1] for question in asked(examples)]
        assert len(dict.fromkeys(groups)) == sum(a != b for a, b in zip(["", *groups], groups, strict=False))
        for group, example in zip(groups, examples, strict=True):
            assert [question.split("-")[1] for question in asked(example.demonstrations)] == [group, group]
    assert not set(asked(prepared.shots)) & set(asked(scored(prepared)))


def test_a_group_without_enough_demonstrations_is_named(tmp_path: Path) -> None:
    task = write_task(
        tmp_path,
        by_subject("q", {"law": 20, "art": 20}),
        by_subject("s", {"law": 5, "art": 2}),
        group_by="subject",
    )
    with pytest.raises(TaskError, match="shots 3 is too many: group 'art' has 2 rows"):
        prepare_rows(TaskSection(task=task, shots=3))


@pytest.mark.parametrize("shots", [0, 1])
def test_rows_of_groups_are_taken_in_turns(tmp_path: Path, shots: int) -> None:
    counts = {"law": 60, "art": 6, "chess": 30}
    task = write_task(tmp_path, by_subject("q", counts), group_by="subject")

    def groups(rows: int | None) -> list[str]:
        section = TaskSection(task=task, rows=rows, shots=shots, splits={"search": "1"})
        return [question.split("-")[1] for question in asked(prepare_rows(section).examples["search"])]

    assert {group: groups(9).count(group) for group in counts} == dict.fromkeys(counts, 3)
    taken = {group: groups(25).count(group) for group in counts}
    assert taken["art"] == 6 - shots
    assert abs(taken["law"] - taken["chess"]) <= 1
    assert len(groups(None)) == 96 - 3 * shots


def test_a_run_says_what_it_was_shown_and_is_not_continued_with_anything_else(
    material: Material, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ("--max-removed", "1", "--splits", "search=0.3,test=0.2")
    outcome = material.search(run, *options, "--shots", "2")
    assert outcome.code == 0, outcome.err
    assert "demonstrations are carved out of the rows, which leaves 98 of 100 to score" in outcome.err
    assert show(run)["rows"] == {"shots": 2, "search": 29, "select": 0, "test": 20}  # of the other 98
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["rows"]["shots"]["count"] == 2
    assert manifest["rows"]["shots"]["digest"] in manifest["identity"]["rows.shots"]
    assert manifest["identity"]["shots"] == manifest["config"]["task"]["shots"] == 2

    for other in ((), ("--shots", "3"), ("--shots", "2", "--seed", "1")):
        refused = material.search(run, *options, *other)
        assert refused.code == 2, refused.err
        assert "rows.shots: the run has" in refused.err
    assert material.search(run, *options, "--shots", "2", "--resume", "must").code == 0
    assert command("resume", run).code == 0

    test = show(run)["test"]["baseline"]
    score = command("evaluate", "--run", run, "--pick", "0", "--json").json
    assert (score["correct"], score["total"]) == (test["correct"], test["total"])
    bare = command("evaluate", "--run", run, "--pick", "0", "--shots", "0", "--split", "search", "--json").json
    assert bare["total"] == 30


def test_demonstrations_change_nothing_for_runs_without(material: Material, tmp_path: Path) -> None:
    assert material.search(tmp_path / "run", "--max-removed", "0").code == 0
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert not [name for name in manifest["identity"] if "shots" in name]
    assert show(tmp_path / "run")["rows"]["shots"] == 0


def test_other_demonstrations_of_the_source_are_another_run(material: Material, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (material.folder / "rows.jsonl").read_text().splitlines()]
    task = write_task(tmp_path, rows[:60], rows[60:80])
    run = tmp_path / "run"
    options = ("--task", task, "--max-removed", "0", "--shots", "3")
    assert material.search(run, *options).code == 0
    write_task(tmp_path, rows[:60], rows[80:])
    refused = material.search(run, *options)
    assert refused.code == 2
    assert "rows.shots: the run has" in refused.err
    assert "rows.search" not in refused.err
    refused = command("evaluate", "--run", run, "--local")
    assert refused.code == 2
    assert "the shots rows of task asked are not those" in refused.err


def test_a_prompt_with_demonstrations_that_is_too_long(material: Material, tmp_path: Path) -> None:
    refused = material.search(tmp_path / "run", "--shots", "60", "--splits", "search=0.5")
    assert refused.code == 2
    assert "fewer demonstrations" in refused.err


def test_shots_are_an_option_everywhere(material: Material, tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text("shots: 2\n")
    plan = material.search(tmp_path / "run", "--config", tmp_path / "search.yaml", "--dry-run")
    assert "task tiny: 2 shots rows, 49 search rows" in plan.out, plan.err
    outcome = material.search(tmp_path / "run", "--shots", "-1", "--dry-run")
    assert outcome.code == 2
    assert "shots -1" in outcome.err
    options: dict[str, Any] = {"model": str(material.model), "task": str(material.task), "local": True, "shots": 1}
    run = tale_ray.search(**options, max_removed=0, run=str(tmp_path / "api"))
    assert run.summary["rows"]["shots"] == 1


@pytest.mark.parametrize("shots", [0, 2])
def test_a_row_is_shown_as_the_model_is_asked_it(material: Material, shots: int) -> None:
    prepared = prepare_rows(TaskSection(task=str(material.task), shots=shots))
    example = prepared.examples["search"][7]
    worker = Worker("w", ModelSection(model=str(material.model)), "float32", ResourceSection(local=True))
    (asked_row,) = worker.encode([example])

    shown = command("tasks", "show", material.task, "--model", material.model, "--row", "7", "--shots", shots)
    assert shown.code == 0, shown.err
    head, *parts = re.split(r"--- (.*) ---\n", shown.out)
    assert f"search row 7 of {len(prepared.examples['search'])}, {shots} demonstrations" in head
    assert "note: the tokenizer has no chat template" in head
    said = {name: text.removesuffix("\n") for name, text in zip(parts[::2], parts[1::2], strict=True)}
    assert said == {
        "prompt": "".join(f"{row.messages[0]['content']}\nAnswer: {row.reply}\n\n" for row in prepared.shots)
        + f"{example.messages[0]['content']}\nAnswer:",
        f"{len(asked_row.token_ids)} tokens": " ".join(map(str, asked_row.token_ids)),
        "reference reply": example.reply,
        "target": example.target,
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--row", "1"), "--row is about a row as a model is asked it: name the model with --model"),
        (("--shots", "1"), "--shots is about a row"),
        (("--model", "bundled", "--row", "50"), "row 50 does not exist: the search split of task tiny has 50 rows"),
        (("--model", "bundled", "--row", "-1"), "row -1 does not exist"),
        (("--model", "./nowhere"), "model folder ./nowhere does not exist"),
        (("--model", "bundled", "--shots", "1000"), "shots 1000 is too many"),
    ],
)
def test_a_row_that_cannot_be_shown(material: Material, arguments: tuple[str, ...], words: str) -> None:
    outcome = command("tasks", "show", material.task, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err
