"""launch/torchrun.sh and launch/deepspeed.sh: start, stop by a signal, go on, and end as if nothing had happened."""

import contextlib
import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.launch.launchers import (
    ROOT,
    TIMEOUT,
    active,
    assert_same_run,
    finish,
    free_ports,
    launched,
    reference,
    saved_step,
    wait_for_steps,
    write_config,
)

pytestmark = pytest.mark.slow  # minutes: many starts of processes

STEPS = 100


def stop_and_go_on(command: list[object], number: signal.Signals, tmp_path: Path, **environment: str) -> str:
    """Start, send the signal, and start again. Returns what was printed."""
    run, log = tmp_path / "run", tmp_path / "log"
    with launched([*command, "--run.dir", run], log, **environment) as process:
        wait_for_steps(run, 3, process, log)
        process.send_signal(number)
        assert finish(process, log) == 0, log.read_text()
    assert 3 <= saved_step(run) < STEPS
    with launched([*command, "--run.dir", run], log, **environment) as process:
        assert finish(process, log) == 0, log.read_text()
    assert saved_step(run) == STEPS
    text = log.read_text()
    assert f"{number.name}: saving after this step, then the end" in text
    assert "Traceback" not in text
    assert "2 process(es)" in text
    return text


def test_torchrun(tmp_path: Path) -> None:
    """With a loader process in each rank: it must not take the signal amiss."""
    config = write_config(tmp_path, STEPS)
    text = stop_and_go_on(["launch/torchrun.sh", config, "--data.workers", 1], signal.SIGTERM, tmp_path, NPROC="2")
    assert "torch.distributed.run --standalone --nproc-per-node 2 -m train --config" in text
    assert_same_run(tmp_path / "run", reference(tmp_path, config))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed(tmp_path: Path) -> None:
    config = write_config(tmp_path, STEPS)
    environment = {
        "NPROC": "2",
        "MASTER_PORT": str(free_ports(1)[0]),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    command = ["launch/deepspeed.sh", config, "--engine.zero_stage", 2]
    stop_and_go_on(command, signal.SIGUSR1, tmp_path, **environment)
    undisturbed = reference(tmp_path, config, "--engine.backend=deepspeed", "--engine.zero_stage=2")
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("script", ["launch/torchrun.sh", "launch/deepspeed.sh"])
def test_usage(script: str) -> None:
    for arguments, status in (([], 2), (["--run.steps", "3"], 2), (["--help"], 0)):
        done = subprocess.run([script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == status
        assert (done.stderr if status else done.stdout).startswith(f"{script} CONFIG [--section.key value ...]: ")


@pytest.mark.parametrize(
    ("script", "config", "environment", "message"),
    [
        ("torchrun.sh", "nowhere.yaml", {}, "nowhere.yaml: no such configuration"),
        ("deepspeed.sh", "nowhere.yaml", {}, "nowhere.yaml: no such configuration"),
        ("torchrun.sh", "configs/quickstart.yaml", {"NPROC": "two"}, "NPROC is 'two'"),
        ("torchrun.sh", "configs/quickstart.yaml", {"NPROC": "1", "NNODES": "2"}, "set RDZV_ENDPOINT"),
    ],
)
def test_wrong_use(script: str, config: str, environment: dict[str, str], message: str) -> None:
    done = subprocess.run(
        [f"launch/{script}", config], cwd=ROOT, env=active() | environment, capture_output=True, text=True,
        timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}" if "NNODES" not in environment else "error: NNODES is 2; ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def stoppable(*command: str) -> list[str]:
    return [sys.executable, "-m", "launch.stoppable", *command]


@pytest.mark.parametrize(("command", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -KILL $$", 137)])
def test_the_status_is_that_of_the_launcher(command: str, status: int) -> None:
    assert subprocess.run(stoppable("sh", "-c", command), cwd=ROOT, timeout=TIMEOUT).returncode == status


def test_a_signal_at_the_very_end_kills_nothing() -> None:
    rain = "parent=$PPID; (while kill -USR1 $parent 2>/dev/null; do :; done) & exit 3"
    assert subprocess.run(stoppable("bash", "-c", rain), cwd=ROOT, timeout=TIMEOUT).returncode == 3


def test_a_launcher_that_does_not_exist() -> None:
    done = subprocess.run(stoppable("/no/launcher"), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (2, "error: /no/launcher: No such file or directory\n")


RANK = """
import pathlib, signal, subprocess, sys, time
folder, told = pathlib.Path(sys.argv[1]), []
time.sleep(0.5)  # It takes a while until a training process listens.
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
child = subprocess.Popen(["sleep", "1000"])  # Any signal ends it.
(folder / "child").write_text(str(child.pid))
while not told:
    time.sleep(0.05)
time.sleep(2.5)  # Saving.
(folder / "result").write_text(f"told {len(told)} time(s), child {child.poll()}")
child.kill()
child.wait()
signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # As Python does when it ends.
time.sleep(2.5)
sys.exit(5)
"""


def test_only_the_ranks_are_told_and_once(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    note, log = tmp_path / "note", tmp_path / "log"
    launcher = ("sh", "-c", f"RANK=0 {sys.executable} {tmp_path}/rank.py {tmp_path}; exit $?")
    with launched(stoppable("--note", str(note), *launcher), log) as process:
        time.sleep(0.3)
        assert not note.exists()
        process.send_signal(signal.SIGTERM)
        assert finish(process, log) == 5, log.read_text()
    assert note.exists()
    assert (tmp_path / "result").read_text() == "told 1 time(s), child None"


def test_a_launcher_that_outlives_its_processes_is_ended(tmp_path: Path) -> None:
    """As torchrun does on a host that is cut off."""
    log = tmp_path / "log"
    program = (
        "import launch.stoppable as s; s.TICK = 0.2; s.LEFT = 1.0; "
        "raise SystemExit(s.Stoppable(['sh', '-c', 'RANK=0 sleep 2; sleep 1000'], None).wait())"
    )
    began = time.monotonic()
    with launched([sys.executable, "-c", program], log) as process:
        assert finish(process, log) == 1
    assert time.monotonic() - began > 3
    assert log.read_text() == "error: the launcher goes on without its training processes; ending it\n"


def test_a_second_ctrl_c_ends_everything(tmp_path: Path) -> None:
    script = f'trap "" USR1; echo $$ > {tmp_path}/pid; mv {tmp_path}/pid {tmp_path}/ready; while :; do sleep 1; done'
    with launched(stoppable("sh", "-c", f"RANK=0 bash -c '{script}'"), tmp_path / "log") as process:
        until = time.monotonic() + TIMEOUT
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert finish(process, tmp_path / "log") == 128 + signal.SIGKILL
    # Whoever inherits the process may take its time to bury it.
    with contextlib.suppress(psutil.NoSuchProcess):
        rank = psutil.Process(int((tmp_path / "ready").read_text()))
        while rank.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until
            time.sleep(0.01)
