"""The blocks of Transformer-VQ as one Triton kernel forward and three backward: every tile of queries passes once over
its own block, the block before and the codewords, so that no scores, no copies of keys for grouped queries and no
outputs of parts are written to memory (FlashAttention-2, arXiv 2307.08691).

With TRITON_INTERPRET=1 the same code runs on the CPU, slowly, in NumPy.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = triton.knobs.runtime.interpret
_LARGEST_TILE = 64


@torch.compiler.disable
def blocks_attended(near_q: Tensor, far_q: Tensor, near_k: Tensor, word: Tensor, v: Tensor, codeword: Tensor,
                    mean: Tensor, log_count: Tensor, scale: float, strict: bool, through_cache: bool,
                    ) -> Tensor:  # fmt: skip
    """Attention of the last V of U blocks of M slots of G documents each, (V, G, H, M, E).

    Queries (V, G, H, M, E): near_q rotated to their positions, far_q not rotated. Keys (U, G, K, M, E): near_k rotated
    to their positions, word by the constant; values v (U, G, K, M, E). Far away codeword (K, C, E), rotated by the
    constant, and mean (U - 2, G, K, C, E) and log_count (U - 2, G, K, C) for the queries of block 2 and on. Sums are
    float32 or wider. Gradients: near_q, far_q, near_k, v, mean; beyond the window v and mean have one only with
    through_cache.
    """
    return _Blocks.apply(near_q, far_q, near_k, word, v, codeword, mean, log_count, scale, strict, through_cache)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, scale, strict, through_cache = arguments
        tensors = [tensor.contiguous() for tensor in tensors]
        near_q, _, near_k, _, _, codeword, *_ = tensors
        queried, documents, heads, size, width = near_q.shape
        blocks = len(near_k)
        wide = torch.promote_types(near_q.dtype, torch.float32)
        out = torch.empty_like(near_q)
        log_sum = near_q.new_empty(out.shape[:-1], dtype=wide)
        largest = _LARGEST_TILE if near_q.itemsize == 2 else _LARGEST_TILE // 2
        tile = min(largest, max(16, triton.next_power_of_2(size)))
        constants = {
            "scale": scale, "documents": documents, "blocks": blocks * documents,
            "first": (blocks - queried) * documents, "HEADS": heads, "SHARE": heads // near_k.shape[2], "SIZE": size,
            "CODES": codeword.shape[1], "WIDTH": width, "PADDED": max(16, triton.next_power_of_2(width)), "TILE": tile,
            "STRICT": strict, "WIDE": tl.float64 if wide == torch.float64 else tl.float32,
            "WIDEN": _INTERPRETED, "num_stages": 2, "num_warps": 4 if width <= 64 else 8,
        }  # fmt: skip
        tiles = triton.cdiv(size, tile)
        _forward[(tiles, queried * documents, heads)](*tensors, out, log_sum, **constants)
        ctx.save_for_backward(*tensors, out, log_sum)
        ctx.constants, ctx.through_cache = constants, through_cache
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        *tensors, out, log_sum = ctx.saved_tensors
        near_q, far_q, near_k, _, v, codeword, mean, _ = tensors
        d_out = gradients[0].contiguous()
        dot = (d_out.to(log_sum.dtype) * out).sum(-1)
        d_near_q, d_far_q = torch.empty_like(near_q), torch.empty_like(far_q)
        d_near_k, d_v, d_mean = torch.empty_like(near_k), torch.empty_like(v), None
        queried, documents, heads, size, _ = near_q.shape
        constants, share = ctx.constants, ctx.constants["SHARE"]
        tiles = triton.cdiv(size, constants["TILE"])
        shared = (*tensors, d_out, log_sum, dot)
        _query_gradients[(tiles, queried * documents, heads)](*shared, d_near_q, d_far_q, **constants)
        _key_gradients[(tiles, len(near_k) * documents, heads // share)](
            *shared, d_near_k, d_v, THROUGH=ctx.through_cache, **constants
        )
        if ctx.through_cache:
            d_mean = torch.empty_like(mean)
            tiles = triton.cdiv(codeword.shape[1], constants["TILE"])
            if len(mean):
                _mean_gradients[(tiles, len(mean) * documents, heads // share)](*shared, d_mean, **constants)
        return d_near_q, d_far_q, d_near_k, None, d_v, None, d_mean, *[None] * 4


# Below, i counts queries and j keys or codewords of a tile; `at` is a row of a tensor seen as (rows, WIDTH).
# The interpreter cannot multiply bfloat16, and products of two of them are exact in float32: WIDEN.

_ALL = tl.constexpr(0)
_OWN = tl.constexpr(1)
"""Keys of the own block."""
_BEFORE = tl.constexpr(2)
"""Keys of the block before that lie in the window."""
_BETWEEN = tl.constexpr(3)
"""Keys of the block before that lie beyond it."""


@triton.jit
def _unseen(i, j, SET: tl.constexpr, SIZE: tl.constexpr):
    """0 where query i sees key j, else -inf."""
    i, j = i[:, None], j[None, :]
    seen = (i < SIZE) & (j < SIZE)
    if SET == _OWN:
        seen = seen & (j <= i)
    if SET == _BEFORE:
        seen = seen & (j >= i)
    if SET == _BETWEEN:
        seen = seen & (j < i)
    return tl.where(seen, 0.0, float("-inf"))


@triton.jit
def _load(base, at, row, end, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows `at` + row of a matrix, (TILE, PADDED); zeros from row `end` on."""
    e = tl.arange(0, PADDED)
    return tl.load(base + (at + row[:, None]) * WIDTH + e, mask=(row[:, None] < end) & (e < WIDTH), other=0.0)


@triton.jit
def _store(base, at, row, end, value, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    e = tl.arange(0, PADDED)
    there = base + (at + row[:, None]) * WIDTH + e
    tl.store(there, value.to(base.dtype.element_ty), mask=(row[:, None] < end) & (e < WIDTH))


@triton.jit
def _dot(a, b, WIDE: tl.constexpr, WIDEN: tl.constexpr):
    """a @ b in the precision of b, summed in WIDE."""
    a = a.to(b.dtype)
    if WIDEN:
        a, b = a.to(WIDE), b.to(WIDE)
    return tl.dot(a, b, input_precision="ieee", out_dtype=WIDE)


@triton.jit
def _more(top, total, mixed, score, v, WIDE: tl.constexpr, WIDEN: tl.constexpr):
    """The running softmax (largest score, sum of weights, weighted values) with a tile of keys more."""
    higher = tl.maximum(top, tl.max(score, 1))
    weight, shrink = tl.exp(score - higher[:, None]), tl.exp(top - higher)
    return higher, total * shrink + tl.sum(weight, 1), mixed * shrink[:, None] + _dot(weight, v, WIDE, WIDEN)


@triton.jit
def _slope(weight, d_o, v, dot, scale, WIDE: tl.constexpr, WIDEN: tl.constexpr):
    """The gradient of q k^T."""
    return weight * (_dot(d_o, tl.trans(v), WIDE, WIDEN) - dot) * scale


@triton.jit
def _attend(top, total, mixed, q, i, k_base, v_base, at, start, end, scale, SET: tl.constexpr, SIZE: tl.constexpr,
            WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
            WIDEN: tl.constexpr):  # fmt: skip
    """The running softmax over keys `start` to `end` of a block."""
    for begin in range(start, end, TILE):
        j = begin + tl.arange(0, TILE)
        k, v = _load(k_base, at, j, SIZE, WIDTH, PADDED), _load(v_base, at, j, SIZE, WIDTH, PADDED)
        score = _dot(q, tl.trans(k), WIDE, WIDEN) * scale + _unseen(i, j, SET, SIZE)
        top, total, mixed = _more(top, total, mixed, score, v, WIDE, WIDEN)
    return top, total, mixed


@triton.jit
def _forward(near_q, far_q, near_k, word, v, codeword, mean, log_count, out, log_sum, scale, documents, first, blocks,
             HEADS: tl.constexpr, SHARE: tl.constexpr, SIZE: tl.constexpr, CODES: tl.constexpr, WIDTH: tl.constexpr,
             PADDED: tl.constexpr, TILE: tl.constexpr, STRICT: tl.constexpr, WIDE: tl.constexpr,
             WIDEN: tl.constexpr):  # fmt: skip
    begin = tl.program_id(0) * TILE
    block = first + tl.program_id(1).to(tl.int64)
    head = tl.program_id(2)
    kv, KV = head // SHARE, HEADS // SHARE
    at_q, at_k = ((block - first) * HEADS + head) * SIZE, (block * KV + kv) * SIZE
    i = begin + tl.arange(0, TILE)
    last = tl.minimum(begin + TILE, SIZE)
    near, far = _load(near_q, at_q, i, SIZE, WIDTH, PADDED), _load(far_q, at_q, i, SIZE, WIDTH, PADDED)
    top = tl.full((TILE,), -1e30, WIDE)  # finite: what sees nothing has no NaN in it
    total = tl.zeros((TILE,), WIDE)
    mixed = tl.zeros((TILE, PADDED), WIDE)
    top, total, mixed = _attend(top, total, mixed, near, i, near_k, v, at_k, 0, last, scale, _OWN,
                                SIZE, WIDTH, PADDED, TILE, WIDE, WIDEN)  # fmt: skip
    if block >= documents:
        at_k -= documents * KV * SIZE
        if STRICT:
            top, total, mixed = _attend(top, total, mixed, near, i, near_k, v, at_k, begin, SIZE, scale, _BEFORE,
                                        SIZE, WIDTH, PADDED, TILE, WIDE, WIDEN)  # fmt: skip
            top, total, mixed = _attend(top, total, mixed, far, i, word, v, at_k, 0, last, scale, _BETWEEN,
                                        SIZE, WIDTH, PADDED, TILE, WIDE, WIDEN)  # fmt: skip
        else:
            top, total, mixed = _attend(top, total, mixed, near, i, near_k, v, at_k, 0, SIZE, scale, _ALL,
                                        SIZE, WIDTH, PADDED, TILE, WIDE, WIDEN)  # fmt: skip
    if block >= 2 * documents:
        at_c = ((block - 2 * documents) * KV + kv) * CODES
        for start in range(0, CODES, TILE):
            j = start + tl.arange(0, TILE)
            log_n = tl.load(log_count + at_c + j, mask=j < CODES, other=float("-inf"))
            k = _load(codeword, kv * CODES, j, CODES, WIDTH, PADDED)
            score = _dot(far, tl.trans(k), WIDE, WIDEN) * scale + log_n[None, :]
            top, total, mixed = _more(top, total, mixed, score, _load(mean, at_c, j, CODES, WIDTH, PADDED), WIDE, WIDEN)
    _store(out, at_q, i, SIZE, mixed / total[:, None], WIDTH, PADDED)
    tl.store(log_sum + at_q + i, top + tl.log(total), mask=i < SIZE)


@triton.jit
def _to_query(d_q, q, d_o, log_z, dot, i, k_base, v_base, at, start, end, scale, SET: tl.constexpr, SIZE: tl.constexpr,
              WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
              WIDEN: tl.constexpr):  # fmt: skip
    """Adds what keys `start` to `end` of a block give to the gradient of a tile of queries."""
    for begin in range(start, end, TILE):
        j = begin + tl.arange(0, TILE)
        k, v = _load(k_base, at, j, SIZE, WIDTH, PADDED), _load(v_base, at, j, SIZE, WIDTH, PADDED)
        weight = tl.exp(_dot(q, tl.trans(k), WIDE, WIDEN) * scale + _unseen(i, j, SET, SIZE) - log_z)
        d_q += _dot(_slope(weight, d_o, v, dot, scale, WIDE, WIDEN), k, WIDE, WIDEN)
    return d_q


@triton.jit
def _query(q, d_out, log_sum, dot, at, i, SIZE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """What the backward pass needs of a tile of queries; zeros beyond the block."""
    return (
        _load(q, at, i, SIZE, WIDTH, PADDED),
        _load(d_out, at, i, SIZE, WIDTH, PADDED),
        tl.load(log_sum + at + i, mask=i < SIZE, other=0.0)[:, None],
        tl.load(dot + at + i, mask=i < SIZE, other=0.0)[:, None],
    )


@triton.jit
def _query_gradients(near_q, far_q, near_k, word, v, codeword, mean, log_count, d_out, log_sum, dot, d_near_q, d_far_q,
                     scale, documents, first, blocks, HEADS: tl.constexpr, SHARE: tl.constexpr, SIZE: tl.constexpr,
                     CODES: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
                     STRICT: tl.constexpr, WIDE: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    begin = tl.program_id(0) * TILE
    block = first + tl.program_id(1).to(tl.int64)
    head = tl.program_id(2)
    kv, KV = head // SHARE, HEADS // SHARE
    at_q, at_k = ((block - first) * HEADS + head) * SIZE, (block * KV + kv) * SIZE
    i = begin + tl.arange(0, TILE)
    last = tl.minimum(begin + TILE, SIZE)
    near, d_o, log_z, o = _query(near_q, d_out, log_sum, dot, at_q, i, SIZE, WIDTH, PADDED)
    far = _load(far_q, at_q, i, SIZE, WIDTH, PADDED)
    d_near = tl.zeros((TILE, PADDED), WIDE)
    d_far = tl.zeros((TILE, PADDED), WIDE)
    d_near = _to_query(d_near, near, d_o, log_z, o, i, near_k, v, at_k, 0, last, scale, _OWN,
                       SIZE, WIDTH, PADDED, TILE, WIDE, WIDEN)  # fmt: skip
    if block >= documents:
        at_k -= documents * KV * SIZE
        if STRICT:
            d_near = _to_query(d_near, near, d_o, log_z, o, i, near_k, v, at_k, begin, SIZE, scale, _BEFORE,
                               SIZE, WIDTH, PADDED, TILE, WIDE, WIDEN)  # fmt: skip
            d_far = _to_query(d_far, far, d_o, log_z, o, i, word, v, at_k, 0, last, scale, _BETWEEN,
                              SIZE, WIDTH, PADDED, TILE, WIDE, WIDEN)  # fmt: skip
        else:
            d_near = _to_query(d_near, near, d_o, log_z, o, i, near_k, v, at_k, 0, SIZE, scale, _ALL,
                               SIZE, WIDTH, PADDED, TILE, WIDE, WIDEN)  # fmt: skip
    if block >= 2 * documents:
        at_c = ((block - 2 * documents) * KV + kv) * CODES
        for start in range(0, CODES, TILE):
            j = start + tl.arange(0, TILE)
            log_n = tl.load(log_count + at_c + j, mask=j < CODES, other=float("-inf"))
            k = _load(codeword, kv * CODES, j, CODES, WIDTH, PADDED)
            weight = tl.exp(_dot(far, tl.trans(k), WIDE, WIDEN) * scale + log_n[None, :] - log_z)
            value = _load(mean, at_c, j, CODES, WIDTH, PADDED)
            d_far += _dot(_slope(weight, d_o, value, o, scale, WIDE, WIDEN), k, WIDE, WIDEN)
    _store(d_near_q, at_q, i, SIZE, d_near, WIDTH, PADDED)
    _store(d_far_q, at_q, i, SIZE, d_far, WIDTH, PADDED)


@triton.jit
def _to_key(d_k, d_v, k, v, j, q_base, d_out, log_sum, dot, at_q, start, end, scale, SET: tl.constexpr,
            SIZE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
            WIDEN: tl.constexpr):  # fmt: skip
    """Adds what queries `start` to `end` of a block give to the gradients of a tile of keys and values."""
    for begin in range(start, end, TILE):
        i = begin + tl.arange(0, TILE)
        q, d_o, log_z, o = _query(q_base, d_out, log_sum, dot, at_q, i, SIZE, WIDTH, PADDED)
        weight = tl.exp(_dot(q, tl.trans(k), WIDE, WIDEN) * scale + _unseen(i, j, SET, SIZE) - log_z)
        d_v += _dot(tl.trans(weight), d_o, WIDE, WIDEN)
        if SET != _BETWEEN:  # whose keys have no gradient
            d_k += _dot(tl.trans(_slope(weight, d_o, v, o, scale, WIDE, WIDEN)), q, WIDE, WIDEN)
    return d_k, d_v


@triton.jit
def _key_gradients(near_q, far_q, near_k, word, v, codeword, mean, log_count, d_out, log_sum, dot, d_near_k, d_v,
                   scale, documents, first, blocks, THROUGH: tl.constexpr, HEADS: tl.constexpr, SHARE: tl.constexpr,
                   SIZE: tl.constexpr, CODES: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                   TILE: tl.constexpr, STRICT: tl.constexpr, WIDE: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    begin = tl.program_id(0) * TILE
    block = tl.program_id(1).to(tl.int64)
    kv = tl.program_id(2)
    at_k = (block * (HEADS // SHARE) + kv) * SIZE
    j = begin + tl.arange(0, TILE)
    last = tl.minimum(begin + TILE, SIZE)
    near, far = _load(near_k, at_k, j, SIZE, WIDTH, PADDED), _load(word, at_k, j, SIZE, WIDTH, PADDED)
    value = _load(v, at_k, j, SIZE, WIDTH, PADDED)
    d_k = tl.zeros((TILE, PADDED), WIDE)
    d_value = tl.zeros((TILE, PADDED), WIDE)
    for head in range(kv * SHARE, (kv + 1) * SHARE):
        at_q = ((block - first) * HEADS + head) * SIZE
        if block >= first:
            d_k, d_value = _to_key(d_k, d_value, near, value, j, near_q, d_out, log_sum, dot, at_q, begin, SIZE, scale,
                                   _OWN, SIZE, WIDTH, PADDED, TILE, WIDE, WIDEN)  # fmt: skip
        if (block + documents < blocks) & (block + documents >= first):
            at_q += documents * HEADS * SIZE
            if STRICT:
                d_k, d_value = _to_key(d_k, d_value, near, value, j, near_q, d_out, log_sum, dot, at_q, 0, last,
                                       scale, _BEFORE, SIZE, WIDTH, PADDED, TILE, WIDE, WIDEN)  # fmt: skip
                if THROUGH:
                    d_k, d_value = _to_key(d_k, d_value, far, value, j, far_q, d_out, log_sum, dot, at_q, begin,
                                           SIZE, scale, _BETWEEN, SIZE, WIDTH, PADDED, TILE, WIDE, WIDEN)  # fmt: skip
            else:
                d_k, d_value = _to_key(d_k, d_value, near, value, j, near_q, d_out, log_sum, dot, at_q, 0, SIZE,
                                       scale, _ALL, SIZE, WIDTH, PADDED, TILE, WIDE, WIDEN)  # fmt: skip
    _store(d_near_k, at_k, j, SIZE, d_k, WIDTH, PADDED)
    _store(d_v, at_k, j, SIZE, d_value, WIDTH, PADDED)


@triton.jit
def _mean_gradients(near_q, far_q, near_k, word, v, codeword, mean, log_count, d_out, log_sum, dot, d_mean,
                    scale, documents, first, blocks, HEADS: tl.constexpr, SHARE: tl.constexpr, SIZE: tl.constexpr,
                    CODES: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
                    STRICT: tl.constexpr, WIDE: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    begin = tl.program_id(0) * TILE
    row = tl.program_id(1).to(tl.int64)
    kv = tl.program_id(2)
    at_c = (row * (HEADS // SHARE) + kv) * CODES
    j = begin + tl.arange(0, TILE)
    k = _load(codeword, kv * CODES, j, CODES, WIDTH, PADDED)
    log_n = tl.load(log_count + at_c + j, mask=j < CODES, other=float("-inf"))
    d_mixed = tl.zeros((TILE, PADDED), WIDE)
    if row + 2 * documents >= first:
        for head in range(kv * SHARE, (kv + 1) * SHARE):
            at_q = ((row + 2 * documents - first) * HEADS + head) * SIZE
            for start in range(0, SIZE, TILE):  # d_o is zero for queries beyond the block
                i = start + tl.arange(0, TILE)
                q, d_o, log_z, _ = _query(far_q, d_out, log_sum, dot, at_q, i, SIZE, WIDTH, PADDED)
                weight = tl.exp(_dot(q, tl.trans(k), WIDE, WIDEN) * scale + log_n[None, :] - log_z)
                d_mixed += _dot(tl.trans(weight), d_o, WIDE, WIDEN)
    _store(d_mean, at_c, j, CODES, d_mixed, WIDTH, PADDED)
