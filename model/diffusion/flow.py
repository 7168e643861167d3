"""Flow matching of patches: logit-normal time, several draws per patch, loss on the velocity (arXiv 2511.13720)."""

import torch
from torch import Tensor

from model.config import HeadConfig
from model.diffusion.head import DiffusionHead
from model.diffusion.path import noised, velocity


def draw(count_B: list[int], seed_B: list[int], patch_width: int, config: HeadConfig,
         device: torch.device) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Times and noises for count_B[b] patches of row b, a function of seed_B[b] alone.

    One generator per row makes the draws independent of how rows are spread over ranks and micro-batches.
    Returns time (N * draws, 1) in (0, 1) and noise (N * draws, P), draws of a patch side by side, float32.
    """
    times, noises = [], []
    for count, seed in zip(count_B, seed_B, strict=True):
        generator = torch.Generator(device).manual_seed(seed)
        draws = count * config.draws
        times.append(torch.randn(draws, 1, generator=generator, device=device))
        noises.append(torch.randn(draws, patch_width, generator=generator, device=device))
    time_M1 = torch.sigmoid(config.time_mean + config.time_std * torch.cat(times))
    return time_M1, config.noise_scale * torch.cat(noises)


def flow_loss(head: DiffusionHead, hidden_ND: Tensor, location_N4: Tensor, x_NP: Tensor, time_M1: Tensor,
              noise_MP: Tensor, config: HeadConfig) -> Tensor:  # fmt: skip
    """Squared error of the velocity for every patch, averaged over its numbers and draws.

    x_NP: clean patches in [-1, 1]. time_M1, noise_MP: `draws` per patch, from `draw`. Returns (N,) float32.
    The target is (x - z) / max(1 - t, time_eps), so for x-prediction the loss is |x' - x|^2 / max(1 - t, time_eps)^2.
    """
    x_MP = x_NP.float().repeat_interleave(config.draws, dim=0)
    z_MP = noised(x_MP, noise_MP, time_M1)
    condition_MW = head.condition(hidden_ND, location_N4).repeat_interleave(config.draws, dim=0)
    predicted_MP = head(z_MP, time_M1[:, 0], condition_MW).float()
    target_MP = velocity(x_MP, z_MP, time_M1, "x", config.time_eps)
    error_MP = velocity(predicted_MP, z_MP, time_M1, config.prediction, config.time_eps) - target_MP
    return error_MP.square().mean(dim=1).view(-1, config.draws).mean(dim=1)
