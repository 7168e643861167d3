"""Paths z = alpha x + sigma e from noise e (t = 0) to data x (t = 1), and what a network may predict on them.

    flow             alpha = t, sigma = 1 - t; velocity v = x - e (rectified flow, arXiv 2209.03003)
    linear, cosine   the schedules of DDPM (arXiv 2006.11239, 2102.09672): alpha = cos a, sigma = sin a, with 1000
                     angles a and straight lines between them; v = sigma x - alpha e (arXiv 2202.00512, other sign)

In all of them v = p x - q e with alpha q + sigma p = 1, hence x = q z + sigma v and e = p z - alpha v.

Every path is the flow path in other clothes: z / (alpha + sigma) lies on it, at the time alpha / (alpha + sigma), its
*straight* time. Samplers know the flow path only, and so apply to all.
"""

import math
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

Prediction = Literal["x", "v", "eps"]
Quantity = Literal["x", "v", "eps", "score"]
Time = TypeVar("Time", float, Tensor)

LEVELS = 1000
"""Noise levels of the DDPM schedules: level i is at time 1 - i / LEVELS."""


class Point(NamedTuple):
    """The numbers of a path at some times; they broadcast against z."""

    alpha: Tensor
    sigma: Tensor
    p: Tensor | float
    q: Tensor | float
    scale: Tensor | float
    """alpha + sigma: what a z of the flow path is multiplied by."""


class FlowPath:
    """z = t x + (1 - t) e."""

    def at(self, time: Tensor) -> Point:
        return Point(time, 1 - time, 1.0, 1.0, 1.0)

    def straight(self, time: Tensor) -> Tensor:
        """The straight time of a time of this path."""
        return time

    def own(self, straight: Tensor) -> Tensor:
        """The time of this path at a straight time."""
        return straight


class AnglePath:
    """z = cos(a) x + sin(a) e: the variance of z is 1 where that of x and e is."""

    def __init__(self, betas: list[float]) -> None:
        """betas: variance of the noise that each level adds, the least noisy first."""
        angles, log_alpha = [0.0], 0.0
        for beta in betas:
            log_alpha += math.log1p(-beta) / 2
            angles.append(math.atan2(math.sqrt(-math.expm1(2 * log_alpha)), math.exp(log_alpha)))
        self._angles = {torch.device("cpu"): torch.tensor(angles, dtype=torch.float64)}

    def angles(self, device: torch.device) -> Tensor:
        """Sent to a device once, so that drawing need not wait for it."""
        if device not in self._angles:
            self._angles[device] = self._angles[torch.device("cpu")].to(device)
        return self._angles[device]

    def at(self, time: Tensor) -> Point:
        level = (1 - time.double()) * LEVELS
        below = level.floor().clamp(0, LEVELS - 1)
        angles, index = self.angles(time.device), below.long()
        angle = torch.lerp(angles[index], angles[index + 1], level - below)
        alpha, sigma = angle.cos().to(time.dtype), angle.sin().to(time.dtype)
        return Point(alpha, sigma, sigma, alpha, alpha + sigma)

    def straight(self, time: Tensor) -> Tensor:
        at = self.at(time)
        return at.alpha / (at.alpha + at.sigma)

    def own(self, straight: Tensor) -> Tensor:
        angles = self.angles(straight.device)
        angle = torch.atan2(1 - straight.double(), straight.double()).clamp_max(angles[-1])
        above = torch.searchsorted(angles, angle).clamp(1, LEVELS)
        low, high = angles[above - 1], angles[above]
        return (1 - (above - 1 + (angle - low) / (high - low)) / LEVELS).to(straight.dtype)


def _linear_betas() -> list[float]:
    return [0.02 * level / LEVELS for level in range(1, LEVELS + 1)]


def _cosine_betas() -> list[float]:
    def alpha(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2)

    return [min(1 - (alpha((i + 1) / LEVELS) / alpha(i / LEVELS)) ** 2, 0.999) for i in range(LEVELS)]


Path = FlowPath | AnglePath
PATHS: dict[str, Path] = {
    "flow": FlowPath(),
    "linear": AnglePath(_linear_betas()),
    "cosine": AnglePath(_cosine_betas()),
}
"""Every path by name. A new one is added here and in HeadConfig.path; the tests hold it to the contract."""


def noised(x: Tensor, noise: Tensor, at: Point) -> Tensor:
    """z = alpha x + sigma e."""
    return at.alpha * x + at.sigma * noise


def convert(value: Tensor, kind: Quantity, to: Quantity, z: Tensor, at: Point, eps: float = 0.0) -> Tensor:
    """x, v, eps (the noise e) or score (the gradient of log p(z), for noise of variance 1), given one of them at z.

    Divisions by sigma (from x) and alpha (from eps) are bounded: they divide by eps at least. A loss needs eps > 0; a
    sampler may use 0 where its grid does not evaluate alpha = 0 or sigma = 0.
    """
    if kind == "score":
        value, kind = -at.sigma * value, "eps"
    if kind == to:
        return value
    if to == "score":
        return -convert(value, kind, "eps", z, at, eps) / at.sigma
    if kind == "x":
        v = (value - at.q * z) / at.sigma.clamp_min(eps)
    elif kind == "eps":
        v = (at.p * z - value) / at.alpha.clamp_min(eps)
    else:
        v = value
    if to == "v":
        return v
    return at.q * z + at.sigma * v if to == "x" else at.p * z - at.alpha * v


def shifted(straight: Time, shift: float) -> Time:
    """The straight time whose amplitude of noise over signal is `shift` times as large.

    A picture that is `shift` times as large on each side then keeps its signal-to-noise ratio, seen at the old size.
    """
    return straight / (straight + shift * (1 - straight))
