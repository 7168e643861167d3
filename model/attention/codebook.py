"""Codebooks of vector-quantised keys: nearest codewords, the gradient past them, and their exponential moving average.

Codewords are no parameters: they follow the keys (Lingle, arXiv 2309.16354). Each forward pass hands out sums over its
keys (`Quantised.sums`); a trainer adds them up over micro-batches and ranks, and gives them to `update` once per
optimizer step. Codewords, distances and counts are float32 or wider.

With SimVQ (Zhu et al., arXiv 2411.02038) they stand still, and a linear map of each head moves all of them together.
The map is a parameter; its gradient comes from the distance to the keys alone.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

_LEAST_COUNT = 0.01
"""Below this a codeword is no longer the mean of its keys: it shrinks to the origin."""
_CHUNK = 1024
"""Keys of a head whose distances are computed at a time: they stay in the processor's cache."""
_FIT_ROUNDS = 10


@dataclass(frozen=True)
class VQConfig:
    """Attention of kind vq: exact keys give way to the nearest of a few codewords, so that the cost grows linearly."""

    codes: int = 256
    """Codewords per key/value head."""
    window: int = 256
    """Slots before a query whose keys keep their positions, at least the patches of the largest image; beyond, all
    keys count as window + 1 slots away. Also the length of the blocks in which rows are computed."""
    band: Literal["strict", "block"] = "strict"
    """strict: the window ends exactly `window` slots before the query. block: it begins with the block before that of
    the query, which is faster, but the result depends on where blocks begin."""
    codebook: Literal["average", "simvq"] = "average"
    """average: codewords are a moving average of their keys. simvq: they are the first k-means of the keys times a
    learned matrix per head, so that none is left behind."""
    decay: float = 0.99
    """Of the moving average, per optimizer step."""
    gradient: Literal["straight", "rotation", "diveq"] = "straight"
    """How gradients pass the nearest codeword: straight-through; rotated and scaled along (arXiv 2410.06424); or by
    the distance in the direction of the error (DiVeQ)."""
    reset_below: float = 0.0
    """Codewords that fewer keys per step fall to (a moving average) are moved beside the most used ones (0: never)."""
    grad_through_cache: bool = True
    """Whether values beyond the window get a gradient. Keys beyond it never do."""
    chunk_blocks: int = 32
    """Blocks (of `window` slots) computed at a time. Chunks that fit into the processor's caches are faster than a long
    document at once."""
    recompute_chunks: bool = False
    """Compute chunks again in the backward pass, which bounds what they keep."""

    def __post_init__(self) -> None:
        for name in ("codes", "window", "chunk_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.vq.{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.decay < 1:
            raise ValueError(f"model.vq.decay is {self.decay}; it must lie in 0 <= x < 1")
        if not self.reset_below >= 0:
            raise ValueError(f"model.vq.reset_below is {self.reset_below}; it must not be negative")
        if self.reset_below and self.codebook == "simvq":
            raise ValueError(f"model.vq.reset_below is {self.reset_below}; with model.vq.codebook simvq it must be 0")


class Quantised(NamedTuple):
    """What a forward pass in training tells about its keys."""

    commit: Tensor
    """Squared distance of keys to their codewords over sqrt(E), summed over slots and heads; with a gradient to the
    keys and, with SimVQ, to the map."""
    sums: Tensor
    """Flat, for `Codebook.update`: per codeword sum and number of its keys; then squared errors and keys."""


class Codebook(nn.Module):
    """Codewords of every key/value head."""

    key_sum_KCE: Tensor
    count_KC: Tensor

    def __init__(self, heads: int, width: int, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("key_sum_KCE", torch.empty(heads, config.codes, width, dtype=torch.float32))
        self.register_buffer("count_KC", torch.empty(heads, config.codes, dtype=torch.float32))
        self.map_KEE = nn.Parameter(torch.empty(heads, width, width)) if config.codebook == "simvq" else None
        self.fitting = False
        """While True, a forward pass first moves the codewords to the means of its keys."""
        self.pending: Tensor | None = None
        """`Quantised.sums` since the last update."""
        self.measured: dict[str, float] = {}
        """About the keys of the last update: perplexity of codes, relative error, codes hardly in use."""

    @torch.no_grad()
    def initialise(self, writable: Callable[[Tensor], AbstractContextManager] = nullcontext) -> None:
        """Random codewords, as long as keys after RMSNorm; the map is the identity. writable: as in Ropeway."""
        self.key_sum_KCE.copy_(torch.randn(self.key_sum_KCE.shape))
        self.count_KC.fill_(1)
        if self.map_KEE is not None:
            with writable(self.map_KEE):
                self.map_KEE.copy_(torch.eye(self.map_KEE.shape[-1]))

    @property
    def codewords_KCE(self) -> Tensor:
        words_KCE = self.key_sum_KCE / self.count_KC.clamp(min=_LEAST_COUNT).unsqueeze(-1)
        return words_KCE if self.map_KEE is None else words_KCE @ self.map_KEE

    def forward(self, k_BSKE: Tensor, real_BS: Tensor) -> tuple[Tensor, Tensor, Tensor, Quantised | None]:
        """Nearest codewords in place of the keys, (B, S, K, E) with a gradient; their numbers, (B, S, K); all of the
        codewords, (K, C, E) without a gradient; and in training what there is to tell. real_BS: False where keys are
        padding, which no statistics may hold."""
        with torch.autocast(k_BSKE.device.type, enabled=False):
            key_XKE = k_BSKE.detach().flatten(0, 1).to(self.key_sum_KCE.dtype)
            if self.fitting:
                self._fit(key_XKE[real_BS.flatten()])
            codewords_KCE = self.codewords_KCE
            code_XK = nearest(key_XKE, codewords_KCE.detach())
            heads = torch.arange(codewords_KCE.shape[0], device=code_XK.device)
            chosen_BSKE = codewords_KCE[heads, code_XK].view(k_BSKE.shape)
            quantised = _pass(k_BSKE, chosen_BSKE.detach().to(k_BSKE.dtype), self.config.gradient)
            told = None
            if self.training:
                error_BSKE = k_BSKE.to(chosen_BSKE.dtype) - chosen_BSKE
                squared = (error_BSKE.square().sum((2, 3)) * real_BS).sum()
                real_X = real_BS.flatten()
                sums = _sums(key_XKE, code_XK, real_X, codewords_KCE.shape[1])
                energy = (key_XKE.square().sum((1, 2)) * real_X).sum()
                told = Quantised(squared * k_BSKE.shape[-1] ** -0.5,
                                 torch.cat((sums.flatten(), squared.detach()[None], energy[None])))  # fmt: skip
        return quantised, code_XK.view(k_BSKE.shape[:-1]), codewords_KCE.detach(), told

    def collect(self, told: Quantised) -> None:
        """Keep the sums of a forward pass for the next update. Activation checkpointing must not run this twice."""
        self.pending = told.sums if self.pending is None else self.pending + told.sums

    def take(self) -> Tensor:
        """The sums collected since the last call, zeros if there are none."""
        taken, self.pending = self.pending, None
        return (
            self.key_sum_KCE.new_zeros(self.key_sum_KCE.numel() + self.count_KC.numel() + 2) if taken is None else taken
        )

    @torch.no_grad()
    def update(self, sums: Tensor) -> None:
        """One step of the moving average, if there is one, from the sums over all keys of an optimizer step."""
        heads, codes, width = self.key_sum_KCE.shape
        own = sums[:-2].view(heads, codes, width + 1)
        key_sum, count = own[..., :-1], own[..., -1]
        decay = self.config.decay
        if self.map_KEE is None:
            self.key_sum_KCE.mul_(decay).add_(key_sum, alpha=1 - decay)
            self.count_KC.mul_(decay).add_(count, alpha=1 - decay)
        if self.config.reset_below:
            self._reset()
        share = count / count.sum(-1, keepdim=True).clamp(min=1)
        entropy = -(share * share.clamp(min=1e-30).log()).sum(-1)
        self.measured = {
            "vq/perplexity": float(entropy.exp().mean()),
            "vq/error": float((sums[-2] / sums[-1].clamp(min=1e-30)).sqrt()),
            "vq/dead": float(((self.count_KC if self.map_KEE is None else count) < 1).double().mean()),
        }

    def _reset(self) -> None:
        """Move codewords out of use beside the most used ones, and give them half of the counts (Linde, Buzo, Gray
        1980). No codeword in use moves. All ranks do the same."""
        generator = torch.Generator().manual_seed(0)
        aside_KCE = torch.randn(self.key_sum_KCE.shape, generator=generator).to(self.key_sum_KCE)
        for key_sum, count, aside in zip(self.key_sum_KCE, self.count_KC, aside_KCE, strict=True):
            dead = (count < self.config.reset_below).nonzero()[:, 0]
            used = count.argsort(descending=True)[: min(len(dead), len(count) - len(dead))]
            dead = dead[: len(used)]
            codeword = key_sum[used] / count[used].clamp(min=_LEAST_COUNT).unsqueeze(-1)
            count[used] /= 2
            key_sum[used] = codeword * count[used].clamp(min=_LEAST_COUNT).unsqueeze(-1)
            direction = aside[dead] / aside[dead].norm(dim=-1, keepdim=True)
            count[dead] = count[used]
            moved = codeword + 0.01 * codeword.norm(dim=-1, keepdim=True) * direction
            key_sum[dead] = moved * count[dead].clamp(min=_LEAST_COUNT).unsqueeze(-1)

    def _fit(self, key_NKE: Tensor) -> None:
        """k-means, from keys chosen at random (with a fixed seed); a codeword without keys takes a random key."""
        codes = self.config.codes
        generator = torch.Generator().manual_seed(0)

        def some() -> Tensor:
            order = torch.cat(
                [torch.randperm(len(key_NKE), generator=generator) for _ in range(-(-codes // len(key_NKE)))]
            )
            return key_NKE[order[:codes].to(key_NKE.device)].transpose(0, 1)

        codewords_KCE = some()
        everything = torch.ones(len(key_NKE), dtype=torch.bool, device=key_NKE.device)
        for _ in range(_FIT_ROUNDS):
            sums = _sums(key_NKE, nearest(key_NKE, codewords_KCE), everything, codes)
            key_sum, count = sums[..., :-1], sums[..., -1:]
            codewords_KCE = torch.where(count > 0, key_sum / count.clamp(min=1), some())
        self.count_KC.copy_(count[..., 0].clamp(min=1))
        self.key_sum_KCE.copy_(codewords_KCE * self.count_KC.unsqueeze(-1))


def nearest(key_NKE: Tensor, codewords_KCE: Tensor) -> Tensor:
    """Number of the nearest codeword of every key and head, (N, K)."""
    half_norm_K1C = codewords_KCE.square().sum(-1).unsqueeze(1) / 2
    transposed_KEC = codewords_KCE.transpose(1, 2)
    found = [
        torch.baddbmm(half_norm_K1C, chunk.transpose(0, 1), transposed_KEC, beta=-1).argmax(-1)
        for chunk in key_NKE.split(_CHUNK)
    ]
    return torch.cat(found, dim=1).T


def _sums(key_NKE: Tensor, code_NK: Tensor, real_N: Tensor, codes: int) -> Tensor:
    """Sum of the keys of every codeword and, last, their number, (K, C, E + 1)."""
    heads, width = key_NKE.shape[1:]
    row_NK = code_NK + codes * torch.arange(heads, device=code_NK.device)
    row_X = row_NK.masked_fill(~real_N.unsqueeze(1), heads * codes).flatten()  # the last row is thrown away
    sums = key_NKE.new_zeros(heads * codes + 1, width).index_add_(0, row_X, key_NKE.flatten(0, 1))
    number = key_NKE.new_zeros(heads * codes + 1).index_add_(0, row_X, key_NKE.new_ones(1).expand(len(row_X)))
    return torch.cat((sums, number.unsqueeze(1)), dim=1)[:-1].view(heads, codes, width + 1)


def _pass(k: Tensor, codeword: Tensor, rule: str) -> Tensor:
    """The codeword, exactly, with a gradient to the key."""
    if rule == "straight":
        carrier = k
    elif rule == "rotation":
        carrier = _rotated(k, codeword)
    else:
        gap = codeword - k
        distance = _norm(gap)
        carrier = k + distance * (gap / distance.clamp(min=1e-12)).detach()
    return _Through.apply(codeword, carrier)


class _Through(torch.autograd.Function):
    """The value of the first, with a gradient to the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def _rotated(k: Tensor, codeword: Tensor) -> Tensor:
    """G k, where G turns the key into the codeword and scales it, as a constant. Opposite vectors: k itself."""
    key, code = k.detach(), codeword
    key_norm, code_norm = (_norm(x).clamp(min=1e-12) for x in (key, code))
    key, code = key / key_norm, code / code_norm
    along_key, along_code = (key * k).sum(-1, keepdim=True), (code * k).sum(-1, keepdim=True)
    turn = 1 + (key * code).sum(-1, keepdim=True)
    rotated = k + 2 * code * along_key - (key + code) * ((along_key + along_code) / turn.clamp(min=1e-6))
    return torch.where(turn < 1e-6, k, rotated * (code_norm / key_norm))


def _norm(x: Tensor) -> Tensor:
    return (x.square().sum(-1, keepdim=True) + torch.finfo(x.dtype).tiny).sqrt()
