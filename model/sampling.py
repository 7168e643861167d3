"""How text tokens and patches are drawn: the settings, and what they choose."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.diffusion.guidance import Guidance
from model.diffusion.sampler import GRIDS, LEARNED, SAMPLERS
from model.ropeway import Ropeway


@dataclass(frozen=True)
class Sampling:
    """How text tokens and patches are drawn."""

    temperature: float = 1.0
    """Temperature of text; 0 takes the most probable token."""
    top_k: int = 0
    """Keep only the k most probable tokens (0: all)."""
    top_p: float = 1.0
    """Keep the most probable tokens that together reach this probability."""
    guidance: Guidance = field(default_factory=Guidance)
    """Classifier-free guidance of images."""
    sampler: str = "euler"
    """A name of model.diffusion.sampler.SAMPLERS, or learned (model.diffusion.solver)."""
    steps: int = 20
    """Sampler steps per patch (heun, midpoint, geometric and learned evaluate the head twice per step but the last)."""
    grid: str = "uniform"
    """A name of model.diffusion.sampler.GRIDS: where the steps lie in time."""
    time_shift: float = 1.0
    """Factor on noise over signal at the times of the grid: n for pictures n times as wide as those it was made for."""
    noise_temperature: float = 1.0
    """Factor on the noise that ddpm, sde and consistency add."""
    clamp: bool = False
    """Keep the clean patch that each evaluation points to within [-1, 1]; the result always is."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1")
        if self.sampler not in (*SAMPLERS, LEARNED):
            raise ValueError(f"sampler {self.sampler!r} is unknown; choose one of {', '.join((*SAMPLERS, LEARNED))}")
        if self.grid not in GRIDS:
            raise ValueError(f"time grid {self.grid!r} is unknown; choose one of {', '.join(GRIDS)}")
        if self.steps < 1:
            raise ValueError(f"sampler steps is {self.steps}; it must be at least 1")
        if not (self.time_shift > 0 and self.noise_temperature >= 0):
            raise ValueError("sampling needs time_shift > 0 and noise_temperature >= 0")


def sampler_of(model: Ropeway, sampling: Sampling) -> Callable[..., Tensor]:
    """A function of model.diffusion.sampler, or the model's own solver. Raises ValueError if it has none for this."""
    if sampling.sampler != LEARNED:
        return SAMPLERS[sampling.sampler]
    if not model.solver:
        raise ValueError("this checkpoint has no sampler learned; make one with python -m train.distill solver")
    has, asked = (f"{steps} steps of the {grid} grid" for steps, grid in
                  ((model.solver.steps, model.solver.grid), (sampling.steps, sampling.grid)))  # fmt: skip
    if has != asked:
        raise ValueError(f"the sampler learned of this checkpoint takes {has}, not {asked}; ask for these, or make "
                         "another with python -m train.distill solver")  # fmt: skip
    return model.solver


def choose_tokens(logits_NV: Tensor, sampling: Sampling, uniform_N: Tensor) -> Tensor:
    """Draw tokens by inverting the distribution function at uniform_N in [0, 1). Returns (N,) ids."""
    if sampling.temperature == 0:
        return logits_NV.argmax(-1)
    probability, order = (
        (logits_NV.double() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    )
    if sampling.top_k:
        probability[:, sampling.top_k :] = 0
    reached_before = probability.cumsum(-1) - probability
    probability = probability.masked_fill(reached_before >= sampling.top_p, 0)
    cumulative = probability.cumsum(-1)
    rank = (cumulative <= uniform_N[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    last = (probability > 0).sum(-1, keepdim=True) - 1
    return order.gather(-1, torch.minimum(rank, last))[:, 0]
