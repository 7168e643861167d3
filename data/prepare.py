"""`python -m data.prepare --input FILES --out DIR`: data as users have it to a prepared set (docs/data-format.md).

The input is a list of units (data/adapters); each becomes one shard, whichever process makes it. A shard is finished
once its record `work/NNNNN.json` is there; what a killed run left unfinished is made again. Everything beside the
shards follows from them, so the result does not depend on the number of processes, nor on interruptions.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data.adapters import KINDS, RawDocument, RawImage, Rejection, Unit, find_units, read
from data.adapters.files import one_line
from data.adapters.forms import Columns, load_columns
from data.command import OneLineParser, add_input, fail
from data.document import Document, Image, Text
from data.encode import Encoder, drop_condition
from data.image import image_size, load_image
from data.source.prepared import FORMAT, SCHEMA
from data.tokenizer import Tokenizer

# Rows that are written at a time; fewer where images are large. They bound the memory that a process needs.
_BATCH_ROWS, _BATCH_BYTES = 64, 2**24
# A worker's beat outside of documents.
_STARTING, _CLOSING = -1, -2
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
class _Fate:
    """What is known of a unit that has brought a process down: documents to refuse, and where to stop reading."""

    refused: dict[int, str] = field(default_factory=dict)
    stop: tuple[int, str] | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit status 0: done; 2: the input or an option is wrong; 1: something failed in the middle of work."""
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="PIL")  # about odd images; what counts is whether they can be read
    try:
        with begin(options) as (job, units):
            try:
                _make_shards(job, units, options.workers, options.timeout)
                _finish(job, units)
            except (ValueError, OSError, RuntimeError, MemoryError) as error:
                fail(error or type(error).__name__, 1)
    except (ValueError, OSError) as error:
        fail(error, 2)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on", 1)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m data.prepare",
        description="Write documents as a prepared set. After an interruption the same command goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_input(parser, KINDS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the prepared set")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        help="bytes, a tokenizer.json, or what transformers.AutoTokenizer loads",
    )
    parser.add_argument("--max_grid", type=int, default=64, help="most patch rows or columns of an image")
    parser.add_argument("--video", action="store_true", help="append the tokens that bracket videos to the tokenizer")
    parser.add_argument("--patch_size", type=int, default=8, help="side of a patch in pixels, as model.patch_size")
    parser.add_argument("--min_patches", type=int, default=1, help="patches of an image at least")
    parser.add_argument("--max_patches", type=int, default=1024, help="patches of an image at most")
    parser.add_argument("--shard_documents", type=int, default=4096, help="documents per shard of a file that divides")
    parser.add_argument("--decode", action="store_true", help="decode every image, not only its header")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; 0: this one, unprotected"
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that one document may take")
    return parser


@contextmanager
def begin(arguments: argparse.Namespace) -> Iterator[tuple[Job, list[Unit]]]:
    """The job and its units, the folder being this process's own until the end. Raises ValueError for wrong input."""
    if arguments.workers < 0 or arguments.shard_documents < 1 or not arguments.timeout > 0:
        raise ValueError("--workers must be at least 0, --shard_documents at least 1, --timeout above 0")
    if arguments.image_folder and not os.path.isdir(arguments.image_folder):
        raise ValueError(f"{arguments.image_folder}: no such folder")
    tokenizer = Tokenizer.named(arguments.tokenizer, arguments.max_grid)
    tokenizer = tokenizer.with_video() if arguments.video else tokenizer
    columns = load_columns(arguments.columns) if arguments.columns else None
    job = Job(arguments.out, tokenizer, arguments.patch_size, arguments.min_patches, arguments.max_patches, columns,
              arguments.image_folder, arguments.decode)  # fmt: skip
    Encoder(tokenizer, job.patch_size, job.min_patches, job.max_patches)  # raises for impossible numbers
    units = find_units(arguments.input, arguments.format, arguments.shard_documents)
    sizes = {
        path: sha256_of(Path(path)) if unit.kind == "hf" else os.path.getsize(path)
        for unit in units
        for path in unit.paths
        if os.path.exists(path)
    }
    described = json.dumps([[asdict(unit), [sizes.get(path) for path in unit.paths]] for unit in units], default=str)
    options = {
        "input": arguments.input,
        "input_sha256": _sha256(described.encode()),
        "format": arguments.format,
        "columns": asdict(columns) if columns else None,
        "image_folder": arguments.image_folder,
        "tokenizer": arguments.tokenizer,
        "tokenizer_sha256": _sha256(tokenizer.inner.to_str().encode()),
        "patch_size": job.patch_size,
        "min_patches": job.min_patches,
        "max_patches": job.max_patches,
        "max_grid": tokenizer.max_grid,
        "shard_documents": arguments.shard_documents,
        "decode": job.decode,
    }
    work = job.out / "work"
    _check_options(job.out / "manifest.json", options)
    if job.out.exists() and not work.exists() and not (job.out / "manifest.json").exists() and any(job.out.iterdir()):
        raise ValueError(f"{job.out}: is not empty and no prepared set; choose another --out")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{job.out}: another process is preparing it") from None
        _check_options(work / "options.json", options)
        (job.out / "shards").mkdir(exist_ok=True)
        _write(job.out / "tokenizer.json", tokenizer.inner.to_str(pretty=True).encode())
        _write(work / "options.json", _json(options))
        yield job, units
        shutil.rmtree(work)


def _check_options(path: Path, options: dict[str, Any]) -> None:
    """Raises ValueError where the folder was begun with other options or other input."""
    if not path.exists():
        return
    before = json.loads(path.read_bytes())
    before = before.get("options", before)
    for name, value in options.items():
        if before.get(name) != value:
            what = "the input files have changed" if name == "input_sha256" else f"{name} was {before.get(name)}"
            raise ValueError(f"{path}: was begun with other options ({what}); choose another --out")


def _make_shards(job: Job, units: list[Unit], workers: int, timeout: float) -> None:
    """Make the shards that are not there yet. Raises RuntimeError or OSError where that cannot go on."""
    for left in job.out.glob("**/*.tmp"):
        left.unlink()
    if (job.out / "manifest.json").exists():
        return
    todo = [number for number in range(len(units)) if not _record(job.out, number).exists()]
    with tqdm(
        total=len(units), initial=len(units) - len(todo), unit="shard", desc="prepare", file=sys.stderr,
        mininterval=0.2 if sys.stderr.isatty() else 30,
    ) as bar:  # fmt: skip
        if workers == 0:
            for number in todo:
                make_shard(job, units[number], number, _Fate())
                bar.update()
        elif todo:
            _share(job, units, todo, min(workers, len(todo)), timeout, bar)


class _Worker:
    """A process that makes shards, and what is seen of it from outside."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        # Step: 2 k while document k of the unit is read, 2 k + 1 while it is looked at. And documents so far.
        self.beat = context.RawArray("q", [_STARTING, 0])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, job, self.beat), daemon=True)
        self.process.start()
        theirs.close()
        self.number: int | None = None
        self.seen, self.since = _STARTING, time.monotonic()

    def give(self, number: int, unit: Unit, fate: _Fate) -> None:
        self.beat[0] = _STARTING
        self.number, self.seen, self.since = number, _STARTING, time.monotonic()
        self.pipe.send((number, unit, fate))

    def hangs(self, timeout: float) -> bool:
        """Whether it has been at the same step for `timeout` seconds; starting up may take a minute more.

        Writing the end of a shard takes as long as the shard is large.
        """
        if self.beat[0] != self.seen:
            self.seen, self.since = self.beat[0], time.monotonic()
        allowed = {_STARTING: timeout + 60, _CLOSING: float("inf")}.get(self.seen, timeout)
        return time.monotonic() - self.since > allowed

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _share(job: Job, units: list[Unit], todo: list[int], count: int, timeout: float, bar: tqdm) -> None:
    """Let `count` processes make the shards `todo`. One that dies or hangs is replaced, and its document refused."""
    todo = todo[::-1]
    fates: dict[int, _Fate] = {}
    ended = 0  # documents of workers that are gone
    started = time.monotonic()
    workers = [_Worker(job) for _ in range(count)]
    try:
        while todo or any(worker.number is not None for worker in workers):
            for worker in workers:
                if worker.number is None and todo:
                    number = todo.pop()
                    worker.give(number, units[number], fates.setdefault(number, _Fate()))
            ready = wait([worker.pipe for worker in workers if worker.number is not None], timeout=0.2)
            for place, worker in enumerate(workers):
                if worker.number is None:
                    continue
                hangs = worker.hangs(timeout)
                reason = f"took more than {timeout:g} seconds" if hangs else None
                if worker.pipe in ready:
                    try:
                        message = worker.pipe.recv()
                    except (EOFError, OSError):
                        worker.process.join(10)
                        reason = f"the process that read it ended with status {worker.process.exitcode}"
                    else:
                        if message is not None:
                            raise RuntimeError(message)
                        fates.pop(worker.number)
                        worker.number = None
                        bar.update()
                        continue
                if reason:
                    worker.end()
                    step = worker.seen if hangs else worker.beat[0]
                    if step < 0:
                        raise RuntimeError(f"a worker process failed outside of any document: {reason}")
                    fate = fates[worker.number]
                    if step % 2:
                        fate.refused[step // 2] = reason
                    else:  # reading itself: there is no way to what comes behind
                        fate.stop = step // 2, reason
                    todo.append(worker.number)
                    ended += worker.beat[1]
                    workers[place] = _Worker(job)
            seen = ended + sum(worker.beat[1] for worker in workers)
            bar.set_postfix_str(f"{seen} documents, {seen / (time.monotonic() - started):.0f}/s", refresh=False)
            if time.time() - bar.last_print_t > bar.mininterval:
                bar.refresh()
                bar.last_print_t = time.time()
    finally:
        for worker in workers:
            worker.end()


def _work(pipe: Connection, job: Job, beat: Any) -> None:
    """A worker: make shards until told to stop, or until the main process is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    warnings.filterwarnings("ignore", module="PIL")
    while True:
        try:
            number, unit, fate = pipe.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        try:
            make_shard(job, unit, number, fate, beat)
        except Exception as error:
            pipe.send(f"shard {number}: {one_line(error)}")
        else:
            pipe.send(None)


def make_shard(job: Job, unit: Unit, number: int, fate: _Fate, beat: Any = None) -> None:
    """Write shard `number`, its quarantine, and at last its record. Raises OSError where they cannot be written."""
    beat = [0, 0] if beat is None else beat
    encoder = Encoder(job.tokenizer, job.patch_size, job.min_patches, job.max_patches)
    counts = dict.fromkeys(_COUNTS, 0)
    batches: list[int] = []
    shard, quarantine = _shard(job.out, number), _quarantine(job.out, number)
    with (
        open(_tmp(shard), "wb") as sink,
        open(_tmp(quarantine), "w", encoding="ascii") as refused,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        rows: list[dict[str, Any]] = []
        size = 0
        for item in _items(job, unit, fate, beat):
            beat[1] += 1
            row: dict[str, Any] | Rejection
            if isinstance(item, RawDocument):
                try:
                    row = make_row(item, encoder, job.decode)
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
        beat[0] = _CLOSING
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
            batches.append(len(rows))
    _commit(quarantine)
    _commit(shard)
    record = {"counts": counts, "batches": batches, "bytes": shard.stat().st_size, "sha256": sha256_of(shard)}
    _write(_record(job.out, number), _json(record))


def _items(job: Job, unit: Unit, fate: _Fate, beat: Any) -> Iterator[RawDocument | Rejection]:
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


def make_row(raw: RawDocument, encoder: Encoder, decode: bool) -> dict[str, Any]:
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


def _finish(job: Job, units: list[Unit]) -> None:
    """Write what follows from the shards, the manifest last, and say how it went."""
    out = job.out
    if not (out / "manifest.json").exists():
        records = [json.loads(_record(out, number).read_bytes()) for number in range(len(units))]
        counts = {name: sum(record["counts"][name] for record in records) for name in _COUNTS}
        with open(_tmp(out / "quarantine.jsonl"), "wb") as target:
            for number in range(len(units)):
                with open(_quarantine(out, number), "rb") as part:
                    shutil.copyfileobj(part, target)
        _commit(out / "quarantine.jsonl")
        if not counts["documents"]:
            raise ValueError(f"no document was kept; {out}/quarantine.jsonl has the reasons")
        histogram = _write_lengths(out, records, counts["documents"])
        firsts = np.cumsum([0, *(rows for record in records for rows in record["batches"])])
        _save_array(out / "batches.npy", firsts.astype(np.int64))
        _write(out / "statistics.json", _json({**counts, "documents_by_slots_up_to": histogram}))
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
                    "file": str(_shard(out, number).relative_to(out)),
                    "documents": record["counts"]["documents"],
                    "batches": len(record["batches"]),
                    "bytes": record["bytes"],
                    "sha256": record["sha256"],
                }
                for number, record in enumerate(records)
            ],
        }
        _write(out / "manifest.json", _json(manifest))
    _report(out)


def _write_lengths(out: Path, records: list[dict[str, Any]], documents: int) -> dict[str, int]:
    """lengths.npy from the shards, and how many documents have up to 2, 4, 8, ... slots."""
    path, bins = out / "lengths.npy", np.zeros(33, np.int64)
    array = np.lib.format.open_memmap(_tmp(path), "w+", np.int32, (3, documents))
    start = 0
    for number, record in enumerate(records):
        with pa.memory_map(str(_shard(out, number))) as file:
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


def _report(out: Path) -> None:
    counts = json.loads((out / "statistics.json").read_bytes())
    print(f"{out}: kept {counts['documents']} documents with {counts['tokens']} text tokens and {counts['images']} "
          f"images ({counts['patches']} patches), rejected {counts['rejected']}")  # fmt: skip
    if counts["rejected"]:
        with open(out / "quarantine.jsonl", encoding="ascii") as file:
            print(f"first of {out}/quarantine.jsonl: {file.readline(1000).strip()}")


def sha256_of(path: Path) -> str:
    """Of a file's content, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _shard(out: Path, number: int) -> Path:
    return out / "shards" / f"{number:05d}.arrow"


def _quarantine(out: Path, number: int) -> Path:
    return out / "work" / f"{number:05d}.jsonl"


def _record(out: Path, number: int) -> Path:
    return out / "work" / f"{number:05d}.json"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _tmp(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _write(path: Path, content: bytes) -> None:
    _tmp(path).write_bytes(content)
    _commit(path)


def _save_array(path: Path, array: np.ndarray) -> None:
    with open(_tmp(path), "wb") as file:
        np.save(file, array)
    _commit(path)


def _commit(path: Path) -> None:
    """Give a file its name once its content is safe on disk."""
    with open(_tmp(path), "rb") as file:
        os.fsync(file.fileno())
    os.replace(_tmp(path), path)


if __name__ == "__main__":
    main()
