"""A trained head as samplers see it: a velocity on the flow path, whatever it predicts and on whichever path."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.config import HeadConfig
from model.diffusion.guidance import Guidance
from model.diffusion.objective import log_variance
from model.diffusion.path import PATHS, Point, convert
from model.noise import fold, normal


class _Moment(NamedTuple):
    """What straight times are to the head, whatever the patch: one for all of them, or one for each."""

    at: Point
    embedding_RW: Tensor


@dataclass
class Field:
    """The guided velocity of N patches, the ones that began last. A head evaluation covers all streams that have a say.

    Times that were evaluated before are remembered: nothing that depends on them alone is computed again.
    """

    head: Any
    """A DiffusionHead, or what does its work: embed_time, and (z, None, condition with the time) -> prediction."""
    config: HeadConfig
    guidance: Guidance
    noise_temperature: float = 1.0
    """Factor on the noise that samplers add."""
    clamp: bool = False
    """Keep the clean patch that the velocity points to within [-1, 1]."""
    learned_variance: bool = False
    """Scale the noise of a step as the head says it (objective ddpm, sampler ddpm)."""
    _moments: dict[float, _Moment] = field(default_factory=dict)

    def begin(self, condition_RW: Tensor, fraction_N1: Tensor, key_N: Tensor | None = None) -> None:
        """Turn to other patches.

        condition_RW: conditions of the N patches in the first stream, then in the second, ... (see Guidance.streams).
        fraction_N1: the part of its image that each patch completes, (0, 1].
        key_N: of the noise that samplers add to each patch (model.noise); None for those that add none.
        """
        self._condition_RW, self._fraction_N1, self._key_N, self._noises = condition_RW, fraction_N1, key_N, 0

    def __call__(self, z: Tensor, time: float | Tensor) -> Tensor:
        """dz/dt of the flow path at a straight time, one for all patches or (N, 1)."""
        streams, self._width = self.guidance.streams_at(time), z.shape[1]
        self._device = z.device
        at, embedding_RW = self._moment(time)
        z_RP = at.scale * (z if streams == 1 else z.repeat(streams, 1))
        out = self.head(z_RP, None, self._condition_RW[: len(z_RP)] + embedding_RW).float()
        if self.config.objective == "ddpm":
            out, spread = out.chunk(2, dim=1)
            self._spread = spread[: len(z)]
        # A uniform grid evaluates t = 0, where eps says nothing about x.
        eps = self.config.time_eps if self.config.prediction == "eps" else 0.0
        v = convert(out, self.config.prediction, "v", z_RP, at, eps)
        v = (at.q - at.p) * z_RP + at.scale * v  # x - e
        v = self.guidance.apply(v.chunk(streams), time, self._fraction_N1)
        return ((z + (1 - time) * v).clamp(-1, 1) - z) / (1 - time) if self.clamp else v

    def _moment(self, time: float | Tensor) -> _Moment:
        path = PATHS[self.config.path]
        if isinstance(time, Tensor):
            own_R1 = path.own(time).repeat(self.guidance.streams, 1)
            return _Moment(path.at(own_R1), self.head.embed_time(own_R1[:, 0]))
        if time not in self._moments:
            own_1 = path.own(torch.tensor([time], device=self._device))
            self._moments[time] = _Moment(path.at(own_1), self.head.embed_time(own_1))
        return self._moments[time]

    def noise(self, time: float, after: float) -> Tensor:
        """What a sampler adds between two straight times, in units of its own standard deviation."""
        self._noises += 1
        assert self._key_N is not None
        noise = normal(fold(self._key_N, self._noises), self._width)
        noise = self.config.noise_scale * self.noise_temperature * noise
        if self.learned_variance:
            before, behind = self._moment(time).at, self._moment(after).at
            noise = noise * torch.exp(log_variance(self._spread, before.sigma / behind.sigma) / 2)
        return noise
