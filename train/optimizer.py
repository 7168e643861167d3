"""AdamW with weight-decay groups, Muon for matrices, the learning-rate schedule, and the average of the weights."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train.config import OptimSection

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of every parameter, beside the number of its steps."""
MUON_MOMENTS = ("momentum_buffer",)
"""What Muon remembers of every matrix."""


def optimizers(model: nn.Module, config: OptimSection) -> list[torch.optim.Optimizer]:
    """What updates the parameters: AdamW alone, or with `muon_lr` Muon for the matrices that decay and AdamW for the
    rest. Muon's steps have the size that AdamW's usually have (arXiv 2502.16982), so the learning rates compare.

    Groups hold in `scale` what the scheduled rate is multiplied with.
    """
    if config.muon_lr is None:
        return [adamw(model, config)]
    decayed, free = _decayed_and_free(model)
    return [
        torch.optim.Muon([{"params": decayed, "scale": config.muon_lr / config.lr}], config.muon_lr,
                         config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        _adamw([{"params": free, "weight_decay": 0.0}], config),
    ]  # fmt: skip


def adamw(model: nn.Module, config: OptimSection) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) that decays matrices, but not embeddings, codebooks, norms, biases and the head's
    modulation."""
    decayed, free = _decayed_and_free(model)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return _adamw(groups, config)


def _adamw(groups: list[dict[str, Any]], config: OptimSection) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def _decayed_and_free(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves the parameter itself empty
        exempt = dimensions < 2 or name == "text_head.weight"
        exempt |= any(part in name for part in ("embedding", "shortcut_in", "modulation", "codebook"))
        (free if exempt else decayed).append(parameter)
    return decayed, free


def learning_rate(step: int, steps: int, config: OptimSection) -> float:
    """Rate of step 0..steps-1: linear warm-up, then a cosine from lr to lr * final_lr_ratio."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    floor = config.final_lr_ratio
    return config.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


class WeightAverage:
    """Exponential moving average of the weights in float32, with a warm-up so that short runs profit from it.

    Each rank averages its own part of every weight (`Ranks.part`).
    """

    def __init__(self, parts: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.parts = {name: part.float().clone() for name, part in parts.items()}

    @torch.no_grad()
    def update(self, parts: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after optimizer step `step` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [parts[name] for name in self.parts]
        torch._foreach_lerp_(list(self.parts.values()), current, 1 - decay)
