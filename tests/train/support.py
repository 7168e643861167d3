"""What the tests of train/ and launch/ share: a tiny configuration, and commands in processes that start at once.

A command runs as `python -m` would run it, in a process of its own with its own signals, standard output and exit
status. It is forked from a server that has imported everything already: importing PyTorch anew costs seconds.
"""

import faulthandler
import importlib
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Picture

from data import prepare

TIMEOUT = 120  # seconds for any process; the machine may be busy
TIMINGS = ("slots_per_second", "patches_per_second", "gflops_per_second", "step_seconds", "data_wait_percent")

TINY = (
    "--run.device=cpu", "--run.precision=fp32", "--run.seed=3", "--run.steps=8",
    "--model.dim=32", "--model.num_layers=1", "--model.num_heads=2", "--model.patch_size=8",
    "--model.head.width=32", "--model.head.depth=1", "--model.head.draws=2",
    "--data.shapes.documents=300", "--data.shapes.canvases=[[16,16],[16,24]]",
    "--data.max_grid=8", "--data.max_patches=16", "--data.row_length=96", "--data.rows_per_step=4", "--data.workers=0",
    "--optim.lr=0.01", "--optim.warmup_steps=2", "--log.every=1",
)  # fmt: skip
"""A model of 80,000 numbers on pictures of 2 x 2 and 2 x 3 patches; every number differs from its default."""

_SERVER = multiprocessing.get_context("forkserver")
# PyTorch imports the last two when the first optimizer is built and the first gradient clipped.
_SERVER.set_forkserver_preload(["train.__main__", "train.evaluate", "launch.generate", "torch._dynamo", "torch.onnx"])


@dataclass
class Result:
    """What a command left."""

    status: int
    """Exit status; -9 where signal 9 ended it."""
    out: str
    err: str


@dataclass
class Command:
    """A command that was started."""

    process: BaseProcess
    out: Path
    err: Path

    def finish(self) -> Result:
        """Wait for the end."""
        self.process.join(TIMEOUT)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"no end after {TIMEOUT} s; standard error so far: {self.err.read_text()}")
        return Result(self.process.exitcode, self.out.read_text(), self.err.read_text())


def start(folder: Path, module: str, *arguments: object, environment: dict[str, str] | None = None) -> Command:
    """Start `python -m module arguments` in a process of its own; its output goes to files in `folder`."""
    return start_function(folder, _run_module, (module, [str(a) for a in arguments]), environment or {})


def start_function(
    folder: Path, function: Callable[..., None], arguments: tuple, environment: dict[str, str]
) -> Command:
    """Start function(*arguments), a module-level function, in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("*.out")))
    out, err = folder / f"{number}.out", folder / f"{number}.err"
    out.touch()
    err.touch()
    process = _SERVER.Process(target=_child, args=(function, arguments, environment, str(out), str(err)))
    process.start()
    return Command(process, out, err)


def _child(function: Callable[..., None], arguments: tuple, environment: dict[str, str], out: str, err: str) -> None:
    os.environ.update(environment)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    faulthandler.dump_traceback_later(TIMEOUT - 10)  # where it hangs, for the message of `finish`
    function(*arguments)


def _run_module(module: str, arguments: list[str]) -> None:
    sys.argv = [module, *arguments]
    name = "train.__main__" if module == "train" else module
    importlib.import_module(name).main()


def ranks(world: int) -> list[dict[str, str]]:
    """The environment that torchrun gives to each of its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def cut(path: Path) -> None:
    """A file that ends too early."""
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    """A file with one altered bit."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def metrics(run: Path, timings: bool = False) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, without what a clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if timings or key not in TIMINGS} for line in lines]


def assert_one_line(result: Result, status: int, *words: str) -> None:
    """The command ended with this status and one line on standard error that holds the words, and no traceback."""
    assert result.status == status, result.err
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: "), result.err
    for word in words:
        assert word in lines[0], (word, result.err)
    assert result.out == ""


def resolutions(tmp_path: Path) -> list[str]:
    """Arguments of a run that reads the same pictures with at most 4 patches, and from step 3 on with up to 16."""
    rng = np.random.default_rng(0)
    for k in range(40):
        Picture.fromarray(rng.integers(0, 256, (32, 24 + 8 * (k % 2), 3), np.uint8)).save(tmp_path / f"{k}.png")
    documents = [{"id": str(k), "segments": [{"text": f"t{k}"}, {"image": f"{k}.png"}]} for k in range(40)]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, most in (("low", 4), ("high", 16)):
        prepare.main(["--input", str(tmp_path / "raw.jsonl"), "--out", str(tmp_path / name), "--max_grid=8",
                      "--patch_size=8", f"--max_patches={most}", "--workers=0"])  # fmt: skip
    return [*TINY, "--data.shapes=null", "--data.max_patches=4",
            f"--data.prepared=[{{path: {tmp_path}/low, weight: 1}}, {{path: {tmp_path}/high, weight: 0}}]",
            "--data.stages=[{from_step: 3, weights: {high: 1}, max_patches: 16}]"]  # fmt: skip
