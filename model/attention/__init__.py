"""Kinds of attention. One contract, one file per kind; `dense` is the reference that the others are tested against.

A kind is a module, built from the model's configuration, with

    forward(q_BSHE, k_BSKE, v_BSKE, angles, documents) -> (out, told)   whole rows, each slot sees its document's past
    prefill(q, k, v, angles, documents) -> (out, state)                 the same, and a state to decode from
    step(q_B1HE, k_B1KE, v_B1KE, angles, length_B, reach, state) -> out
        one more slot; row b holds length_B[b], and with it all lie within the first `reach`, for which there is room
    state.reserve(reach, slots)
        make room for steps within `reach`, of `slots` in all

`told` is what a quantised kind says about its keys in training (codebook.Quantised), else None.
Queries and keys arrive normalised but not rotated: a kind rotates them itself (a quantiser must see them before).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from model.attention.dense import DenseAttention
from model.attention.vq import VQAttention

if TYPE_CHECKING:
    from model.config import ModelConfig

KINDS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "dense": lambda c: DenseAttention(c.head_width),
    "vq": lambda c: VQAttention(c.head_width, c.kv_heads, c.rope_base, c.rope_frequencies, c.vq),
}
