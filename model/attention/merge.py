"""Softmax attention over keys that lie in several tensors, as if they were one: parts are attended by themselves and
merged by the logarithms of their normalisers. On CUDA kernel.py takes its place.

The backward pass of each part is that of ordinary attention, given the merged output and normaliser instead of the
part's own, as in ring attention (arXiv 2310.01889).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

MASKED = -1e30
"""Added to scores of what must not be seen. Finite, so that a query which sees nothing of a part has no NaN in it."""


class Part(NamedTuple):
    """Queries (N - first, H, L, E), keys and values (N - first, H, T, E) for all but the first `first` of N sequences,
    with a bias that broadcasts to the scores (N - first, H, L, T) and has no gradient, or causal (then L = T)."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    causal: bool = False
    first: int = 0


def attend(parts: list[Part], scale: float) -> Tensor:
    """softmax(scale * q k^T + bias) v over the keys of all parts together, (N, H, L, E). The first part has all N."""
    if parts[0].q.device.type == "cpu":
        tensors = [tensor for part in parts for tensor in part[:4]]
        return _Flash.apply(scale, [part[4:] for part in parts], *tensors)
    return attend_plainly(parts, scale)


def attend_plainly(parts: list[Part], scale: float) -> Tensor:
    """The same from plain operations, with all scores in memory at once: the reference of `attend`."""
    scores = []
    for part in parts:
        score = (part.q @ part.k.transpose(-1, -2)).to(_wide(part.q)) * scale
        if part.causal:
            score = score + MASKED * torch.ones_like(score, requires_grad=False).triu(1)
        scores.append(score if part.bias is None else score + part.bias)
    top = scores[0].detach().amax(-1, keepdim=True)
    for part, score in zip(parts[1:], scores[1:], strict=True):
        top[part.first :] = torch.maximum(top[part.first :], score.detach().amax(-1, keepdim=True))
    total, normaliser = torch.zeros_like(parts[0].q, dtype=top.dtype), torch.zeros_like(top)
    for part, score in zip(parts, scores, strict=True):
        weight = (score - top[part.first :]).exp()
        seen = (weight.to(part.v.dtype) @ part.v).to(top.dtype)
        total = torch.cat((total[: part.first], total[part.first :] + seen))
        normaliser = torch.cat((normaliser[: part.first], normaliser[part.first :] + weight.sum(-1, keepdim=True)))
    return (total / normaliser).to(parts[0].q.dtype)


class _Flash(torch.autograd.Function):
    """One call of the CPU's flash attention per part."""

    @staticmethod
    def forward(ctx: Any, scale: float, kinds: list[tuple[bool, int]], *tensors: Tensor) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        done = []
        for (causal, _), (q, k, v, bias) in zip(kinds, _fours(tensors), strict=True):
            done.append(flash(q, k, v, 0.0, causal, attn_mask=_expanded(bias, q, k), scale=scale))
        log_sum = done[0][1].clone()
        for (_, first), (_, own) in zip(kinds[1:], done[1:], strict=True):
            torch.logaddexp(log_sum[first:], own, out=log_sum[first:])
        merged = done[0][0] * (done[0][1] - log_sum).exp_().unsqueeze(-1)
        for (_, first), (out, own) in zip(kinds[1:], done[1:], strict=True):
            merged[first:].addcmul_(out, (own - log_sum[first:]).exp_().unsqueeze(-1))
        merged = merged.to(tensors[0].dtype)
        ctx.save_for_backward(merged, log_sum, *tensors)
        ctx.scale, ctx.kinds = scale, kinds
        return merged

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        merged, log_sum, *tensors = ctx.saved_tensors
        found: list[Tensor | None] = []
        for (causal, first), (q, k, v, bias) in zip(ctx.kinds, _fours(tensors), strict=True):
            mask = _expanded(bias, q, k)
            found += [
                *flash(gradients[0][first:], q, k, v, merged[first:], log_sum[first:], 0.0, causal, attn_mask=mask,
                       scale=ctx.scale),
                None,
            ]  # fmt: skip
        return None, None, *found


def _fours(tensors: Any) -> list[tuple]:
    return [tuple(tensors[i : i + 4]) for i in range(0, len(tensors), 4)]


def _expanded(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(q.dtype).expand(*q.shape[:3], k.shape[2])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
