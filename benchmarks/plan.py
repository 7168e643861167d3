"""The plan alone on synthetic lengths: time, memory and fill rate for millions of documents."""

import multiprocessing
import tempfile
import time
import tracemalloc
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.report import Result, Row
from data.mixture import HANDS_MEASURED
from data.plan import Plan

_CHUNK = 2**22
_WINDOW = 2**20  # documents of a window of the plan


def run(documents: list[int] | None = None, row_length: int = 2048, rows: int = 1000) -> Result:
    """Plan an epoch of documents whose lengths lie in a memory-mapped file, each size in a process of its own.

    Captions, pictures with captions, and pages: 40 % of 10 to 80 slots, 40 % of 64, 256 or 576 patches with a caption,
    20 % of 80 to 1500 slots.

    Args:
        documents: numbers of documents; default 10^6, 10^7, 10^8.
        row_length: slots of a row.
        rows: rows that are asked for one after the other at the end of the epoch.
    """
    documents = documents or [10**6, 10**7, 10**8]
    measured: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in documents:
            path = Path(folder, "lengths.npy")
            _write_lengths(path, number)
            receiver, sender = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("spawn").Process(target=_plan, args=(path, row_length, rows, sender))
            process.start()
            sender.close()
            measured.append({"documents": number, "row_length": row_length, **receiver.recv()})
            process.join()
    summary: list[Row] = [
        {
            "documents": row["documents"],
            "first row, s": row["first_row_cpu_seconds"],
            "last row of the epoch, s": row["last_row_cpu_seconds"],
            "the same, ns per document": 1e9 * float(row["last_row_cpu_seconds"] or 0) / int(row["documents"] or 1),
            "a next row, ms": row["next_row_cpu_milliseconds"],
            "memory of the plan, MB": float(row["memory_bytes"] or 0) / 1e6,
            "filled, %": 100 * float(row["fill_rate"] or 0),
        }
        for row in measured
    ]
    notes = (
        "CPU time of one process per size. First row: a run that begins. Last row of the epoch: what a run pays once "
        "that resumes there; all windows before it are counted, none of their rows is made. Memory: what Python and "
        "NumPy hold at the peak over the first seven windows, without the pages of the memory-mapped file of lengths."
    )
    figure = Figure(figsize=(5, 3.5))
    axis = figure.subplots()
    for key in ("first row, s", "last row of the epoch, s"):
        axis.plot([int(row["documents"] or 0) for row in summary], [float(row[key] or 0) for row in summary],
                  marker="o", label=key)  # fmt: skip
    axis.set(xlabel="documents", ylabel="CPU seconds", xscale="log", yscale="log", title="planning an epoch")
    axis.legend()
    return Result("plan", measured, summary, notes, figure, packages=("numpy",))


def _write_lengths(path: Path, number: int) -> None:
    lengths = np.lib.format.open_memmap(path, mode="w+", dtype=np.int32, shape=(number,))
    rng = np.random.default_rng(0)
    for start in range(0, number, _CHUNK):
        part = lengths[start : start + _CHUNK]
        kind = rng.choice(3, len(part), p=[0.4, 0.4, 0.2])
        pictures = rng.choice([64, 256, 576], len(part)) + 6 + rng.poisson(25, len(part))
        part[:] = np.choose(kind, [rng.integers(10, 80, len(part)), pictures, rng.integers(80, 1500, len(part))])
    lengths.flush()


def _plan(path: Path, row_length: int, rows: int, sender: Connection) -> None:
    """In a process of its own: what `run` reports of one size."""
    lengths = np.load(path, mmap_mode="r")
    total = sum(int(lengths[start : start + _CHUNK].sum(dtype=np.int64)) for start in range(0, len(lengths), _CHUNK))
    least = total // row_length  # rows of the epoch at least

    def make() -> Plan:
        return Plan(lambda epoch, ids: (ids, lengths[ids]), len(lengths), row_length, 0, hands=HANDS_MEASURED)

    tracemalloc.start()
    make().row(min(least, 6 * _WINDOW * total // len(lengths) // row_length))  # more windows than are kept at a time
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    began = time.process_time()
    plan = make()
    plan.row(0)
    first = time.process_time() - began
    plan.row(least - 1)
    counted = time.process_time() - began
    began = time.process_time()
    for r in range(least - rows, least):
        plan.row(r)
    each = (time.process_time() - began) / rows
    end = least
    while plan.row(end)[0] == 0:
        end += 1
    sender.send(
        {
            "first_row_cpu_seconds": first,
            "last_row_cpu_seconds": counted,
            "next_row_cpu_milliseconds": 1e3 * each,
            "memory_bytes": memory,
            "fill_rate": total / (row_length * end),
        }
    )
