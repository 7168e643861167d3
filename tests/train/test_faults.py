"""What goes wrong around a run ends in one clear line, on all ranks, and the newest good checkpoint goes on."""

import hashlib
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.kill import differences, unlike
from data.mixture import Mixture
from tests.train.support import (
    TIMEOUT,
    TINY,
    Command,
    Result,
    assert_one_line,
    cut,
    flip,
    metrics,
    ranks,
    start_function,
)
from train import checkpoint, engine, meter, pipeline, settings
from train.__main__ import main
from train.checkpoint import Checkpoint, step_folder
from train.config import Config, OptimSection

pytestmark = pytest.mark.slow  # minutes: many starts of processes

LONG = 60  # steps of the runs that are asked to stop: about a second
SOON = 15  # seconds; a loader process that outlives its rank keeps the connection open for five of them
ZERO_2 = ("--engine.backend=deepspeed", "--engine.zero_stage=2")
ZERO_3 = ("--engine.backend=deepspeed", "--engine.zero_stage=3")


# ---- processes -------------------------------------------------------------------------------------------------------


def as_it_is(arguments: tuple[str, ...]) -> None:
    """`python -m train`; this and the next ones run in a process of their own."""
    sys.argv = ["train", *arguments]
    main()


def with_small_files(size: int, arguments: tuple[str, ...]) -> None:
    """No file can be longer than so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    as_it_is(arguments)


def with_many_shards(arguments: tuple[str, ...]) -> None:
    checkpoint.SHARD_BYTES = 100_000
    as_it_is(arguments)


def with_slow_disk(seconds: float, arguments: tuple[str, ...]) -> None:
    """A checkpoint takes so many seconds more."""
    right = checkpoint._publish

    def slow(*given: Path) -> None:
        time.sleep(seconds)
        right(*given)

    checkpoint._publish = slow
    as_it_is(arguments)


def with_nan(first: int, last: int, rank: int, arguments: tuple[str, ...]) -> None:
    """The loss of one rank is not a number in steps first to last, counted from the start of the process."""
    right, calls = engine.objective, iter(range(1, 10_000))

    def wrong(*given: object) -> torch.Tensor:
        return right(*given) * (math.nan if first <= next(calls) <= last else 1)

    if int(os.environ.get("RANK", "0")) == rank:
        engine.objective = wrong
        if ZERO_2[0] in arguments:
            from train import deepspeed_engine

            deepspeed_engine.objective = wrong
    as_it_is(arguments)


def begin(run: Path, *arguments: str, world: int = 1, child: Callable[..., None] = as_it_is) -> list[Command]:
    """Start the run on so many ranks."""
    command = (*TINY, f"--run.dir={run}", *arguments)
    environments = ranks(world) if world > 1 else [{}]
    return [start_function(run.parent / "out", child, (command,), environment) for environment in environments]


def end(commands: list[Command]) -> list[Result]:
    return [command.finish() for command in commands]


def train(run: Path, *arguments: str, world: int = 1, child: Callable[..., None] = as_it_is) -> list[Result]:
    """Run to the end, which must be a good one."""
    results = end(begin(run, *arguments, world=world, child=child))
    assert all(result.status == 0 for result in results), [result.err for result in results]
    return results


def error_of(result: Result, status: int = 1) -> str:
    """The one error line of a command that may have said other things before, and ended with this status."""
    assert result.status == status, result.err
    assert "Traceback" not in result.err
    lines = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert lines == result.err.splitlines()[-1:], result.err
    return lines[0]


def wait_for_step(run: Path, step: int) -> None:
    until = time.monotonic() + TIMEOUT
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count("\n") < step:
        assert time.monotonic() < until, "the run does not get on"
        time.sleep(0.002)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def end_of(run: Path) -> Checkpoint:
    return checkpoint.load(checkpoint.resolve(run))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """straight(world, *arguments): a run that nobody disturbed."""

    @cache
    def make(world: int, *arguments: str) -> Path:
        run = tmp_path_factory.mktemp("straight") / "run"
        train(run, *arguments, world=world)
        return run

    return make


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run_on_small_disk(tmp_path: Path) -> Iterator[Path]:
    """A run folder that is a file system of its own, of 6 MB."""
    run = tmp_path / "run"
    run.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", run], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield run
    subprocess.run(["umount", run], check=True)


def check_that_a_failed_save_is_survived(
    run: Path, straight: Path, reason: str, *arguments: str, world: int, child: Callable[..., None] = as_it_is
) -> None:
    """Steps 4 to 8 with a save in step 6 that must fail, and then without the obstacle, which is `run/filler` or the
    child."""
    before = files(run / "checkpoints")
    arguments = (*arguments, "--checkpoint.every=3")
    first, *others = (error_of(result) for result in end(begin(run, *arguments, world=world, child=child)))
    assert f"error: {step_folder(run, 6)} could not be written" in first
    assert reason in first
    assert "older checkpoints stay as they were" in first
    assert all("rank 0 could not write a checkpoint" in other for other in others)
    assert files(run / "checkpoints") == before
    assert [path.name for path in (run / "checkpoints").iterdir() if path.suffix == ".tmp"] == []

    (run / "filler").unlink(missing_ok=True)
    first = train(run, *arguments, world=world)[0]
    assert "from step 3 to 8" in first.err
    assert differences(run, straight) == []


BACKGROUND = "--checkpoint.background=true"
OWN_TOKENIZER = "--data.tokenizer=configs/shapes-tokenizer.json"


@pytest.mark.parametrize(
    ("world", "arguments", "size"),
    [(1, (BACKGROUND,), 100_000), (2, (), 100_000), (1, (OWN_TOKENIZER,), 20_000)],
    ids=["background", "two", "tokenizer"],
)
def test_a_file_that_cannot_be_written(
    tmp_path: Path, straight: Callable[..., Path], world: int, arguments: tuple[str, ...], size: int
) -> None:
    """The weights of the tiny model take 320,000 bytes, its own tokenizer 37,000."""
    run, saved = tmp_path / "run", [argument for argument in arguments if argument != BACKGROUND]
    train(run, "--run.stop_after=3", *arguments, world=world)
    child = partial(with_small_files, size)
    check_that_a_failed_save_is_survived(
        run, straight(world, *saved), "too large", *arguments, world=world, child=child
    )


@pytest.mark.parametrize(("world", "arguments"), [(1, ()), (2, (BACKGROUND,))], ids=["one", "two-background"])
def test_a_full_disk_at_a_save(
    run_on_small_disk: Path, straight: Callable[..., Path], world: int, arguments: tuple[str, ...]
) -> None:
    run = run_on_small_disk
    train(run, "--run.stop_after=3", world=world)
    with (run / "filler").open("wb") as filler:
        filler.write(bytes(shutil.disk_usage(run).free - 500_000))
    check_that_a_failed_save_is_survived(run, straight(world), "No space left", *arguments, world=world)


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (result,) = end(begin(run, "--run.steps=40", child=partial(with_small_files, 4000)))
    assert str(run / "metrics.jsonl") in error_of(result)


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    """A signal asks for a checkpoint at any step, SIGKILL may come before it is there: no later one has its name."""
    run = tmp_path / "run"
    left = step_folder(run, 2).with_suffix(".tmp")
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(bytes(1000))
    train(run, "--run.stop_after=3")
    assert sorted(path.name for path in left.parent.iterdir()) == ["latest", "step-00000003"]


# ---- damaged checkpoints ---------------------------------------------------------------------------------------------


def make_newer(state: Path) -> None:
    """Of a format to come, and sound."""
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": checkpoint.FORMAT + 1}))
    sign(state.parent, state.name)


def sign(folder: Path, name: str) -> None:
    """Bring the manifest up to date with a file that was changed."""
    content = (folder / name).read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGE = {
    "truncated": ("model-00002-of-*.safetensors", cut, "truncated"),
    "altered": ("optimizer/exp_avg_sq-00003-of-*.safetensors", flip, "altered since it was written"),
    "missing": ("ema-00001-of-*.safetensors", Path.unlink, "missing from the checkpoint"),
    "newer": (
        "state.json",
        make_newer,
        f"format {checkpoint.FORMAT + 1}, this version reads up to {checkpoint.FORMAT}",
    ),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """two_checkpoints(world): a run with checkpoints of steps 3 and 6, of several shards each."""

    @cache
    def make(world: int) -> Path:
        run = tmp_path_factory.mktemp("sharded") / "run"
        train(run, "--checkpoint.every=3", "--run.stop_after=6", world=world, child=with_many_shards)
        return run

    return make


@pytest.mark.parametrize(
    ("world", "damage"),
    [(1, "truncated"), (1, "altered"), (1, "missing"), (1, "newer"), (2, "altered"), (2, "newer")],
)
def test_the_checkpoint_before_a_bad_one_goes_on(
    tmp_path: Path, two_checkpoints: Callable[[int], Path], straight: Callable[..., Path], world: int, damage: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_checkpoints(world), run)
    pattern, spoil, words = DAMAGE[damage]
    (bad,) = step_folder(run, 6).glob(pattern)
    spoil(bad)
    first, *others = train(run, world=world)
    warnings = [line for line in first.err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: {bad if damage != 'newer' else bad.parent}: ")
    assert words in warnings[0]
    assert "using the checkpoint before it" in warnings[0]
    assert "from step 3 to 8" in first.err
    assert [other.err for other in others] == [""] * (world - 1)
    assert differences(run, straight(world)) == []


def test_shards_of_a_good_checkpoint_go_on(
    tmp_path: Path, two_checkpoints: Callable[[int], Path], straight: Callable[..., Path]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_checkpoints(1), run)
    assert len(list(step_folder(run, 6).glob("model-*.safetensors"))) >= 3
    (result,) = train(run)
    assert "warning" not in result.err
    assert "from step 6 to 8" in result.err
    assert differences(run, straight(1)) == []


def test_without_a_sound_checkpoint_both_ranks_end(tmp_path: Path, two_checkpoints: Callable[[int], Path]) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_checkpoints(2), run)
    for step in (3, 6):
        flip(step_folder(run, step) / "state.json")
    before = files(run)
    first, second = end(begin(run, world=2))
    assert "no checkpoint there is sound" in error_of(first, status=2)
    assert "lost contact with another rank" in error_of(second)
    assert files(run) == before


def test_other_settings_are_refused_by_both_ranks(two_checkpoints: Callable[[int], Path]) -> None:
    run = two_checkpoints(2)
    before = files(run)
    for result in end(begin(run, "--optim.lr=0.5", world=2)):
        assert_one_line(result, 2, "holds a run with other settings", "optim.lr is 0.01 there, 0.5 here")
    assert files(run) == before


# ---- numbers that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "backend"), [(1, ()), (2, ()), (2, ZERO_2)], ids=["one", "two", "two-zero-2"])
def test_nan_on_one_rank_is_skipped_by_all_and_then_ends_the_run(
    tmp_path: Path, world: int, backend: tuple[str, ...]
) -> None:
    if backend:
        pytest.importorskip("deepspeed")
    run = tmp_path / "run"
    arguments = ("--checkpoint.every=2", "--optim.max_skipped=3", *backend)
    child = partial(with_nan, 5, 99, world - 1)
    folder = run / "non_finite" / "step-00000007"
    results = end(begin(run, *arguments, world=world, child=child))
    for result in results:
        assert error_of(result).startswith(
            f"error: 3 gradients in a row are not finite; the rows of step 7 are in {folder}"
        )
    skipped = re.findall(r"gradient of step (\d+) is not finite; its update is skipped", results[0].err)
    assert skipped == ["5", "6", "7"]

    # What was good stays as it was: the checkpoint of step 6 holds what the one of step 4 holds.
    before, after = (checkpoint.load(step_folder(run, step)) for step in (4, 6))
    assert unlike(after, before) == []
    assert (before.skipped, after.skipped) == (0, 2)
    assert [line["skipped"] for line in metrics(run)] == [0, 0, 0, 0, 1, 2]

    config = settings.parse([*TINY])[0]
    mixture = pipeline.make_mixture(
        config, pipeline.make_encoder(config, pipeline.make_tokenizer(config.data)), "train"
    )
    for rank in range(world):
        mine = [json.loads(line) for line in (folder / f"rank-{rank}.jsonl").read_text().splitlines()]
        assert [line["row"] for line in mine] == pipeline.StepRows(mixture, config, rank, world).numbers(6)
    for row in range(24, 28):
        saved, batch = load_file(folder / f"row-{row}.safetensors"), pipeline.make_batch(mixture, [row], 3)
        assert torch.equal(saved["token_S"], batch.token_BS[0])
        assert torch.equal(saved["patches_NP"], batch.patches_NP)

    if not backend:
        train(run, *arguments, world=world)  # without the trouble it goes on
        assert (end_of(run).step, end_of(run).skipped) == (8, 2)
        assert unlike(end_of(run), after) != []


def test_skipped_steps_survive_a_restart(tmp_path: Path, straight: Callable[..., Path]) -> None:
    """AdamW has taken as many steps as were not skipped: its bias correction depends on that."""
    one, two = tmp_path / "one", tmp_path / "two"
    child = partial(with_nan, 3, 4, 0)
    train(one, child=child)
    train(two, "--run.stop_after=5", child=child)
    train(two)
    assert differences(two, one) == []
    assert end_of(two).skipped == 2
    assert differences(one, straight(1)) != []


def test_the_saved_rows_show_which_of_them_is_to_blame(tmp_path: Path, straight: Callable[..., Path]) -> None:
    """A token that some rows of the first step hold has a weight that is not a number."""
    config = settings.parse([*TINY])[0]
    mixture = pipeline.make_mixture(
        config, pipeline.make_encoder(config, pipeline.make_tokenizer(config.data)), "train"
    )
    rows = [set(mixture.row(row).token.tolist()) for row in range(4)]
    token = min(token for token in set.union(*rows) if sum(token in row for row in rows) == 1)
    start = tmp_path / "start"
    shutil.copytree(checkpoint.resolve(straight(1)), start)
    weights = load_file(start / "model.safetensors")
    weights["token_embedding.weight"][token] = math.nan
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    sign(start, "model.safetensors")

    run = tmp_path / "run"
    (result,) = end(begin(run, f"--run.init_from={start}", "--optim.max_skipped=1"))
    folder = run / "non_finite" / "step-00000001"
    assert str(folder) in error_of(result)
    lines = [json.loads(line) for line in (folder / "rank-0.jsonl").read_text().splitlines()]
    assert [math.isnan(line["loss/text"]) for line in lines] == [token in rows[line["row"]] for line in lines]
    assert [line["documents"] for line in lines] == [documents_of(mixture, line["row"]) for line in lines]


def documents_of(mixture: Mixture, row: int) -> list[int]:
    stream, number = mixture.locate(row)
    return stream.plan.row(number)[1].tolist()


# ---- losses that jump ------------------------------------------------------------------------------------------------


def reports(losses: list[float]) -> list[str]:
    """What is said of these losses of steps 1, 2, ..."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    meter.logger.addHandler(handler)
    try:
        spikes = meter.Spikes(Config(optim=OptimSection(text_weight=2.0, image_weight=0.5, spike=2.0)))
        for step, loss in enumerate(losses, 1):
            spikes.look(step, [loss / 4, loss])  # weighted, half of it is text
    finally:
        meter.logger.removeHandler(handler)
    return said


def with_jump(at: int, height: float = 5.0, steps: int = 100) -> list[float]:
    return [height if step == at else 1.0 for step in range(1, steps + 1)]


def test_a_jump_is_reported_once_with_its_rows() -> None:
    (said,) = reports(with_jump(80))
    assert "the loss of step 80 is 5.0000, 5.0 times its recent mean 1.0000 (text 1.2500, image 5.0000" in said
    assert "rows 1264 to 1279)" in said  # 16 rows per step


@pytest.mark.parametrize(
    "losses",
    [
        pytest.param(with_jump(50), id="warm-up"),
        pytest.param(with_jump(80, height=1.9), id="small"),
        pytest.param([1.01**step for step in range(400)], id="slow growth"),
        pytest.param(with_jump(80, height=math.nan), id="nan"),
        pytest.param(with_jump(80, height=math.inf), id="inf"),
        pytest.param(with_jump(80, height=0.0), id="a step without a loss"),
    ],
)
def test_what_is_no_jump_is_not_reported(losses: list[float]) -> None:
    assert reports(losses) == []


def test_what_is_not_finite_does_not_count_for_the_mean() -> None:
    assert len(reports(with_jump(51))) == 1
    assert reports([math.nan, *with_jump(50)]) == []  # 49 losses were seen before the jump
    (said,) = reports([*with_jump(70, math.inf, 70), *with_jump(20)])
    assert "5.0 times its recent mean 1.0000" in said


def test_a_run_reports_its_jumps(tmp_path: Path) -> None:
    """At a rate of nearly 0 the loss stays at its mean, and some steps draw harder noise than others."""
    run, spike = tmp_path / "run", 1.07
    (result,) = train(run, "--run.steps=90", "--optim.lr=1e-9", f"--optim.spike={spike}")
    expected, mean = [], 0.0
    for line in metrics(run)[:-1]:  # Losses are known to all ranks one step later.
        step, loss = line["step"], line["loss/text"] + line["loss/image"]
        if step > 50 and loss > spike * mean:
            expected.append((str(step), f"{loss:.4f}"))
        mean += (loss - mean) * max(0.02, 1 / step)
    assert len(expected) >= 3
    assert re.findall(r"warning: the loss of step (\d+) is ([\d.]+), ", result.err) == expected


# ---- ranks that die or hang ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("victim", "arguments"),
    [(0, ("--data.workers=1",)), (1, ("--data.workers=0",)), (1, ZERO_3)],
    ids=["rank-0", "rank-1", "zero-3"],
)
def test_a_dead_rank_ends_the_other_in_seconds(tmp_path: Path, victim: int, arguments: tuple[str, ...]) -> None:
    if arguments == ZERO_3:
        pytest.importorskip("deepspeed")
    run = tmp_path / "run"
    commands = begin(run, "--run.steps=100000", *arguments, world=2)
    wait_for_step(run, 3)
    commands[victim].process.kill()
    began = time.monotonic()
    result = commands[1 - victim].finish()
    assert time.monotonic() - began < SOON
    assert error_of(result).startswith("error: lost contact with another rank, whose own message says why")


def test_a_checkpoint_in_the_making_is_finished_when_another_rank_dies(tmp_path: Path) -> None:
    """What is written in the background is complete in the memory of rank 0: nobody else is needed for it."""
    run = tmp_path / "run"
    arguments = ("--run.steps=100000", "--checkpoint.every=4", BACKGROUND)
    commands = begin(run, *arguments, world=2, child=partial(with_slow_disk, 3.0))
    wait_for_step(run, 5)
    commands[1].process.kill()
    assert "lost contact with another rank" in error_of(commands[0].finish())
    assert end_of(run).step == 4
    assert [path.name for path in (run / "checkpoints").iterdir() if path.suffix == ".tmp"] == []


def test_a_rank_that_hangs_ends_the_other_after_the_timeout(tmp_path: Path) -> None:
    run = tmp_path / "run"
    commands = begin(run, "--run.steps=100000", "--engine.timeout=3", world=2)
    wait_for_step(run, 3)
    stopped = commands[1].process
    assert stopped.pid
    os.kill(stopped.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        result = commands[0].finish()
        assert 2 < time.monotonic() - began < SOON
        assert "lost contact with another rank" in error_of(result)
    finally:
        stopped.kill()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_ends_the_other_after_the_timeout(tmp_path: Path, rank: int) -> None:
    command = (*TINY, f"--run.dir={tmp_path / 'run'}", "--engine.timeout=3")
    result = start_function(tmp_path / "out", as_it_is, (command,), ranks(2)[rank]).finish()
    assert "another rank" in error_of(result)


# ---- requests to stop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "rank"), [("SIGTERM", 1), ("SIGUSR1", 0), ("a file", 0)])
def test_a_request_to_one_of_two_ranks_stops_both(
    tmp_path: Path, straight: Callable[..., Path], how: str, rank: int
) -> None:
    run, long = tmp_path / "run", f"--run.steps={LONG}"
    commands = begin(run, long, world=2)
    wait_for_step(run, 3)
    if how == "a file":
        (run / "stop").touch()
    else:
        pid = commands[rank].process.pid
        assert pid
        os.kill(pid, signal.Signals[how])
    first, second = end(commands)
    assert (first.status, second.status) == (0, 0), (first.err, second.err)
    stopped = end_of(run).step
    assert 3 <= stopped < LONG
    assert f"stopped on request after step {stopped}" in first.err
    assert not (run / "stop").exists()
    train(run, long, world=2)
    assert differences(run, straight(2, long)) == []
