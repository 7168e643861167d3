"""Softmax attention over keys that lie in several tensors, as if they were one: parts are attended by themselves and
merged by the logarithms of their normalisers. On CUDA kernel.py takes its place.

The backward pass of each part is that of ordinary attention, given the merged output and normaliser instead of the
part's own, as in ring attention (arXiv 2310.01889).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MASKED = -1e30
"""Added to scores of what must not be seen. Finite, so that a query which sees nothing of a part has no NaN in it."""


Place = tuple[slice, slice, slice]
"""Sequences, heads and rows."""


class Part(NamedTuple):
    """Queries q[first:] of N sequences (N, H, L, E) see keys and values from sequence `seen` on (.., H, T, E), one
    sequence each, with a bias that broadcasts to the scores (N - first, H, L, T) and has no gradient, or causal (then
    L = T). Of every sequence, only the chosen rows of queries see the chosen rows of keys; the bias is theirs.

    Parts may share tensors: their gradients are then summed in place, and no slice needs one as large as the whole.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    causal: bool = False
    first: int = 0
    seen: int = 0
    rows: slice = slice(None)
    key_rows: slice = slice(None)

    @property
    def queries(self) -> Place:
        return slice(self.first, None), slice(None), self.rows

    @property
    def keys(self) -> Place:
        return slice(self.seen, self.seen + len(self.q) - self.first), slice(None), self.key_rows


def attend(parts: list[Part], scale: float) -> Tensor:
    """softmax(scale * q k^T + bias) v over the keys of all parts, (N, H, L, E). The first part has all queries."""
    if parts[0].q.device.type != "cpu":
        return attend_plainly(parts, scale)
    tensors = list({id(x): x for part in parts for x in part[:4] if x is not None}.values())
    place = {id(x): i for i, x in enumerate(tensors)}
    return _Flash.apply(scale, [(tuple(place.get(id(x)) for x in part[:4]), part[4:]) for part in parts], *tensors)


def attend_plainly(parts: list[Part], scale: float) -> Tensor:
    """The same from plain operations, with all scores in memory at once: the reference of `attend`."""
    scores = []
    for part in parts:
        score = (part.q[part.queries] @ part.k[part.keys].transpose(-1, -2)).to(_wide(part.q)) * scale
        if part.causal:
            score = score + MASKED * torch.ones_like(score, requires_grad=False).triu(1)
        scores.append(score if part.bias is None else score + part.bias)
    top = scores[0].detach().amax(-1, keepdim=True)
    for part, score in zip(parts[1:], scores[1:], strict=True):
        top[part.queries] = torch.maximum(top[part.queries], score.detach().amax(-1, keepdim=True))
    total, normaliser = torch.zeros_like(parts[0].q, dtype=top.dtype), torch.zeros_like(top)
    for part, score in zip(parts, scores, strict=True):
        weight = (score - top[part.queries]).exp()
        seen = (weight.to(part.v.dtype) @ part.v[part.keys]).to(top.dtype)
        total = total + _spread(seen, part.queries, total)
        normaliser = normaliser + _spread(weight.sum(-1, keepdim=True), part.queries, normaliser)
    return (total / normaliser).to(parts[0].q.dtype)


class _Flash(torch.autograd.Function):
    """One call of the CPU's flash attention per part."""

    @staticmethod
    def forward(ctx: Any, scale: float, layout: list[tuple], *tensors: Tensor) -> Tensor:
        """layout: of every part the places of q, k, v and bias among the tensors, and the rest of the part."""
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        parts, done = _parts(layout, tensors), []
        for part in parts:
            q, k, v = part.q[part.queries], part.k[part.keys], part.v[part.keys]
            done.append(flash(q, k, v, 0.0, part.causal, attn_mask=_expanded(part.bias, q, k), scale=scale))
        log_sum = done[0][1].clone()
        for part, (_, own) in zip(parts[1:], done[1:], strict=True):
            at = part.queries
            log_sum[at] = torch.logaddexp(log_sum[at], own)
        merged = done[0][0] * (done[0][1] - log_sum).exp_().unsqueeze(-1)
        for part, (out, own) in zip(parts[1:], done[1:], strict=True):
            merged[part.queries].addcmul_(out, (own - log_sum[part.queries]).exp_().unsqueeze(-1))
        merged = merged.to(tensors[0].dtype)
        ctx.save_for_backward(merged, log_sum, *tensors)
        ctx.scale, ctx.layout = scale, layout
        return merged

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        merged, log_sum, *tensors = ctx.saved_tensors
        found: list[Tensor | None] = [None] * len(tensors)
        for (places, _), part in zip(ctx.layout, _parts(ctx.layout, tensors), strict=True):
            at = part.queries
            q, k, v = part.q[at], part.k[part.keys], part.v[part.keys]
            pieces = flash(gradients[0][at], q, k, v, merged[at], log_sum[at], 0.0, part.causal,
                           attn_mask=_expanded(part.bias, q, k), scale=ctx.scale)  # fmt: skip
            for i, piece, where in zip(places, pieces, (at, part.keys, part.keys), strict=False):
                if ctx.needs_input_grad[2 + i]:
                    found[i] = _added(found[i], piece, where, tensors[i])
        return None, None, *found


def _parts(layout: list[tuple], tensors: Sequence[Tensor]) -> list[Part]:
    return [
        Part(tensors[q], tensors[k], tensors[v], None if bias is None else tensors[bias], *rest)
        for (q, k, v, bias), rest in layout
    ]


def _added(total: Tensor | None, piece: Tensor, where: Place, like: Tensor) -> Tensor:
    """The gradient so far and that of a place more; a first one that is of the whole is taken as it is."""
    if total is None:
        if piece.shape == like.shape:
            return piece
        total = torch.zeros_like(like)
    total[where] += piece
    return total


def _spread(x: Tensor, where: Place, like: Tensor) -> Tensor:
    """x at its place among zeros."""
    wide = torch.zeros_like(like)
    wide[where] = x
    return wide


def _expanded(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Not in the dtype of q: bfloat16 would round the logarithms of large counts by a few per cent."""
    return None if bias is None else bias.to(_wide(q)).expand(*q.shape[:3], k.shape[2])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
