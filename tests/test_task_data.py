"""Rows from every kind of source, equal whatever they are kept in, and what is said when they are not there."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tale_ray.errors import TaskError
from tale_ray.tasks.boolean import generate_rows
from tale_ray.tasks.data import load_rows, load_shots
from tale_ray.tasks.spec import FileSource, GeneratorSource, HubSource, Source, TaskSpec, load_task
from tale_ray.tasks.splits import row_digest

ROWS: list[dict[str, Any]] = [
    {"question": 'Röntgen, "quoted"\nin two lines', "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "score": 1.5},
    {"question": "2024-07-26", "choices": {"label": ["1", "2"], "text": ["", "z"]}, "score": None},
]
HUB = HubSource(path="owner/data", name="config", split="test", revision=None)


def make_spec(source: Source, folder: Path, shots: Source | None = None) -> TaskSpec:
    base = load_task("boolean_synthetic")
    values = {name: getattr(base, name) for name in base.__slots__}
    return TaskSpec(**{**values, "source": source, "shots": shots, "folder": folder})


def file_spec(folder: Path, file_format: Any, *data_files: str) -> TaskSpec:
    return make_spec(FileSource(format=file_format, data_files=data_files), folder)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_generated_rows(tmp_path: Path) -> None:
    spec = make_spec(GeneratorSource(generator="boolean", seed=5, rows=7), tmp_path)
    assert load_rows(spec, None) == load_rows(spec, "/nowhere") == generate_rows(5, 7)


def test_the_same_rows_from_every_file_and_from_the_mirror(tmp_path: Path) -> None:
    write_parquet(tmp_path / "rows.parquet", ROWS)
    write_lines(tmp_path / "rows.jsonl", [{key: value for key, value in row.items() if value} for row in ROWS])
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8-sig")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    write_parquet(tmp_path / "one/owner/data/config/test.parquet", ROWS)
    write_lines(tmp_path / "two/owner/data/config/test.jsonl", ROWS)

    specs = [
        (file_spec(tmp_path, "parquet", "rows.parquet"), None),
        (file_spec(tmp_path, "json", "rows.jsonl"), None),
        (file_spec(tmp_path, "json", "rows.json"), None),
        (file_spec(tmp_path, "json", "rows.jsonl.gz"), None),
        (make_spec(HUB, tmp_path), str(tmp_path / "one")),
        (make_spec(HUB, tmp_path), str(tmp_path / "two")),
    ]
    for spec, data_root in specs:
        rows = load_rows(spec, data_root)
        assert rows == ROWS
        assert [row_digest(row) for row in rows] == [row_digest(row) for row in ROWS]


def test_hub_rows_through_datasets_equal_those_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path: str, name: str | None, *, split: str, revision: str | None) -> Any:
        asked.append((path, name, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows(make_spec(HUB, tmp_path), None)
    assert asked == [("owner/data", "config", "test", None)]
    assert [row_digest(row) for row in rows] == [row_digest(row) for row in ROWS]


def test_an_unreachable_hub_says_how_to_go_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TaskError, match=r"owner/data.*Couldn't reach.*--data-root.*owner/data/config/test.parquet"):
        load_rows(make_spec(HUB, tmp_path), None)


def test_csv_keeps_text_and_types(tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "number", "share", "yes", "day", "note", "gap"])
        writer.writerow(["two\nlines, ü", 3, 0.5, True, "2024-07-26", "None", ""])
        writer.writerow(["", -4, 2, False, "2024-07-27", "NA", 8])
    assert load_rows(file_spec(tmp_path, "csv", "rows.csv"), None) == [
        {
            "question": "two\nlines, ü",
            "number": 3,
            "share": 0.5,
            "yes": True,
            "day": "2024-07-26",
            "note": "None",
            "gap": None,
        },
        {"question": "", "number": -4, "share": 2.0, "yes": False, "day": "2024-07-27", "note": "NA", "gap": 8},
    ]


def test_csv_texts_may_be_longer_than_the_block_that_is_read_at_once(tmp_path: Path) -> None:
    texts = [f"{number}\n" * 300_000 for number in range(4)]
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    assert [row["text"] for row in load_rows(file_spec(tmp_path, "csv", "rows.csv"), None)] == texts


def test_several_files_patterns_and_absolute_paths(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_lines(tmp_path / f"part/{name}.jsonl", [{name: name}])
    spec = file_spec(tmp_path, "json", str(tmp_path / "part/c.jsonl"), "part/[ab].jsonl")
    assert load_rows(spec, None) == [
        {"c": "c", "a": None, "b": None},
        {"c": None, "a": "a", "b": None},
        {"c": None, "a": None, "b": "b"},
    ]
    assert len(load_rows(file_spec(tmp_path, "json", "**/*.jsonl"), None)) == 3


@pytest.mark.parametrize(
    ("file_format", "name", "content", "parts"),
    [
        ("csv", "missing.csv", None, ["missing.csv", "does not exist", "data_files"]),
        ("csv", "*.tsv", None, ["*.tsv", "does not exist"]),
        *(("csv", name, None, [name, "cannot be looked for", "data_files"]) for name in ("**x", "/", "x" * 300)),
        ("csv", "empty.csv", b"", ["empty.csv", "cannot be read as csv"]),
        ("csv", "header.csv", b"a,b\n", ["header.csv", "no rows"]),
        ("csv", "ragged.csv", b"a,b\n1,2\n1,2,3\n", ["ragged.csv", "cannot be read as csv"]),
        ("csv", "latin.csv", "a\ncaf\xe9\n".encode("latin-1"), ["latin.csv", "UTF-8"]),
        ("csv", "twice.csv", b"a,a\n1,2\n", ["twice.csv", "cannot be read as csv"]),
        ("json", "empty.json", b"", ["empty.json", "no rows"]),
        ("json", "list.json", b"[]", ["list.json", "no rows"]),
        ("json", "broken.json", b'{"a": 1}\n{"a"', ["broken.json", "cannot be read as json"]),
        ("json", "values.json", b"[1, 2]", ["values.json", "row 1 is 1"]),
        ("json", "latin.json", b'{"a": "\xe9"}', ["latin.json", "cannot be read as json"]),
        ("json", "broken.json.gz", b"\x00\x01", ["broken.json.gz", "cannot be read as json"]),
        ("parquet", "broken.parquet", b"PAR1", ["broken.parquet", "cannot be read as parquet"]),
    ],
)
def test_files_that_cannot_be_used(
    tmp_path: Path, file_format: str, name: str, content: bytes | None, parts: list[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError) as error:
        load_rows(file_spec(tmp_path, file_format, name), None)
    for part in parts:
        assert part in str(error.value)


def test_a_mirror_without_the_split_or_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"owner/data/config/test.parquet.*TALE_RAY_DATA_ROOT"):
        load_rows(make_spec(HUB, tmp_path), str(tmp_path))
    with pytest.raises(TaskError, match="is not a folder"):
        load_rows(make_spec(HUB, tmp_path), str(tmp_path / "absent"))


def test_a_mirror_names_the_default_configuration(tmp_path: Path) -> None:
    write_parquet(tmp_path / "owner/data/default/test.parquet", ROWS)
    source = HubSource(path="owner/data", name=None, split="test", revision=None)
    assert load_rows(make_spec(source, tmp_path), str(tmp_path)) == ROWS


def test_demonstrations_come_from_their_split_or_are_carved(tmp_path: Path) -> None:
    train = HubSource(path="owner/data", name="config", split="train", revision=None)
    write_parquet(tmp_path / "owner/data/config/test.parquet", ROWS)
    assert load_shots(make_spec(HUB, tmp_path), str(tmp_path)) is None
    assert load_shots(make_spec(HUB, tmp_path, train), str(tmp_path)) is None
    write_parquet(tmp_path / "owner/data/config/train.parquet", ROWS[:1])
    assert load_shots(make_spec(HUB, tmp_path, train), str(tmp_path)) == ROWS[:1]
    with pytest.raises(TaskError, match="is not a folder"):
        load_shots(make_spec(HUB, tmp_path, train), str(tmp_path / "absent"))
    missing = FileSource(format="csv", data_files=("shots.csv",))
    with pytest.raises(TaskError, match="does not exist"):
        load_shots(make_spec(HUB, tmp_path, missing), str(tmp_path))
