"""The network of the diffusion head: an AdaLN MLP over one noised patch (MAR, arXiv 2406.11838, code of LTH14/mar)."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import LOCATION_FEATURES, SHORTCUTS, TIME_FEATURES, ModelConfig


class DiffusionHead(nn.Module):
    """Predicts the clean patch, velocity or noise of a noised patch, given the hidden state before it and its place.

    Every AdaLN linear, the last linear and the sizes of shortcuts start at zero: the output is exactly 0 at first.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, patch = config.head.width, config.patch_width
        self.time_scale = config.head.time_scale
        self.patch_in = nn.Linear(patch, width)
        self.condition_in = nn.Linear(config.dim, width)
        self.location_in = nn.Linear(LOCATION_FEATURES, width)
        self.time_in = FloatLinear(TIME_FEATURES, width)
        self.time_out = FloatLinear(width, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(config.head.depth))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, patch * config.head.outputs)
        if config.head.objective == "shortcut":
            self.shortcut_in = MoveEmbedding(width)
        self.recompute = False

    def initialise(self, writable: Callable[[Tensor], AbstractContextManager] = nullcontext) -> None:
        """Xavier linears with zero biases, N(0, 0.02) for the time embedding, zeros where it must start silent."""
        for name, parameter in self.named_parameters():
            with writable(parameter):
                norm = ".norm." in name
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.constant_(parameter, 1.0 if norm and name.endswith("weight") else 0.0)
        for embedding in (self.time_in, self.time_out):
            with writable(embedding.weight):
                nn.init.normal_(embedding.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if "modulation" in name or name.startswith(("patch_out", "shortcut_in")):
                with writable(parameter):
                    nn.init.zeros_(parameter)

    def condition(self, hidden_ND: Tensor, location_N4: Tensor) -> Tensor:
        """What does not depend on the time: hidden state and place of the target patch. Returns (N, W)."""
        return self.condition_in(hidden_ND) + self.locate(location_N4)

    def locate(self, location_N4: Tensor) -> Tensor:
        """The part of a place in the condition, (N, W). location_N4: row, col (1-based), rows, cols of a patch."""
        row, col, rows, cols = location_N4.unbind(-1)
        edges = torch.stack((row, col, rows - row, cols - col), dim=-1).float()
        features = sinusoid(edges, LOCATION_FEATURES // 4).flatten(-2)
        return self.location_in(features.to(self.location_in.weight.dtype))

    def embed_time(self, time_M: Tensor) -> Tensor:
        """What is added to the condition for times in [0, 1], 0 is noise. Returns (M, W)."""
        return self.time_out(F.silu(self.time_in(sinusoid(time_M * self.time_scale, TIME_FEATURES))))

    def forward(self, z_MP: Tensor, time_M: Tensor | None, condition_MW: Tensor) -> Tensor:
        """One evaluation. time_M as in embed_time; None: the condition holds the time already. Returns (M, P); with
        learned variance (M, 2P)."""
        modulator_MW = F.silu(condition_MW if time_M is None else self.embed_time(time_M) + condition_MW)
        u_MW = self.patch_in(z_MP)
        for block in self.blocks:
            if self.recompute:
                u_MW = checkpoint(block, u_MW, modulator_MW, use_reentrant=False)
            else:
                u_MW = block(u_MW, modulator_MW)
        shift, scale = self.final_modulation(modulator_MW).chunk(2, dim=-1)
        return self.patch_out(F.layer_norm(u_MW, u_MW.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class FloatLinear(nn.Linear):
    """Computes in the precision of its weight, float32 under autocast: nearby times must not collapse."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class MoveEmbedding(nn.Embedding):
    """What the wish to move over 1 / steps of the way in one go adds to a condition (steps 1, 2, ..., 64); from 128 on,
    or 0, the velocity is that of the flow (arXiv 2410.12557)."""

    def __init__(self, width: int) -> None:
        super().__init__(SHORTCUTS, width)

    def forward(self, steps_M: Tensor) -> Tensor:
        """(M, W)"""
        steps_M = torch.where(steps_M == 0, 1 << (SHORTCUTS - 1), steps_M.long())
        return super().forward((SHORTCUTS - 1 - steps_M.float().log2().round().long()).clamp_min(0))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.modulation = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, u_MW: Tensor, modulator_MW: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(modulator_MW).chunk(3, dim=-1)
        return u_MW + gate * self.down(F.silu(self.up(self.norm(u_MW) * (1 + scale) + shift)))


def sinusoid(value: Tensor, features: int) -> Tensor:
    """Cosines then sines of value * 10000^(-2i/features), i < features/2. Returns value.shape + (features,) float32."""
    half = features // 2
    frequency = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=value.device, dtype=torch.float32))
    angle = value.float().unsqueeze(-1) * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
