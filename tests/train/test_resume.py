"""A run that was interrupted ends with the same bits as one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image as Picture

from tests.train.support import TIMEOUT, TINY, Command, assert_one_line, metrics, ranks, resolutions, start
from train import checkpoint, settings
from train.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
LONG = 60  # steps of the runs that a signal interrupts: about a second


def begin(run: Path, *arguments: str, environment: dict[str, str] | None = None) -> Command:
    return start(run.parent / "out", "train", *TINY, f"--run.dir={run}", *arguments, environment=environment)


def train(run: Path, *arguments: str) -> str:
    """Run `python -m train` to its end; returns what it said."""
    result = begin(run, *arguments).finish()
    assert result.status == 0, result.err
    return result.err


def train_on_two(run: Path, *arguments: str) -> None:
    started = [begin(run, *arguments, environment=environment) for environment in ranks(2)]
    for command in started:
        result = command.finish()
        assert result.status == 0, result.err


def end_of(run: Path) -> Checkpoint:
    return checkpoint.load(checkpoint.resolve(run))


def assert_bit_equal(a: Path, b: Path) -> None:
    """Weights, their average, moments, counters and lines of the log."""
    one, two = end_of(a), end_of(b)
    assert (one.step, one.skipped) == (two.step, two.skipped)
    groups = {"model": (one.model, two.model), "ema": (one.ema, two.ema)}
    kinds = {"exp_avg", "exp_avg_sq"} | ({"momentum_buffer"} if one.config.optim.muon_lr else set())
    assert one.optimizer.keys() == two.optimizer.keys() == kinds
    groups |= {kind: (one.optimizer[kind], two.optimizer[kind]) for kind in one.optimizer}
    for kind, (left, right) in groups.items():
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), f"{kind} {name}"
    assert metrics(a) == metrics(b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 steps without a break."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train(run)
    return run


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LONG steps without a break."""
    run = tmp_path_factory.mktemp("long") / "run"
    train(run, f"--run.steps={LONG}")
    return run


def test_a_run_leaves_what_it_promises(straight: Path) -> None:
    assert sorted(path.name for path in straight.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "train.log",
    ]
    assert settings.read(straight / "config.yaml") == end_of(straight).config
    lines = metrics(straight)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert "loss/text" in lines[0]
    assert lines[-1]["loss/text"] < lines[0]["loss/text"]


@pytest.mark.parametrize("workers", [0, 1])
def test_two_halves_equal_the_whole(tmp_path: Path, straight: Path, workers: int) -> None:
    run, worker = tmp_path / "run", f"--data.workers={workers}"
    train(run, worker, "--run.stop_after=4")
    assert end_of(run).step == 4
    train(run, worker)
    assert end_of(run).step == 8
    assert_bit_equal(run, straight)


def test_two_halves_equal_the_whole_with_muon(tmp_path: Path, straight: Path) -> None:
    whole, halves, muon = tmp_path / "whole", tmp_path / "halves", "--optim.muon_lr=0.004"
    train(whole, muon)
    train(halves, muon, "--run.stop_after=4")
    train(halves, muon)
    assert_bit_equal(whole, halves)
    names = {kind: set(tensors) for kind, tensors in end_of(whole).optimizer.items()}
    assert not names["momentum_buffer"] & names["exp_avg"]
    assert names["momentum_buffer"] | names["exp_avg"] == set(end_of(whole).model)
    assert metrics(whole)[-1] != metrics(straight)[-1]


def test_whole_images_are_trained_resumed_described_and_drawn(tmp_path: Path) -> None:
    whole, halves, mode = tmp_path / "whole", tmp_path / "halves", "--model.image_mode=transfusion"
    train(whole, mode)
    train(halves, mode, "--run.stop_after=4")
    train(halves, mode)
    assert_bit_equal(whole, halves)
    lines = metrics(whole)
    assert lines[-1]["loss/image"] < lines[0]["loss/image"]
    for options in (("--prompt", "a red circle", "--size", "16x24", "--steps", 2, "--out", tmp_path / "out"),
                    ("--image", tmp_path / "out" / "00000.png", "--max-text", 5)):  # fmt: skip
        result = start(tmp_path / "log", "launch.generate", "--checkpoint", whole, *options).finish()
        assert result.status == 0, result.err
    with Picture.open(tmp_path / "out" / "00000.png") as picture:
        assert picture.size == (24, 16)


def test_the_comparison_notices_another_seed(tmp_path: Path, straight: Path) -> None:
    """Negative control."""
    train(tmp_path / "run", "--run.seed=4")
    with pytest.raises(AssertionError):
        assert_bit_equal(tmp_path / "run", straight)


def test_evaluation_and_samples_change_nothing(tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    train(run, "--eval.every=4", "--eval.rows=2", "--eval.samples=1", "--eval.sampler_steps=1")
    lines = metrics(run)
    held_out = [line for line in lines if "held_out/text" in line]
    assert [line["step"] for line in held_out] == [4, 8]
    assert [line for line in lines if "held_out/text" not in line] == metrics(straight)
    one, two = end_of(run), end_of(straight)
    assert all(torch.equal(one.model[name], two.model[name]) for name in two.model)
    assert all(torch.equal(one.ema[name], two.ema[name]) for name in two.ema)
    steps, suffixes = zip(*((path.stem, path.suffix) for path in (run / "samples").iterdir()), strict=True)
    assert set(steps) == {"step-00000004", "step-00000008"}
    assert set(suffixes) == {".png", ".txt"}


def test_a_finished_run_has_nothing_to_do(straight: Path) -> None:
    before = metrics(straight, timings=True)
    train(straight)
    assert metrics(straight, timings=True) == before


def wait_for_step(run: Path, step: int) -> None:
    until = time.monotonic() + TIMEOUT
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count("\n") < step:
        assert time.monotonic() < until, "the run does not get on"
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_checkpoint_and_the_same_command_goes_on(
    tmp_path: Path, long: Path, number: signal.Signals
) -> None:
    run, arguments = tmp_path / "run", (f"--run.steps={LONG}", "--data.workers=1")
    command = begin(run, *arguments)
    wait_for_step(run, 3)
    assert command.process.pid
    os.kill(command.process.pid, number)
    result = command.finish()
    assert result.status == 0, result.err
    assert "Traceback" not in result.err
    stopped = end_of(run).step
    assert 3 <= stopped < LONG
    assert f"stopped on request after step {stopped}" in result.err
    train(run, *arguments)
    assert_bit_equal(run, long)


def test_kill_9_loses_only_the_steps_since_the_last_checkpoint(tmp_path: Path, long: Path) -> None:
    run, arguments = tmp_path / "run", (f"--run.steps={LONG}", "--checkpoint.every=5", "--data.workers=1")
    command = begin(run, *arguments)
    wait_for_step(run, 12)
    command.process.kill()
    assert command.finish().status == -signal.SIGKILL
    assert 5 <= end_of(run).step < LONG
    train(run, *arguments)
    assert_bit_equal(run, long)


def test_after_damage_the_checkpoint_before_is_used(tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    train(run, "--run.stop_after=6", "--checkpoint.every=3")
    damaged = run / "checkpoints" / "step-00000006" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    said = train(run)
    assert f"warning: {damaged}: truncated" in said
    assert "from step 3 to 8" in said
    assert_bit_equal(run, straight)


def test_no_sound_checkpoint_is_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, "--run.stop_after=1")
    damaged = run / "checkpoints" / "step-00000001" / "ema.safetensors"
    damaged.write_bytes(b"")
    before = (run / "metrics.jsonl").read_bytes()
    result = begin(run).finish()
    assert result.status == 2
    assert "no checkpoint there is sound" in result.err
    assert "Traceback" not in result.err
    assert (run / "metrics.jsonl").read_bytes() == before
    assert damaged.exists()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--model.dim=64", "model.dim is 32 there, 64 here"),
        ("--data.rows_per_step=8", "data.rows_per_step is 4 there, 8 here"),
        ("--run.seed=9", "run.seed is 3 there, 9 here"),
        ("--optim.lr=0.5", "optim.lr is 0.01 there, 0.5 here"),
        ("--data.text={}", "data.text"),
    ],
)
def test_other_settings_are_refused(straight: Path, argument: str, words: str) -> None:
    before = metrics(straight, timings=True)
    assert_one_line(begin(straight, argument).finish(), 2, "holds a run with other settings", words)
    assert metrics(straight, timings=True) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_in_the_middle_is_replaced_counted_and_named_once(tmp_path: Path, workers: int) -> None:
    """Only the head of an image is read before training starts; the rest of this one is missing."""
    Picture.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:2000])
    names = ["good.png"] * 20 + ["broken.png"]
    lines = [json.dumps({"segments": [{"image": name}, {"text": "x" * 60}]}) + "\n" for name in names]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    run = tmp_path / "run"
    files = ("--data.shapes=null", f"--data.files=[{{path: {tmp_path / 'data.jsonl'}}}]", "--run.steps=12")
    first = begin(run, *files, f"--data.workers={workers}", "--run.stop_after=6").finish()
    then = begin(run, *files, f"--data.workers={workers}").finish()
    assert (first.status, then.status) == (0, 0), first.err + then.err
    warnings = [line for line in (first.err + then.err).splitlines() if "cannot be read" in line]
    assert 1 <= len(warnings) <= 2  # once per process
    assert all(f"{tmp_path / 'data.jsonl'}:21: segment 1: {tmp_path / 'broken.png'}" in line for line in warnings)
    lines_of_log = metrics(run)
    # A row holds one document of 76 slots: 48 rows are two epochs and six documents.
    assert lines_of_log[-1]["seen/data/documents"] == 48
    assert lines_of_log[-1]["seen/data/epochs"] == pytest.approx(48 / 21)
    assert sum(line["replaced"] for line in lines_of_log) in (2, 3)

    whole = tmp_path / "whole"
    assert begin(whole, *files, f"--data.workers={workers}").finish().status == 0
    assert metrics(whole) == lines_of_log


def test_data_of_which_nothing_can_be_read_is_one_line_and_status_1(tmp_path: Path) -> None:
    Picture.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "broken.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "broken.png").read_bytes()[:2000])
    (tmp_path / "data.jsonl").write_text('{"segments": [{"image": "broken.png"}]}\n' * 3)
    result = begin(
        tmp_path / "run", "--data.shapes=null", f"--data.files=[{{path: {tmp_path / 'data.jsonl'}}}]"
    ).finish()
    assert result.status == 1, result.err
    assert "Traceback" not in result.err
    (error,) = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert error.startswith(f"error: {tmp_path / 'data.jsonl'}:")
    assert "none of the 100 documents after it can be read" in error


def test_gradients_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    result = begin(tmp_path / "run", "--optim.lr=1e30", "--optim.max_skipped=3", "--run.steps=40").finish()
    assert result.status == 1
    assert "Traceback" not in result.err
    assert result.err.count("is not finite; its update is skipped") == 3
    assert result.err.splitlines()[-1].startswith("error: 3 gradients in a row are not finite")


def test_a_dry_run_of_a_resumed_run_does_one_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, "--run.stop_after=2")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "step 3/8" in train(run, "--dry_run")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_new_run_from_old_weights(tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    train(run, f"--run.init_from={straight}", "--run.stop_after=1", "--optim.lr=1e-9")
    new, old = end_of(run), end_of(straight)
    assert new.step == 1
    for name, weight in old.model.items():
        assert torch.allclose(new.model[name], weight, rtol=1e-5, atol=1e-6), name


def test_processes_may_change_on_the_way(tmp_path: Path, straight: Path) -> None:
    """1 process, then 2, then 1 with 2 micro-batches read the same rows: the losses stay the same."""
    run = tmp_path / "run"
    train(run, "--run.stop_after=3")
    train_on_two(run, "--run.stop_after=6")
    train(run, "--engine.micro_batches=2")
    lines, expected = metrics(run), metrics(straight)
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line, wanted in zip(lines, expected, strict=True):
        for key in ("loss/text", "loss/image", "grad_norm"):
            assert line[key] == pytest.approx(wanted[key], rel=1e-5, abs=2e-6), (line["step"], key)
        assert line["fill_percent"] == wanted["fill_percent"]


@pytest.mark.slow
def test_torchrun(tmp_path: Path, straight: Path) -> None:
    """Two processes as a user starts them."""
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "train", *TINY,
         f"--run.dir={run}"], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=2 * TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stderr
    for line, wanted in zip(metrics(run), metrics(straight), strict=True):
        assert line["loss/text"] == pytest.approx(wanted["loss/text"], rel=1e-5)


def test_a_run_over_two_resolutions_resumes_exactly(tmp_path: Path) -> None:
    """Stopped before, at and after the step at which the larger pictures begin."""
    (tmp_path / "data").mkdir()
    arguments = [argument for argument in resolutions(tmp_path / "data") if argument not in TINY]
    train(tmp_path / "straight", *arguments)
    for stop in (2, 3, 5, 8):
        train(tmp_path / "pieces", *arguments, f"--run.stop_after={stop}")
    assert_bit_equal(tmp_path / "straight", tmp_path / "pieces")
