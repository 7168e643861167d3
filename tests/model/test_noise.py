"""Noise by hashing: a published generator, the normal distribution, and independence."""

import numpy as np
import pytest
import torch
from scipy import stats

from model import noise
from model.noise import fold, normal


def test_hash_is_splitmix64() -> None:
    """The first numbers of the generator with seed 0, as published with it."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    zero = torch.zeros(1, dtype=torch.int64)
    for found in (torch.cat([fold(zero, n) for n in range(3)]), fold(zero, torch.arange(3))):
        assert [n % 2**64 for n in found.tolist()] == expected


@pytest.mark.parametrize(("keys", "count"), [(1, 100_000), (100_000, 1), (500, 200)])
def test_numbers_are_normal(keys, count) -> None:
    """Along the numbers of a key, and along neighbouring keys."""
    found = normal(torch.arange(keys), count).double().flatten().numpy()
    assert stats.kstest(found, "norm").pvalue > 0.01
    for moment, expected in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert np.mean(found**moment) == pytest.approx(expected, abs=5 * np.sqrt(96 / len(found)))
    for lag in {1, 2, min(count, 1000)}:
        assert abs(np.corrcoef(found[:-lag], found[lag:])[0, 1]) < 5 / np.sqrt(len(found))


def test_numbers_follow_from_the_key_alone() -> None:
    keys = fold(torch.arange(64), 7)
    found = normal(keys, 12)
    assert found.dtype == torch.float32
    assert torch.equal(normal(keys[[5, 3]], 12), found[[5, 3]])
    assert len(found.unique()) == found.numel()


@pytest.mark.parametrize("bits", [0, -1])
def test_the_hashes_nearest_to_0_and_1_give_finite_numbers(bits, monkeypatch) -> None:
    monkeypatch.setattr(noise, "fold", lambda key, number: torch.full_like(key + number, bits))
    assert torch.isfinite(normal(torch.arange(2), 3)).all()
