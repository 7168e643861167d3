"""Samplers: from noise at t = 0 to data at t = 1 of the flow path, on a grid of straight times (see path.py).

A velocity field is a function (z, time) -> dz/dt with time a Python float, or (N, 1) for every row of z its own. No
sampler evaluates it at t = 1: the last step is Euler's, which returns exactly the clean patch that the field then
points to. Samplers that add noise take it from `noise(time, after)`, which returns standard normal numbers (times a
temperature) for the step between the two.

On a DDPM path `euler` is DDIM (arXiv 2010.02502) and `ddpm` the ancestral sampler with the posterior variance.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from model.diffusion.path import PATHS, Path, shifted

Velocity = Callable[[Tensor, Any], Tensor]
Noise = Callable[[float, float], Tensor]


def euler(velocity: Velocity, z: Tensor, times: list[float], noise: Noise | None = None) -> Tensor:
    """z <- z + dt v(z, t). One evaluation per step; with x-prediction the last step returns the prediction itself."""
    for time, after in pairwise(times):
        z = z + (after - time) * velocity(z, time)
    return z


def heun(velocity: Velocity, z: Tensor, times: list[float], noise: Noise | None = None) -> Tensor:
    """Second-order predictor-corrector: two evaluations per step but the last."""
    for time, after in pairwise(times[:-1]):
        first = velocity(z, time)
        second = velocity(z + (after - time) * first, after)
        z = z + (after - time) * (first + second) / 2
    return euler(velocity, z, times[-2:])


def midpoint(velocity: Velocity, z: Tensor, times: list[float], noise: Noise | None = None) -> Tensor:
    """The slope half-way between two times moves all the way: two evaluations per step but the last."""
    return _midpoint(velocity, z, times, lambda time, after: (time + after) / 2)


def geometric(velocity: Velocity, z: Tensor, times: list[float], noise: Noise | None = None) -> Tensor:
    """Like midpoint, where noise over signal is the geometric mean of the two (DPM-Solver-2, arXiv 2206.00927). Pure
    noise has no such mean: from there it is that of the noise, 1 - t."""

    def between(time: float, after: float) -> float:
        if time == 0:
            return 1 - math.sqrt(1 - after)
        return 1 / (1 + math.sqrt((1 - time) / time * (1 - after) / after))

    return _midpoint(velocity, z, times, between)


def _midpoint(velocity: Velocity, z: Tensor, times: list[float], between: Callable[[float, float], float]) -> Tensor:
    for time, after in pairwise(times[:-1]):
        middle = between(time, after)
        z = z + (after - time) * velocity(z + (middle - time) * velocity(z, time), middle)
    return euler(velocity, z, times[-2:])


def ddpm(velocity: Velocity, z: Tensor, times: list[float], noise: Noise | None = None) -> Tensor:
    """Ancestral sampling: draw from q(z_after | z, x) with x the clean patch that the velocity points to."""
    assert noise is not None
    for time, after in pairwise(times[:-1]):
        x = z + (1 - time) * velocity(z, time)
        # z = a z_after + noise of variance `added`, while z_after holds noise of variance (1 - after)^2.
        a = time / after
        added = (1 - time) ** 2 - (a * (1 - after)) ** 2
        mean = (a * (1 - after) ** 2 * z + after * added * x) / (1 - time) ** 2
        z = mean + math.sqrt(added) * (1 - after) / (1 - time) * noise(time, after)
    return euler(velocity, z, times[-2:])


def sde(velocity: Velocity, z: Tensor, times: list[float], noise: Noise | None = None) -> Tensor:
    """dz = (v + (1 - t) score) dt + sqrt(2 (1 - t)) dw by Euler-Maruyama: the marginals of the ODE (NextStep-1)."""
    assert noise is not None
    for time, after in pairwise(times[:-1]):
        v = velocity(z, time)
        # The noise that v comes from is z - t v, and (1 - t) score is minus that.
        spread = math.sqrt(2 * (1 - time) * (after - time))
        z = z + (after - time) * (v - (z - time * v)) + spread * noise(time, after)
    return euler(velocity, z, times[-2:])


def consistency(velocity: Velocity, z: Tensor, times: list[float], noise: Noise | None = None) -> Tensor:
    """Jump to the clean patch, add the noise of the next time, jump again (arXiv 2303.01469). For consistency models
    only: elsewhere the jump ends at a mean over what the patch could be."""
    assert noise is not None
    for time, after in pairwise(times[:-1]):
        x = z + (1 - time) * velocity(z, time)
        z = after * x + (1 - after) * noise(time, after)
    return euler(velocity, z, times[-2:])


SAMPLERS = {
    "euler": euler,
    "heun": heun,
    "midpoint": midpoint,
    "geometric": geometric,
    "ddpm": ddpm,
    "sde": sde,
    "consistency": consistency,
}
"""Every sampler by name. A new one is one function added here; tests/model/test_sampler.py holds it to the contract."""

LEARNED = "learned"
"""The name of the sampler that is trained for one model, model.diffusion.solver.LearnedMidpoint."""


def evaluations(sampler: str, steps: int) -> int:
    """How often a sampler of that name asks for the velocity."""
    return 2 * steps - 1 if sampler in ("heun", "midpoint", "geometric", LEARNED) else steps


def uniform_grid(steps: int, path: Path = PATHS["flow"]) -> list[float]:
    """Straight times of steps + 1 equidistant times, 0 to 1, of the path."""
    times = [step / steps for step in range(steps + 1)]
    return [float(path.straight(torch.tensor(time, dtype=torch.float64))) for time in times]


def edm_grid(steps: int, path: Path = PATHS["flow"]) -> list[float]:
    """The grid of EDM (arXiv 2206.00364): (1 - t) / t falls from 80 to 0.002 as a seventh power, then to 0."""
    rho, highest, lowest = 7, 80.0, 0.002
    ends = highest ** (1 / rho), lowest ** (1 / rho)
    levels = [(ends[0] + n / max(steps - 1, 1) * (ends[1] - ends[0])) ** rho for n in range(steps)]
    return [*(1 / (1 + level) for level in levels), 1.0]


GRIDS = {"uniform": uniform_grid, "edm": edm_grid}
"""Every grid of times by name: (steps, path) -> steps + 1 rising straight times that end at 1."""


def grid_of(name: str, steps: int, path: Path, shift: float = 1.0) -> list[float]:
    """The grid, shifted to the signal-to-noise ratio of pictures `shift` times as large."""
    return [shifted(time, shift) for time in GRIDS[name](steps, path)]
