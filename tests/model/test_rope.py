"""The rotation against complex numbers, the rotate_half of Llama, and the vector of the articles."""

import math

import pytest
import torch

from model.positions import LAYOUTS, parse_document
from model.rope import frequencies, rotate, rotation
from tests.model.support import turn_by_complex_numbers

CPU = torch.device("cpu")


def turned(x: torch.Tensor, positions: torch.Tensor, kind: str = "alternate", base: float = 10000.0) -> torch.Tensor:
    return rotate(x, rotation(positions, frequencies(x.shape[-1], base, kind, CPU)))


@pytest.mark.parametrize("base", [100.0, 10000.0, 1e6])
@pytest.mark.parametrize("width", [4, 8, 64])
def test_equals_complex_multiplication(width, base) -> None:
    x = torch.randn(1, 20, 3, width)
    positions = torch.rand(1, 20, 2) * 50
    found = turned(x, positions, base=base)
    for slot in range(20):
        for head in range(3):
            expected = turn_by_complex_numbers(x[0, slot, head], *positions[0, slot].tolist(), base)
            torch.testing.assert_close(found[0, slot, head].double(), expected, rtol=0, atol=3e-5)


def test_text_equals_llama() -> None:
    width, slots = 32, 300
    x = torch.randn(1, slots, 2, width)
    n = torch.arange(1, slots + 1, dtype=torch.float32)
    inverse = 1.0 / (10000.0 ** (torch.arange(0, width, 2).float() / width))
    angle = torch.cat([torch.outer(n, inverse)] * 2, dim=-1)[None, :, None]
    half = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1)
    expected = x * angle.cos() + half * angle.sin()
    found = turned(x, torch.stack((n, n), dim=-1)[None])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)  # float32 angles of up to 300 radians


def test_article_vector() -> None:
    # The article pairs neighbours, (q0, q1) and (q2, q3); pair i here is (i, i + E/2).
    adjacent = torch.tensor([1.0, 0.0, 0.0, 1.0])
    ours = torch.stack((adjacent[0::2], adjacent[1::2])).flatten()
    found = turned(ours.view(1, 1, 1, 4), torch.tensor([[[5.5, 4.0]]])).view(2, 2).T.flatten()
    expected = torch.tensor([0.708669774, -0.705540326, -0.039989334, 0.999200107])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["alternate", "paired"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_depend_on_differences_only(layout, kind) -> None:
    positions = LAYOUTS[layout](parse_document("T3 I2x3 T2"))
    q, k = torch.randn(2, 1, 11, 1, 16).unbind(0)

    def scores(shift: torch.Tensor) -> torch.Tensor:
        moved = positions + shift
        return torch.einsum("bihe,bjhe->ij", turned(q, moved, kind), turned(k, moved, kind))

    torch.testing.assert_close(scores(torch.tensor([17.5, -4.0])), scores(torch.zeros(2)), rtol=0, atol=3e-5)


def test_frequencies() -> None:
    alternate = frequencies(8, 10000.0, "alternate", CPU)
    torch.testing.assert_close(alternate, torch.tensor([10000.0 ** (-2 * i / 8) for i in range(4)]))
    torch.testing.assert_close(frequencies(8, 10000.0, "paired", CPU), torch.tensor([1, 1, 0.01, 0.01]))


def test_transposed_images_swap_their_roles_only_with_paired_frequencies() -> None:
    x = torch.randn(1, 1, 1, 16)
    swapped = x.view(2, 4, 2).flip(-1).reshape(1, 1, 1, 16)  # exchange the two pairs of each frequency
    here, there = torch.tensor([[[3.0, 7.5]]]), torch.tensor([[[7.5, 3.0]]])
    back = turned(swapped, there, "paired").view(2, 4, 2).flip(-1).reshape(1, 1, 1, 16)
    torch.testing.assert_close(turned(x, here, "paired"), back)
    back = turned(swapped, there, "alternate").view(2, 4, 2).flip(-1).reshape(1, 1, 1, 16)
    assert not torch.allclose(turned(x, here, "alternate"), back, atol=1e-2)


def test_length_is_kept_and_origin_is_identity() -> None:
    x = torch.randn(2, 5, 2, 8)
    torch.testing.assert_close(turned(x, torch.randn(2, 5, 2) * 100).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned(x, torch.zeros(2, 5, 2)), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_low_precision_positions_are_refused(dtype) -> None:
    with pytest.raises(TypeError, match="float32"):
        rotation(torch.ones(1, 3, 2, dtype=dtype), frequencies(8, 10000.0, "alternate", CPU))


def test_bfloat16_queries_are_turned_in_float32() -> None:
    x = torch.randn(1, 4, 1, 8).bfloat16()
    positions = torch.full((1, 4, 2), 1000.5)
    found = turned(x, positions)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, turned(x.float(), positions).bfloat16())
    assert math.isclose(float(torch.tensor(1000.5).bfloat16()), 1000.0)  # what would be lost
