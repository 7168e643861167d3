"""The path and its conversions."""

import pytest
import torch

from model.diffusion.path import clean, noise, noised, velocity


@pytest.fixture
def case() -> tuple[torch.Tensor, ...]:
    x, e = torch.randn(2, 200, 12, dtype=torch.float64).unbind(0)
    time = torch.rand(200, 1, dtype=torch.float64) * 0.9 + 0.05
    return x, e, time, noised(x, e, time)


def test_ends() -> None:
    x, e = torch.randn(2, 3, 4).unbind(0)
    assert torch.equal(noised(x, e, torch.tensor(0.0)), e)
    assert torch.equal(noised(x, e, torch.tensor(1.0)), x)


def test_every_prediction_gives_the_same_velocity(case) -> None:
    x, e, time, z = case
    for kind, predicted in (("x", x), ("v", x - e), ("eps", e)):
        torch.testing.assert_close(velocity(predicted, z, time, kind, 0.05), x - e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["x", "v", "eps"])
def test_round_trips(case, kind) -> None:
    _, _, time, z = case
    predicted = torch.randn_like(z)
    v = velocity(predicted, z, time, kind, 0.0)
    back = {"x": clean, "eps": noise, "v": lambda v, z, time: v}[kind](v, z, time)
    torch.testing.assert_close(back, predicted, rtol=1e-11, atol=1e-12)


def test_division_is_bounded_at_the_ends() -> None:
    one, zero = torch.ones(1), torch.zeros(1)
    assert velocity(one, zero, torch.tensor(0.99), "x", 0.05).item() == pytest.approx(20)
    assert velocity(one, zero, torch.tensor(0.0), "eps", 0.05).item() == pytest.approx(-20)
    assert velocity(one, zero, torch.tensor(0.9), "x", 0.05).item() == pytest.approx(10, rel=1e-6)
