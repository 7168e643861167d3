"""The files of a prepared set: a unit of the input becomes a shard, and from all shards follow index and manifest.

Each is written under another name (`.tmp`) and gets its own once it is safe on disk, so that a file is whole if it is
there. What is under way lies in `work`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.adapters import RawDocument, RawImage, Rejection, Unit, read
from data.adapters.files import one_line
from data.adapters.forms import Columns
from data.document import Document, Image, Text
from data.encode import Encoder, drop_condition
from data.image import image_size, load_image
from data.source.prepared import FORMAT, SCHEMA
from data.tokenizer import Tokenizer

STARTING, CLOSING = -1, -2
"""The beat of who makes a shard, before the first document and behind the last."""
# Rows that are written at a time; fewer where images are large. They bound the memory that a process needs.
_BATCH_ROWS, _BATCH_BYTES = 64, 2**24
_COUNTS = ("documents", "rejected", "texts", "images", "tokens", "patches", "slots", "image_bytes")


@dataclass(frozen=True)
class Job:
    """What a worker needs beside its unit; it travels to another process."""

    out: Path
    tokenizer: Tokenizer
    patch_size: int
    min_patches: int
    max_patches: int
    columns: Columns | None
    image_folder: str | None
    decode: bool


@dataclass
class Fate:
    """What is known of a unit that has brought a process down: documents to refuse, and where to stop reading."""

    refused: dict[int, str] = field(default_factory=dict)
    stop: tuple[int, str] | None = None


def make_shard(job: Job, unit: Unit, number: int, fate: Fate, beat: Any = None) -> None:
    """Write shard `number`, its quarantine, and at last its record. Raises OSError where they cannot be written."""
    beat = [0, 0] if beat is None else beat
    encoder = Encoder(job.tokenizer, job.patch_size, job.min_patches, job.max_patches)
    counts = dict.fromkeys(_COUNTS, 0)
    batches: list[int] = []
    shard, quarantine = _shard_path(job.out, number), _quarantine_path(job.out, number)
    with (
        open(_temporary(shard), "wb") as sink,
        open(_temporary(quarantine), "w", encoding="ascii") as refused,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        rows: list[dict[str, Any]] = []
        size = 0
        for item in _items(job, unit, fate, beat):
            beat[1] += 1
            row: dict[str, Any] | Rejection
            if isinstance(item, RawDocument):
                try:
                    row = _make_row(item, encoder, job.decode)
                except ValueError as error:
                    row = Rejection(item.input, item.where, one_line(error))
            else:
                row = item
            if isinstance(row, Rejection):
                counts["rejected"] += 1
                refused.write(json.dumps(asdict(row)) + "\n")
                continue
            _count(row, counts)
            rows.append(row)
            size += sum(len(s["ids"]) * 8 if s["image"] is None else len(s["image"]) for s in row["segments"])
            if len(rows) == _BATCH_ROWS or size >= _BATCH_BYTES:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
                batches.append(len(rows))
                rows, size = [], 0
        beat[0] = CLOSING
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
            batches.append(len(rows))
    _commit(quarantine)
    _commit(shard)
    record = {"counts": counts, "batches": batches, "bytes": shard.stat().st_size, "sha256": sha256_of(shard)}
    write(record_path(job.out, number), json_bytes(record))


def _items(job: Job, unit: Unit, fate: Fate, beat: Any) -> Iterator[RawDocument | Rejection]:
    """What the unit holds, but for what has brought a process down. Keeps the beat."""
    beat[0] = 0
    if fate.stop and fate.stop[0] == 0:
        yield Rejection(unit.paths[0], "file", fate.stop[1])
        return
    for ordinal, item in enumerate(read(unit, job.columns, job.image_folder)):
        beat[0] = 2 * ordinal + 1
        yield Rejection(item.input, item.where, fate.refused[ordinal]) if ordinal in fate.refused else item
        beat[0] = 2 * ordinal + 2
        if fate.stop and fate.stop[0] == ordinal + 1:
            yield Rejection(item.input, f"after {item.where}", f"cannot be read on: {fate.stop[1]}")
            return


def measure(raw: RawDocument, decode: bool) -> Document:
    """The document with the sizes of its images alone. Raises ValueError for an image that cannot be read.

    With decode=True images are read as a whole, not only their headers.
    """
    segments: list[Text | Image] = []
    for number, segment in enumerate(raw.segments, 1):
        if isinstance(segment, Text):
            segments.append(segment)
            continue
        try:
            height, width = load_image(segment.data).shape[:2] if decode else image_size(segment.data)
        except ValueError as error:
            raise ValueError(f"segment {number}: {error}") from None
        segments.append(Image(height, width, None, segment.learn, segment.frame))
    return Document(tuple(segments), raw.id, raw.source)


def _make_row(raw: RawDocument, encoder: Encoder, decode: bool) -> dict[str, Any]:
    """A document as a row of SCHEMA, without its empty texts. Raises ValueError for an image that cannot be read."""
    segments: list[Text | Image] = []
    rows = []
    empty = dict.fromkeys(("text", "ids", "image", "height", "width", "frame"))
    for given, segment in zip(raw.segments, measure(raw, decode).segments, strict=True):
        if isinstance(segment, Image) and isinstance(given, RawImage):
            segments.append(segment)
            rows.append({"image": given.data, "height": segment.height, "width": segment.width, "frame": segment.frame})
        elif isinstance(segment, Text) and segment.text:
            ids = encoder.tokenizer.encode_array(segment.text)
            segments.append(Text(segment.text, segment.learn, ids))
            rows.append({"text": segment.text, "ids": ids})
        else:
            continue
        rows[-1] = {**empty, **rows[-1], "learn": segment.learn}
    document = Document(tuple(segments))
    lengths = {"slots": encoder.length(document), "slots_dropped": encoder.length(drop_condition(document))}
    return {"id": raw.id, "source": raw.source, **lengths, "patches": encoder.patches(document), "segments": rows}


def _count(row: dict[str, Any], counts: dict[str, int]) -> None:
    counts["documents"] += 1
    counts["slots"] += row["slots"]
    counts["patches"] += row["patches"]
    for segment in row["segments"]:
        if segment["image"] is None:
            counts["texts"] += 1
            counts["tokens"] += len(segment["ids"])
        else:
            counts["images"] += 1
            counts["image_bytes"] += len(segment["image"])


def finish(out: Path, shards: int) -> None:
    """Write what follows from the shards, the manifest last. Raises ValueError where no document was kept."""
    records = [json.loads(record_path(out, number).read_bytes()) for number in range(shards)]
    counts = {name: sum(record["counts"][name] for record in records) for name in _COUNTS}
    with open(_temporary(out / "quarantine.jsonl"), "wb") as target:
        for number in range(shards):
            with open(_quarantine_path(out, number), "rb") as part:
                shutil.copyfileobj(part, target)
    _commit(out / "quarantine.jsonl")
    if not counts["documents"]:
        raise ValueError(f"no document was kept; {out}/quarantine.jsonl has the reasons")
    histogram = _write_lengths(out, records, counts["documents"])
    firsts = np.cumsum([0, *(rows for record in records for rows in record["batches"])])
    with open(_temporary(out / "batches.npy"), "wb") as array:
        np.save(array, firsts.astype(np.int64))
    _commit(out / "batches.npy")
    write(out / "statistics.json", json_bytes({**counts, "documents_by_slots_up_to": histogram}))
    manifest = {
        "format": FORMAT,
        "options": json.loads((out / "work/options.json").read_bytes()),
        "documents": counts["documents"],
        "rejected": counts["rejected"],
        "files": {
            name: {"bytes": (out / name).stat().st_size, "sha256": sha256_of(out / name)}
            for name in ("tokenizer.json", "lengths.npy", "batches.npy", "statistics.json", "quarantine.jsonl")
        },
        "shards": [
            {
                "file": str(_shard_path(out, number).relative_to(out)),
                "documents": record["counts"]["documents"],
                "batches": len(record["batches"]),
                "bytes": record["bytes"],
                "sha256": record["sha256"],
            }
            for number, record in enumerate(records)
        ],
    }
    write(out / "manifest.json", json_bytes(manifest))


def _write_lengths(out: Path, records: list[dict[str, Any]], documents: int) -> dict[str, int]:
    """lengths.npy from the shards, and how many documents have up to 2, 4, 8, ... slots."""
    path, bins = out / "lengths.npy", np.zeros(33, np.int64)
    array = np.lib.format.open_memmap(_temporary(path), "w+", np.int32, (3, documents))
    start = 0
    for number, record in enumerate(records):
        with pa.memory_map(str(_shard_path(out, number))) as file:
            reader = pa.ipc.open_file(file)
            for index in range(len(record["batches"])):
                batch = reader.get_batch(index)
                part = np.stack([batch.column(name).to_numpy() for name in ("slots", "slots_dropped", "patches")])
                array[:, start : start + batch.num_rows] = part
                bins += np.bincount(np.ceil(np.log2(part[0])).astype(np.int64), minlength=33)
                start += batch.num_rows
    array.flush()
    del array
    _commit(path)
    return {str(2**power): int(count) for power, count in enumerate(bins) if count}


def sha256_of(path: Path) -> str:
    """Of a file's content, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard_path(out: Path, number: int) -> Path:
    return out / "shards" / f"{number:05d}.arrow"


def _quarantine_path(out: Path, number: int) -> Path:
    return out / "work" / f"{number:05d}.jsonl"


def record_path(out: Path, number: int) -> Path:
    return out / "work" / f"{number:05d}.json"


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def write(path: Path, content: bytes) -> None:
    _temporary(path).write_bytes(content)
    _commit(path)


def _commit(path: Path) -> None:
    """Give a file its name once its content is safe on disk."""
    with open(_temporary(path), "rb") as file:
        os.fsync(file.fileno())
    os.replace(_temporary(path), path)
