"""`python -m launch.preflight [--dir RUN_DIR] ...`: a check of seconds before a run of days.

Alone, or on the processes that will train: `torchrun --nproc-per-node 8 -m launch.preflight --dir runs/mine`. Every
rank multiplies matrices and compares the product, all ranks together add and gather numbers, and every host looks at
its disk and its shared memory. Rank 0 prints a table, and a line for each rank with a problem.
"""

import argparse
import json
import math
import os
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data.command import OneLineParser, fail
from train.precision import bf16_units
from train.ranks import pick_device

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_GB = 0.25
"""The 64 MB that a container gets by default are too few for loader processes and for NCCL."""
GRACE = 5
"""Seconds that rank 0 waits for the reports of the others."""


@dataclass
class Report:
    """What one rank found. nan: not measured."""

    rank: int
    host: str = "?"
    device: str = "?"
    tflops: float = math.nan
    """TFLOP/s of a matrix product."""
    bandwidth: float = math.nan
    """GB/s that each rank sends in a large all-reduce (with n ranks 2 (n - 1) / n of the size, per second)."""
    latency: float = math.nan
    """Microseconds of a small all-reduce."""
    disk: float = math.nan
    """GB free where the run will write."""
    shared: float = math.nan
    """GB free in shared memory."""
    problems: list[str] = field(default_factory=list)


class Examination:
    """The checks of one rank, in a thread of its own: whatever hangs, the main thread goes on to say so."""

    def __init__(self, report: Report, arguments: argparse.Namespace, store: dist.Store | None) -> None:
        self.report, self.arguments, self.store = report, arguments, store
        self.stage = ""

    def run(self, seconds: float) -> None:
        """Fill the report, in so many seconds at most."""
        thread = threading.Thread(target=self._examine, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            self.report.problems.append(f"{self.stage}: no end after {seconds:.0f} s")

    def _examine(self) -> None:
        self._try("disk", self._look_at_disks)
        device = self._try("device", self._choose_device)
        if device is not None:
            self.report.tflops = self._try("matrix product", multiply, device) or math.nan
        if self.store is not None:
            speeds = self._try("all-reduce and all-gather", self._exchange, device)
            self.report.bandwidth, self.report.latency = speeds or (math.nan, math.nan)

    def _choose_device(self) -> torch.device:
        device = pick_device("auto")
        self.report.device = device.type
        if device.type == "cuda":
            torch.cuda.set_device(device)
            self.report.device = torch.cuda.get_device_name(device)
        return device

    def _exchange(self, device: torch.device) -> tuple[float, float] | None:
        """What `exchange` gives; None if a rank cannot take part, for which the others must not wait."""
        assert self.store is not None
        if math.isnan(self.report.tflops):
            self.store.add("unfit", 1)
        if self.store.add("arrived", 1) == _world():
            self.store.set("complete", "yes")
        self.store.wait(["complete"])
        return None if self.store.add("unfit", 0) else exchange(device, self.store)

    def _try(self, stage: str, check: Callable, *arguments: object):  # type: ignore[no-untyped-def]
        """The result of a check; None if it failed, which the report then says."""
        self.stage = stage
        try:
            return check(*arguments)
        except Exception as error:  # whatever the drivers and libraries of a broken machine raise
            self.report.problems.append(f"{stage}: {_first_line(error)}")
            return None

    def _look_at_disks(self) -> None:
        place = self.arguments.dir.absolute()
        folder = next(path for path in (place, *place.parents) if path.is_dir())
        self.report.disk = shutil.disk_usage(folder).free / 1e9
        if self.report.disk < self.arguments.min_free_gb:
            least = self.arguments.min_free_gb
            raise ValueError(f"{self.report.disk:.1f} GB are free in {folder}, less than {least:g}")
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
        if SHARED_MEMORY.is_dir():
            self.report.shared = shutil.disk_usage(SHARED_MEMORY).free / 1e9
            if self.report.shared < LEAST_SHARED_GB:
                raise ValueError(f"{self.report.shared:.2f} GB are free in {SHARED_MEMORY}, less than "
                                 f"{LEAST_SHARED_GB}; give a container more with docker run --shm-size 8g")  # fmt: skip


def multiply(device: torch.device) -> float:
    """TFLOP/s of a matrix product in the precision of training. Raises ValueError if a number of it is wrong."""
    n, dtype = (4096 if device.type == "cuda" else 1024), torch.bfloat16 if bf16_units(device) else torch.float32
    random = torch.Generator(device).manual_seed(0)

    def integers(largest: int, *shape: int) -> torch.Tensor:
        return torch.randint(-largest, largest + 1, shape, device=device, generator=random)

    # Entries -1, 0, 1, most of them 0: all sums are integers below 256, exact in any precision and any order.
    a, b = ((integers(1, n, n) * integers(1, n, n).abs()).to(dtype) for _ in range(2))
    product = a @ b
    # C x = A (B x) for random x: a wrong entry of C = A B shows, without a second large product (Freivalds, 1977).
    x = integers(1000, n, 4).double()
    if not torch.equal(product.double() @ x, a.double() @ (b.double() @ x)):
        raise ValueError(f"a product of {n} x {n} numbers in {str(dtype).removeprefix('torch.')} is wrong")
    began, products = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < 0.2:
        product = a @ b
        _wait_for(device)
        products += 1
    return products * 2 * n**3 / seconds / 1e12


def exchange(device: torch.device, store: dist.Store) -> tuple[float, float]:
    """(GB/s, microseconds) of all-reduces among all ranks. Raises ValueError if a number that came out is wrong, after
    everything that the other ranks wait for."""
    rank, world, backend = _rank(), _world(), "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("exchange", store), rank=rank, world_size=world)
    size = 16 * 2**20 if device.type == "cuda" else 2**20
    mine = (torch.arange(size, device=device) % 1000).float()
    total = mine + rank
    dist.all_reduce(total)
    parts = [torch.empty(1000, device=device) for _ in range(world)]
    dist.all_gather(parts, mine[:1000] + rank)

    def seconds(numbers: torch.Tensor, times: int) -> float:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(numbers)
        _wait_for(device)
        return (time.perf_counter() - began) / times

    small, large = seconds(mine[:1].clone(), 20), seconds(torch.zeros(size, device=device), 5)
    if not torch.equal(total, world * mine + world * (world - 1) / 2):
        raise ValueError(f"the sum of {size} numbers over all ranks is wrong")
    if not all(torch.equal(part, mine[:1000] + other) for other, part in enumerate(parts)):
        raise ValueError("the numbers gathered from all ranks are wrong")
    return 2 * (world - 1) / world * 4 * size / large / 1e9, small * 1e6


def collect(mine: Report, store: dist.Store) -> bool:
    """Bring the reports together on rank 0, which prints them. Returns, on every rank, whether all is well."""
    store.set(f"report/{mine.rank}", json.dumps(asdict(mine)))
    if mine.rank:
        store.wait(["verdict"], timedelta(seconds=3 * GRACE))
        well = store.get("verdict") == b"well"
        store.add("told", 1)
        return well
    reports, silent, until = [mine], 0, time.monotonic() + GRACE
    for rank in range(1, _world()):
        try:
            store.wait([f"report/{rank}"], timedelta(seconds=max(until - time.monotonic(), 0.01)))
            reports.append(Report(**json.loads(store.get(f"report/{rank}"))))
        except RuntimeError:
            silent += 1
            host = store.get(f"host/{rank}").decode()
            reports.append(Report(rank, host, problems=["no report: its process has ended or hangs"]))
    well = show(reports)
    store.set("verdict", "well" if well else "not well")
    # The store may live in this process: it stays until the others have read the verdict.
    until = time.monotonic() + 5
    while store.add("told", 0) < _world() - 1 - silent and time.monotonic() < until:
        time.sleep(0.01)
    return well


def show(reports: list[Report]) -> bool:
    """Print the table, warnings and problems. Returns whether all is well."""
    median = statistics.median([report.tflops for report in reports if report.tflops > 0] or [math.nan])
    slow = [report for report in reports if report.tflops < median / 2]
    rows: list[tuple[str, ...]] = [("rank", "host", "device", "TFLOP/s", "GB/s", "latency us", "disk GB", "shared GB")]
    for r in reports:
        numbers = (f"{r.tflops:.2f}", f"{r.bandwidth:.2f}", f"{r.latency:.0f}", f"{r.disk:.1f}", f"{r.shared:.1f}")
        rows.append((str(r.rank), r.host, r.device, *(number.replace("nan", "-") for number in numbers)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for report in slow:
        print(f"warning: rank {report.rank} on {report.host}: {report.tflops:.2f} TFLOP/s is less than half of the "
              f"median {median:.2f}; all ranks will wait for it", file=sys.stderr)  # fmt: skip
    for report in reports:
        if report.problems:
            print(f"error: rank {report.rank} on {report.host}: {'; '.join(report.problems)}", file=sys.stderr)
    return not any(report.problems for report in reports)


def main() -> None:
    """Exit status 0: all is well; 1: a rank has a problem; 2: wrong arguments."""
    arguments = _parser().parse_args()
    if arguments.timeout <= 0:
        fail("--timeout must be positive", 2)
    report, store, reports = Report(_rank(), socket.gethostname()), None, None
    if _world() > 1:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            timeout = timedelta(seconds=arguments.timeout)
            store = next(iter(dist.rendezvous("env://", timeout=timeout)))[0]
            store.set_timeout(timedelta(days=1))  # From here on the main thread keeps the time.
            # A connection of its own: one on which a check hangs cannot be used to say so.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            reports = dist.PrefixStore("preflight", dist.TCPStore(address, port, is_master=False, timeout=timeout))
            reports.set(f"host/{report.rank}", report.host)
        except (RuntimeError, ValueError) as error:
            fail(f"rank {report.rank} on {report.host}: the {_world()} ranks do not meet at {place}: "
                          f"{_first_line(error)}", 1)  # fmt: skip
    Examination(report, arguments, store).run(arguments.timeout)
    try:
        well = show([report]) if reports is None else collect(report, reports)
    except RuntimeError as error:
        print(f"error: rank {report.rank} on {report.host}: rank 0 does not answer ({_first_line(error)})",
              file=sys.stderr)  # fmt: skip
        well = False
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if well else 1)  # Not to wait for what hangs.


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m launch.preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dir", type=Path, default=Path("runs"), help="folder where the run will write (default: runs)")
    add("--min-free-gb", type=float, default=1.0, help="gigabytes that must be free there (default: 1)")
    add("--timeout", type=float, default=60.0, help="seconds until what hangs counts as failed (default: 60)")
    return parser


if __name__ == "__main__":
    main()
