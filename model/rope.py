"""Rotary embedding with two coordinates: even pairs turn with the row coordinate, odd pairs with the column.

Pair i consists of the numbers i and i + E/2 of a head, as in Llama and Qwen weights. Angles are float32: bfloat16
cannot even represent the integers above 256. Source: Su Jianlin, spaces.ac.cn/archives/10352.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of every slot's angles, each (B, S, 1, F) float32, broadcast over heads."""

    cos: Tensor
    sin: Tensor


def frequencies(head_dim: int, base: float, kind: Literal["alternate", "paired"], device: torch.device,
                dtype: torch.dtype = torch.float32) -> Tensor:  # fmt: skip
    """theta_i = base^(-2i/E); `paired` gives both coordinates the same ones, base^(-4j/E). Returns (F,)."""
    pair_F = torch.arange(head_dim // 2, device=device, dtype=dtype)
    if kind == "paired":
        pair_F = 2 * (pair_F // 2)
    return base ** (-2 * pair_F / head_dim)


def rotation(positions_BS2: Tensor, theta_F: Tensor) -> Rotation:
    """Angles of every slot. Positions must be float32 (half-integers and large values do not survive bfloat16)."""
    if positions_BS2.dtype != torch.float32:
        raise TypeError(f"positions must be float32, not {positions_BS2.dtype}: lower precision loses half-integers")
    coordinate_BSF = positions_BS2[..., torch.arange(theta_F.shape[0], device=theta_F.device) % 2]
    angle = (coordinate_BSF * theta_F).unsqueeze(2)
    return Rotation(angle.cos(), angle.sin())


def rotate(x: Tensor, angles: Rotation) -> Tensor:
    """Rotate (B, S, heads, E) by the slots' angles in float32 or wider; the result has the dtype of x."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    turned = (torch.addcmul(first * angles.cos, second, angles.sin, value=-1),
              torch.addcmul(second * angles.cos, first, angles.sin))  # fmt: skip
    return torch.cat(turned, dim=-1).to(x.dtype)
