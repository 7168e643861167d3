"""Transformer-VQ attention: softmax over vector-quantised keys, in time linear in the length (arXiv 2309.16354).

Inside a window, 0 <= i - j <= M by index in the document, query i and codeword j are rotated to their positions as in
every other kind. Beyond it, all keys count as M + 1 slots away (ReRoPE, spaces.ac.cn/archives/9708): the score depends
on the codeword alone, so what is beyond is C codewords, with the log of the number and the mean value of their keys.

A document is computed in blocks of M slots. The queries of a block see

    own      its own block, causal                                    rotated to positions
    before   the block before, where i - j <= M (all, band = block)   rotated to positions
    between  the block before, where i - j > M (band = strict)        constant rotation
    far      all blocks before that, summed per codeword              constant rotation
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention.codebook import Codebook, Quantised, VQConfig
from model.attention.dense import softmax_attention
from model.attention.documents import Documents, Group
from model.attention.merge import MASKED, Part, attend
from model.rope import Rotation, frequencies, rotate


@dataclass
class VQState:
    """What decoding needs of the past, of a size that does not grow: the last R slots one by one, slot i in place
    i mod R, and sums over everything before `summed_B`. R is M + 1 (strict) or 2 M (block)."""

    key_BKRE: Tensor
    """Codewords rotated to their positions."""
    code_BKR: Tensor
    value_BKRE: Tensor
    value_sum_BKCE: Tensor
    """float32, per codeword."""
    count_BKC: Tensor
    summed_B: Tensor
    """Slots in the sums. A slot that is written twice, because its row was not active, is added once."""

    def reserve(self, reach: int, slots: int) -> None:
        """There is room for any number."""


class VQAttention(nn.Module):
    """Causal softmax attention over quantised keys inside each document."""

    def __init__(self, head_dim: int, kv_heads: int, rope_base: float,
                 rope_frequencies: Literal["alternate", "paired"], config: VQConfig) -> None:  # fmt: skip
        super().__init__()
        self.scale, self.config, self.window = head_dim**-0.5, config, config.window
        self.rope_base, self.rope_frequencies = rope_base, rope_frequencies
        self.codebook = Codebook(kv_heads, head_dim, config)

    @torch.compiler.disable  # its loops over chunks would be a new graph of minutes for every set of documents
    def forward(self, q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, angles: Rotation,
                documents: Documents) -> tuple[Tensor, Quantised | None]:  # fmt: skip
        """Attend over whole rows; padding slots return zeros. Returns (B, S, H, E), and in training what the codebook
        has to tell."""
        word_BSKE, code_BSK, codewords_KCE, told = self.codebook(k_BSKE, _real(documents, k_BSKE))
        return self._attended(q_BSHE, word_BSKE, code_BSK, codewords_KCE, v_BSKE, angles, documents), told

    def prefill(self, q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, angles: Rotation, documents: Documents,
                ) -> tuple[Tensor, VQState]:  # fmt: skip
        """Attend over prompts that begin at slot 0 of their row, and keep what decoding needs."""
        real_BS = _real(documents, k_BSKE)
        word_BSKE, code_BSK, codewords_KCE, _ = self.codebook(k_BSKE, real_BS)
        out = self._attended(q_BSHE, word_BSKE, code_BSK, codewords_KCE, v_BSKE, angles, documents)
        length_B, ring = real_BS.sum(1), self._ring
        place_R = torch.arange(ring, device=length_B.device)
        last_B1 = length_B[:, None] - 1
        held_BR = (last_B1 - (last_B1 - place_R) % ring).clamp(min=0)  # the last slot of each place
        row_B1 = torch.arange(len(length_B), device=length_B.device)[:, None]
        key, code, value = (x[row_B1, held_BR].transpose(1, 2) for x in (rotate(word_BSKE, angles), code_BSK, v_BSKE))
        state = VQState(key, code, value, *self._empty_sums(v_BSKE), summed_B=(length_B - ring).clamp(min=0))
        is_summed_BS = torch.arange(real_BS.shape[1], device=length_B.device) < state.summed_B[:, None]
        _add(state, code_BSK.transpose(1, 2), v_BSKE.transpose(1, 2), is_summed_BS)
        return out, state

    def step(self, q_B1HE: Tensor, k_B1KE: Tensor, v_B1KE: Tensor, angles: Rotation, length_B: Tensor, reach: int,
             state: VQState) -> Tensor:  # fmt: skip
        """One more slot for every sample, at a cost that does not depend on what went before. length_B: slots held."""
        real_B1 = torch.ones_like(length_B, dtype=torch.bool)[:, None]
        word_B1KE, code_B1K, codewords_KCE, _ = self.codebook(k_B1KE, real_B1)
        ring, sample = self._ring, torch.arange(len(length_B), device=length_B.device)
        place = length_B % ring
        # The slot that gives way joins the sums, unless it did so when this one was first written.
        leaves_B = state.summed_B <= length_B - ring
        _add(state, state.code_BKR[sample, :, place].unsqueeze(2), state.value_BKRE[sample, :, place].unsqueeze(2),
             leaves_B[:, None])  # fmt: skip
        state.summed_B = state.summed_B + leaves_B
        state.key_BKRE[sample, :, place] = rotate(word_B1KE, angles)[:, 0]
        state.code_BKR[sample, :, place] = code_B1K[:, 0]
        state.value_BKRE[sample, :, place] = v_B1KE[:, 0]

        back_BR = (length_B[:, None] - torch.arange(ring, device=length_B.device)) % ring
        held_BR = length_B[:, None] - back_BR  # the slot in each place, negative if there is none yet
        heads, wide = state.key_BKRE.shape[1], state.value_sum_BKCE.dtype
        near_BKGE, far_BKGE = (q[:, 0].unflatten(1, (heads, -1)) for q in (rotate(q_B1HE, angles), q_B1HE))
        near_BKGR = (near_BKGE @ state.key_BKRE.transpose(-1, -2)).to(wide)
        beyond_KCE = rotate(codewords_KCE, self._beyond(angles)).to(q_B1HE.dtype)
        far_BKGC = (far_BKGE @ beyond_KCE.transpose(-1, -2)).to(wide)
        if self.config.band == "block":
            in_band_BR = held_BR // self.window >= (length_B // self.window - 1)[:, None]
            between_BKGR = far_BKGC.gather(-1, state.code_BKR.unsqueeze(2).expand_as(near_BKGR))
            near_BKGR = torch.where(in_band_BR[:, None, None], near_BKGR, between_BKGR)
        near_BKGR = (near_BKGR * self.scale).masked_fill((held_BR < 0)[:, None, None], -torch.inf)
        far_BKGC = far_BKGC * self.scale + state.count_BKC.log().unsqueeze(2)
        weight = torch.cat((near_BKGR, far_BKGC), dim=-1).softmax(-1)
        weight_BKGR, weight_BKGC = weight.split((ring, far_BKGC.shape[-1]), dim=-1)
        mean_weight_BKGC = weight_BKGC / state.count_BKC.clamp(min=1).unsqueeze(2)
        out = (weight_BKGR.to(v_B1KE.dtype) @ state.value_BKRE).to(wide) + mean_weight_BKGC @ state.value_sum_BKCE
        return out.to(q_B1HE.dtype).flatten(1, 2).unsqueeze(1)

    @property
    def _ring(self) -> int:
        """Slots that decoding holds one by one."""
        return self.window + 1 if self.config.band == "strict" else 2 * self.window

    def _beyond(self, angles: Rotation) -> Rotation:
        """The one rotation of keys beyond the window, for queries without any: -(M + 1) on both coordinates."""
        wide = torch.float64
        theta_F = frequencies(2 * angles.cos.shape[-1], self.rope_base, self.rope_frequencies, angles.cos.device, wide)
        angle = -(self.window + 1) * theta_F
        return Rotation(angle.cos().to(angles.cos.dtype), angle.sin().to(angles.cos.dtype))

    def _empty_sums(self, v_BSKE: Tensor) -> tuple[Tensor, Tensor]:
        shape = (v_BSKE.shape[0], v_BSKE.shape[2], self.config.codes)
        wide = torch.promote_types(v_BSKE.dtype, torch.float32)
        return v_BSKE.new_zeros(*shape, v_BSKE.shape[-1], dtype=wide), v_BSKE.new_zeros(shape, dtype=wide)

    def _attended(self, q_BSHE: Tensor, word_BSKE: Tensor, code_BSK: Tensor, codewords_KCE: Tensor, v_BSKE: Tensor,
                  angles: Rotation, documents: Documents) -> Tensor:  # fmt: skip
        """word, code: the keys' codewords, with a gradient to the keys, and their numbers."""
        flat = [x.flatten(0, 1) for x in (q_BSHE, word_BSKE, v_BSKE, code_BSK)]
        turns = Rotation(*(x.expand(*q_BSHE.shape[:2], -1, -1).flatten(0, 1) for x in angles))
        out = torch.zeros_like(flat[0])
        for group in documents.groups:
            is_short = group.slot_GL.shape[1] <= self._ring  # then every slot sees all of its past in the window
            attended = (
                self._short(group, turns, *flat[:3]) if is_short else self._blocks(group, codewords_KCE, turns, *flat)
            )
            out.index_copy_(0, group.slot_GL[group.valid_GL], attended[group.valid_GL])
        return out.view_as(q_BSHE)

    def _short(self, group: Group, turns: Rotation, q_XHE: Tensor, k_XKE: Tensor, v_XKE: Tensor) -> Tensor:
        """Documents that fit into the window, (G, L, H, E)."""
        q, k, v, *angles = (
            x.index_select(0, group.slot_GL.flatten()).unflatten(0, group.slot_GL.shape)
            for x in (q_XHE, k_XKE, v_XKE, *turns)
        )
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, Rotation(*angles)), rotate(k, Rotation(*angles)), v))
        return softmax_attention(q, k, v, self.scale).transpose(1, 2)

    def _blocks(self, group: Group, codewords_KCE: Tensor, turns: Rotation, q_XHE: Tensor, word_XKE: Tensor,
                v_XKE: Tensor, code_XK: Tensor) -> Tensor:  # fmt: skip
        """Longer documents, (G, L, H, E). Inside, U counts blocks and M slots of a block: (U, G, M, H, E)."""
        documents, longest = group.slot_GL.shape
        number, chunk = -(-longest // self.window), self.config.chunk_blocks
        last = torch.arange(number * self.window, device=group.slot_GL.device).clamp(max=longest - 1)
        slot_GL = group.slot_GL[:, last]  # padded with the last slot, which no real slot sees there
        slot_UGM = slot_GL.unflatten(1, (number, self.window)).transpose(0, 1).contiguous()
        asking = slot_UGM.split(chunk)
        # The queries of a chunk see the block before it one by one; the one before that joins the sums.
        seen = [slot_UGM[max(start - 2, 0) : start + chunk] for start in range(0, number, chunk)]
        q, word, v = _Taken.apply(q_XHE, *asking), _Taken.apply(word_XKE, *seen), _Taken.apply(v_XKE, *seen)
        value_sum, count = self._empty_sums(v_XKE.expand(documents, *v_XKE.shape))
        outs: list[Tensor] = []
        for i, slots in enumerate(seen):
            cos, sin = (x[slots] for x in turns)
            # Tensors one by one: only these does a checkpoint around the layer drop and make again.
            given = (codewords_KCE, value_sum, count, cos, sin, q[i], word[i], v[i], code_XK[slots])
            if self.config.recompute_chunks and torch.is_grad_enabled():
                out, value_sum, count = checkpoint(self._chunk, *given, use_reentrant=False)
            else:
                out, value_sum, count = self._chunk(*given)
            outs.append(out.transpose(2, 3))
        return torch.cat(outs).transpose(0, 1).flatten(1, 2)[:, :longest]

    def _chunk(self, codewords: Tensor, value_sum: Tensor, count: Tensor, cos: Tensor, sin: Tensor, q: Tensor,
               word: Tensor, v: Tensor, code: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The queries (U, G, M, H, E) of the last of some blocks, given the sums over all blocks before these; returns
        what they see, (U, G, H, M, E), and the sums over all but the last two blocks. cos, sin: of the keys' angles.

        Far away it is the codewords that are rotated and not the queries, since they need no gradient there.
        """
        lead, share = len(v) - len(q), q.shape[3] // v.shape[3]
        angles = Rotation(cos, sin)
        beyond, strict = self._beyond(angles), self.config.band == "strict"
        codewords = rotate(codewords, beyond).to(q.dtype)
        near_q, far_q, near_k, word, v, code = (
            x.transpose(2, 3)
            for x in (
                rotate(q, Rotation(*(x[lead:] for x in angles))),
                q,
                rotate(word, angles),
                rotate(word.detach(), beyond) if strict else word.detach(),  # unread: all of the block is near
                v,
                code,
            )
        )
        through = self.config.grad_through_cache
        cache = v if through else v.detach()
        size = self.window
        mean, log_count, value_sum, count = _far(code[:-2], cache[:-2], value_sum, count)
        if _has_kernel(near_q):
            from model.attention.kernel import blocks_attended  # on demand: it needs Triton

            out = blocks_attended(
                near_q, far_q, near_k, word, v, codewords, mean, log_count, self.scale, strict, through
            )
            return out, value_sum, count
        ones = torch.ones(size, size, dtype=near_q.dtype, device=near_q.device)

        def sequences(x: Tensor) -> Tensor:
            return x.flatten(0, 1).repeat_interleave(share, 1) if share > 1 else x.flatten(0, 1)

        near, far = near_q.flatten(0, 1), far_q.flatten(0, 1)
        key, value = sequences(near_k), sequences(v)
        documents, begin = v.shape[1], max(lead, 1)
        first, seen = (begin - lead) * documents, (begin - 1) * documents
        parts = [Part(near, key, value, causal=True, seen=lead * documents)]
        if len(v) > 1 and not strict:
            parts.append(Part(near, key, value, first=first, seen=seen))
        elif len(v) > 1:
            words, values = sequences(word), value if through else value.detach()
            for rows, before, between in _halves(size):
                bias = MASKED * ones.tril(-1)[rows, before]
                parts.append(Part(near, key, value, bias, False, first, seen, rows, before))
                bias = MASKED * ones.triu()[rows, between]
                parts.append(Part(far, words, values, bias, False, first, seen, rows, between))
        if len(v) > 2:
            parts.append(Part(far, sequences(codewords.expand_as(mean)), sequences(mean),
                              sequences(log_count).unsqueeze(2), first=(2 - lead) * documents))  # fmt: skip
        return attend(parts, self.scale).unflatten(0, (-1, documents)), value_sum, count


class _Taken(torch.autograd.Function):
    """x at several sets of indices, which may overlap. Their gradients are summed in one tensor like x; indexing itself
    would make such a tensor for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*indices)
        ctx.shape = x.shape
        return tuple(x.index_select(0, index.flatten()).unflatten(0, index.shape) for index in indices)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total = gradients[0].new_zeros(ctx.shape)
        for index, gradient in zip(ctx.saved_tensors, gradients, strict=True):
            total.index_add_(0, index.flatten(), gradient.reshape(-1, *ctx.shape[1:]))
        return total, *[None] * len(gradients)


def _halves(size: int) -> Sequence[tuple[slice, slice, slice]]:
    """Rows of queries in a block, and of the keys before it that they can see: in the window, and beyond it. What the
    halves do not see, a quarter of the scores, is not computed."""
    half, every = size // 2, slice(None)
    first, second = slice(half), slice(half, None)
    return [(first, every, first), (second, second, every)] if half else [(every, every, every)]


def _far(code: Tensor, v: Tensor, value_sum: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean value and log count of every codeword over the blocks up to each one, (U, G, K, C, E) and (U, G, K, C), and
    the sums at the last. code (U, G, K, M), v (U, G, K, M, E); the sums before: (G, K, C, E), (G, K, C)."""
    shape = (*code.shape[:3], count.shape[-1])
    rows = code.shape[:3].numel()
    row_UG1K = torch.arange(rows, device=code.device).view(*shape[:2], 1, shape[2])
    code, v = code.transpose(2, 3), v.transpose(2, 3)  # as they lie in memory
    index = (code + shape[-1] * row_UG1K).flatten()
    wide = value_sum.dtype
    block_count = count.new_zeros(rows * shape[-1]).index_add_(0, index, count.new_ones(len(index))).view(shape)
    block_sum = value_sum.new_zeros(rows * shape[-1], v.shape[-1]).index_add(
        0, index, v.reshape(-1, v.shape[-1]).to(wide)
    )
    counts = block_count.cumsum(0) + count
    sums = block_sum.view(*shape, v.shape[-1]).cumsum(0) + value_sum
    mean = sums / counts.clamp(min=1).unsqueeze(-1)
    last = (sums[-1], counts[-1]) if len(code) else (value_sum, count)
    return mean.to(v.dtype), counts.log().clamp(min=MASKED), *last


def _has_kernel(x: Tensor) -> bool:
    """Whether the Triton kernel computes the blocks: on CUDA, in up to float32, where Triton is installed."""
    return x.device.type == "cuda" and x.dtype != torch.float64 and find_spec("triton") is not None


def _add(state: VQState, code_BKN: Tensor, value_BKNE: Tensor, chosen_BN: Tensor) -> None:
    """Add the chosen ones of N slots of every row to its sums."""
    chosen_B1N = chosen_BN.unsqueeze(1).to(state.count_BKC.dtype)
    state.count_BKC.scatter_add_(2, code_BKN, chosen_B1N.expand(code_BKN.shape))
    value = value_BKNE.to(state.value_sum_BKCE.dtype) * chosen_B1N.unsqueeze(-1)
    state.value_sum_BKCE.scatter_add_(2, code_BKN.unsqueeze(-1).expand_as(value), value)


def _real(documents: Documents, x_BS: Tensor) -> Tensor:
    """True where a slot belongs to a document, (B, S)."""
    real_X = torch.zeros(x_BS.shape[:2], dtype=torch.bool, device=x_BS.device).flatten()
    for group in documents.groups:
        real_X = real_X.index_fill(0, group.slot_GL.flatten(), True)
    return real_X.view(x_BS.shape[:2])
