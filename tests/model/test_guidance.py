"""Classifier-free guidance: its identities and schedules."""

import pytest
import torch

from model.diffusion.guidance import Guidance, guide

FRACTION = torch.tensor([[0.25], [0.5], [1.0]])


def test_identities() -> None:
    conditional, unconditional = torch.randn(2, 6, 5, dtype=torch.float64).unbind(0)
    one = torch.ones(6, 1, dtype=torch.float64)
    torch.testing.assert_close(guide(conditional, unconditional, one), conditional, rtol=1e-14, atol=1e-14)
    assert torch.equal(guide(conditional, unconditional, 0 * one), unconditional)
    for scale in (0.0, 1.0, 2.5, 30.0):
        assert torch.equal(guide(conditional, conditional, scale * one), conditional)
    expected = 3 * conditional - 2 * unconditional
    torch.testing.assert_close(guide(conditional, unconditional, 3 * one), expected, rtol=1e-13, atol=1e-13)


def test_constant() -> None:
    assert Guidance(2.5).at(0.3, FRACTION).tolist() == [[2.5]] * 3


def test_linear_reaches_the_scale_at_the_last_patch() -> None:
    assert Guidance(3.0, "linear").at(0.9, FRACTION).tolist() == [[1.5], [2], [3]]


@pytest.mark.parametrize(
    ("low", "high", "time", "on"),
    [(0.1, 1, 0, False), (0.1, 1, 0.1, False), (0.1, 1, 0.11, True), (0.1, 0.5, 0.5, False), (0, 0.5, 0, True)],
)
def test_interval(low, high, time, on) -> None:
    assert Guidance(4.0, "interval", low, high).at(time, FRACTION).tolist() == [[4.0 if on else 1.0]] * 3


def test_active() -> None:
    assert not Guidance(1.0).active
    assert Guidance(0.0).active
    assert Guidance(2.0).active


@pytest.mark.parametrize("wrong", [{"scale": -1}, {"low": 0.5, "high": 0.5}, {"low": -0.1}, {"high": 1.1}])
def test_refusals(wrong) -> None:
    with pytest.raises(ValueError, match="guidance"):
        Guidance(**wrong)
