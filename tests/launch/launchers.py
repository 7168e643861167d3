"""What the tests of the launchers share: a tiny run as a YAML file, processes as users start them, comparisons.

Unlike in `tests.train.support`, everything here is started anew, as a command line starts it.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from tests.train.support import TINY, metrics, ranks, start
from train import checkpoint, settings

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 180  # seconds for anything that is waited for; the machine may be busy


def write_config(folder: Path, steps: int) -> Path:
    """TINY with so many steps as a YAML file."""
    path = folder / "tiny.yaml"
    settings.write(settings.parse([*TINY, f"--run.steps={steps}"])[0], path)
    return path


def reference(folder: Path, config: Path, *arguments: str) -> Path:
    """The run of two processes that nothing disturbs."""
    run = folder / "reference"
    command = ("--config", config, f"--run.dir={run}", *arguments)
    for process in [start(folder / "out", "train", *command, environment=rank) for rank in ranks(2)]:
        result = process.finish()
        assert result.status == 0, result.err
    return run


@contextlib.contextmanager
def launched(command: Sequence[object], log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """Start a command in the root of the checkout; at the end of the block nothing of it is left."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, env=active() | environment, stdout=file, stderr=file
        )
    try:
        yield process
    finally:
        kill_tree(process.pid)
        process.wait()


def active() -> dict[str, str]:
    """The environment of a user who has activated this Python's environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}


def kill_tree(pid: int) -> None:
    """Kill a process and all below it."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.Error):
                each.kill()


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen, log: Path) -> None:
    """Wait until the log of the run has so many steps."""
    path, until = run / "metrics.jsonl", time.monotonic() + TIMEOUT
    while not path.is_file() or path.read_text().count("\n") < steps:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.01)


def finish(process: subprocess.Popen, log: Path) -> int:
    """Exit status of a process."""
    try:
        return process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end after {TIMEOUT} s: {log.read_text()}") from None


def saved_step(run: Path) -> int:
    """The step of the checkpoint that `latest` names, which is sound."""
    name = (run / "checkpoints" / "latest").read_text().strip()
    return checkpoint.load(run / "checkpoints" / name).step


def assert_same_run(one: Path, two: Path) -> None:
    """The same weights to the bit, and the same log."""
    for name in ("model.safetensors", "ema.safetensors"):
        assert (checkpoint.resolve(one) / name).read_bytes() == (checkpoint.resolve(two) / name).read_bytes(), name
    assert metrics(one) == metrics(two)


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def output(command: Sequence[object], environment: Mapping[str, str] | None = None) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout
