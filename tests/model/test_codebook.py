"""Codebooks: typed-in vectors of the moving average, k-means, gradients past codewords, counts."""

import numpy as np
import pytest
import torch

from model.attention.codebook import Codebook, VQConfig, nearest
from tests.model.support import Words, batch_of, build, picture, tiny_config


def make(codewords: list, dtype: torch.dtype = torch.float64, **changes: object) -> Codebook:
    """One head with these codewords, every count 1."""
    words = torch.tensor(codewords, dtype=dtype)
    book = Codebook(1, words.shape[1], VQConfig(codes=len(words), **changes)).to(dtype)
    book.key_sum_KCE.copy_(words[None])
    book.count_KC.fill_(1)
    return book


def told(book: Codebook, keys: torch.Tensor, real: torch.Tensor | None = None):  # type: ignore[no-untyped-def]
    real = torch.ones(len(keys), dtype=torch.bool) if real is None else real
    word, code, _, quantised = book(keys[None, :, None], real[None])
    return word, code, quantised


KEYS = torch.tensor([[0.2, 0.1], [0.9, 1.2], [1.1, 0.8], [0.1, -0.3]], dtype=torch.float64)


def test_one_update_by_hand() -> None:
    book = make([[0, 0], [1, 1]])
    _, code, quantised = told(book, KEYS)
    assert code.flatten().tolist() == [0, 1, 1, 0]
    assert float(quantised.commit) == pytest.approx(4 * 0.0625 / 2**0.5)  # mean .0625, over sqrt(E)
    book.update(quantised.sums)
    torch.testing.assert_close(book.key_sum_KCE[0], torch.tensor([[0.003, -0.002], [1.01, 1.01]]).double())
    torch.testing.assert_close(book.count_KC[0], torch.tensor([1.01, 1.01]).double())
    expected = torch.tensor([[0.0029703, -0.0019802], [1, 1]]).double()
    torch.testing.assert_close(book.codewords_KCE[0], expected, rtol=0, atol=1e-7)


def test_an_unused_codeword_stays_for_458_updates() -> None:
    book = make([[0, 0], [9, 9]])
    sums = told(book, KEYS)[2].sums
    for _ in range(458):
        book.update(sums)
    torch.testing.assert_close(book.codewords_KCE[0, 1], torch.tensor([9.0, 9.0]).double(), rtol=1e-12, atol=0)
    book.update(sums)
    assert (book.codewords_KCE[0, 1] < 9 - 1e-3).all()
    assert book.measured["vq/dead"] == 0.5


def test_padding_and_the_split_into_passes_do_not_matter() -> None:
    torch.manual_seed(0)
    keys, book = torch.randn(12, 3, dtype=torch.float64), make(torch.randn(4, 3).tolist())
    whole = told(book, keys)[2].sums
    parts = [told(book, part)[2].sums for part in keys.split(5)]
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-14)
    real = torch.arange(15) < 12
    padded = told(book, torch.cat((keys, torch.full((3, 3), 7.0))), real)[2]
    torch.testing.assert_close(padded.sums, whole, rtol=0, atol=1e-14)
    assert padded.commit == told(book, keys)[2].commit


def test_the_nearest_codeword_is_the_nearest() -> None:
    torch.manual_seed(0)
    keys, words = torch.randn(2500, 2, 5), torch.randn(2, 7, 5)
    expected = torch.stack([torch.cdist(keys[:, h], words[h]).argmin(1) for h in range(2)], dim=1)
    assert torch.equal(nearest(keys, words), expected)


def test_metrics_of_uniform_and_of_constant_codes() -> None:
    book = make([[0, 0], [1, 1]])
    book.update(told(book, KEYS)[2].sums)
    assert book.measured["vq/perplexity"] == pytest.approx(2)
    assert book.measured["vq/error"] == pytest.approx((0.25 / float(KEYS.square().sum())) ** 0.5)
    book.update(told(book, KEYS[:1])[2].sums)
    assert book.measured["vq/perplexity"] == pytest.approx(1)


def test_fitting_moves_codewords_to_the_keys() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[5.0, 0], [-5, 0], [0, 5], [0, -5]])
    keys = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 2)
    book = make([[0.0, 0.0]] * 4, torch.float32)
    book.fitting = True
    word, _, _ = told(book, keys)
    assert float((word[0, :, 0] - keys).norm(dim=1).max()) < 6  # every key has a codeword of a cluster
    # A quarter if two clusters share a codeword, which k-means allows.
    assert float((keys - word[0, :, 0]).square().sum() / keys.square().sum()) < 0.26
    assert float(book.count_KC.sum()) >= 200
    few = make([[0.0, 0.0]] * 8, torch.float32)
    few.fitting = True
    told(few, keys[:3])  # fewer keys than codewords
    assert few.codewords_KCE.isfinite().all()


def test_resetting_moves_dead_codewords_and_no_others() -> None:
    book = make([[0, 0], [1, 1], [50, 50], [-50, 50]], reset_below=0.5)
    book.count_KC[0, 2:] = 0.1
    sums = told(book, KEYS)[2].sums
    plain = make([[0, 0], [1, 1], [50, 50], [-50, 50]])
    plain.count_KC[0, 2:] = 0.1
    plain.update(sums)
    book.update(sums)
    torch.testing.assert_close(book.codewords_KCE[0, :2], plain.codewords_KCE[0, :2], rtol=0, atol=1e-12)
    assert float((book.codewords_KCE[0, 2:].norm(dim=1)).max()) < 2
    assert float(book.count_KC.sum()) == pytest.approx(float(plain.count_KC[0, :2].sum()))


def test_straight_through_gives_the_gradient_to_the_key_and_none_to_the_codebook() -> None:
    keys = KEYS.clone().requires_grad_()
    word, code, _ = told(make([[0, 0], [1, 1]]), keys)
    assert torch.equal(word[0, :, 0], code.flatten().double()[:, None].expand(4, 2))
    (gradient,) = torch.autograd.grad(word.sum(), keys)
    assert torch.equal(gradient, torch.ones_like(keys))


def test_rotation_trick() -> None:
    """Backward is G^T g with G = (|c| / |k|) R, R the turn from k to c in their plane, written out as a matrix."""
    torch.manual_seed(0)
    words = torch.randn(1, 4, dtype=torch.float64)
    k, g = torch.randn(2, 4, dtype=torch.float64)
    book = make(words.tolist(), gradient="rotation")
    key = k[None].clone().requires_grad_()
    word, _, _ = told(book, key)
    assert torch.equal(word.flatten(), words[0])
    (found,) = torch.autograd.grad((word.flatten() * g).sum(), key)
    a, b = k / k.norm(), words[0] / words[0].norm()
    u = (b - (a @ b) * a) / (b - (a @ b) * a).norm()
    cos, sin = a @ b, b @ u
    turn = torch.eye(4) + (cos - 1) * (a.outer(a) + u.outer(u)) + sin * (u.outer(a) - a.outer(u))
    matrix = words[0].norm() / k.norm() * turn
    torch.testing.assert_close(matrix @ k, words[0])
    torch.testing.assert_close(found[0], matrix.T @ g)
    opposite = (-words).clone().requires_grad_()
    word, _, _ = told(book, opposite)
    assert torch.equal(torch.autograd.grad(word.sum(), opposite)[0], torch.ones(1, 4, dtype=torch.float64))


def test_diveq() -> None:
    """d|c - k|/dk = -(c - k)/|c - k|, so the gradient is g less its part along the error."""
    torch.manual_seed(0)
    words, (k, g) = torch.randn(1, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    key = k[None].clone().requires_grad_()
    word, _, _ = told(make(words.tolist(), gradient="diveq"), key)
    assert torch.equal(word.flatten(), words[0])
    (found,) = torch.autograd.grad((word.flatten() * g).sum(), key)
    e = (words[0] - k) / (words[0] - k).norm()
    torch.testing.assert_close(found[0], g - e * (e @ g))
    exact = words.clone().requires_grad_()
    (found,) = torch.autograd.grad(told(make(words.tolist(), gradient="diveq"), exact)[0].sum(), exact)
    assert found.isfinite().all()


def test_the_commitment_pulls_keys_to_their_codewords() -> None:
    keys = KEYS.clone().requires_grad_()
    word, _, quantised = told(make([[0, 0], [1, 1]]), keys)
    (gradient,) = torch.autograd.grad(quantised.commit, keys)
    torch.testing.assert_close(gradient, 2 * (KEYS - word[0, :, 0].detach()) / 2**0.5)


def simvq(heads: int = 2, width: int = 3, codes: int = 5) -> Codebook:
    book = Codebook(heads, width, VQConfig(codes=codes, codebook="simvq")).double()
    book.initialise()
    with torch.no_grad():
        book.map_KEE += 0.5 * torch.randn(heads, width, width)
    return book


def test_simvq_by_hand() -> None:
    """Codewords are w M; the commitment |k - w M|^2 / sqrt(E) gives M the gradient -2 w^T (k - w M) / sqrt(E)."""
    torch.manual_seed(0)
    book = simvq()
    keys = torch.randn(1, 40, 2, 3, dtype=torch.float64, requires_grad=True)
    real = torch.arange(40)[None] < 33
    word, code, codewords, quantised = book(keys, real)
    to_map, to_keys = torch.zeros(2, 3, 3, dtype=torch.float64), torch.zeros(40, 2, 3, dtype=torch.float64)
    for h in range(2):
        w, m = book.key_sum_KCE[h], book.map_KEE[h].detach()
        torch.testing.assert_close(codewords[h], torch.stack([row @ m for row in w]))
        for n in range(40):
            k = keys[0, n, h].detach()
            nearest_one = min(range(5), key=lambda c: float((k - w[c] @ m).square().sum()))
            assert int(code[0, n, h]) == nearest_one
            torch.testing.assert_close(word[0, n, h].detach(), w[nearest_one] @ m)
            if n < 33:
                error = k - w[nearest_one] @ m
                to_map[h] -= 2 * w[nearest_one].outer(error) / 3**0.5
                to_keys[n, h] = 2 * error / 3**0.5
    found = torch.autograd.grad(quantised.commit, (book.map_KEE, keys), retain_graph=True)
    torch.testing.assert_close(found[0], to_map)
    torch.testing.assert_close(found[1][0], to_keys)
    assert not codewords.requires_grad
    (nothing,) = torch.autograd.grad(word.sum(), book.map_KEE, allow_unused=True)
    assert nothing is None


def test_only_the_map_moves_the_codewords_of_simvq() -> None:
    torch.manual_seed(0)
    book = simvq()
    keys, real = torch.randn(1, 40, 2, 3, dtype=torch.float64), torch.ones(1, 40, dtype=torch.bool)
    before = [buffer.clone() for buffer in book.buffers()]
    commits = []
    for _ in range(20):
        _, code, _, quantised = book(keys, real)
        (gradient,) = torch.autograd.grad(quantised.commit, book.map_KEE)
        with torch.no_grad():
            book.map_KEE -= 0.005 * gradient
        book.update(quantised.sums)
        commits.append(float(quantised.commit.detach()))
    assert all(torch.equal(*pair) for pair in zip(before, book.buffers(), strict=True))
    assert commits[-1] < 0.9 * commits[0]
    unused = [c for h in range(2) for c in range(5) if c not in code[..., h]]
    assert book.measured["vq/dead"] == pytest.approx(len(unused) / 10)


@pytest.mark.parametrize("recompute", [False, True])
def test_activation_checkpointing_counts_once(recompute) -> None:
    documents = [[Words([1, 2, 3]), picture(np.random.default_rng(0), 2, 3), Words([4, 5])]]
    batch = batch_of(documents, [[Words([6])]])
    model = build(tiny_config(attention="vq"))
    if recompute:
        model.recompute_activations()
    losses = model(batch)
    (losses.text + losses.image + losses.commit).backward()
    heads, real = 2, int((batch.document_BS > 0).sum())
    for book in model.codebooks().values():
        sums = book.take()
        counts = sums[:-2].view(heads, 12, -1)[..., -1]
        assert (counts.sum(1) == real).all()
        assert (book.take() == 0).all()
    assert float(losses.commit.detach()) > 0
    model.eval()
    assert float(model(batch).commit) == 0
    assert all(book.pending is None for book in model.codebooks().values())
