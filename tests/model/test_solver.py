"""The learned midpoint: a sampler like the others, that learns where to look."""

import pytest
import torch
from torch import Tensor

from model.config import HeadConfig
from model.diffusion.field import Field
from model.diffusion.guidance import Guidance
from model.diffusion.path import PATHS
from model.diffusion.sampler import GRIDS, LEARNED, SAMPLERS, evaluations, midpoint, uniform_grid
from model.diffusion.solver import LearnedMidpoint, solver_loss
from tests.model.support import build, fill, tiny_config


def gaussian(z: Tensor, t: float | Tensor) -> Tensor:
    """Velocity where data and noise are N(0, 1): the end of a trajectory is its beginning."""
    return (2 * t - 1) * z / (t**2 + (1 - t) ** 2)


def random_solver(width: int, steps: int = 4) -> LearnedMidpoint:
    solver = LearnedMidpoint(width, steps, "uniform").double()
    fill(solver)
    return solver


def test_untrained_is_the_midpoint() -> None:
    z, times = torch.randn(5, 3, dtype=torch.float64), uniform_grid(4)
    solver = LearnedMidpoint(3, 4, "uniform").double()
    torch.testing.assert_close(solver(gaussian, z, times), midpoint(gaussian, z, times), rtol=1e-12, atol=1e-12)


def test_looks_between_the_two_times_whatever_it_learned() -> None:
    z, solver = 1e3 * torch.randn(50, 3, dtype=torch.float64), random_solver(3)
    places = solver.middle(z, torch.randn_like(z), 0.25, 0.5)
    assert places.shape == (50, 1)
    assert (places >= 0.25).all()
    assert (places <= 0.5).all()
    assert places.unique().numel() > 1


@pytest.mark.parametrize("grid", GRIDS)
def test_constant_prediction_is_returned(grid) -> None:
    target, z = torch.randn(2, 5, 3, dtype=torch.float64).unbind(0)
    found = random_solver(3)(lambda z, t: (target - z) / (1 - t), z, GRIDS[grid](4))
    torch.testing.assert_close(found, target, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [3, 4])
def test_beats_the_midpoint_at_equal_evaluations(steps) -> None:
    """Trained on some noise, scored on other noise against the exact end of the trajectory."""
    torch.manual_seed(0)
    solver, times = LearnedMidpoint(2, steps, "uniform").double(), uniform_grid(steps)
    optimizer = torch.optim.Adam(solver.parameters(), lr=1e-2)
    for _ in range(150):
        loss = solver_loss(solver, gaussian, torch.randn(128, 2, dtype=torch.float64), times)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    z = torch.randn(1000, 2, dtype=torch.float64)
    with torch.no_grad():
        learned, fixed = ((sampler(gaussian, z, times) - z).square().mean().sqrt() for sampler in (solver, midpoint))
    assert learned < 0.6 * fixed


def test_loss_is_the_distance_from_the_trajectory() -> None:
    """Zero for a straight flow; otherwise the error at the end of each step, up to that of the teacher."""
    z, times = torch.randn(64, 2, dtype=torch.float64), uniform_grid(3)
    solver = LearnedMidpoint(2, 3, "uniform").double()
    assert float(solver_loss(solver, lambda z, t: torch.ones_like(z), z, times).detach()) < 1e-25
    expected, here = 0.0, z
    for time, after in ((0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)):
        middle = (time + after) / 2 if after < 1 else time
        here = here + (after - time) * gaussian(here + (middle - time) * gaussian(here, time), middle)
        exact = z * (after**2 + (1 - after) ** 2) ** 0.5
        expected += float((here - exact).square().mean()) / 3
    assert float(solver_loss(solver, gaussian, z, times).detach()) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("name", [*SAMPLERS, LEARNED])
def test_evaluations_are_as_many_as_said(name) -> None:
    calls = []

    def field(z: Tensor, t: float | Tensor) -> Tensor:
        calls.append(t)
        return gaussian(z, t)

    for steps in (1, 2, 5):
        calls.clear()
        sampler = random_solver(3, steps) if name == LEARNED else SAMPLERS[name]
        z = torch.randn(2, 3, dtype=torch.float64)
        sampler(field, z, uniform_grid(steps), lambda t, s: torch.zeros(2, 3))
        assert len(calls) == evaluations(name, steps)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("schedule", ["constant", "linear", "interval"])
def test_every_patch_may_have_its_own_time(path, schedule) -> None:
    config = HeadConfig(width=24, depth=1, path=path)
    head = build(tiny_config(head=config)).diffusion_head
    condition, z = torch.randn(8, 24), torch.randn(4, 12)
    fraction = torch.tensor([[0.25], [0.5], [0.75], [1.0]])
    times = [0.05, 0.3, 0.6, 0.9]

    def field(chosen: list[int]) -> Field:
        rows = chosen + [4 + n for n in chosen]
        guidance = Guidance(2.5, schedule)
        made = Field(head, config, guidance, clamp=True)
        made.begin(condition[rows], fraction[chosen])
        return made

    with torch.no_grad():
        together = field([0, 1, 2, 3])(z, torch.tensor(times)[:, None])
        for n, time in enumerate(times):
            torch.testing.assert_close(together[n : n + 1], field([n])(z[n : n + 1], time), rtol=1e-4, atol=1e-5)
