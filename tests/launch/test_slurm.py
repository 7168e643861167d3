"""`sbatch launch/slurm.sbatch` on a real Slurm of two emulated nodes: preempted, requeued, and still the same run."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.launchers import (
    TIMEOUT,
    active,
    assert_same_run,
    free_ports,
    output,
    reference,
    saved_step,
    write_config,
)

CLUSTER = Path(__file__).with_name("slurm_cluster.sh")
PROGRAMS = ("munged", "sbatch", "slurmctld", "slurmd")
UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING")
STEPS = 100


def why_not() -> str | None:
    """Why Slurm cannot be started here."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} missing; on Debian apt-get install slurm-wlm munge)"
    return "starting Slurm needs root" if os.geteuid() else None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands reach the cluster."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # The path of a socket has 107 characters at most.
    try:
        output([CLUSTER, "up", folder, *free_ports(3)])
        # The nodes' names mean nothing to the resolver: both are this machine.
        yield active() | {"SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}
    finally:
        subprocess.run([CLUSTER, "down", folder], capture_output=True, timeout=TIMEOUT, check=False)
        shutil.rmtree(folder)


class Job:
    """A job that was submitted."""

    def __init__(self, cluster: dict[str, str], log: Path, *command: object) -> None:
        self.cluster, self.log = cluster, log
        self.number = output(["sbatch", "--parsable", f"--output={log}", *command], cluster).strip()

    def state(self) -> dict[str, str]:
        """What Slurm knows of it."""
        words = output(["scontrol", "show", "job", "--oneliner", self.number], self.cluster).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for_text(self, text: str) -> None:
        """Until it has printed this."""
        until = time.monotonic() + TIMEOUT
        while text not in self.text():
            assert time.monotonic() < until, self.text()
            assert self.state()["JobState"] in UNFINISHED, self.text()
            time.sleep(0.1)

    def wait(self) -> dict[str, str]:
        """Its state at its end."""
        until = time.monotonic() + TIMEOUT
        while (state := self.state())["JobState"] in UNFINISHED:
            assert time.monotonic() < until, (state, self.text())
            time.sleep(0.2)
        return state


def test_a_preempted_job_goes_on_as_if_nothing_had_happened(tmp_path: Path, cluster: dict[str, str]) -> None:
    config, run = write_config(tmp_path, STEPS), tmp_path / "run"
    job = Job(
        cluster, tmp_path / "job.log", "--nodes=2", "--exclusive", "launch/slurm.sbatch", config, "--run.dir", run
    )
    job.wait_for_text(f"step 3/{STEPS}")
    urgent = Job(cluster, tmp_path / "urgent.log", "--partition=high", "--nodes=2", "--exclusive", "--wrap=echo urgent")
    job.wait_for_text("requeueing job")
    stopped = saved_step(run)
    assert 3 <= stopped < STEPS
    assert urgent.wait()["JobState"] == "COMPLETED"
    state, text = job.wait(), job.text()
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "1"), text
    assert saved_step(run) == STEPS
    assert_same_run(run, reference(tmp_path, config))

    # One log of both parts, with the environment of every node and the table of the check.
    assert text.count("== job ") == 4
    for node in ("node1", "node2"):
        assert text.count(f"{node}: here is {node}: ") == 2
    assert text.count("rank  host") == 2
    assert text.count("SIGUSR1: saving after this step") == 2, "one on each node"
    assert f"training from step {stopped} to {STEPS}" in text
    assert "Traceback" not in text


def test_a_wrong_configuration_is_one_line(tmp_path: Path, cluster: dict[str, str]) -> None:
    config = write_config(tmp_path, STEPS)
    job = Job(cluster, tmp_path / "job.log", "--nodes=2", "launch/slurm.sbatch", config, "--model.width", 3)
    state = job.wait()
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0")
    assert job.text() == "error: unrecognized arguments: --model.width 3\n"


@pytest.mark.slow
def test_the_stop_file_and_scancel_do_not_requeue(tmp_path: Path, cluster: dict[str, str]) -> None:
    config, run = write_config(tmp_path, 100_000), tmp_path / "run"
    arguments = ("--nodes=2", "launch/slurm.sbatch", config, "--run.dir", run)
    job = Job(cluster, tmp_path / "stopped.log", *arguments)
    job.wait_for_text("step 3/")
    (run / "stop").touch()
    state = job.wait()
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "0"), job.text()
    stopped = saved_step(run)

    job = Job(cluster, tmp_path / "cancelled.log", *arguments)
    job.wait_for_text(f"step {stopped + 3}/")
    output(["scancel", job.number], cluster)
    assert (job.wait()["JobState"], job.state()["Restarts"]) == ("CANCELLED", "0"), job.text()
    assert "requeueing" not in job.text()


@pytest.mark.slow
def test_a_failed_training_fails_the_job(tmp_path: Path, cluster: dict[str, str]) -> None:
    config = write_config(tmp_path, STEPS)
    options = ("--run.dir", tmp_path / "run", "--optim.lr", 1e30, "--optim.max_skipped", 3)
    job = Job(cluster, tmp_path / "job.log", "--nodes=2", "launch/slurm.sbatch", config, *options)
    state = job.wait()
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "1:0"), job.text()
    assert "gradients in a row are not finite" in job.text()
    assert "requeueing" not in job.text()
