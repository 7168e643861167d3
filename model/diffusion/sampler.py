"""Samplers of the flow: from noise at t = 0 to data at t = 1 on a grid of times.

A velocity field is a function (z, time) -> dz/dt with time a Python float. No sampler evaluates it at t = 1.
"""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


def euler(velocity: Velocity, z: Tensor, times: list[float]) -> Tensor:
    """z <- z + dt v(z, t). One evaluation per step; with x-prediction the last step returns the prediction itself."""
    for time, after in pairwise(times):
        z = z + (after - time) * velocity(z, time)
    return z


def heun(velocity: Velocity, z: Tensor, times: list[float]) -> Tensor:
    """Second-order predictor-corrector; the last step is Euler's, so t = 1 is never evaluated."""
    for time, after in pairwise(times[:-1]):
        first = velocity(z, time)
        second = velocity(z + (after - time) * first, after)
        z = z + (after - time) * (first + second) / 2
    return euler(velocity, z, times[-2:])


SAMPLERS = {"euler": euler, "heun": heun}
"""Every sampler by name. A new one is one function added here; tests/model/test_sampler.py holds it to the contract."""


def uniform_grid(steps: int) -> list[float]:
    """steps + 1 equidistant times from 0 to 1."""
    return [step / steps for step in range(steps + 1)]
