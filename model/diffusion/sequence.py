"""Whole images by diffusion inside the backbone (Transfusion, arXiv 2408.11039): its two ends.

All patches of an image are noised together and see each other; the hidden state of a patch says what it is.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import TIME_FEATURES, ModelConfig
from model.diffusion.head import FloatLinear, MoveEmbedding, sinusoid


class SequenceHead(nn.Module):
    """The time that is added to embedded patches, and what hidden states say about them. The output is 0 at first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.time_scale = config.head.time_scale
        self.time_in = FloatLinear(TIME_FEATURES, config.dim)
        self.time_out = FloatLinear(config.dim, config.dim)
        self.patch_out = nn.Linear(config.dim, config.patch_width * config.head.outputs)
        if config.head.objective == "shortcut":
            self.shortcut_in = MoveEmbedding(config.dim)

    def initialise(self, writable: Callable[[Tensor], AbstractContextManager] = nullcontext) -> None:
        """N(0, 0.02) for the time embedding, zeros for the rest."""
        for name, parameter in self.named_parameters():
            with writable(parameter):
                nn.init.zeros_(parameter)
                if name.startswith("time") and parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.02)

    def embed_time(self, time_N: Tensor) -> Tensor:
        """What is added to patches that are noised to times in [0, 1], 1 is clean. Returns (N, D)."""
        return self.time_out(F.silu(self.time_in(sinusoid(time_N * self.time_scale, TIME_FEATURES))))

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """The clean patch, velocity or noise of every patch, (N, P); with learned variance (N, 2P)."""
        return self.patch_out(hidden_ND)
