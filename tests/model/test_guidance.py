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
    assert Guidance(2.5, "constant").at(0.3, FRACTION).tolist() == [[2.5]] * 3


def test_linear_reaches_the_scale_at_the_last_patch() -> None:
    assert Guidance(3.0, "linear").at(0.9, FRACTION).tolist() == [[1.5], [2], [3]]


@pytest.mark.parametrize(
    ("low", "high", "time", "on"),
    [(0.1, 1, 0, False), (0.1, 1, 0.1, False), (0.1, 1, 0.11, True), (0.1, 0.5, 0.5, False), (0, 0.5, 0, True)],
)
def test_interval(low, high, time, on) -> None:
    assert Guidance(4.0, "interval", low, high).at(time, FRACTION).tolist() == [[4.0 if on else 1.0]] * 3


def test_streams() -> None:
    assert Guidance(1.0).streams == 1
    assert Guidance(0.0).streams == Guidance(2.0).streams == 2
    assert Guidance(1.0, image_scale=2.0).streams == Guidance(2.0, image_scale=0.0).streams == 3


@pytest.mark.parametrize(
    ("schedule", "time", "streams"),
    [("interval", 0.1, 1), ("interval", 0.2, 3), ("interval", 0.4, 1), ("constant", 0.1, 3), ("linear", 0.1, 3)],
)
def test_streams_without_a_say_are_not_run(schedule, time, streams) -> None:
    guidance = Guidance(4.0, schedule, 0.1, 0.4, image_scale=2.0)
    assert guidance.streams_at(time) == streams
    assert guidance.streams_at(torch.tensor([[time]])) == 3  # a time for every patch
    assert Guidance(1.0, schedule, 0.1, 0.4).streams_at(time) == 1


def velocities(count: int) -> list[torch.Tensor]:
    return list(torch.randn(count, 3, 5, dtype=torch.float64).unbind(0))


@pytest.mark.parametrize("schedule", ["constant", "linear", "interval"])
@pytest.mark.parametrize("image", [1.5, 0.0])
def test_separate_scales(schedule, image) -> None:
    """u2 + s2 (u1 - u2) + s (c - u1), with u1 the stream without text and u2 that without images as well."""
    c, u1, u2 = velocities(3)
    guidance = Guidance(4.0, schedule, image_scale=image)
    found = guidance.apply([c, u1, u2], 0.2, FRACTION)
    part = FRACTION.double() if schedule == "linear" else torch.ones(3, 1, dtype=torch.float64)
    s, s2 = 1 + 3 * part, 1 + (image - 1) * part
    torch.testing.assert_close(found, u2 + s2 * (u1 - u2) + s * (c - u1), rtol=1e-6, atol=1e-6)


def test_scales_of_one_are_the_conditional() -> None:
    c, u1, u2 = velocities(3)
    assert Guidance().apply([c], 0.5, FRACTION) is c
    torch.testing.assert_close(Guidance(image_scale=1.0).apply([c, u1, u2], 0.5, FRACTION), c, rtol=1e-12, atol=1e-12)
    outside = Guidance(4.0, "interval", 0.2, 0.4, image_scale=3.0)
    torch.testing.assert_close(outside.apply([c, u1, u2], 0.5, FRACTION), c, rtol=1e-12, atol=1e-12)


def test_renormalised_guidance_keeps_the_direction_and_is_never_longer() -> None:
    c, u = velocities(2)
    plain, short = (Guidance(5.0, "constant", renormalise=flag).apply([c, u], 0.5, FRACTION) for flag in (False, True))
    for patch in range(3):
        wanted = min(1.0, float(c[patch].norm() / plain[patch].norm()))
        assert wanted < 1
        torch.testing.assert_close(short[patch], plain[patch] * wanted, rtol=1e-9, atol=1e-9)
    still = Guidance(0.5, "constant", renormalise=True).apply([c, 0 * c], 0.5, FRACTION)
    torch.testing.assert_close(still, c / 2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "wrong", [{"scale": -1}, {"image_scale": -1}, {"low": 0.5, "high": 0.5}, {"low": -0.1}, {"high": 1.1}]
)
def test_refusals(wrong) -> None:
    with pytest.raises(ValueError, match="guidance"):
        Guidance(**wrong)
