"""Transformer-VQ against a dense float64 reference: outputs, gradients, causality, decoding, and its limits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.attention.codebook import VQConfig
from model.attention.documents import Documents
from model.attention.merge import MASKED, Part, attend, attend_plainly
from model.attention.vq import VQAttention
from model.positions import LAYOUTS, Grid, parse_document
from model.rope import Rotation, rotate, rotation
from tests.model.support import slow_vq

HEADS, KV_HEADS, WIDTH, CODES = 4, 2, 8, 6


def make(dtype: torch.dtype = torch.float64, kv_heads: int = KV_HEADS, **changes: object) -> VQAttention:
    torch.manual_seed(7)
    kind = VQAttention(WIDTH, kv_heads, 1e4, "alternate", VQConfig(**({"codes": CODES} | changes))).to(dtype)
    kind.codebook.initialise()
    if kind.codebook.map_KEE is not None:
        with torch.no_grad():
            kind.codebook.map_KEE += 0.3 * torch.randn(WIDTH, WIDTH)
    return kind


def mixed_row(rng: np.random.Generator, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Document numbers (S,) and positions (S, 2) of a row of documents that mix text and images of random sizes."""
    document, positions, number = [], [], 0
    while len(document) < slots - 4:
        number += 1
        words = []
        for _ in range(rng.integers(1, 6)):
            height, width = rng.integers(1, 5, 2)
            words.append(f"T{rng.integers(1, 9)}" if rng.random() < 0.5 else f"I{height}x{width}")
        placed = LAYOUTS["tv"](Grid(*parse_document(" ".join(words))))[0]
        document += [number] * len(placed)
        positions.append(placed)
    padding = max(0, slots - len(document))
    document = torch.tensor(document + [0] * padding)[:slots]
    return document, torch.cat([*positions, torch.zeros(padding, 2)])[:slots]


def exact_rotation(positions_BS2: torch.Tensor) -> Rotation:
    theta = 1e4 ** (-2 * torch.arange(WIDTH // 2, dtype=torch.float64) / WIDTH)
    angle = (positions_BS2.double()[..., torch.arange(WIDTH // 2) % 2] * theta).unsqueeze(2)
    return Rotation(angle.cos(), angle.sin())


def case(seed: int, slots: int = 90, dtype: torch.dtype = torch.float64, kv_heads: int = KV_HEADS) -> tuple:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    document, positions = (torch.stack(x) for x in zip(*(mixed_row(rng, slots) for _ in range(2)), strict=True))
    document[1] = (document[1] > 0) * (1 + (document[1] > 3))  # the second row holds long documents
    heads = (HEADS, kv_heads, kv_heads)
    q, k, v = (torch.randn(2, slots, h, WIDTH, dtype=dtype, requires_grad=True) for h in heads)
    return q, k, v, positions, document


def reference(kind: VQAttention, q, k, v, positions, document) -> torch.Tensor:
    options = kind.config
    rows = zip(q, k, v, positions, document, strict=True)
    return torch.stack([
        slow_vq(*row, kind.codebook.codewords_KCE, options.window, options.band, options.grad_through_cache)
        for row in rows
    ])  # fmt: skip


def errors(kind: VQAttention, seed: int, dtype: torch.dtype = torch.float64) -> tuple[float, float]:
    """Largest errors of outputs and gradients."""
    slots = max(90, 8 * kind.window)
    q, k, v, positions, document = case(seed, slots, dtype, len(kind.codebook.count_KC))
    assert slots <= 90 or document[1].bincount()[1:].max() > 4 * kind.window  # some keys are only in the sums
    angles = exact_rotation(positions)
    if dtype != torch.float64:
        angles = Rotation(angles.cos.float(), angles.sin.float())
    out, _ = kind(q, k, v, angles, Documents.of(document))
    expected = reference(kind, q, k, v, positions, document)
    weight = torch.randn_like(expected)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    gradient = max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True))
    return float((out - expected).detach().abs().max()), gradient


@pytest.mark.parametrize("band", ["strict", "block"])
@pytest.mark.parametrize("window", [1, 2, 5, 8, 16, 40])
def test_outputs_and_gradients_equal_the_dense_reference(window, band) -> None:
    for seed in range(2):
        for through_cache in (True, False):
            kind = make(window=window, band=band, grad_through_cache=through_cache)
            output, gradient = errors(kind, seed)
            assert output <= 1e-12
            assert gradient <= 1e-9


@pytest.mark.parametrize("band", ["strict", "block"])
@pytest.mark.parametrize("kv_heads", [1, HEADS])
def test_one_key_head_for_all_and_one_for_each(kv_heads, band) -> None:
    output, gradient = errors(make(kv_heads=kv_heads, window=5, band=band), 0)
    assert output <= 1e-12
    assert gradient <= 1e-9


@pytest.mark.parametrize("band", ["strict", "block"])
def test_codewords_behind_a_map(band) -> None:
    for seed in range(2):
        output, gradient = errors(make(window=5, band=band, codebook="simvq"), seed)
        assert output <= 1e-12
        assert gradient <= 1e-9


@pytest.mark.parametrize("band", ["strict", "block"])
@pytest.mark.parametrize("window", [1, 2, 5, 8, 16, 40])
def test_float32(window, band) -> None:
    output, gradient = errors(make(torch.float32, window=window, band=band), 0, torch.float32)
    assert output <= 1e-5
    assert gradient <= 1e-4


@pytest.mark.parametrize("band", ["strict", "block"])
@pytest.mark.parametrize(("chunk", "recompute"), [(1, False), (1, True), (2, True), (3, False)])
def test_chunks_equal_all_at_once(chunk, recompute, band) -> None:
    whole = make(window=5, band=band, chunk_blocks=100)
    parts = make(window=5, band=band, chunk_blocks=chunk, recompute_chunks=recompute)
    q, k, v, positions, document = case(3)
    angles, documents = exact_rotation(positions), Documents.of(document)
    weight = torch.randn(q.shape, dtype=q.dtype)
    results = []
    for kind in (whole, parts):
        out, _ = kind(q, k, v, angles, documents)
        results.append((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_chunks_that_are_computed_again_keep_their_inputs_alone() -> None:
    """Bytes kept for the backward pass, per slot and in tensors as large as the queries."""

    def kept(slots: int, recompute: bool) -> float:
        kind = make(torch.float32, window=8, chunk_blocks=4, recompute_chunks=recompute)
        q, k, v = (torch.randn(1, slots, heads, WIDTH, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS))
        found: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        angles = rotation(torch.rand(1, slots, 2), torch.ones(WIDTH // 2))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out, _ = kind(q, k, v, angles, Documents.of(torch.ones(1, slots, dtype=torch.long)))
        assert out.requires_grad
        return sum(found.values()) / q.nbytes

    assert kept(512, True) < 0.45 * kept(512, False)
    assert kept(2048, True) < 1.1 * kept(512, True)


def influence(kind: torch.nn.Module, document: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(S, S) bool: whether output i depends on the query, key or value of slot j."""
    torch.manual_seed(1)
    slots = len(document)
    q, k, v = (
        torch.randn(1, slots, h, WIDTH, dtype=torch.float64, requires_grad=True) for h in (HEADS, KV_HEADS, KV_HEADS)
    )
    out, _ = kind(q, k, v, exact_rotation(positions[None]), Documents.of(document[None]))
    rows = []
    for i in range(slots):
        gradients = torch.autograd.grad(out[0, i].square().sum(), (q, k, v), retain_graph=True)
        rows.append(sum(g[0].abs().sum((1, 2)) for g in gradients) > 0)
    return torch.stack(rows)


@pytest.mark.parametrize("band", ["strict", "block"])
def test_a_slot_depends_on_the_past_of_its_document_and_nothing_else(band) -> None:
    document, positions = mixed_row(np.random.default_rng(2), 60)
    document = (document > 0) * (1 + (document > 2))
    document[40:44], document[44:] = 7, 8
    expected = (document[:, None] == document) & (document > 0) & torch.ones(60, 60, dtype=torch.bool).tril()
    assert torch.equal(influence(make(window=4, band=band), document, positions), expected)
    one = torch.ones_like(document)
    assert not torch.equal(influence(make(window=4, band=band), one, positions), expected)  # the check can fail


def test_gradients_stop_at_the_cache_where_asked() -> None:
    document, positions = torch.ones(30, dtype=torch.long), torch.arange(1.0, 31).unsqueeze(1).expand(30, 2)
    distance = torch.arange(30)[:, None] - torch.arange(30)
    found = influence(make(window=4, grad_through_cache=False), document, positions)
    assert torch.equal(found, (distance >= 0) & (distance <= 4))


@pytest.mark.parametrize("codebook", ["average", "simvq"])
@pytest.mark.parametrize("band", ["strict", "block"])
@torch.no_grad()
def test_prefill_and_steps_equal_forward(band, codebook) -> None:
    kind = make(window=4, band=band, codebook=codebook).eval()
    torch.manual_seed(0)
    lengths, added = torch.tensor([1, 4, 5, 9, 17, 30]), 14
    rows, total = len(lengths), 30 + added
    positions = torch.rand(rows, total, 2) * 30
    q, k, v = (torch.randn(rows, total, h, WIDTH, dtype=torch.float64) for h in (HEADS, KV_HEADS, KV_HEADS))
    angles = exact_rotation(positions)

    def documents(length_B: torch.Tensor, slots: int) -> Documents:
        return Documents.of((torch.arange(slots) < length_B[:, None]).long())

    expected, _ = kind(q, k, v, angles, documents(lengths + added, total))
    begin = [x[:, :30] for x in (q, k, v)]
    out, state = kind.prefill(*begin, Rotation(*(a[:, :30] for a in angles)), documents(lengths, 30))
    for b, length in enumerate(lengths):
        torch.testing.assert_close(out[b, :length], expected[b, :length], rtol=0, atol=1e-12)
    every, sizes = torch.arange(rows), _sizes(state)
    for step in range(added):
        at = lengths + step
        here = Rotation(*(a[every, at].unsqueeze(1) for a in angles))
        inputs = [x[every, at].unsqueeze(1) for x in (q, k, v)]
        if step % 3 == 1:  # a row that is not active writes junk, and the same slot again later
            kind.step(*(torch.randn_like(x) for x in inputs), here, at, 30 + step, state)
        out = kind.step(*inputs, here, at, 30 + step, state)
        torch.testing.assert_close(out[:, 0], expected[every, at], rtol=0, atol=1e-12)
    assert _sizes(state) == sizes
    assert (state.count_BKC.sum(-1) == state.summed_B[:, None]).all()


def _sizes(state) -> list:
    return [value.shape for value in vars(state).values()]


def test_the_mean_of_values_beyond_the_window_lies_among_the_values() -> None:
    kind = make(window=4).eval()
    q, k, v, positions, document = case(5)
    document = torch.ones_like(document)
    _, state = kind.prefill(q, k, v, exact_rotation(positions), Documents.of(document))
    mean = state.value_sum_BKCE / state.count_BKC.clamp(min=1).unsqueeze(-1)
    used = (state.count_BKC > 0).unsqueeze(-1)
    low, high = v.amin(1).unsqueeze(2), v.amax(1).unsqueeze(2)
    assert ((mean >= low) & (mean <= high) | ~used).all()
    assert (state.count_BKC.sum(-1) == 90 - 5).all()


def test_every_key_its_own_codeword_is_softmax_attention_inside_the_window() -> None:
    kind = make(codes=12, window=12)
    torch.manual_seed(0)
    q = torch.randn(1, 12, HEADS, WIDTH, dtype=torch.float64)
    k, v = torch.randn(2, 1, 12, KV_HEADS, WIDTH, dtype=torch.float64)
    kind.codebook.key_sum_KCE.copy_(k[0].transpose(0, 1))
    angles = exact_rotation(torch.rand(1, 12, 2) * 9)
    out, _ = kind(q, k, v, angles, Documents.of(torch.ones(1, 12, dtype=torch.long)))
    parts = (x.transpose(1, 2) for x in (rotate(q, angles), rotate(k, angles), v))
    expected = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("band", ["strict", "block"])
def test_beyond_the_window_the_order_of_keys_does_not_matter(band) -> None:
    """With a window of one slot and every key its own codeword: of the last query, all but the nearest keys."""
    slots, near = 12, 2
    kind = make(codes=slots, window=1, band=band)
    torch.manual_seed(0)
    q = torch.randn(1, slots, HEADS, WIDTH, dtype=torch.float64)
    k, v = torch.randn(2, 1, slots, KV_HEADS, WIDTH, dtype=torch.float64)
    kind.codebook.key_sum_KCE.copy_(k[0].transpose(0, 1))
    angles = exact_rotation(torch.rand(1, slots, 2) * 9)
    documents = Documents.of(torch.ones(1, slots, dtype=torch.long))

    def last(order: list[int]) -> torch.Tensor:
        return kind(q, k[:, order], v[:, order], angles, documents)[0][0, -1]

    straight = list(range(slots))
    far = [*straight[-near - 1 :: -1], *straight[-near:]]
    torch.testing.assert_close(last(far), last(straight), rtol=0, atol=1e-12)
    assert float((last(straight[::-1]) - last(straight)).abs().max()) > 1e-3


def test_the_order_of_codewords_does_not_matter() -> None:
    one, other = make(window=4), make(window=4)
    order = torch.randperm(CODES)
    for name in ("key_sum_KCE", "count_KC"):
        getattr(other.codebook, name).copy_(getattr(one.codebook, name)[:, order])
    q, k, v, positions, document = case(6)
    angles, documents = exact_rotation(positions), Documents.of(document)
    torch.testing.assert_close(one(q, k, v, angles, documents)[0], other(q, k, v, angles, documents)[0],
                               rtol=0, atol=1e-12)  # fmt: skip


def test_codewords_without_keys_weigh_nothing() -> None:
    """Exactly: their own score is the highest of all."""
    few, more = make(window=4), make(window=4, codes=CODES + 3)
    for name in ("key_sum_KCE", "count_KC"):
        getattr(more.codebook, name)[:, :CODES] = getattr(few.codebook, name)
    q, k, v, positions, document = case(6)
    q = q.abs()
    more.codebook.key_sum_KCE[:, CODES:] = 1e3 * more.codebook.count_KC[:, CODES:, None]
    angles, documents = exact_rotation(positions), Documents.of(document)
    one, other = (kind(q, k, v, angles, documents)[0] for kind in (few, more))
    assert one.isfinite().all()
    torch.testing.assert_close(one, other, rtol=0, atol=1e-15)


def test_copies_of_a_key_and_value_are_one_entry_with_the_log_of_their_number() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 3, 4, dtype=torch.float64)
    five = [torch.cat((x, x[:, :, :1].expand(-1, -1, 4, -1)), dim=2) for x in (k, v)]
    bias = torch.zeros(1, 1, 1, 3, dtype=torch.float64)
    bias[..., 0] = np.log(5)
    torch.testing.assert_close(attend([Part(q, k, v, bias)], 0.5), attend([Part(q, *five)], 0.5))


def test_merged_parts_equal_plain_softmax() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    nothing = MASKED * torch.ones(1, 1, 1, 5, dtype=torch.float64)
    parts = [
        Part(q, k, v, causal=True),
        Part(q, k, v, first=1),
        Part(q, k, v, nothing, first=2, seen=2),
        Part(q, k, v, first=2, rows=slice(3, None), key_rows=slice(2)),
    ]
    results = []
    for function in (attend, attend_plainly):
        out = function(parts, 0.3)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    for n in range(4):
        seen = [(torch.ones(5, 5).tril(), n)] + [(torch.ones(5, 5), n - 1)] * (n > 0)
        if n > 1:
            corner = torch.zeros(5, 5)
            corner[3:, :2] = 1
            seen.append((corner, n - 2))
        score = torch.cat([(q[n] @ k[m].mT * 0.3).masked_fill(mask == 0, -torch.inf) for mask, m in seen], dim=-1)
        expected = score.softmax(-1) @ torch.cat([v[m] for _, m in seen], dim=1)
        torch.testing.assert_close(results[0][0][n], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("band", ["strict", "block"])
def test_bf16_follows_float32(band) -> None:
    q, k, v, positions, document = case(4)
    kind, angles, documents = (
        make(torch.float32, window=8, band=band),
        rotation(positions, torch.ones(WIDTH // 2)),
        Documents.of(document),
    )
    weight = torch.randn(q.shape)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [x.detach().bfloat16().to(dtype).requires_grad_() for x in (q, k, v)]
        out, _ = kind(*inputs, angles, documents)
        assert out.dtype == dtype
        results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    for low, high in zip(*results, strict=True):
        assert (low.float() - high).norm() < 0.02 * high.norm()


def test_bf16_keeps_the_logs_of_large_counts() -> None:
    counts = torch.tensor([4780.0, 5080.0])  # their logs are 8.5 in bfloat16
    q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2, 2), torch.eye(2)[None, None]
    part = Part(*(x.bfloat16() for x in (q, k, v)), bias=counts.log()[None, None, None])
    for function in (attend, attend_plainly):
        torch.testing.assert_close(function([part], 1.0).float()[0, 0, 0], counts / counts.sum(), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "changes", [{"codes": 0}, {"window": 0}, {"decay": 1.0}, {"chunk_blocks": 0}, {"reset_below": -1.0}]
)
def test_impossible_settings_are_refused(changes) -> None:
    with pytest.raises(ValueError, match=f"model.vq.{next(iter(changes))} is"):
        replace(VQConfig(), **changes)


def test_simvq_resets_no_codewords() -> None:
    with pytest.raises(ValueError, match=r"model.vq.reset_below is 1.0; .* simvq it must be 0"):
        VQConfig(codebook="simvq", reset_below=1.0)
