"""Every sampler on flows with known solutions."""

import math
from itertools import pairwise

import pytest
import torch

from model.diffusion.objective import log_variance
from model.diffusion.path import PATHS, convert, noised
from model.diffusion.sampler import GRIDS, SAMPLERS, edm_grid, grid_of, uniform_grid

ORDER = {"euler": 1, "heun": 2, "midpoint": 2, "geometric": 2}
"""Of convergence to the solution of the differential equation. Other samplers add noise."""
NOISY = [name for name in SAMPLERS if name not in ORDER]
ANCESTRAL = [name for name in NOISY if name != "consistency"]
"""Samplers that turn the distribution of the noise into that of the data, whatever the field."""
ONE = torch.ones(1, dtype=torch.float64)


def gaussian(z: torch.Tensor, t: float) -> torch.Tensor:
    """Velocity where data and noise are N(0, 1)."""
    return (2 * t - 1) * z / (t**2 + (1 - t) ** 2)


def toward(x: torch.Tensor, z: torch.Tensor, t: float) -> torch.Tensor:
    """Velocity that points to x."""
    return (x - z) / (1 - t)


def shifted_gaussian(mean: float, data: float, sigma: float):  # type: ignore[no-untyped-def]
    """Velocity where data is N(mean, data^2) and noise N(0, sigma^2), by way of E[x | z]."""

    def field(z: torch.Tensor, t: float) -> torch.Tensor:
        variance = t**2 * data**2 + (1 - t) ** 2 * sigma**2
        return toward(mean + t * data**2 * (z - t * mean) / variance, z, t)

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


def between(name: str, t: float, h: float) -> float:
    """In between of two times; for geometric by noise levels, as on the grid of EDM, but from pure noise on."""
    if name == "midpoint":
        return t + h / 2
    if t == 0:
        return 1 - math.sqrt(1 - h)
    return 1 / (1 + math.exp((math.log(1 / t - 1) + math.log(1 / (t + h) - 1)) / 2))


@pytest.mark.parametrize("name", ["heun", "midpoint", "geometric"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_step_by_step(name, steps) -> None:
    z, h = 1.0, 1 / steps
    for k in range(steps):
        t = k * h
        v = float(gaussian(ONE * z, t))
        if k < steps - 1 and name == "heun":
            v = (v + float(gaussian(ONE * (z + h * v), t + h))) / 2
        elif k < steps - 1:
            middle = between(name, t, h)
            v = float(gaussian(ONE * (z + (middle - t) * v), middle))
        z += h * v
    assert SAMPLERS[name](gaussian, ONE, uniform_grid(steps)).item() == pytest.approx(z, rel=1e-12)


def test_geometric_looks_at_the_geometric_mean_of_noise_levels() -> None:
    """Of 80 and 17.527832, the first levels of test_edm_grid: 37.446."""
    seen: list[float] = []

    def field(z: torch.Tensor, t: float) -> torch.Tensor:
        seen.append((1 - t) / t)
        return z

    SAMPLERS["geometric"](field, ONE, edm_grid(5))
    assert seen[:3] == pytest.approx([80, math.sqrt(80 * 17.527832), 17.527832], rel=1e-6)


def test_uniform_grid() -> None:
    assert uniform_grid(4) == [0, 0.25, 0.5, 0.75, 1]
    assert uniform_grid(1) == [0, 1]


def test_edm_grid() -> None:
    levels = [(1 - t) / t for t in edm_grid(5)]
    assert levels == pytest.approx([80, 17.527832, 2.515219, 0.169753, 0.002, 0], abs=1e-6)
    assert edm_grid(1) == [1 / 81, 1]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 49, 200])
def test_every_grid_rises_and_ends_exactly_at_one(grid, path, steps) -> None:
    for shift in (1.0, 3.0):
        times = grid_of(grid, steps, PATHS[path], shift)
        assert len(times) == steps + 1
        assert 0 <= times[0] < 0.02
        assert times[-1] == 1
        assert all(before < after for before, after in pairwise(times))
    plain = grid_of(grid, steps, PATHS[path])
    assert all(t < s for t, s in zip(times[1:-1], plain[1:-1], strict=True)), "a shift means more steps in the noise"


def test_every_sampler_has_an_order_or_noise() -> None:
    assert SAMPLERS.keys() - ORDER.keys() == {"ddpm", "sde", "consistency"}


@pytest.mark.parametrize("name", SAMPLERS)
class TestEverySampler:
    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize("steps", [1, 2, 7, 50])
    def test_constant_prediction_is_returned(self, name, grid, steps) -> None:
        target = torch.randn(5, 3, dtype=torch.float64)
        z = torch.randn(5, 3, dtype=torch.float64)
        times = []

        def field(z: torch.Tensor, t: float) -> torch.Tensor:
            times.append(t)
            return toward(target, z, t)

        found = SAMPLERS[name](field, z, GRIDS[grid](steps), lambda t, s: torch.randn_like(z))
        torch.testing.assert_close(found, target, rtol=0, atol=1e-13)
        assert times[0] == GRIDS[grid](steps)[0]
        assert max(times) < 1

    def test_last_step_returns_the_prediction_of_that_step(self, name) -> None:
        """Not only where the prediction is constant: what the network says last is what comes out."""
        last = []

        def field(z: torch.Tensor, t: float) -> torch.Tensor:
            last.append(torch.sin(3 * z + t))
            return toward(last[-1], z, t)

        z = torch.randn(9, dtype=torch.float64)
        found = SAMPLERS[name](field, z, uniform_grid(20), lambda t, s: torch.randn_like(z))
        torch.testing.assert_close(found, last[-1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ORDER)
class TestEverySamplerWithoutNoise:
    def test_order_of_convergence(self, name) -> None:
        """Twice the steps divide the error by 2^order: the slope of error over steps, in logarithms."""
        mean, data, sigma = 0.7, 0.5, 1.3
        field, exact = shifted_gaussian(mean, data, sigma), mean + data * 2 / sigma
        # The error of geometric changes its sign on the uniform grid; its own is that of EDM, which starts after t = 0.
        grid, number = (edm_grid, (10, 40)) if name == "geometric" else (uniform_grid, (40, 160))
        start = grid(1)[0]
        z = mean * start + 2 / sigma * math.hypot(data * start, sigma * (1 - start))
        errors = [abs(SAMPLERS[name](field, z * ONE, grid(n)).item() - exact) for n in number]
        assert math.log(errors[0] / errors[1], 4) == pytest.approx(ORDER[name], abs=0.1)

    def test_whole_distribution_is_moved(self, name) -> None:
        z = torch.randn(2000, dtype=torch.float64) * 2
        found = SAMPLERS[name](shifted_gaussian(-1.0, 0.3, 2.0), z, uniform_grid(400))
        torch.testing.assert_close(found, -1 + 0.3 * z / 2, rtol=0, atol=0.02)

    def test_constant_velocity_is_exact_on_any_grid(self, name) -> None:
        found = SAMPLERS[name](lambda z, t: 3 * torch.ones_like(z), ONE, [0, 0.1, 0.15, 0.8, 1])
        assert found.item() == pytest.approx(4, rel=1e-15)


def moments(name: str, field, times: list[float], sigma: float = 1.0) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """Mean and variance of what the sampler makes of N(0, sigma^2) in a field linear in z, without drawing anything:
    the result is its value without noise, plus how strongly it answers to the start and to the noise of each step."""
    rows = torch.eye(len(times) + 1, dtype=torch.float64) * sigma  # row 0 for the value without noise, 1 for the start

    def one(time: float, after: float) -> torch.Tensor:
        return rows[:, 2 + times.index(time)]

    start = rows[:, 1]
    found = SAMPLERS[name](field, start, times, one)
    return found[0].item(), float((found[1:] - found[0]).square().sum())


@pytest.mark.parametrize("name", ANCESTRAL)
class TestEverySamplerWithNoise:
    def test_moments_converge_with_order_one(self, name) -> None:
        mean, data, sigma = 0.7, 0.5, 1.3
        found = [moments(name, shifted_gaussian(mean, data, sigma), uniform_grid(n), sigma) for n in (40, 160)]
        for value, exact in ((0, mean), (1, data**2)):
            errors = [abs(pair[value] - exact) for pair in found]
            assert errors[1] < 0.05 * exact
            # The mean may be exact (to rounding) at any number of steps.
            assert errors[0] < 1e-9 or math.log(errors[0] / errors[1], 4) > 0.75

    def test_marginal_variances(self, name) -> None:
        """t^2 + (1 - t)^2 on the way, where data and noise are N(0, 1)."""
        times = uniform_grid(800)
        for t, expected in ((0.25, 0.625), (0.5, 0.5), (0.75, 0.625), (1.0, 1.0)):
            here = [time for time in times if time <= t]
            # The sampler ends with an Euler step; one of no length leaves z as it is.
            found = moments(name, gaussian, here + ([t] if t < 1 else []))[1]
            assert found == pytest.approx(expected, abs=0.01)


def test_ddpm_draws_from_the_posterior() -> None:
    """By Bayes on a grid of z_after, for a known x."""
    x, z, time, after = 0.6, -0.3, 0.35, 0.55
    a = time / after
    points = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    prior = -((points - after * x) ** 2) / (2 * (1 - after) ** 2)
    likelihood = -((z - a * points) ** 2) / (2 * ((1 - time) ** 2 - (a * (1 - after)) ** 2))
    density = (prior + likelihood).softmax(0)
    mean = float((density * points).sum())
    spread = float((density * (points - mean) ** 2).sum().sqrt())
    for noise, expected in ((0.0, mean), (1.0, mean + spread), (-2.0, mean - 2 * spread)):
        times = [time, after, after]  # the last step, Euler's, has no length
        found = SAMPLERS["ddpm"](lambda z, t: toward(x * ONE, z, t), z * ONE, times, lambda t, s, n=noise: n * ONE)
        assert found.item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_consistency_sampler_with_an_exact_consistency_function(steps) -> None:
    """Where jumps follow the flow, every number of steps gives the distribution of the data."""

    def jump(z: torch.Tensor, t: float) -> torch.Tensor:
        return toward(0.7 + 0.5 * (z - 0.7 * t) / math.sqrt((0.5 * t) ** 2 + (1 - t) ** 2), z, t)

    mean, variance = moments("consistency", jump, uniform_grid(steps))
    assert mean == pytest.approx(0.7, abs=1e-12)
    assert variance == pytest.approx(0.25, abs=1e-12)


def test_a_bound_of_five_hundredths_would_leave_noise() -> None:
    """Why the sampler divides by 1 - t itself, and only the loss bounds it."""
    flow = PATHS["flow"]
    found = SAMPLERS["euler"](
        lambda z, t: convert(0 * z, "x", "v", z, flow.at(ONE * t), 0.05), ONE, uniform_grid(50)
    )  # fmt: skip
    assert found.item() == pytest.approx(0.04 * 0.6 * 0.6, rel=1e-9)


@pytest.mark.slow  # importing the peer takes long
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("kind", ["ddim", "ddpm", "ddpm learned"])
def test_equal_to_the_schedulers_of_diffusers(path, steps, kind) -> None:
    """Their loop over a DDPM path, with a network made up for the purpose, against ours over straight times."""
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers: the peer of this test")
    here = PATHS[path]
    alphas = here.at(1 - torch.arange(1001, dtype=torch.float64) / 1000).alpha
    settings = {
        "trained_betas": (1 - (alphas[1:] / alphas[:-1]) ** 2).numpy(), "timestep_spacing": "trailing",
        "prediction_type": "epsilon", "clip_sample": False,
    }  # fmt: skip
    if kind == "ddim":
        scheduler = diffusers.DDIMScheduler(**settings, set_alpha_to_one=True)
    else:
        learned = {"variance_type": "learned_range" if "learned" in kind else "fixed_small"}
        scheduler = diffusers.DDPMScheduler(**settings, **learned)
    scheduler.set_timesteps(steps)

    def network(z: torch.Tensor, time: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.sin(2 * z + time) + 0.5 * z, torch.cos(z + time)  # noise, share of the log variance in -1 .. 1

    z = start = torch.randn(4, 6, dtype=torch.float64)
    for timestep in scheduler.timesteps:
        eps, share = network(z, 1 - (int(timestep) + 1) / 1000)
        out = torch.cat((eps, share), dim=1) if "learned" in kind else eps
        more = {"generator": torch.Generator().manual_seed(int(timestep))} if "ddpm" in kind else {}
        moved = scheduler.step(out, timestep, z, **more)
        # Theirs adds noise of a learned variance even in the step that ends at the clean data.
        z = moved.pred_original_sample if timestep == scheduler.timesteps[-1] else moved.prev_sample

    state = {}

    def field(z: torch.Tensor, straight: float) -> torch.Tensor:
        time = here.own(torch.tensor(straight, dtype=torch.float64))
        at = here.at(time)
        state["level"], state["sigma"] = round((1 - float(time)) * 1000), at.sigma
        eps, state["share"] = network(at.scale * z, float(time))
        x = (at.scale * z - at.sigma * eps) / at.alpha
        return x - eps

    def noise(straight: float, after: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(state["level"] - 1)
        drawn = torch.randn(start.shape, generator=generator, dtype=start.dtype)
        if "learned" in kind:  # between the variance of the posterior and that of the noise the path adds
            sigma = here.at(here.own(torch.tensor(after, dtype=torch.float64))).sigma
            drawn = drawn * torch.exp(log_variance(state["share"], state["sigma"] / sigma) / 2)
        return drawn

    times = uniform_grid(steps, here)
    begin = start / here.at(torch.tensor(0.0, dtype=torch.float64)).scale
    found = SAMPLERS["euler" if kind == "ddim" else "ddpm"](field, begin, times, noise)
    torch.testing.assert_close(found, z, rtol=3e-4, atol=3e-4 * float(z.abs().max()))


def test_noised_and_velocity_agree() -> None:
    x, e = torch.randn(2, 4, 3, dtype=torch.float64).unbind(0)
    t, h, flow = torch.tensor(0.4, dtype=torch.float64), 1e-6, PATHS["flow"]
    slope = (noised(x, e, flow.at(t + h)) - noised(x, e, flow.at(t - h))) / (2 * h)
    at = flow.at(t)
    torch.testing.assert_close(convert(x, "x", "v", noised(x, e, at), at, 0.05), slope, rtol=1e-8, atol=1e-8)
