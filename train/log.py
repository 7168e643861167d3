"""What a user watches: lines on the console, a progress bar on a terminal, metrics.jsonl, TensorBoard."""

import json
import logging
import platform
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

logger = logging.getLogger("ropeway")


class Log:
    """Log of one run, on rank 0. A resumed run drops the metrics of steps that it will do again."""

    def __init__(self, run: Path | None, first_step: int, steps: int, tensorboard: bool) -> None:
        """run: the run's folder; None writes nothing but the console (a dry run)."""
        self.file, self.board = None, None
        logger.setLevel(logging.INFO)
        logger.handlers.clear()
        logger.propagate = False
        handlers: list[logging.Handler] = [_Console()]
        if run:
            run.mkdir(parents=True, exist_ok=True)
            path = run / "metrics.jsonl"
            _truncate(path, first_step)
            self.file = path.open("a")
            handlers.append(logging.FileHandler(run / "train.log"))
            if tensorboard:
                self.board = _tensorboard(run)
        for handler in handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
            logger.addHandler(handler)
        self.bar = tqdm(total=steps, initial=first_step, unit="step", disable=not sys.stderr.isatty(), smoothing=0.05)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One line of numbers after `step` steps."""
        if self.file:
            line = {"step": step, **{key: round(value, 6) for key, value in values.items()}}
            try:
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()
            except OSError as error:  # it does not say which file
                raise OSError(f"{self.file.name}: cannot be written: {error.strerror}") from error
        if self.board:
            self.board.log(values, step=step)

    def close(self) -> None:
        self.bar.close()
        if self.file:
            self.file.close()
        if self.board:
            self.board.finish()


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _truncate(path: Path, first_step: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= first_step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # The line that a killed process was writing.
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(kept))
    partial.replace(path)


def check_tensorboard() -> None:
    """Raises ValueError if TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise ValueError("log.tensorboard needs TensorBoard; install it with pip install -e '.[log]'")


def _tensorboard(run: Path):  # type: ignore[no-untyped-def]
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker

    PartialState()
    tracker = TensorBoardTracker(run_name="tensorboard", logging_dir=run)
    tracker.start()
    return tracker


def environment() -> str:
    """One line on what the run runs on: commit, versions, processor."""
    packages = " ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "tokenizers", "safetensors"))
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{cpu_name()}, {torch.get_num_threads()} threads"
    )
    return f"commit {commit()}, python {platform.python_version()} {packages}, {device}"


def commit() -> str:
    """Short commit of the checkout, with + if files differ from it; unknown outside a checkout."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    root = Path(__file__).resolve().parent
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=root, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
