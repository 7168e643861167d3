"""`python -m launch.stoppable [--note FILE] LAUNCHER ...`: run a launcher so that it can be asked to stop.

SIGTERM, SIGINT, SIGHUP and SIGUSR1 reach every training process below the launcher as SIGUSR1, once. Each saves at the
next step boundary and ends with status 0, and so does the launcher: the exit status stays that of the training. A
second SIGINT ends everything at once. --note: a file to make when a signal arrives. For Linux.

Left to themselves, torchrun ends with status 1 after a signal and kills what needs more than 30 seconds to save, and
the deepspeed launcher dies and leaves its processes running. And when the network fails, torchrun can hang for good
after its processes have ended with an error: then it is ended with status 1.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

import psutil  # type: ignore[import-untyped]

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
TICK, HURRY = 5.0, 1.0
"""Seconds between looks at the processes; and after a signal, until all have been told: one that has only just started
does not listen yet."""
LEFT = 30.0
"""Seconds that a launcher may go on without its processes. torchrun waits for the other machines to get there too."""


class Stoppable:
    """A launcher and the processes below it. No PyTorch here: a signal is heard from the first moment on."""

    def __init__(self, command: list[str], note: Path | None) -> None:
        """Start the command. Raises OSError if that cannot be done."""
        self.note, self.asked, self.hangs = note, False, False
        self.told: set[psutil.Process] = set()
        self.alive: float | None = None  # When there were training processes for the last time.
        self.launcher: subprocess.Popen | None = None
        for number in STOPS:
            # nohup and `command &` in a script have some of them ignored, on purpose.
            if number == signal.SIGUSR1 or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._ask)
        signal.signal(signal.SIGALRM, self._look)
        # A session of its own, or Ctrl-C on a terminal would go to the launcher as well. SIGUSR1 would end the launcher
        # and any training process that does not listen yet: they start with it ignored.
        environment = {name: value for name, value in os.environ.items() if name != "RANK"}
        self.launcher = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_ignore)
        signal.setitimer(signal.ITIMER_REAL, TICK, TICK)

    def wait(self) -> int:
        """Exit status of the launcher, as a shell gives it."""
        assert self.launcher is not None
        status = self.launcher.wait()
        if self.hangs:
            return 1
        return status if status >= 0 else 128 - status

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked = True
            print(f"{signal.Signals(number).name}: saving after this step, then the end", file=sys.stderr, flush=True)
            if self.note:
                self.note.touch()
            signal.setitimer(signal.ITIMER_REAL, 0.01, HURRY)
        elif number == signal.SIGINT:
            self._kill()

    def _look(self, number: int, frame: FrameType | None) -> None:
        if not self.launcher:
            return
        ranks = set(_ranks(psutil.Process(self.launcher.pid)))
        if self.asked:
            new = {process for process in ranks if _listens(process)} - self.told
            _send(signal.SIGUSR1, new)
            self.told |= new
        if ranks:
            self.alive = time.monotonic()
        elif self.alive and time.monotonic() - self.alive > LEFT:
            print("error: the launcher goes on without its training processes; ending it", file=sys.stderr, flush=True)
            self.hangs = True
            self._kill()

    def _kill(self) -> None:
        if self.launcher:
            launcher = psutil.Process(self.launcher.pid)
            _send(signal.SIGKILL, [*launcher.children(recursive=True), launcher])


def _ranks(process: psutil.Process) -> Iterator[psutil.Process]:
    """The topmost processes below this one that have a RANK and run; what they start themselves is none."""
    for child in process.children():
        with contextlib.suppress(psutil.Error):
            if "RANK" in child.environ():
                yield child
            else:
                yield from _ranks(child)


def _listens(process: psutil.Process) -> bool:
    """Whether it has a handler for SIGUSR1. Python takes it away early in its own end, where the signal would kill."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


def _send(number: signal.Signals, processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # It has ended in the meantime.
            process.send_signal(number)


def _ignore() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def main() -> None:
    """Exit status: that of the launcher; 2: there is none, or it cannot be started."""
    command, note = sys.argv[1:], None
    if command[:1] == ["--note"] and len(command) > 1:
        command, note = command[2:], Path(command[1])
    if not command or command[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        raise SystemExit(2)
    try:
        stoppable = Stoppable(command, note)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    # Not through Python's own end: it takes the handlers away first, and a late signal, or the next tick, would kill.
    os._exit(stoppable.wait())


if __name__ == "__main__":
    main()
