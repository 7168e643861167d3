"""The text head: logits and cross-entropy, without ever holding the logits of a whole batch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_CHUNK_ELEMENTS = 2**24
"""Logits held at once while training: 64 MiB in float32."""


class TextHead(nn.Module):
    """Scores of the next token. With half_swap the tied embedding is used with its two halves exchanged: otherwise a
    token's own score is about dim * std^2 times larger than any other at the start (spaces.ac.cn/archives/9698)."""

    def __init__(self, weight_VD: Tensor, half_swap: bool) -> None:
        super().__init__()
        self.weight = weight_VD
        self.half_swap = half_swap

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, V) float32."""
        if self.half_swap:  # Swapping the hidden state equals swapping the weight, and costs less.
            hidden_ND = torch.cat(hidden_ND.chunk(2, dim=-1)[::-1], dim=-1)
        return F.linear(hidden_ND, self.weight).float()

    def forward(self, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
        """Cross-entropy of every target in nats, (N,) float32; logits are made and recomputed chunk by chunk."""

        def cross_entropy(hidden: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(hidden), target, reduction="none")

        rows = max(1, _CHUNK_ELEMENTS // self.weight.shape[0])
        if len(target_N) <= rows:
            return cross_entropy(hidden_ND, target_N)
        chunks = zip(hidden_ND.split(rows), target_N.split(rows), strict=True)
        return torch.cat([checkpoint(cross_entropy, *chunk, use_reentrant=False) for chunk in chunks])


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Total cross-entropy of a text in bits per byte of its UTF-8 form."""
    return nats / math.log(2) / max(num_bytes, 1)
