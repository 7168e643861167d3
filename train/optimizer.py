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
_MOMENTUM = 0.95
_TOGETHER = 8
"""Matrices of one shape that Muon works on at a time: more take memory and save little."""


def optimizers(model: nn.Module, config: OptimSection, bf16: bool) -> list[torch.optim.Optimizer]:
    """What updates the parameters: AdamW alone, or with `muon_lr` Muon for the matrices that decay and AdamW for the
    rest. Groups hold in `scale` what the scheduled rate is multiplied with. bf16: what Muon multiplies in."""
    if config.muon_lr is None:
        return [adamw(model, config)]
    decayed, free = _decayed_and_free(model)
    matrices = {"params": decayed, "weight_decay": config.weight_decay, "scale": config.muon_lr / config.lr}
    return [Muon([matrices], config.muon_lr, bf16), _adamw([{"params": free, "weight_decay": 0.0}], config)]


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


class Muon(torch.optim.Optimizer):
    """W <- (1 - lr decay) W - lr 0.2 sqrt(longer side) O, with O the orthogonal factor of the averaged gradient of each
    matrix (Muon, github.com/KellerJordan/Muon; Nesterov's momentum 0.95). The factor gives steps the size that AdamW's
    usually have (arXiv 2502.16982), so the learning rates compare.

    Unlike torch.optim.Muon it works on matrices of one shape together, and in float32 where bfloat16 is not wanted: on
    CPUs without units for it that is many times slower.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, bf16: bool) -> None:
        super().__init__(groups, {"lr": lr})
        self.bf16 = bf16

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for alike in by_shape.values():
                for first in range(0, len(alike), _TOGETHER):
                    self._update(alike[first : first + _TOGETHER], group["lr"], group["weight_decay"])

    def _update(self, matrices: list[Tensor], lr: float, decay: float) -> None:
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        averages = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - _MOMENTUM)
        steps = orthogonalised(torch.stack(torch._foreach_lerp(gradients, averages, _MOMENTUM)), self.bf16)
        torch._foreach_mul_(matrices, 1 - lr * decay)
        torch._foreach_add_(matrices, list(steps), alpha=-lr * 0.2 * max(matrices[0].shape) ** 0.5)


def orthogonalised(x_NRC: Tensor, bf16: bool) -> Tensor:
    """Five Newton-Schulz steps towards the orthogonal factor U V^T of each matrix U S V^T: singular values end between
    0.68 and 1.14, but those below a hundredth of the matrix's norm. bf16: multiply in bfloat16, with errors of some
    hundredths. Returns (N, R, C) of the same type."""
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x_NRC.mT if x_NRC.shape[1] > x_NRC.shape[2] else x_NRC
    y = (y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(torch.bfloat16 if bf16 else y.dtype)
    for _ in range(5):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if x_NRC.shape[1] > x_NRC.shape[2] else y).to(x_NRC.dtype)


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
