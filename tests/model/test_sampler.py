"""Every sampler on flows with known solutions."""

import math

import pytest
import torch

from model.diffusion.path import velocity
from model.diffusion.sampler import SAMPLERS, uniform_grid

ORDER = {"euler": 1, "heun": 2}
ONE = torch.ones(1, dtype=torch.float64)


def gaussian(z: torch.Tensor, t: float) -> torch.Tensor:
    """Velocity where data and noise are N(0, 1)."""
    return (2 * t - 1) * z / (t**2 + (1 - t) ** 2)


def shifted_gaussian(mean: float, data: float, sigma: float):  # type: ignore[no-untyped-def]
    """Velocity where data is N(mean, data^2) and noise N(0, sigma^2), by way of E[x | z]."""

    def field(z: torch.Tensor, t: float) -> torch.Tensor:
        variance = t**2 * data**2 + (1 - t) ** 2 * sigma**2
        x = mean + t * data**2 * (z - t * mean) / variance
        return velocity(x, z, torch.tensor(t, dtype=z.dtype), "x", 0.0)

    return field


@pytest.mark.parametrize(
    ("name", "steps", "expected", "tolerance"),
    [
        ("euler", 10, 0.878984, 1e-6),
        ("euler", 50, 0.974616, 1e-6),
        ("heun", 10, 0.999335, 1e-6),
        ("heun", 50, 0.9999946, 1e-7),
    ],
)
def test_gaussian_vectors(name, steps, expected, tolerance) -> None:
    # The vectors of Heun are those of the pure method. Its last step here is Euler's; an empty one takes that place.
    times = uniform_grid(steps) + ([1.0] if name == "heun" else [])
    assert SAMPLERS[name](gaussian, ONE, times).item() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_heun_step_by_step(steps) -> None:
    z, h = 1.0, 1 / steps
    for k in range(steps):
        v = float(gaussian(ONE * z, k * h))
        if k < steps - 1:
            v = (v + float(gaussian(ONE * (z + h * v), (k + 1) * h))) / 2
        z += h * v
    assert SAMPLERS["heun"](gaussian, ONE, uniform_grid(steps)).item() == pytest.approx(z, rel=1e-12)


def test_grid() -> None:
    assert uniform_grid(4) == [0, 0.25, 0.5, 0.75, 1]
    assert uniform_grid(1) == [0, 1]
    assert all(uniform_grid(n)[-1] == 1 for n in range(1, 200))


@pytest.mark.parametrize("name", SAMPLERS)
class TestEverySampler:
    def test_order_of_convergence(self, name) -> None:
        field = shifted_gaussian(0.7, 0.5, 1.3)
        exact = 0.7 + 0.5 * 2 / 1.3
        errors = [abs(SAMPLERS[name](field, 2 * ONE, uniform_grid(n)).item() - exact) for n in (40, 160)]
        assert math.log(errors[0] / errors[1], 4) > ORDER.get(name, 1) - 0.15

    def test_whole_distribution_is_moved(self, name) -> None:
        z = torch.randn(2000, dtype=torch.float64) * 2
        found = SAMPLERS[name](shifted_gaussian(-1.0, 0.3, 2.0), z, uniform_grid(400))
        torch.testing.assert_close(found, -1 + 0.3 * z / 2, rtol=0, atol=0.02)

    @pytest.mark.parametrize("steps", [1, 2, 7, 50])
    def test_constant_prediction_is_returned(self, name, steps) -> None:
        target = torch.randn(5, 3, dtype=torch.float64)
        z = torch.randn(5, 3, dtype=torch.float64)
        times = []

        def field(z: torch.Tensor, t: float) -> torch.Tensor:
            times.append(t)
            return velocity(target, z, torch.tensor(t, dtype=z.dtype), "x", 0.0)

        torch.testing.assert_close(SAMPLERS[name](field, z, uniform_grid(steps)), target, rtol=0, atol=1e-13)
        assert times[0] == 0
        assert max(times) < 1

    def test_constant_velocity_is_exact_on_any_grid(self, name) -> None:
        found = SAMPLERS[name](lambda z, t: 3 * torch.ones_like(z), ONE, [0, 0.1, 0.15, 0.8, 1])
        assert found.item() == pytest.approx(4, rel=1e-15)


def test_last_euler_step_returns_the_prediction_of_that_step() -> None:
    """Not only where the prediction is constant: what the network says last is what comes out."""
    last = []

    def field(z: torch.Tensor, t: float) -> torch.Tensor:
        last.append(torch.sin(3 * z + t))
        return velocity(last[-1], z, torch.tensor(t, dtype=z.dtype), "x", 0.0)

    found = SAMPLERS["euler"](field, torch.randn(9, dtype=torch.float64), uniform_grid(20))
    torch.testing.assert_close(found, last[-1], rtol=0, atol=1e-15)


def test_a_bound_of_five_hundredths_would_leave_noise() -> None:
    """Why the sampler divides by 1 - t itself, and only the loss bounds it."""
    found = SAMPLERS["euler"](lambda z, t: velocity(0 * z, z, ONE * t, "x", 0.05), ONE, uniform_grid(50))
    assert found.item() == pytest.approx(0.04 * 0.6 * 0.6, rel=1e-9)
