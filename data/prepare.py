"""`python -m data.prepare --input FILES --out DIR`: data as users have it to a prepared set (docs/data-format.md).

The input is a list of units (data/adapters); each becomes one shard (data/shard.py), whichever process makes it.
A shard is finished once its record `work/NNNNN.json` is there; what a killed run left unfinished is made again.
Everything beside the shards follows from them, so the result does not depend on the number of processes, nor on
interruptions.
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
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.adapters import KINDS, Unit, find_units
from data.adapters.files import one_line
from data.adapters.forms import load_columns
from data.command import OneLineParser, add_input, fail
from data.encode import Encoder
from data.shard import CLOSING, STARTING, Fate, Job, finish, json_bytes, make_shard, record_path, sha256_of, write
from data.tokenizer import Tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit status 0: done; 2: the input or an option is wrong; 1: something failed in the middle of work."""
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="PIL")  # about odd images; what counts is whether they can be read
    try:
        with _begin(options) as (job, units):
            try:
                _make_shards(job, units, options.workers, options.timeout)
                if not (job.out / "manifest.json").exists():
                    finish(job.out, len(units))
                _report(job.out)
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
def _begin(arguments: argparse.Namespace) -> Iterator[tuple[Job, list[Unit]]]:
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
        "input_sha256": hashlib.sha256(described.encode()).hexdigest(),
        "format": arguments.format,
        "columns": asdict(columns) if columns else None,
        "image_folder": arguments.image_folder,
        "tokenizer": arguments.tokenizer,
        "tokenizer_sha256": hashlib.sha256(tokenizer.inner.to_str().encode()).hexdigest(),
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
        write(job.out / "tokenizer.json", tokenizer.inner.to_str(pretty=True).encode())
        write(work / "options.json", json_bytes(options))
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
    todo = [number for number in range(len(units)) if not record_path(job.out, number).exists()]
    with tqdm(
        total=len(units), initial=len(units) - len(todo), unit="shard", desc="prepare", file=sys.stderr,
        mininterval=0.2 if sys.stderr.isatty() else 30,
    ) as bar:  # fmt: skip
        if workers == 0:
            for number in todo:
                make_shard(job, units[number], number, Fate())
                bar.update()
        elif todo:
            _share(job, units, todo, min(workers, len(todo)), timeout, bar)


class _Worker:
    """A process that makes shards, and what is seen of it from outside."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        # Step: 2 k while document k of the unit is read, 2 k + 1 while it is looked at. And documents so far.
        self.beat = context.RawArray("q", [STARTING, 0])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, job, self.beat), daemon=True)
        self.process.start()
        theirs.close()
        self.number: int | None = None
        self.seen, self.since = STARTING, time.monotonic()

    def give(self, number: int, unit: Unit, fate: Fate) -> None:
        self.beat[0] = STARTING
        self.number, self.seen, self.since = number, STARTING, time.monotonic()
        self.pipe.send((number, unit, fate))

    def hangs(self, timeout: float) -> bool:
        """Whether it has been at the same step for `timeout` seconds; starting up may take a minute more.

        Writing the end of a shard takes as long as the shard is large.
        """
        if self.beat[0] != self.seen:
            self.seen, self.since = self.beat[0], time.monotonic()
        allowed = {STARTING: timeout + 60, CLOSING: float("inf")}.get(self.seen, timeout)
        return time.monotonic() - self.since > allowed

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _share(job: Job, units: list[Unit], todo: list[int], count: int, timeout: float, bar: tqdm) -> None:
    """Let `count` processes make the shards `todo`. One that dies or hangs is replaced, and its document refused."""
    todo = todo[::-1]
    fates: dict[int, Fate] = {}
    ended = 0  # documents of workers that are gone
    started = time.monotonic()
    workers = [_Worker(job) for _ in range(count)]
    try:
        while todo or any(worker.number is not None for worker in workers):
            for worker in workers:
                if worker.number is None and todo:
                    number = todo.pop()
                    worker.give(number, units[number], fates.setdefault(number, Fate()))
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
                    elif _is_stream(units[worker.number]):
                        raise RuntimeError(f"the stream of shard {worker.number} broke off: its process {reason}")
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


def _is_stream(unit: Unit) -> bool:
    return unit.kind == "hf" and load_columns(unit.paths[0]).streaming


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


def _report(out: Path) -> None:
    counts = json.loads((out / "statistics.json").read_bytes())
    print(f"{out}: kept {counts['documents']} documents with {counts['tokens']} text tokens and {counts['images']} "
          f"images ({counts['patches']} patches), rejected {counts['rejected']}")  # fmt: skip
    if counts["rejected"]:
        with open(out / "quarantine.jsonl", encoding="ascii") as file:
            print(f"first of {out}/quarantine.jsonl: {file.readline(1000).strip()}")


if __name__ == "__main__":
    main()
