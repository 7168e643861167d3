"""A trained head as samplers see it: a velocity on the flow path, whatever it predicts and on whichever path."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import HeadConfig
from model.diffusion.guidance import Guidance
from model.diffusion.head import DiffusionHead
from model.diffusion.objective import log_variance
from model.diffusion.path import PATHS, convert


@dataclass
class Field:
    """The guided velocity of N patches. A head evaluation covers all streams of the guidance."""

    head: DiffusionHead
    config: HeadConfig
    condition_RW: Tensor
    """Conditions of the N patches in the first stream, then in the second, ... (see Guidance.streams)."""
    guidance: Guidance
    fraction_N1: Tensor
    """The part of its image that each patch completes, (0, 1]."""
    random: Callable[[], Tensor]
    """Fresh standard normal numbers (N, P) for samplers that add noise."""
    clamp: bool = False
    """Keep the clean patch that the velocity points to within [-1, 1]."""
    learned_variance: bool = False
    """Scale the noise of a step as the head says it (objective ddpm, sampler ddpm)."""

    def __call__(self, z: Tensor, time: float | Tensor) -> Tensor:
        """dz/dt of the flow path at a straight time, one for all patches or (N, 1)."""
        path, streams = PATHS[self.config.path], self.guidance.streams
        each = time if isinstance(time, Tensor) else z.new_full((len(z), 1), time)
        own_R1 = path.own(each).repeat(streams, 1)
        at = path.at(own_R1)
        z_RP = at.scale * z.repeat(streams, 1)
        out = self.head(z_RP, own_R1[:, 0], self.condition_RW).float()
        if self.config.objective == "ddpm":
            out, spread = out.chunk(2, dim=1)
            self._spread = spread[: len(z)]
        # A uniform grid evaluates t = 0, where eps says nothing about x.
        eps = self.config.time_eps if self.config.prediction == "eps" else 0.0
        v = convert(out, self.config.prediction, "v", z_RP, at, eps)
        v = (at.q - at.p) * z_RP + at.scale * v  # x - e
        v = self.guidance.apply(v.chunk(streams), time, self.fraction_N1)
        return ((z + (1 - time) * v).clamp(-1, 1) - z) / (1 - time) if self.clamp else v

    def noise(self, time: float, after: float) -> Tensor:
        """What a sampler adds between two straight times, in units of its own standard deviation."""
        noise = self.config.noise_scale * self.random()
        if self.learned_variance:
            path = PATHS[self.config.path]
            before, behind = (path.at(path.own(noise.new_tensor(t))) for t in (time, after))
            noise = noise * torch.exp(log_variance(self._spread, before.sigma / behind.sigma) / 2)
        return noise
