"""Runs killed with SIGKILL at random moments and started again, compared bit for bit with runs left alone.

Every start is a new process that reads the run from disk; it is forked from a server that has imported PyTorch already,
because importing it anew would take longer than the run. Moments are spread over start-up, steps and saves. On several
processes some kills hit one rank only: then the others have to end by themselves, with one line that says why.
"""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

from torch import Tensor

from benchmarks.processes import environments
from benchmarks.report import Result, Row
from train import checkpoint, pipeline
from train.__main__ import main
from train.checkpoint import Checkpoint

EVERY = 3
"""Steps between checkpoints: small, so that many kills fall into a save."""
SETTINGS = (
    "--run.device=cpu", "--run.precision=fp32", "--run.threads=1", "--run.seed=3",
    "--model.dim=32", "--model.num_layers=1", "--model.num_heads=2", "--model.patch_size=8",
    "--model.head.width=32", "--model.head.depth=1", "--model.head.draws=2",
    "--data.shapes.documents=300", "--data.shapes.canvases=[[16,16],[16,24]]",
    "--data.max_grid=8", "--data.max_patches=16", "--data.row_length=96", "--data.rows_per_step=4",
    "--optim.lr=0.01", "--optim.warmup_steps=2", f"--checkpoint.every={EVERY}", "--log.every=1",
)  # fmt: skip
"""A model of 80,000 numbers, whose steps take milliseconds."""
STEPS = 120
TIMED = ("slots_per_second", "patches_per_second", "gflops_per_second", "step_seconds", "data_wait_percent")
"""What a clock measured: the keys of metrics.jsonl that no two runs share."""
PATIENCE = 30.0
"""Seconds in which a rank has to end after another one was killed."""
LONGEST = 300.0
"""Seconds that no start of these runs needs."""

_SERVER = multiprocessing.get_context("forkserver")


@dataclass
class Found:
    """What came of the runs."""

    kills: list[Row] = field(default_factory=list)
    runs: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Everything that was not as it had to be."""


@dataclass
class Job:
    """The processes of one start of a run."""

    processes: list[BaseProcess]
    said: list[Path]
    """Standard error of each."""
    began: float = field(default_factory=time.monotonic)

    def runs(self) -> bool:
        return all(process.exitcode is None for process in self.processes)

    def watch(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Wait for so long, until something happens, or until a process ends."""
        limit = time.monotonic() + seconds
        while self.runs() and time.monotonic() < limit and not until():
            time.sleep(min(0.002, max(limit - time.monotonic(), 0)))

    def finish(self) -> None:
        """Wait for the end. Raises OSError unless all processes end well."""
        for process, said in zip(self.processes, self.said, strict=True):
            process.join(LONGEST)
            if process.exitcode != 0:
                self.kill()
                raise OSError(f"exit status {process.exitcode} of a process that nobody killed: {said.read_text()}")

    def kill(self) -> None:
        for process in self.processes:
            process.kill()


@dataclass(frozen=True)
class Pace:
    """Of a run that is left alone."""

    first: float
    """Seconds from the start to the end of the first step."""
    step: float
    """Seconds per step after it, saves included."""


def run(kills: int = 50, world: Literal["1", "2", "both"] = "both", seed: int = 0) -> Result:
    """Kill runs, start them again, and compare their ends with those of runs left alone.

    Args:
        kills: kills for each number of processes.
        world: processes of a run; both: first one, then two.
        seed: of the moments, and of whom they hit.
    """
    if kills < 1:
        raise ValueError(f"--kills is {kills}; it must be at least 1")
    # PyTorch imports the last two when the first optimizer is built and the first gradient clipped.
    _SERVER.set_forkserver_preload(["benchmarks.kill", "torch._dynamo", "torch.onnx"])
    folder = Path(tempfile.mkdtemp(prefix="ropeway-kill-"))
    found = [torture(folder / w, int(w), kills, STEPS, seed) for w in (("1", "2") if world == "both" else (world,))]
    problems = [problem for part in found for problem in part.problems]
    if problems:
        raise ValueError(f"{len(problems)} problem(s), for a look at the runs in {folder}: {'; '.join(problems)}")
    shutil.rmtree(folder)
    return Result(
        benchmark="kill",
        rows=[row for part in found for row in part.kills + part.runs],
        summary=[{key: row[key] for key in row if key != "row"} for part in found for row in part.runs],
        notes=_notes(),
        packages=("numpy", "safetensors"),
    )


def torture(folder: Path, world: int, kills: int, steps: int, seed: int) -> Found:
    """Runs of `steps` steps on `world` processes, one after the other, until `kills` kills have hit them. The last one
    may then go on to its end. Raises OSError if a process fails that nobody killed."""
    chance, found = random.Random(seed), Found()
    straight = folder / "straight"
    pace = undisturbed(straight, world, steps)
    if len(samples(straight)) != world * steps:
        raise OSError(f"{straight}: the record of what was read is not complete")
    for number in count(1):
        place = folder / f"run-{number}"
        mine: list[Row] = []
        problems: list[str] = []
        while len(found.kills) + len(mine) < kills:
            row = _start_and_kill(place, world, steps, pace, chance, problems)
            if row is None:
                break  # It came to its end first.
            mine.append({"row": "kill", "processes": world, "run": number, **row})
        else:
            start(place, world, steps).finish()
        problems += differences(place, straight)
        if samples(place) != samples(straight):
            problems.append("other samples were read")
        found.kills += mine
        found.problems += [f"{place}: {problem}" for problem in problems]
        found.runs.append(
            {
                "row": "run",
                "processes": world,
                "run": number,
                "steps": steps,
                "kills": len(mine),
                "in start-up": sum(row["phase"] == "start-up" for row in mine),
                "between saves": sum(row["phase"] == "steps" for row in mine),
                "in a save": sum(row["phase"] == "save" for row in mine),
                "of one rank alone": sum(row["killed"] != "all" for row in mine),
                "steps done again": sum(int(row["steps_lost"] or 0) for row in mine),
                "bit-equal": "no" if problems else "yes",
            }
        )
        if len(found.kills) == kills:
            break
    return found


def undisturbed(place: Path, world: int, steps: int) -> Pace:
    """A run from its start to its end."""
    job = start(place, world, steps)
    job.watch(LONGEST, until=lambda: _log(place)[1] > 0)
    first = time.monotonic() - job.began
    job.finish()
    return Pace(first, (time.monotonic() - job.began - first) / steps)


def start(place: Path, world: int, steps: int, *arguments: str) -> Job:
    """Start the run in this folder, or go on with it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    said = [place.with_name(f"{place.name}-{rank}.err") for rank in range(world)]
    command = [*SETTINGS, f"--run.dir={place}", f"--run.steps={steps}", *arguments]
    processes: list[BaseProcess] = [
        _SERVER.Process(target=_train, args=(command, environment, str(_record_of(place)), str(path)))
        for environment, path in zip(environments(world) if world > 1 else [{}], said, strict=True)
    ]
    for process in processes:
        process.start()
    return Job(processes, said)


def differences(place: Path, straight: Path) -> list[str]:
    """Everything in which the end of one run is not that of the other, to the bit."""
    one, two = (checkpoint.load(checkpoint.resolve(run)) for run in (place, straight))
    found = unlike(one, two)
    if (one.step, one.skipped) != (two.step, two.skipped):
        found.append(f"step {one.step} with {one.skipped} skipped, not {two.step} with {two.skipped}")
    if _metrics(place) != _metrics(straight):
        found.append("metrics.jsonl differs")
    return found


def unlike(one: Checkpoint, two: Checkpoint) -> list[str]:
    """Tensors that are not the same in both, to the bit."""

    def tensors(state: Checkpoint) -> dict[str, Mapping[str, Tensor]]:
        return {"model": state.model, "ema": state.ema, **state.optimizer}

    mine, theirs = tensors(one), tensors(two)
    found = [f"{kind} is in one of them only" for kind in sorted(mine.keys() ^ theirs.keys())]
    for kind in sorted(mine.keys() & theirs.keys()):
        a, b = mine[kind], theirs[kind]
        found += [f"{kind} {name} is in one of them only" for name in sorted(a.keys() ^ b.keys())]
        found += [f"{kind} {name} differs" for name in sorted(a.keys() & b.keys()) if _bits(a[name]) != _bits(b[name])]
    return found


def samples(place: Path) -> dict[tuple[int, int], set[str]]:
    """What was read for every (rank, step): one entry where all starts of the run have read the same."""
    found = defaultdict(set)
    for path in sorted(_record_of(place).glob("*")):
        for line in path.read_text().split("\n"):
            try:
                step, documents, digest = json.loads(line)
            except json.JSONDecodeError:
                continue  # a blank line, or what a killed process was writing
            found[int(path.name), step].add(f"{documents} {digest}")
    return dict(found)


def _start_and_kill(
    place: Path, world: int, steps: int, pace: Pace, chance: random.Random, problems: list[str]
) -> Row | None:
    """Start the run and kill it; None if it came to its end before. Adds what went wrong to `problems`."""
    resumed, (file, _), partial = _newest(place, problems), _log(place), _partial(place)
    killed = chance.choice(("all", "all", "all", *map(str, range(world)))) if world > 1 else "all"
    # One rank is killed alone in the midst of work only: while the ranks look for each other, ending the others is the
    # part of the launcher, which is left out here.
    aim = chance.choice(("start-up", "steps", "save") if killed == "all" else ("steps", "save"))
    background, workers = chance.random() < 1 / 2, chance.randrange(2)
    job = start(place, world, steps, f"--checkpoint.background={str(background).lower()}", f"--data.workers={workers}")

    def done() -> int | None:
        """The last step in the log, once this start has done one."""
        now, step = _log(place)  # A start that goes on with a run replaces the file.
        return step if now != file and step > resumed else None

    if aim == "start-up":
        job.watch(chance.uniform(0, pace.first))
    else:
        job.watch(LONGEST, until=lambda: done() is not None)
        job.watch(chance.uniform(0, 4 * EVERY * pace.step))
    if aim == "save":
        job.watch(LONGEST, until=lambda: bool(_partial(place) - partial))
        job.watch(chance.uniform(0, EVERY * pace.step))
    if not job.runs():
        job.finish()
        return None

    moment = time.monotonic()
    victims = job.processes if killed == "all" else [job.processes[int(killed)]]
    for victim in chance.sample(victims, len(victims)):
        victim.kill()
    for process in job.processes:
        process.join(PATIENCE)
    survived = time.monotonic() - moment
    newest = _newest(place, problems)
    for process, said in zip(job.processes, job.said, strict=True):
        if process not in victims:
            problems += _not_as_a_survivor(process, said.read_text(), finished=newest == steps)
    step = done() or resumed
    saving = _partial(place) - partial
    return {
        "seconds": round(moment - job.began, 3),
        "killed": killed,
        "phase": "save" if saving else "start-up" if done() is None else "steps",
        "step": step,
        "partial_checkpoint": min(saving)[0] if saving else None,
        "steps_lost": max(step - newest, 0),
        "background": background,
        "workers": workers,
        "survivor_seconds": None if killed == "all" else round(survived, 3),
    }


def _not_as_a_survivor(process: BaseProcess, said: str, finished: bool) -> list[str]:
    """What is wrong with how a rank ended after another one was killed."""
    if process.exitcode is None:
        process.kill()
        return [f"a rank still ran {PATIENCE:.0f} s after another one was killed"]
    if process.exitcode == 0 and finished:
        return []  # Its work was done.
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    if process.exitcode == 1 and len(errors) == 1 and "lost contact" in errors[0] and "Traceback" not in said:
        return []
    return [f"exit status {process.exitcode} of a rank after another one was killed, which said: {said}"]


def _train(command: list[str], environment: dict[str, str], record: str, said: str) -> None:
    """In a process of its own: `python -m train`, with a record of what it reads."""
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    folder = Path(record)
    folder.mkdir(exist_ok=True)
    read = pipeline.StepRows.__getitem__

    def noted(rows: pipeline.StepRows, step: int) -> pipeline.Step:
        found = read(rows, step)
        places = [rows.mixture.locate(row) for row in rows.numbers(step)]
        documents = [stream.plan.row(number)[1].tolist() for stream, number in places]
        digest = hashlib.sha256()
        for batch in found.batches:
            digest.update(_bits(batch.token_BS) + _bits(batch.patches_NP) + repr(batch.seed_B).encode())
        with (folder / str(rows.rank)).open("a") as file:
            # The line break comes first: what a killed process was writing spoils no line but its own.
            file.write("\n" + json.dumps([step, documents, digest.hexdigest()]))
        return found

    pipeline.StepRows.__getitem__ = noted  # type: ignore[method-assign]
    sys.argv = ["train", *command]
    main()


def _record_of(place: Path) -> Path:
    return place.with_name(f"{place.name}-samples")


def _bits(tensor: Tensor) -> bytes:
    return repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes()


def _metrics(place: Path) -> list[str]:
    """Lines of metrics.jsonl without what a clock measured, as text: a nan equals itself."""
    lines = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
    return [json.dumps({key: line[key] for key in line if key not in TIMED}) for line in lines]


def _log(place: Path) -> tuple[int, int]:
    """(inode, last step) of metrics.jsonl; zeros where there is none."""
    try:
        with (place / "metrics.jsonl").open() as file:
            lines = file.read().split("\n")[:-1]  # without what was not written to its end
            return os.fstat(file.fileno()).st_ino, json.loads(lines[-1])["step"] if lines else 0
    except FileNotFoundError:
        return 0, 0


def _newest(place: Path, problems: list[str]) -> int:
    """Step of the newest checkpoint, 0 if there is none. A kill must not leave one that is not sound."""
    try:
        newest = checkpoint.newest(place, problems.append)
    except ValueError as error:
        problems.append(str(error))
        newest = None
    return newest.step if newest else 0


def _partial(place: Path) -> set[tuple[str, int]]:
    """Checkpoints that were begun and not finished, each with the time of its last change."""
    found = set()
    for folder in checkpoint.folder_of(place).glob("step-*.tmp"):
        with suppress(FileNotFoundError):  # It was finished at this moment.
            found.add((folder.name, folder.stat().st_ctime_ns))
    return found


def _notes() -> str:
    return f"""
Runs of {STEPS} steps on a model of 80,000 numbers with a checkpoint every {EVERY} steps, float32, one thread per
process, DistributedDataParallel (gloo) on two. Each start draws whether checkpoints are written in the background and
whether a loader process makes the rows. It also draws what the kill aims at: the start-up, the time of four checkpoints
after the first step, or the next save after such a time; the moment is drawn from that. One row per kill in the JSON
file.

"in a save": the kill left a checkpoint that was begun and not finished (`step-*.tmp`); kills while older checkpoints
are removed are not counted there. "of one rank alone": the other rank has to end by itself within {PATIENCE:.0f} s,
with exit status 1 and one line.

"bit-equal", compared with a run of the same number of processes that was left alone: raw weights, average, both
moments, step and skipped steps; metrics.jsonl without timings, one line per step; the documents, tokens, pixels and
noise seeds that each rank read for each step, whichever start of the run read them.
"""
