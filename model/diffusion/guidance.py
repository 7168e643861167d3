"""Classifier-free guidance v = v_u + s (v_c - v_u) (arXiv 2207.12598) and how its scale s varies."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Scale of classifier-free guidance. 1 is off (no second stream is run), 0 ignores the condition."""

    scale: float = 1.0
    """Guidance scale s."""
    schedule: Literal["constant", "linear", "interval"] = "constant"
    """linear: 1 + (s-1)/N at the first of N patches to s at the last (MAR). interval: while low < t < high (JiT)."""
    low: float = 0.1
    """Lower time of the interval (0: from the very start)."""
    high: float = 1.0
    """Upper time of the interval."""

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise ValueError(f"guidance scale is {self.scale}; it must not be negative")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"guidance interval {self.low} .. {self.high} must satisfy 0 <= low < high <= 1")

    @property
    def active(self) -> bool:
        return self.scale != 1

    def at(self, time: float, fraction: Tensor) -> Tensor:
        """Scale at a time for patches that complete the given fraction (0, 1] of their image, shape of fraction."""
        if self.schedule == "linear":
            return 1 + (self.scale - 1) * fraction
        if self.schedule == "interval" and not ((time > self.low or self.low == 0) and time < self.high):
            return fraction.new_ones(fraction.shape)
        return fraction.new_full(fraction.shape, self.scale)


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """v_u + s (v_c - v_u); scale broadcasts. Exactly v_c at s = 1 is the caller's matter (skip the second stream)."""
    return unconditional + scale * (conditional - unconditional)
