"""Softmax attention, exact: the reference for every other kind, and the default."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.documents import Documents, Group
from model.rope import Rotation, rotate

KEY_MULTIPLE = 32
"""While generating, keys are attended in multiples of this many slots, the surplus masked: how a sum over keys is split
into vectors follows their number, and the rounding of a sample must not depend on the lengths of the others."""


FLOAT_UP_TO = 512
"""On CPUs documents up to this length are attended in float32, where the fused kernel in bfloat16 is up to 4.5 times
slower (docs/decisions.md, 39). Groups of documents end here if their block divides it, so that
the others of a batch do not decide the precision."""


@dataclass
class DenseState:
    """Rotated keys and values of the slots so far, (B, K, T, E) each."""

    key_BKTE: Tensor
    value_BKTE: Tensor

    def reserve(self, reach: int, slots: int) -> None:
        """Make room for the steps within `reach`, of `slots` in all. CPUs multiply a part of a larger tensor many times
        slower, in bfloat16: there room is made bit by bit, elsewhere at once."""
        room = reach if self.key_BKTE.device.type == "cpu" else rounded_up(slots)
        if (missing := room - self.key_BKTE.shape[2]) > 0:
            self.key_BKTE, self.value_BKTE = (F.pad(x, (0, 0, 0, missing)) for x in (self.key_BKTE, self.value_BKTE))


class DenseAttention(nn.Module):
    """Causal softmax attention inside each document; where `documents` says so, patches also see all of their image.

    Documents are gathered into groups of similar length and attended as separate, right-padded sequences: a real slot
    never sees the padding behind it, so no mask is needed and short documents in a long row cost little.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.scale = head_dim**-0.5

    def forward(self, q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, angles: Rotation, documents: Documents,
                ) -> tuple[Tensor, None]:  # fmt: skip
        """Attend over whole rows; padding slots return zeros. Returns (B, S, H, E)."""
        return self._grouped(rotate(q_BSHE, angles), rotate(k_BSKE, angles), v_BSKE, documents), None

    def prefill(self, q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, angles: Rotation, documents: Documents,
                ) -> tuple[Tensor, DenseState]:  # fmt: skip
        """Attend over prompts that begin at slot 0 of their row, and keep their keys and values."""
        rotated = rotate(k_BSKE, angles)
        out = self._grouped(rotate(q_BSHE, angles), rotated, v_BSKE, documents)
        missing = rounded_up(rotated.shape[1]) - rotated.shape[1]
        state = DenseState(*(F.pad(x.transpose(1, 2), (0, 0, 0, missing)).contiguous() for x in (rotated, v_BSKE)))
        return out, state

    def step(self, q_B1HE: Tensor, k_B1KE: Tensor, v_B1KE: Tensor, angles: Rotation, length_B: Tensor, reach: int,
             state: DenseState) -> Tensor:  # fmt: skip
        """One more slot for every sample. length_B: slots already held. reach: a multiple of KEY_MULTIPLE, known on the
        host, within which all slots lie, the new one too; the state has room for it."""
        sample = torch.arange(len(length_B), device=length_B.device)
        q_BHE, k_BKE = rotate(torch.cat((q_B1HE, k_B1KE), 2), angles)[:, 0].split((q_B1HE.shape[2], k_B1KE.shape[2]), 1)
        state.key_BKTE[sample, :, length_B] = k_BKE
        state.value_BKTE[sample, :, length_B] = v_B1KE[:, 0]
        key_BKTE, value_BKTE = state.key_BKTE[:, :, :reach], state.value_BKTE[:, :, :reach]
        unseen_BT = torch.arange(reach, device=length_B.device) > length_B[:, None]
        bias_BT = torch.zeros_like(unseen_BT, dtype=torch.float32).masked_fill_(unseen_BT, -torch.inf)
        # Plain products: the fused kernel of the CPU rounds a single query differently from thread to thread.
        q_BKGE = q_BHE.unflatten(1, (k_BKE.shape[1], -1))
        score_BKGT = q_BKGE @ key_BKTE.transpose(-1, -2)
        weight_BKGT = torch.add(bias_BT[:, None, None], score_BKGT, alpha=self.scale).softmax(-1)
        return (weight_BKGT.to(score_BKGT.dtype) @ value_BKTE).flatten(1, 2).unsqueeze(1)

    def _grouped(self, q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, documents: Documents) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q_BSHE, k_BSKE, v_BSKE))
        out = torch.zeros_like(q)
        for group in documents.groups:
            q_GHLE, k_GKLE, v_GKLE = (_gather(x, group.slot_GL).transpose(1, 2) for x in (q, k, v))
            seen = None if documents.image_X is None else _seen(group, documents.image_X)
            attended = softmax_attention(q_GHLE, k_GKLE, v_GKLE, self.scale, seen)
            out = out.index_copy(0, group.slot_GL[group.valid_GL], attended.transpose(1, 2)[group.valid_GL])
        return out.view_as(q_BSHE)


def softmax_attention(q_GHLE: Tensor, k_GKLE: Tensor, v_GKLE: Tensor, scale: float,
                      seen: Tensor | None = None) -> Tensor:  # fmt: skip
    """Of G documents at once, by PyTorch's fused kernels. seen: which slots a slot sees, (G, 1, L, L); default: those
    up to itself. Returns (G, H, L, E)."""
    dtype, causal = q_GHLE.dtype, seen is None
    if dtype == torch.bfloat16 and q_GHLE.device.type == "cpu" and q_GHLE.shape[2] <= FLOAT_UP_TO:
        q_GHLE, k_GKLE, v_GKLE = q_GHLE.float(), k_GKLE.float(), v_GKLE.float()
    with torch.autocast("cpu", enabled=False):  # it would make them bfloat16 again
        out = F.scaled_dot_product_attention(
            q_GHLE, k_GKLE, v_GKLE, seen, is_causal=causal, scale=scale, enable_gqa=True
        )
    return out.to(dtype)


def _seen(group: Group, image_X: Tensor) -> Tensor:
    """Which slots (last axis) a slot sees: those before it, and all of its image. (G, 1, L, L)"""
    image_GL = image_X[group.slot_GL]
    same_GLL = (image_GL[:, :, None] == image_GL[:, None]) & (image_GL > 0)[:, None] & group.valid_GL[:, None]
    return (same_GLL | torch.ones_like(same_GLL).tril()).unsqueeze(1)


def rounded_up(slots: int) -> int:
    """To a number of keys that is attended."""
    return -(-slots // KEY_MULTIPLE) * KEY_MULTIPLE


def _gather(x: Tensor, slot_GL: Tensor) -> Tensor:
    return x.index_select(0, slot_GL.flatten()).unflatten(0, slot_GL.shape)
