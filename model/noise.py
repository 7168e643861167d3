"""Normal numbers that are a function of a key alone: no state, no order, the same for any batch and, up to the
rounding of a logarithm and a cosine in float64, on any device.

A key is an int64, hashed by splitmix64 (Steele, Lea, Flood 2014) from a seed and from what tells its numbers apart.
"""

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIXES = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)


def _signed(number: int) -> int:
    """The int64 of the same low 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def fold(key: Tensor, number: int | Tensor) -> Tensor:
    """Another key, for the given number; shapes broadcast. It need not be known on the host."""
    z = key + (_signed((number + 1) * _GOLDEN) if isinstance(number, int) else (number + 1) * _signed(_GOLDEN))
    for shift, factor in _MIXES:
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def normal(key_N: Tensor, count: int) -> Tensor:
    """Standard normal numbers of every key, (N, count) float32, by Box and Muller's transform in float64."""
    number_C = torch.arange(2 * count, device=key_N.device)
    # In (0, 1): 53 bits and a half.
    uniform_NC = (_shifted(fold(key_N[:, None], number_C), 11).double() + 0.5) * 2.0**-53
    radius, turn = (-2 * uniform_NC[:, :count].log()).sqrt(), uniform_NC[:, count:]
    return (radius * torch.cos(2 * math.pi * turn)).float()
