"""Every kind of attention against a slow float64 reference, and the contract that all kinds keep."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.attention import KINDS
from model.attention.dense import DenseAttention, DenseState, rounded_up, softmax_attention
from model.attention.documents import BLOCK, Documents
from model.rope import Rotation, frequencies, rotation
from tests.model.support import make_kind, slow_attention, slow_vq

HEADS, WIDTH = 4, 8


def random_documents(rng: np.random.Generator, batch: int, slots: int) -> torch.Tensor:
    rows = []
    for _ in range(batch):
        row: list[int] = []
        while len(row) < slots - 3:
            row += [max(row, default=0) + 1] * int(rng.integers(1, 9))
        rows.append((row[: slots - int(rng.integers(0, 4))] + [0] * slots)[:slots])
    return torch.tensor(rows)


def case(seed: int, kv_heads: int, slots: int = 16) -> tuple:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    document_BS = random_documents(rng, 2, slots)
    positions = torch.rand(2, slots, 2) * 30
    angles = rotation(positions, frequencies(WIDTH, 10000.0, "alternate", torch.device("cpu")))
    shapes = (HEADS, kv_heads, kv_heads)
    q, k, v = (torch.randn(2, slots, heads, WIDTH, requires_grad=True) for heads in shapes)
    return q, k, v, positions, angles, document_BS


def causality_error(kind: torch.nn.Module, document_BS: torch.Tensor, seed: int = 0) -> float:
    """Largest derivative of an output with respect to a key or value that it must not see, (B, S) documents."""
    torch.manual_seed(seed)
    batch, slots = document_BS.shape
    q, k, v = (torch.randn(batch, slots, 2, WIDTH, requires_grad=True) for _ in range(3))
    angles = rotation(torch.rand(batch, slots, 2), frequencies(WIDTH, 10000.0, "alternate", torch.device("cpu")))
    out, _ = kind(q, k, v, angles, Documents.of(document_BS))
    worst = 0.0
    for b in range(batch):
        for i in range(slots):
            gradients = torch.autograd.grad(out[b, i].square().sum(), (q, k, v), retain_graph=True)
            influence = sum(g.abs().sum(dim=(2, 3)) for g in gradients)
            allowed = torch.zeros(batch, slots, dtype=torch.bool)
            allowed[b, : i + 1] = (document_BS[b, : i + 1] == document_BS[b, i]) & (document_BS[b, i] > 0)
            worst = max(worst, float(influence[~allowed].max()))
            assert (influence[allowed] > 0).all(), "an output ignores a slot of its own past"
    return worst


@pytest.mark.parametrize("name", KINDS)
class TestEveryKind:
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_forward_and_gradients_equal_the_slow_reference(self, name, seed, kv_heads) -> None:
        q, k, v, positions, angles, document_BS = case(seed, kv_heads)
        kind = make_kind(name, HEADS, kv_heads, WIDTH)
        found, _ = kind(q, k, v, angles, Documents.of(document_BS))
        rows = zip(q, k, v, positions, document_BS, strict=True)
        if name == "vq":
            codewords = kind.codebook.codewords_KCE
            expected = torch.stack([slow_vq(*row, codewords, kind.window) for row in rows])
        else:
            expected = torch.stack([slow_attention(*row) for row in rows])
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-6)
        weight = torch.randn_like(expected)
        got = torch.autograd.grad((found.double() * weight).sum(), (q, k, v))
        wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=3e-5)

    def test_nothing_flows_back_in_time_or_between_documents(self, name) -> None:
        document_BS = torch.tensor([[1] * 5 + [2] * 4 + [3] + [0] * 2, [1] * 7 + [2] * 5])
        assert causality_error(make_kind(name, 2, 2, WIDTH), document_BS) == 0

    def test_padding_returns_zeros(self, name) -> None:
        q, k, v, _, angles, document_BS = case(3, 2)
        out, _ = make_kind(name, HEADS, 2, WIDTH)(q, k, v, angles, Documents.of(document_BS))
        assert (document_BS == 0).any()
        assert (out[document_BS == 0] == 0).all()

    def test_prefill_and_steps_equal_forward(self, name) -> None:
        torch.manual_seed(0)
        lengths, slots, added = [3, 30, 17], 30, 5  # beyond the slots that a state begins with
        total = slots + added
        angles = rotation(torch.rand(3, total, 2) * 9, frequencies(WIDTH, 1e4, "alternate", torch.device("cpu")))
        q, k, v = (torch.randn(3, total, heads, WIDTH) for heads in (4, 2, 2))
        kind = make_kind(name, 4, 2, WIDTH)
        whole = torch.arange(total) < torch.tensor(lengths)[:, None] + added
        expected, _ = kind(q, k, v, angles, Documents.of(whole.long()))
        prompt = Documents.of((torch.arange(slots) < torch.tensor(lengths)[:, None]).long())

        def at(x: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
            return x[torch.arange(3), length_B].unsqueeze(1)

        head = Rotation(*(part[:, :slots] for part in angles))
        out, state = kind.prefill(q[:, :slots], k[:, :slots], v[:, :slots], head, prompt)
        for b, length in enumerate(lengths):
            torch.testing.assert_close(out[b, :length], expected[b, :length], rtol=0, atol=2e-6)
        length_B = torch.tensor(lengths)
        for step in range(added):
            here = Rotation(*(at(part, length_B) for part in angles))
            new, reach = (at(x, length_B) for x in (q, k, v)), rounded_up(slots + step + 1)
            state.reserve(reach, total)
            out = kind.step(*new, here, length_B, reach, state)
            torch.testing.assert_close(out, at(expected, length_B), rtol=0, atol=2e-6)
            length_B = length_B + 1


def test_room_is_made_bit_by_bit_on_cpus_and_elsewhere_at_once() -> None:
    filled, empty = (torch.ones(2, 3, 32, 8, device=device) for device in ("cpu", "meta"))
    on_cpu, elsewhere = DenseState(filled, filled), DenseState(empty, empty)
    for reach, room in ((32, 32), (64, 64), (64, 64)):
        on_cpu.reserve(reach, 100)
        elsewhere.reserve(reach, 100)
        assert on_cpu.key_BKTE.shape == on_cpu.value_BKTE.shape == (2, 3, room, 8)
        assert elsewhere.key_BKTE.shape == elsewhere.value_BKTE.shape == (2, 3, 128, 8)
    assert (on_cpu.key_BKTE[:, :, :32] == 1).all()
    assert (on_cpu.key_BKTE[:, :, 32:] == 0).all()


class _Peeks(DenseAttention):
    """A wrong kind: it ignores that documents have an order."""

    def _grouped(self, q, k, v, documents):  # type: ignore[no-untyped-def]
        out = torch.zeros_like(q).flatten(0, 1)
        for group in documents.groups:
            parts = (x.flatten(0, 1)[group.slot_GL].transpose(1, 2) for x in (q, k, v))
            mixed = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)
            out = out.index_copy(0, group.slot_GL[group.valid_GL], mixed[group.valid_GL])
        return out.view_as(q)


class _Leaks(DenseAttention):
    """A wrong kind: it takes a row for one document."""

    def forward(self, q, k, v, angles, documents):  # type: ignore[no-untyped-def]
        return super().forward(q, k, v, angles, Documents.of(torch.ones(q.shape[:2], dtype=torch.long)))


@pytest.mark.parametrize("wrong", [_Peeks, _Leaks])
def test_the_causality_check_finds_wrong_kinds(wrong) -> None:
    document_BS = torch.tensor([[1] * 5 + [2] * 7, [1] * 7 + [2] * 5])
    assert causality_error(wrong(WIDTH), document_BS) > 1e-3


def test_short_documents_in_bfloat16_are_attended_in_float32_on_a_cpu() -> None:
    """The fused kernel in bfloat16 is many times slower there, and autocast would choose it again."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, 30, WIDTH).bfloat16() for heads in (HEADS, 2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = softmax_attention(q, k, v, WIDTH**-0.5)
    wide = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True)
    assert torch.equal(found, wide.bfloat16())
    assert not torch.equal(found, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def test_groups_hold_every_slot_once_and_waste_at_most_half() -> None:
    document_BS = random_documents(np.random.default_rng(5), 4, 60)
    documents = Documents.of(document_BS)
    slots = torch.cat([group.slot_GL[group.valid_GL] for group in documents.groups])
    assert sorted(slots.tolist()) == document_BS.flatten().nonzero()[:, 0].tolist()
    squared = 0
    for group in documents.groups:
        lengths = group.valid_GL.sum(1)
        squared += int((lengths**2).sum())
        assert (2 * lengths > group.valid_GL.shape[1]).all()
        for slot, valid in zip(group.slot_GL, group.valid_GL, strict=True):
            assert (slot[valid].diff() == 1).all()
            assert len(set(document_BS.flatten()[slot].tolist())) == 1
    assert documents.squared_lengths == squared


@pytest.mark.parametrize("block", [1, 2, 5, 40, BLOCK])
def test_documents_are_padded_by_less_than_a_block(block: int) -> None:
    """Also where their group is rounded up to whole blocks, as `vq` does."""
    lengths = [3 * block + 1, 4 * block, 5 * block - block // 3, 5 * block, 9 * block - block // 4, 2 * block,
               block + 1, block, block // 2 + 1]  # fmt: skip
    number = torch.arange(1, len(lengths) + 1)
    documents = Documents.of(torch.repeat_interleave(number, torch.tensor(lengths))[None], block=block)
    for group in documents.groups:
        length_G, longest = group.valid_GL.sum(1), group.slot_GL.shape[1]
        assert (longest - length_G < block).all()
        if longest > block:
            assert (-(-longest // block) == -(-length_G // block)).all()


@pytest.mark.parametrize("multiple", [16, 64])
def test_a_prompt_is_attended_in_a_length_that_follows_from_its_own(multiple: int) -> None:
    """Up to the multiple it is a power of two, whatever other prompts are there."""
    lengths = torch.tensor([1, 2, 3, 9, 15, 16, 17, 33, 60, 64, 65, 100, 200, 300])
    valid = torch.arange(300) < lengths[:, None]
    for group in Documents.of(valid.long(), multiple).groups:
        longest = group.slot_GL.shape[1]
        for length in group.valid_GL.sum(1).tolist():
            power = 1 << (length - 1).bit_length()
            assert longest == power if power <= multiple else longest % multiple == 0


def test_equal_numbers_in_neighbouring_rows_are_two_documents() -> None:
    (group,) = Documents.of(torch.ones(2, 4, dtype=torch.long)).groups
    assert group.slot_GL.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_batch_of_padding_has_no_documents() -> None:
    assert Documents.of(torch.zeros(2, 5, dtype=torch.long)) == Documents((), 0)
