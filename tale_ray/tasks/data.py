"""The rows of a task, wherever they are kept: a mirror, the hub, local files, or a generator.

Rows are plain Python values. The same rows read from Parquet, from JSON lines or from the hub have equal digests:
nothing here guesses at dates, and a key that a row of a JSON file leaves out is null, as it would be in Parquet.

This module does not know what the rows are for.
"""

import json
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from pyarrow import csv, parquet

from tale_ray.errors import TaskError
from tale_ray.paths import existing
from tale_ray.tasks.boolean import generate_rows
from tale_ray.tasks.spec import FileFormat, FileSource, GeneratorSource, HarnessSource, HubSource, Source, TaskSpec

Row: TypeAlias = dict[str, Any]


def load_rows(spec: TaskSpec, data_root: str | None) -> list[Row]:
    """Return the rows of the task in the order of their source.

    With `data_root`, a hub source is read from that mirror and the network is never asked.

    Raises:
        TaskError: the source is missing, unreachable, unreadable or empty; the message says where and what to do.
    """
    return _load(_own_source(spec), spec, data_root)


def count_rows(spec: TaskSpec, data_root: str | None) -> int | None:
    """Return the number of rows of the task, or None if that takes a hub, or a mirror that does not hold them.

    Raises:
        TaskError: what should hold them cannot be read.
    """
    source = _own_source(spec)
    if isinstance(source, GeneratorSource):
        return source.rows
    if isinstance(source, HubSource):
        if data_root is None:
            return None
        _check_root(data_root)
        if not any(path.is_file() for path in _mirror_files(source, data_root)):
            return None
    return len(load_rows(spec, data_root))


def load_shots(spec: TaskSpec, data_root: str | None) -> list[Row] | None:
    """Return the rows that demonstrations are taken from, or None if they are to be carved out of the task's rows.

    They are where the task names no source for them, or where the mirror at `data_root` does not hold their split.

    Raises:
        TaskError: as `load_rows`.
    """
    source = spec.shots
    if source is None:
        return None
    if isinstance(source, HubSource) and data_root is not None:
        _check_root(data_root)
        if not any(path.is_file() for path in _mirror_files(source, data_root)):
            return None
    return _load(source, spec, data_root)


def _own_source(spec: TaskSpec) -> Source:
    assert not isinstance(spec.source, HarnessSource), "lm-evaluation-harness reads the rows of its tasks itself"
    return spec.source


def _load(source: Source, spec: TaskSpec, data_root: str | None) -> list[Row]:
    if isinstance(source, GeneratorSource):
        return list(generate_rows(source.seed, source.rows))
    if isinstance(source, FileSource):
        rows = _read_files(source, spec.folder)
    elif data_root is None:
        rows = _load_hub(source)
    else:
        rows = _read_mirror(source, data_root)
    if not rows:
        raise TaskError(f"task {spec.name}: {source} holds no rows: a task needs at least one; check its source")
    return rows


def _check_root(data_root: str) -> None:
    if existing(data_root, Path.is_dir) is None:
        raise TaskError(f"data root {data_root} is not a folder: give the folder of a mirror, or leave the option out")


def _mirror_files(source: HubSource, data_root: str) -> tuple[Path, Path]:
    folder = Path(data_root) / source.path / (source.name or "default")
    return folder / f"{source.split}.parquet", folder / f"{source.split}.jsonl"


def _read_mirror(source: HubSource, data_root: str) -> list[Row]:
    _check_root(data_root)
    table, lines = _mirror_files(source, data_root)
    if table.is_file():
        return _read_file(table, "parquet")
    if lines.is_file():
        return _read_file(lines, "json")
    raise TaskError(
        f"{source} is not in the data root: neither {table} nor {lines.name} is there; "
        "put the split there, or leave out --data-root (TALE_RAY_DATA_ROOT) to ask the hub"
    )


def _load_hub(source: HubSource) -> list[Row]:
    import datasets  # slow to import, and only needed here

    try:
        dataset = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
        return list(dataset.to_list())
    except Exception as error:
        raise TaskError(
            f"{source} cannot be loaded from the hub: {type(error).__name__}: {error}; check its name and the network, "
            f"or give --data-root a folder that holds {source.path}/{source.name or 'default'}/{source.split}.parquet"
        ) from error


def _read_files(source: FileSource, folder: Path) -> list[Row]:
    rows: list[Row] = []
    for pattern in source.data_files:
        path = folder / pattern
        files = _matching_files(path)
        if not files:
            raise TaskError(
                f"data file {path} does not exist: paths are relative to the folder of the task file, {folder}; "
                "correct data_files"
            )
        for file in files:
            rows += _read_file(file, source.format)
    return _with_all_columns(rows)


def _matching_files(path: Path) -> list[Path]:
    """Return the file of that name, else those that it matches as a pattern."""
    try:
        if path.is_file():
            return [path]
        return sorted(file for file in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if file.is_file())
    except (OSError, ValueError, IndexError) as error:  # the latter two from patterns that pathlib does not take
        raise TaskError(
            f"data file {path} cannot be looked for ({error}): name files, or patterns with *, ? and ** as a whole "
            "folder; correct data_files"
        ) from error


def _read_file(path: Path, file_format: FileFormat) -> list[Row]:
    try:
        if file_format == "parquet":
            return _table_rows(parquet.read_table(path))
        if file_format == "csv":
            return _read_csv(path)
        return _read_json(path)
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise TaskError(f"data file {path} cannot be read as {file_format}: {error}; correct or replace it") from error


def _read_csv(path: Path) -> list[Row]:
    parse = csv.ParseOptions(newlines_in_values=True)
    convert = csv.ConvertOptions(null_values=[""])  # only what is empty is null: "None" and "NA" are answers
    table = csv.read_csv(path, parse_options=parse, convert_options=convert)
    dates = {column.name: pa.string() for column in table.schema if pa.types.is_temporal(column.type)}
    if dates:  # text that looks like a date stays text, as its author wrote it
        convert.column_types = dates
        table = csv.read_csv(path, parse_options=parse, convert_options=convert)
    if broken := [column.name for column in table.schema if pa.types.is_binary(column.type)]:
        raise ValueError(f"the column {broken[0]!r} is not text in UTF-8")
    return _table_rows(table)


def _table_rows(table: pa.Table) -> list[Row]:
    if len(set(table.column_names)) < table.num_columns:
        raise ValueError(f"two columns have one name: {', '.join(table.column_names)}")
    return list(table.to_pylist())


def _read_json(path: Path) -> list[Row]:
    """Read a list of objects, or one object a line."""
    with pa.input_stream(str(path)) as stream:  # decompresses by the name's ending
        text = stream.read().decode("utf-8-sig")
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is {row!r}, and a row is an object of columns")
    return _with_all_columns(rows)


def _with_all_columns(rows: list[Row]) -> list[Row]:
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]
