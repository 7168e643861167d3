"""`python -m train.distill`: what it writes, what draws with it, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.config import HeadConfig
from model.diffusion.field import Field
from model.diffusion.guidance import Guidance
from model.diffusion.sampler import SAMPLERS, uniform_grid
from model.sampling import Sampling
from tests.train.support import TINY, assert_one_line, flip, start
from train import checkpoint
from train.distill import ConsistencyLesson, batches, consistency_config, patches
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


def end_of(head, config: HeadConfig, hidden: Tensor, location: Tensor, z: Tensor, steps: int) -> Tensor:  # type: ignore[no-untyped-def]
    """Where Euler's steps lead from noise."""
    field = Field(head, config, Guidance())
    field.begin(head.condition(hidden, location), torch.ones(len(z), 1))
    return SAMPLERS["euler"](field, z, uniform_grid(steps))


def test_distilled_jumps_end_where_the_flow_leads(run: Path) -> None:
    """Of a flow whose ways are far from straight: its 8 steps of Euler against one jump, before and after."""
    generator = Generator.load(run, device="cpu")
    old, model = checkpoint.read_config(checkpoint.resolve(run)), generator.model.requires_grad_(False)
    torch.manual_seed(0)
    for parameter in model.diffusion_head.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    config = consistency_config(old, 8)
    lesson = ConsistencyLesson(model, config.model.head, lr=3e-3, decay=0.9, ema_decay=0.9)
    before = [parameter.clone() for parameter in lesson.target.parameters()]
    for number, batch in enumerate(batches(config, generator, 60)):
        lesson.learn(batch)
        if not number:
            for was, now, learned in zip(before, lesson.target.parameters(), lesson.student.parameters(), strict=True):
                torch.testing.assert_close(now, 0.9 * was + 0.1 * learned)
    hidden, location, x = patches(model, batch)
    with torch.no_grad():
        z = torch.randn_like(x)
        flow, jump = (end_of(model.diffusion_head, old.model.head, hidden, location, z, steps) for steps in (8, 1))
        distilled = end_of(lesson.student, config.model.head, hidden, location, z, 1)
    errors = [float((one - flow).square().mean().sqrt()) for one in (jump, distilled)]
    assert errors[1] < 0.75 * errors[0]


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
