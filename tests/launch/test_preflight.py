"""`python -m launch.preflight`: it passes on a sound machine, and every check fails where something is wrong."""

import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch import preflight
from tests.train.support import Result, assert_one_line, ranks, start, start_function

NUMBERS = ("TFLOP/s", "GB/s", "latency us", "disk GB", "shared GB")


def alone(tmp_path: Path, *arguments: object) -> Result:
    return start(tmp_path / "out", "launch.preflight", "--dir", tmp_path / "run", *arguments).finish()


def on_two(tmp_path: Path, broken: str = "", *arguments: str) -> list[Result]:
    """Both ranks; rank 1 with the named thing broken."""
    every = ["preflight", "--dir", str(tmp_path), *arguments]
    started = [
        start_function(tmp_path / "out", sabotaged, (every, broken if environment["RANK"] == "1" else ""), environment)
        for environment in ranks(2)
    ]
    return [command.finish() for command in started]


def errors(result: Result, rank: int) -> list[str]:
    return [line for line in result.err.splitlines() if line.startswith(f"error: rank {rank} on ")]


def sabotaged(arguments: list[str], broken: str) -> None:
    """The command with something broken in this process."""
    import sys

    multiply, all_reduce, all_gather = torch.Tensor.__matmul__, dist.all_reduce, dist.all_gather

    def wrong_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = multiply(a, b)
        if product.dtype != torch.float64:
            product[3, 5] += 1
        return product

    def wrong_sum(numbers: torch.Tensor) -> None:
        all_reduce(numbers)
        numbers[-1] += 1

    def wrong_order(parts: list[torch.Tensor], mine: torch.Tensor) -> None:
        all_gather(parts, mine)
        parts.reverse()

    def hanging(*_: object) -> None:
        time.sleep(1000)

    def slow(device: torch.device) -> float:
        return 1e-6

    def end(*_: object) -> None:
        raise SystemExit(3)

    places = {
        "product": (torch.Tensor, "__matmul__", wrong_product),
        "sum": (dist, "all_reduce", wrong_sum),
        "gather": (dist, "all_gather", wrong_order),
        "hanging product": (preflight, "multiply", hanging),
        "hanging sum": (dist, "all_reduce", hanging),
        "speed": (preflight, "multiply", slow),
        "process": (preflight, "Examination", end),
    }
    if broken:
        place, name, replacement = places[broken]
        setattr(place, name, replacement)
    sys.argv = arguments
    preflight.main()


def test_alone(tmp_path: Path) -> None:
    result = alone(tmp_path)
    assert (result.status, result.err) == (0, "")
    head, line = result.out.splitlines()
    assert all(name in head for name in NUMBERS)
    rank, _, device, tflops, bandwidth, latency, disk, shared = line.split()
    assert (rank, device, bandwidth, latency) == ("0", "cpu", "-", "-")
    assert float(tflops) > 0
    assert float(disk) > 1
    assert float(shared) > 0.2


def test_two_ranks(tmp_path: Path) -> None:
    first, second = on_two(tmp_path)
    assert (first.status, first.err) == (0, "")
    assert (second.status, second.err, second.out) == (0, "", "")
    lines = [line.split() for line in first.out.splitlines()[1:]]
    assert [line[0] for line in lines] == ["0", "1"]
    assert all(float(number) > 0 for line in lines for number in line[3:])


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("product", "matrix product: a product of 1024 x 1024 numbers in"),
        ("sum", "all-reduce and all-gather: the sum of 1048576 numbers over all ranks is wrong"),
        ("gather", "all-reduce and all-gather: the numbers gathered from all ranks are wrong"),
    ],
)
def test_wrong_numbers_on_one_rank(tmp_path: Path, broken: str, reason: str) -> None:
    first, second = on_two(tmp_path, broken)
    assert (first.status, second.status) == (1, 1)
    (line,) = first.err.splitlines()
    assert line.startswith("error: rank 1 on ")
    assert reason in line
    assert second.err == ""


@pytest.mark.parametrize(
    ("broken", "reason"),
    [("hanging product", "matrix product: no end after "), ("hanging sum", "all-reduce and all-gather: no end after ")],
)
def test_a_rank_that_hangs(tmp_path: Path, broken: str, reason: str) -> None:
    first, second = on_two(tmp_path, broken, "--timeout", "5")
    assert (first.status, second.status) == (1, 1)
    (line,) = errors(first, rank=1)
    assert reason in line


def test_a_rank_that_ends(tmp_path: Path) -> None:
    first, second = on_two(tmp_path, "process", "--timeout", "3")
    assert (first.status, second.status) == (1, 3)
    (line,) = errors(first, rank=1)
    assert line == f"error: rank 1 on {socket.gethostname()}: no report: its process has ended or hangs"


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    environment = ranks(2)[0]
    result = start(
        tmp_path / "out", "launch.preflight", "--dir", tmp_path, "--timeout", 3, environment=environment
    ).finish()
    assert_one_line(result, 1, "rank 0 on ", "the 2 ranks do not meet at 127.0.0.1:", "1/2")


def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    first, second = on_two(tmp_path, "speed")
    assert (first.status, second.status) == (0, 0)
    (line,) = first.err.splitlines()
    assert line.startswith("warning: rank 1 on ")
    assert "0.00 TFLOP/s is less than half of the median" in line


def test_a_full_disk(tmp_path: Path) -> None:
    result = alone(tmp_path, "--min-free-gb", 10**9)
    assert result.status == 1
    (line,) = result.err.splitlines()
    assert line.startswith("error: rank 0 on ")
    assert f"GB are free in {tmp_path}, less than 1e+09" in line


def test_wrong_arguments(tmp_path: Path) -> None:
    assert_one_line(alone(tmp_path, "--timeout", "soon"), 2, "--timeout", "soon")
    assert_one_line(alone(tmp_path, "--timeout", 0), 2, "--timeout must be positive")


def test_shared_memory_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "LEAST_SHARED_GB", 1e9)
    monkeypatch.setattr(preflight, "SHARED_MEMORY", tmp_path)
    report = preflight.Report(0)
    arguments = preflight._parser().parse_args(["--dir", str(tmp_path)])
    preflight.Examination(report, arguments, None).run(60)
    (problem,) = report.problems
    assert problem.startswith("disk: ")
    assert f"GB are free in {tmp_path}, less than 1000000000.0; give a container more" in problem
