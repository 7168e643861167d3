"""`python -m train.distill`: what it writes, what draws with it, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from model.sampling import Sampling
from tests.train.support import TINY, assert_one_line, flip, start
from train import checkpoint
from train.generator import Generator


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("distill") / "run"
    result = start(folder.parent / "out", "train", *TINY, f"--run.dir={folder}", "--run.stop_after=2").finish()
    assert result.status == 0, result.err
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def distill(run: Path, kind: str, *arguments: object):  # type: ignore[no-untyped-def]
    options = ("--checkpoint", run, "--updates", 3, "--device", "cpu")
    return start(run.parent / "out", "train.distill", kind, *options, *arguments).finish()


def test_solver_is_written_beside_the_weights_and_draws(run: Path) -> None:
    result = distill(run, "solver", "--steps", 3)
    assert result.status == 0, result.err
    folder = checkpoint.resolve(run)  # still sound
    assert result.out.splitlines()[-1] == str(folder / "solver.safetensors")
    generator = Generator.load(run, device="cpu")
    assert generator.model.solver is not None
    assert any(parameter.any() for parameter in generator.model.solver.down.parameters()), "it has learned"
    (picture,) = generator.pictures(["a red circle"], (16, 16), Sampling(sampler="learned", steps=3))
    (other,) = generator.pictures(["a red circle"], (16, 16), Sampling(sampler="heun", steps=3))
    assert picture.shape == other.shape
    assert picture.std() > 0
    with pytest.raises(ValueError, match="takes 3 steps of the uniform grid, not 4 steps"):
        generator.pictures(["a red circle"], (16, 16), Sampling(sampler="learned", steps=4))


def test_learned_without_a_solver_is_one_line(run: Path) -> None:
    options = (
        "--checkpoint",
        run,
        "--prompt",
        "x",
        "--size",
        "16x16",
        "--sampler",
        "learned",
        "--out",
        run / "pictures",
    )
    assert_one_line(start(run.parent / "out", "launch.generate", *options).finish(), 2, "train.distill solver")
    assert not (run / "pictures").exists()


def test_a_broken_solver_is_one_line(run: Path) -> None:
    assert distill(run, "solver", "--steps", 2).status == 0
    path = checkpoint.resolve(run) / "solver.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    assert_one_line(distill(run, "solver"), 2, "solver.safetensors", "remove it")


@pytest.mark.parametrize("options", [(), ("--from_data", "--decay", "0")])
def test_consistency_is_a_run_of_its_own(run: Path, options: tuple[str, ...]) -> None:
    if not options:  # A solver that the flow has is left behind.
        assert distill(run, "solver").status == 0
    out = run.parent / "few"
    result = distill(run, "consistency", "--out", out, *options)
    assert result.status == 0, result.err
    folder = checkpoint.resolve(out)
    config = checkpoint.read_config(folder)
    assert config.model.head.objective == "consistency"
    old, new = (checkpoint.Weights(place / "ema") for place in (checkpoint.resolve(run), folder))
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(name.startswith("diffusion_head.") for name in changed)
    for sampling in (Sampling(sampler="consistency", steps=2), Sampling(steps=1)):
        (picture,) = Generator.load(out, device="cpu").pictures(["a red circle"], (16, 16), sampling)
        assert picture.shape == (16, 16, 3)
    assert json.loads((folder / "state.json").read_text())["step"] == 3
    assert_one_line(distill(run, "consistency", "--out", out), 2, "exists")
    assert_one_line(distill(out, "consistency", "--out", run.parent / "more"), 2, "objective consistency")


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("solver", ("--steps", "1"), ("--steps is 1",)),
        ("solver", ("--updates", "0"), ("--updates is 0",)),
        ("solver", ("--grid", "none"), ("--grid",)),
        ("consistency", (), ("--out",)),
    ],
)
def test_wrong_options_are_one_line(run: Path, kind: str, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_one_line(distill(run, kind, *options), 2, *words)


def test_an_altered_checkpoint_is_refused(run: Path) -> None:
    flip(checkpoint.resolve(run) / "ema.safetensors")
    assert_one_line(distill(run, "solver"), 2, "no sound checkpoint")
