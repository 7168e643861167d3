"""The text head against F.cross_entropy, and the loss of tied embeddings at the start."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import text_head
from model.text_head import TextHead, bits_per_byte


@pytest.mark.parametrize("half_swap", [False, True])
def test_loss_is_cross_entropy_whole_and_in_chunks(half_swap, monkeypatch) -> None:
    head = TextHead(nn.Parameter(torch.randn(50, 16)), half_swap)
    hidden, target = torch.randn(23, 16, requires_grad=True), torch.randint(0, 50, (23,))
    weight_23 = torch.randn(23)
    used = torch.cat((head.weight[:, 8:], head.weight[:, :8]), dim=1) if half_swap else head.weight
    expected = F.cross_entropy(hidden @ used.T, target, reduction="none")
    wanted = torch.autograd.grad((expected * weight_23).sum(), (hidden, head.weight))
    for elements in (2**24, 50 * 4, 50, 1):
        monkeypatch.setattr(text_head, "_CHUNK_ELEMENTS", elements)
        found = head(hidden, target)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        got = torch.autograd.grad((found * weight_23).sum(), (hidden, head.weight))
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_no_targets_give_an_empty_loss_with_a_graph() -> None:
    head = TextHead(nn.Parameter(torch.randn(9, 4)), False)
    head(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.long)).sum().backward()
    assert (head.weight.grad == 0).all()


@pytest.mark.parametrize(("half_swap", "expected"), [(False, 15.30), (True, 10.61)])
def test_loss_of_tied_embeddings_at_the_start(half_swap, expected) -> None:
    """A hidden state along its own token's embedding, the next token another one: ln 32000 is 10.373."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(32000, 768, generator=generator)
    own = torch.randint(0, 32000, (400,), generator=generator)
    target = torch.randint(0, 32000, (400,), generator=generator)
    hidden = F.normalize(weight[own], dim=-1) * math.sqrt(768)
    with torch.no_grad():
        found = TextHead(nn.Parameter(weight), half_swap)(hidden, target).mean()
    assert float(found) == pytest.approx(expected, abs=0.12)


def test_logits_are_float32_under_autocast() -> None:
    head = TextHead(nn.Parameter(torch.randn(9, 4)), False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.logits(torch.randn(3, 4)).dtype == torch.float32


def test_bits_per_byte() -> None:
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)
    assert bits_per_byte(0.0, 0) == 0
