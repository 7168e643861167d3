"""A midpoint solver that learns where between two times to look (AMED, arXiv 2312.00094).

Trajectories of the flow lie close to a plane, so by the mean value theorem one slope between two times, at a place that
depends on the patch, is nearly right for the whole step. A small network says the place; it is trained to follow a
trajectory of many steps, with the flow itself fixed.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.diffusion.sampler import Noise, Velocity, euler, heun

_FINE_STEPS = 4
"""Steps of Heun that the teacher takes where the solver takes one."""


class LearnedMidpoint(nn.Module):
    """A sampler like those of model.diffusion.sampler, for one grid of times. Untrained it is `midpoint`."""

    def __init__(self, patch_width: int, steps: int, grid: str, width: int = 64) -> None:
        super().__init__()
        self.steps, self.grid = steps, grid
        self.up = nn.Linear(2 * patch_width + 2, width)
        self.down = nn.Linear(width, 1)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def middle(self, z: Tensor, first: Tensor, time: float, after: float) -> Tensor:
        """Where to look between two times, (N, 1), given z (N, P) and the velocity there."""
        clean = z + (1 - time) * first
        times = [z.new_full((len(z), 1), at) for at in (time, after)]
        features = torch.cat((z, clean, *times), dim=1).to(self.up.weight.dtype)
        share = torch.sigmoid(self.down(F.silu(self.up(features))))
        return time + (after - time) * share.to(z.dtype)

    def forward(self, velocity: Velocity, z: Tensor, times: list[float], noise: Noise | None = None) -> Tensor:
        for time, after in pairwise(times[:-1]):
            z = self.step(velocity, z, time, after)
        return euler(velocity, z, times[-2:])

    def step(self, velocity: Velocity, z: Tensor, time: float, after: float) -> Tensor:
        first = velocity(z, time)
        middle = self.middle(z, first, time, after)
        return z + (after - time) * velocity(z + (middle - time) * first, middle)


def solver_loss(solver: LearnedMidpoint, velocity: Velocity, z: Tensor, times: list[float]) -> Tensor:
    """Mean squared distance from the teacher's trajectory, at the end of every step of the grid. z: (N, P) noise."""
    with torch.no_grad():
        teacher, places = z, []
        for time, after in pairwise(times):
            fine = [time + (after - time) * step / _FINE_STEPS for step in range(_FINE_STEPS)] + [after]
            # Heun's last step is Euler's: one of no length takes its place, but at the very end.
            teacher = heun(velocity, teacher, fine if after == 1 else [*fine, after])
            places.append(teacher)
    loss = z.new_zeros(())
    for (time, after), place in zip(pairwise(times), places, strict=True):
        z = euler(velocity, z, [time, after]) if after == 1 else solver.step(velocity, z, time, after)
        loss = loss + (z - place).square().mean()
    return loss / len(places)
