"""The causal backbone: pre-RMSNorm blocks of attention and SwiGLU, with the names and shapes of Llama and Qwen."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import KINDS
from model.attention.codebook import Quantised
from model.config import ModelConfig
from model.rope import Rotation

Attend = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Any]]
"""How a block's attention is called with (kind, q, k, v): over a whole batch, filling a state, or one step. Beside the
output it returns what the pass wants of the layer, which comes out of the block unchanged."""


class HeadNorm(nn.RMSNorm):
    """Of queries or keys. It computes in the precision of its weight, float32 under autocast, and keeps the dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Attention(nn.Module):
    """Projections, optional query/key norm, and a kind of attention."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        self.head_width = width = config.head_width
        self.q_proj = nn.Linear(config.dim, config.num_heads * width, bias=False)
        self.k_proj = nn.Linear(config.dim, config.kv_heads * width, bias=False)
        self.v_proj = nn.Linear(config.dim, config.kv_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_heads * width, config.dim, bias=False)
        self.q_norm = HeadNorm(width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.kind = KINDS[kind](config)

    def forward(self, x_BSD: Tensor, attend: Attend) -> tuple[Tensor, Any]:
        q, k, v = (
            linear(x_BSD).unflatten(-1, (-1, self.head_width)) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        out, extra = attend(self.kind, self.q_norm(q), self.k_norm(k), v)
        return self.o_proj(out.flatten(2)), extra


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.up_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config, kind)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.ffn_width)

    def forward(self, x_BSD: Tensor, attend: Attend) -> tuple[Tensor, Any]:
        attended, extra = self.self_attn(self.input_layernorm(x_BSD), attend)
        x_BSD = x_BSD + attended
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD)), extra


class Backbone(nn.Module):
    """Blocks and a final RMSNorm. The three calls differ only in how attention reads the past."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.layer_kinds)
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.recompute = False

    def forward(self, x_BSD: Tensor, angles: Rotation, documents: object) -> tuple[Tensor, Tensor]:
        """Whole rows, each slot sees the past of its document. Also returns the commitment of keys to their codewords,
        summed over the quantised layers (0 unless in training)."""

        def attend(kind: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Quantised | None]:
            return kind(q, k, v, angles, documents)

        commit = torch.zeros((), device=x_BSD.device)
        for layer in self.layers:
            if self.recompute:
                x_BSD, told = checkpoint(layer, x_BSD, attend, use_reentrant=False)
            else:
                x_BSD, told = layer(x_BSD, attend)
            if told is not None:
                # Here and not in the layer, which activation checkpointing runs twice.
                layer.self_attn.kind.codebook.collect(told)  # type: ignore[union-attr, operator]
                commit = commit + told.commit
        return self.norm(x_BSD), commit

    def prefill(self, x_BSD: Tensor, angles: Rotation, documents: object) -> tuple[Tensor, list]:
        """Whole prompts, and one decode state per layer."""
        states: list = []
        for layer in self.layers:
            x_BSD, state = layer(x_BSD, lambda kind, q, k, v: kind.prefill(q, k, v, angles, documents))
            states.append(state)
        return self.norm(x_BSD), states

    def step(self, x_B1D: Tensor, angles: Rotation, length_B: Tensor, reach: int, states: list) -> Tensor:
        """One more slot for every sample. length_B, reach: see model.attention."""
        for layer, state in zip(self.layers, states, strict=True):
            x_B1D, _ = layer(
                x_B1D, lambda kind, q, k, v, s=state: (kind.step(q, k, v, angles, length_B, reach, s), None)
            )
        return self.norm(x_B1D)
