"""A run goes on with another number of ranks, another ZeRO stage or another backend, from the same checkpoint."""

import json
from pathlib import Path

import pytest

from tests.train.support import TINY, metrics, start
from tests.train.support import ranks as ranks_of
from tests.train.uneven import distance
from train import checkpoint

pytest.importorskip("deepspeed", exc_type=ImportError)

STEPS = 12
# Of a tensor's norm. Sums are in another order, and where a gradient is nearly zero AdamW makes the difference larger,
# twelve times at a learning rate of 0.01. A run on other rows ends at a distance of about 1.
TOLERANCE = 1e-4
DDP = ("--engine.backend=torch",)


def zero(stage: int, *more: str) -> tuple[str, ...]:
    return ("--engine.backend=deepspeed", f"--engine.zero_stage={stage}", *more)


CHAINS = {
    "ranks": [(2, DDP), (1, DDP), (2, DDP)],
    "stages": [(2, zero(2)), (2, zero(3)), (2, DDP)],
    "both": [(1, zero(3)), (2, zero(1)), (1, zero(0)), (2, zero(3, "--engine.offload=true"))],
    "micro-batches": [(1, DDP), (2, zero(2, "--engine.micro_batches=2")), (1, ("--engine.micro_batches=4",))],
}


def train(run: Path, world: int, *arguments: str) -> None:
    environments = ranks_of(world) if world > 1 else [{}]
    started = [
        start(run.parent / "out", "train", *TINY, f"--run.steps={STEPS}", f"--run.dir={run}", *arguments, environment=e)
        for e in environments
    ]
    for command in started:
        result = command.finish()
        assert result.status == 0, result.err


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    train(run, 1)
    return run


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
def test_a_run_that_changes_its_ranks_and_stages_ends_the_same(
    tmp_path: Path, straight: Path, chain: list[tuple[int, tuple[str, ...]]]
) -> None:
    run = tmp_path / "run"
    for number, (world, arguments) in enumerate(chain, 1):
        train(run, world, f"--run.stop_after={number * STEPS // len(chain)}", *arguments)
    found, expected = (checkpoint.load(checkpoint.resolve(place)) for place in (run, straight))
    assert (found.step, found.skipped) == (expected.step, expected.skipped) == (STEPS, 0)
    assert distance(dict(found.model), dict(expected.model)) < TOLERANCE
    assert distance(dict(found.ema), dict(expected.ema)) < TOLERANCE
    for kind in expected.optimizer:
        assert distance(dict(found.optimizer[kind]), dict(expected.optimizer[kind])) < TOLERANCE
    # One line per step: had a row been repeated or lost, its loss would be another one.
    mine, theirs = metrics(run), metrics(straight)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    for key in ("loss/text", "loss/image", "grad_norm"):
        assert [line[key] for line in mine] == pytest.approx([line[key] for line in theirs], rel=1e-5)
    assert len({line["loss/image"] for line in theirs}) == STEPS


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, stage: int) -> None:
    arguments = (*zero(stage), "--checkpoint.every=6")
    train(tmp_path / "straight", 2, *arguments)
    train(tmp_path / "halves", 2, *arguments, "--run.stop_after=6")
    train(tmp_path / "halves", 2, *arguments)
    digests = []
    for name in ("straight", "halves"):
        folder = checkpoint.resolve(tmp_path / name)
        digests.append(json.loads((folder / "manifest.json").read_text()))
    for file in digests[0]:
        if file.endswith(".safetensors"):
            assert digests[0][file] == digests[1][file], file
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "halves")
