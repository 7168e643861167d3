"""Rows of Parquet and Arrow files, and of anything that `datasets.load_dataset` reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.adapters.forms import Columns
from data.adapters.lines import Found, Part

# Rows that are turned into objects at a time: they hold whole images.
_ROWS = 16


def divide_parquet(path: str, documents: int) -> list[Part]:
    """Ranges of row groups that hold about `documents` rows: (first group, last + 1, number of the first row)."""
    with pq.ParquetFile(path) as file:
        parts: list[Part] = []
        start, row, rows = 0, 1, 0
        for group in range(file.num_row_groups):
            rows += file.metadata.row_group(group).num_rows
            if rows >= documents or group == file.num_row_groups - 1:
                parts.append((start, group + 1, row))
                start, row, rows = group + 1, row + rows, 0
        return parts


def parquet_records(path: str, start: int, stop: int | None, number: int) -> Found:
    """The rows of a range of row groups."""
    with pq.ParquetFile(path) as file:
        groups = list(range(start, file.num_row_groups if stop is None else stop))
        for batch in file.iter_batches(_ROWS, row_groups=groups, use_threads=False):
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1


def arrow_records(path: str) -> Found:
    """The rows of an Arrow IPC file, in the file or the stream format."""
    number = 1
    with pa.memory_map(path) as file:
        for batch in _arrow_batches(file):
            batch.validate(full=True)  # offsets that point out of the file would crash the process
            for first in range(0, batch.num_rows, _ROWS):
                for row in batch.slice(first, _ROWS).to_pylist():
                    yield f"row {number}", row
                    number += 1


def _arrow_batches(file: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    if file.read(6) != b"ARROW1":
        file.seek(0)
        yield from pa.ipc.open_stream(file)
        return
    file.seek(0)
    reader = pa.ipc.open_file(file)
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def load_dataset(columns: Columns, path: str) -> Any:
    """The dataset that a column mapping names, images left as the bytes of their files. Raises ValueError."""
    import datasets

    if columns.dataset is None:
        raise ValueError(f"{path}: has no `dataset: {{path: ...}}`, which says what to load")
    try:
        dataset = datasets.load_dataset(**{"split": "train", **columns.dataset})
    except Exception as error:  # every builder has its own
        raise ValueError(f"{path}: the dataset cannot be loaded: {' '.join(str(error).split())}") from None
    if dataset.column_names is None:  # A stream whose columns show in its rows; each row is checked.
        return dataset
    missing = [part.name for part in columns.parts if part.name not in dataset.column_names]
    if missing:
        raise ValueError(f"{path}: there is no column {missing[0]!r}; there are {', '.join(dataset.column_names)}")
    if columns.streaming:
        dataset = dataset.decode(False)
    encoded = datasets.Image(decode=False)
    for part in [] if columns.streaming else columns.parts:
        feature = dataset.features[part.name]
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(part.name, encoded)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(part.name, datasets.List(encoded))
    wanted = {part.name for part in columns.parts} | ({columns.id} if columns.id else set())
    return dataset.select_columns(sorted(wanted & set(dataset.column_names)))


def divide_dataset(columns: Columns, path: str, documents: int) -> list[Part]:
    """Ranges of `documents` rows; the files of a stream."""
    if columns.streaming:
        return [(number, number + 1, 1) for number in range(load_dataset(columns, path).num_shards)]
    rows = len(load_dataset(columns, path))
    return [(start, min(start + documents, rows), start + 1) for start in range(0, rows, documents)]


def dataset_records(columns: Columns, path: str, start: int, stop: int | None) -> Found:
    """The rows of a range, or of a file of a stream."""
    try:
        dataset = load_dataset(columns, path)
    except ValueError as error:
        raise OSError(str(error)) from None  # It could be loaded when its parts were counted.
    if columns.streaming:
        for number, row in enumerate(dataset.shard(dataset.num_shards, start), 1):
            yield f"file {start + 1}, row {number}", row
        return
    for index in range(start, len(dataset) if stop is None else stop):
        yield f"row {index + 1}", dataset[index]
