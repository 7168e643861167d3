"""The straight path z_t = t x + (1 - t) e from noise e (t = 0) to data x (t = 1), and what a network may predict on it.

Conversions divide by D = max(1 - t, eps) and T = max(t, eps). The loss uses eps > 0, because 1/(1 - t) is unbounded; a
sampler may use eps = 0, since its grid never evaluates t = 1. Source: JiT, arXiv 2511.13720.
"""

from typing import Literal

from torch import Tensor

Prediction = Literal["x", "v", "eps"]


def noised(x: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """z_t = t x + (1 - t) e. time broadcasts against x."""
    return time * x + (1 - time) * noise


def velocity(predicted: Tensor, z: Tensor, time: Tensor, prediction: Prediction, eps: float) -> Tensor:
    """Velocity dz/dt from what the network predicted at (z, time). time broadcasts against z."""
    if prediction == "x":
        return (predicted - z) / (1 - time).clamp_min(eps)
    if prediction == "eps":
        return (z - predicted) / time.clamp_min(eps)
    return predicted


def clean(velocity: Tensor, z: Tensor, time: Tensor) -> Tensor:
    """The end point x = z + (1 - t) v that a velocity points to."""
    return z + (1 - time) * velocity


def noise(velocity: Tensor, z: Tensor, time: Tensor) -> Tensor:
    """The starting point e = z - t v that a velocity comes from."""
    return z - time * velocity
