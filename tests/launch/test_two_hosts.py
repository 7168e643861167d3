"""A run on two hosts, here two network namespaces with a virtual cable between them, which is cut."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch.launchers import (
    TIMEOUT,
    assert_same_run,
    finish,
    launched,
    output,
    reference,
    saved_step,
    wait_for_steps,
    write_config,
)

pytestmark = pytest.mark.slow  # minutes: many starts of processes

STEPS = 100


def why_not() -> str | None:
    """Why there can be no namespaces here."""
    missing = [name for name in ("ip", "unshare") if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} missing; on Debian apt-get install iproute2 util-linux"
    if os.geteuid():
        return "network namespaces need root"
    name = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=TIMEOUT)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=TIMEOUT)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else None


@dataclass
class Hosts:
    """Two hosts, host0 and host1, and the cable between them."""

    names: list[str]
    """Of the namespaces."""

    def on(self, host: int, *command: object) -> list[object]:
        """A command on a host: its own network, host name and /etc/hosts."""
        rename = f'hostname host{host}; exec "$@"'
        return ["ip", "netns", "exec", self.names[host], "unshare", "--uts", "sh", "-c", rename, "sh", *command]

    def cable(self, state: str) -> None:
        """up or down."""
        output(["ip", "-n", self.names[0], "link", "set", "cable", state])


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    names = [f"ropeway-{os.getpid()}-{i}" for i in range(2)]
    folders = [Path("/etc/netns") / name for name in names]
    try:
        for name, folder in zip(names, folders, strict=True):
            output(["ip", "netns", "add", name])
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("127.0.0.1 localhost\n10.99.7.1 host0\n10.99.7.2 host1\n")
        output(["ip", "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable",
                "netns", names[1]])  # fmt: skip
        for i, name in enumerate(names):
            output(["ip", "-n", name, "address", "add", f"10.99.7.{i + 1}/24", "dev", "cable"])
            output(["ip", "-n", name, "link", "set", "cable", "up"])
            output(["ip", "-n", name, "link", "set", "lo", "up"])
        yield Hosts(names)
    finally:
        for name, folder in zip(names, folders, strict=True):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=TIMEOUT)
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            Path("/etc/netns").rmdir()


def command(launcher: str, host: int) -> tuple[list[object], dict[str, str]]:
    """How one process is started on each host, and its environment."""
    if launcher == "torchrun":
        return ["launch/torchrun.sh"], {"NPROC": "1", "NNODES": "2", "RDZV_ENDPOINT": "host0:29400"}
    rank = {"RANK": str(host), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host0", "MASTER_PORT": "29500"}
    return [sys.executable, "-m", "train", "--config"], rank


# torchrun on the cut-off host hangs, until after half a minute it is ended.
@pytest.mark.parametrize("launcher", ["none", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_cut_cable_ends_the_job_and_the_same_command_goes_on(tmp_path: Path, hosts: Hosts, launcher: str) -> None:
    config, run = write_config(tmp_path, STEPS), tmp_path / "run"
    options = ("--run.dir", run, "--engine.timeout", 8, "--checkpoint.every", 10)

    @contextlib.contextmanager
    def both(part: str) -> Iterator[list[tuple[subprocess.Popen, Path]]]:
        started = []
        with contextlib.ExitStack() as stack:
            for host in range(2):
                log = tmp_path / f"{part}-host{host}.log"
                program, environment = command(launcher, host)
                process = launched(hosts.on(host, *program, config, *options), log, **environment)
                started.append((stack.enter_context(process), log))
            yield started

    with both("cut") as processes:
        wait_for_steps(run, 15, *processes[0])
        hosts.cable("down")
        for process, log in processes:
            assert finish(process, log) == 1
            errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
            assert "lost contact with another rank" in errors[0]
    assert 10 <= saved_step(run) < STEPS
    hosts.cable("up")
    with both("again") as processes:
        for process, log in processes:
            assert finish(process, log) == 0, log.read_text()
    assert saved_step(run) == STEPS
    assert_same_run(run, reference(tmp_path, config))
