"""Classifier-free guidance v = v_u + s (v_c - v_u) (arXiv 2207.12598) and how its scale s varies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Scales of classifier-free guidance. 1 is off (no further stream is run), 0 ignores the condition."""

    scale: float = 1.0
    """Guidance scale s of the text."""
    schedule: Literal["interval", "linear", "constant"] = "interval"
    """interval: while low < t < high (arXiv 2404.07724). linear: 1 + (s-1)/N at the first of N patches to s at the last
    (MAR). constant: always; on raw pixels it gives fringes (docs/diffusion-head.md)."""
    low: float = 0.0
    """Lower time of the interval (0: from the very start, the noise)."""
    high: float = 0.3
    """Upper time of the interval."""
    image_scale: float = 1.0
    """Guidance scale of the images in the prompt, for editing; other than 1 it runs a third stream, without them."""
    renormalise: bool = False
    """Shorten the guided velocity of a patch to the length of the conditional one, if it is longer (BAGEL)."""

    def __post_init__(self) -> None:
        for name in ("scale", "image_scale"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"guidance {name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"guidance interval {self.low} .. {self.high} must satisfy 0 <= low < high <= 1")

    @property
    def streams(self) -> int:
        """How many are run: the sequence itself, that without text, that without text and images of the prompt."""
        if self.image_scale != 1:
            return 3
        return 1 if self.scale == 1 else 2

    def streams_at(self, time: float | Tensor) -> int:
        """How many have a say at a straight time: outside of the interval the first alone."""
        inside = self.schedule != "interval" or isinstance(time, Tensor) or self._inside(time)
        return self.streams if inside else 1

    def at(self, time: float | Tensor, fraction: Tensor) -> Tensor:
        """Scale at a straight time for patches that complete the given fraction (0, 1] of their image, shape of
        fraction."""
        return self._at(self.scale, time, fraction)

    def _at(self, scale: float, time: float | Tensor, fraction: Tensor) -> Tensor:
        if self.schedule == "linear":
            return 1 + (scale - 1) * fraction
        inside = self.schedule == "constant" or self._inside(time)
        return fraction.new_zeros(fraction.shape) + scale * inside + 1 * (inside ^ True)

    def _inside(self, time: Any) -> Any:
        return ((time > self.low) | (self.low == 0)) & (time < self.high)

    def apply(self, velocities: Sequence[Tensor], time: float | Tensor, fraction: Tensor) -> Tensor:
        """The guided velocity from those of all streams, (N, P) each, in the order of `streams`. fraction: (N, 1)."""
        if len(velocities) == 1:
            return velocities[0]
        conditional, textless = velocities[:2]
        v = guide(conditional, textless, self.at(time, fraction))
        if len(velocities) == 3:
            v = v + (self._at(self.image_scale, time, fraction) - 1) * (textless - velocities[2])
        if self.renormalise:
            lengths = [part.norm(dim=-1, keepdim=True) for part in (conditional, v)]
            v = v * (lengths[0] / lengths[1].clamp_min(1e-8)).clamp_max(1)
        return v


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """v_u + s (v_c - v_u); scale broadcasts. Exactly v_c at s = 1 is the caller's matter (skip the second stream)."""
    return unconditional + scale * (conditional - unconditional)
