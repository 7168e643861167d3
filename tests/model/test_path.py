"""The paths, their conversions and their schedules."""

import math
from itertools import product
from typing import get_args

import pytest
import torch

from model.config import HeadConfig
from model.diffusion.path import LEVELS, PATHS, Prediction, Quantity, convert, noised, shifted

KINDS: tuple[Quantity, ...] = get_args(Quantity)
F64 = torch.float64


def truths(x: torch.Tensor, e: torch.Tensor, z: torch.Tensor, alpha, sigma, name: str) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    """Everything that may be predicted, from the data and noise of z."""
    v = x - e if name == "flow" else sigma * x - alpha * e
    return {"x": x, "v": v, "eps": e, "score": -(z - alpha * x) / sigma**2}


def test_every_choice_of_the_configuration_is_a_path() -> None:
    assert get_args(HeadConfig.__annotations__["path"]) == tuple(PATHS)
    assert get_args(HeadConfig.__annotations__["prediction"]) == get_args(Prediction)
    assert get_args(HeadConfig.__annotations__["loss"]) == get_args(Prediction)


@pytest.mark.parametrize("name", PATHS)
class TestEveryPath:
    @pytest.fixture
    def case(self, name) -> tuple[torch.Tensor, ...]:
        x, e = torch.randn(2, 200, 12, dtype=F64).unbind(0)
        time = torch.rand(200, 1, dtype=F64) * 0.9 + 0.05
        return x, e, time, noised(x, e, PATHS[name].at(time))

    def test_from_noise_to_data(self, name) -> None:
        path, (x, e) = PATHS[name], torch.randn(2, 3, 4)
        assert torch.equal(noised(x, e, path.at(torch.tensor(1.0))), x)
        torch.testing.assert_close(noised(x, e, path.at(torch.tensor(0.0))), e, rtol=0, atol=0.03)
        times = torch.linspace(0, 1, 3001, dtype=F64)
        at = path.at(times)
        ratio = (at.alpha / (at.alpha + at.sigma)).diff()
        assert (ratio > 0).all()
        assert torch.isfinite(ratio).all()

    @pytest.mark.parametrize(("kind", "to"), [*product(KINDS, KINDS)])
    def test_conversions(self, name, kind, to, case) -> None:
        x, e, time, z = case
        at = PATHS[name].at(time)
        true = truths(x, e, z, at.alpha, at.sigma, name)
        torch.testing.assert_close(convert(true[kind], kind, to, z, at), true[to], rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(("kind", "to"), [*product(KINDS, KINDS)])
    def test_round_trips(self, name, kind, to, case) -> None:
        _, _, time, z = case
        given, at = torch.randn_like(z), PATHS[name].at(time)
        back = convert(convert(given, kind, to, z, at), to, kind, z, at)
        torch.testing.assert_close(back, given, rtol=1e-9, atol=1e-9)

    def test_velocity_is_the_slope_along_the_path(self, name, case) -> None:
        """Up to a factor of the time that the angle of a DDPM path brings."""
        x, e, time, _ = case
        path, h = PATHS[name], 1e-7
        time = (time * LEVELS).floor() / LEVELS + 0.5 / LEVELS  # inside a straight part
        at = path.at(time)
        slope = (noised(x, e, path.at(time + h)) - noised(x, e, path.at(time - h))) / (2 * h)
        v = truths(x, e, noised(x, e, at), at.alpha, at.sigma, name)["v"]
        factor = (slope / v).median(dim=1, keepdim=True).values
        torch.testing.assert_close(factor * v, slope, rtol=1e-4, atol=1e-4)
        assert (factor > 0).all()
        if name == "flow":
            torch.testing.assert_close(factor, torch.ones_like(factor), rtol=1e-6, atol=1e-6)

    def test_straight_times(self, name, case) -> None:
        """z / scale lies on the flow path at the straight time, and the way back is exact."""
        x, e, time, z = case
        path = PATHS[name]
        straight = path.straight(time)
        on_flow = straight * x + (1 - straight) * e
        torch.testing.assert_close(z / path.at(time).scale, on_flow, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(path.own(straight), time, rtol=0, atol=1e-12)
        single = path.own(path.straight(time.float()))
        torch.testing.assert_close(single, time.float(), rtol=0, atol=2e-6)

    @pytest.mark.parametrize("shift", [2.0, 4.0, 0.5])
    def test_shift_divides_the_amplitude_of_signal_over_noise(self, name, shift, case) -> None:
        _, _, time, _ = case
        path = PATHS[name]
        before, after = path.at(time), path.at(path.own(shifted(path.straight(time), shift)))
        ratio = (before.alpha / before.sigma) / (after.alpha / after.sigma)
        inside = path.straight(torch.zeros((), dtype=F64)) < shifted(path.straight(time), shift)
        torch.testing.assert_close(ratio[inside], torch.full_like(ratio[inside], shift), rtol=1e-8, atol=0)
        if name != "flow":  # the formula for a path of constant variance
            alpha = before.alpha / (before.alpha**2 + shift**2 * before.sigma**2).sqrt()
            torch.testing.assert_close(after.alpha[inside], alpha[inside], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("shift", "pairs"),
    [
        (2.0, {0.1: 0.052632, 0.25: 0.142857, 0.5: 0.333333, 0.75: 0.6, 0.9: 0.818182}),
        (4.0, {0.1: 0.027027, 0.25: 0.076923, 0.5: 0.2, 0.75: 0.428571, 0.9: 0.692308}),
        (3.2, {0.25: 0.0943396}),
    ],
)
def test_shift_vectors(shift, pairs) -> None:
    for time, expected in pairs.items():
        assert shifted(time, shift) == pytest.approx(expected, abs=1e-6)
        # The same as s times the noise: z = t x + s (1 - t) e has that ratio of signal to noise.
        assert shifted(time, shift) / (1 - shifted(time, shift)) == pytest.approx(time / (shift * (1 - time)))


def at_level(name: str, level: int) -> float:
    return float(PATHS[name].at(torch.tensor(1 - level / LEVELS, dtype=F64)).alpha)


def test_linear_schedule_vectors() -> None:
    assert at_level("linear", LEVELS) == pytest.approx(0.00648203, abs=1e-8)
    product_ = 1.0
    for level in range(1, LEVELS + 1):
        product_ *= math.sqrt(1 - 0.02 * level / LEVELS)
        if level % 50 == 0:
            assert at_level("linear", level) == pytest.approx(product_, rel=1e-9)


def test_cosine_schedule_vectors() -> None:
    """Cumulative alpha squared after index + 1 levels."""
    for index, expected in (
        (0, 0.999958716), (99, 0.972092737), (249, 0.847012161), (499, 0.493843590), (749, 0.144272102),
        (899, 0.0240917), (998, 2.42877e-6),
    ):  # fmt: skip
        assert at_level("cosine", index + 1) ** 2 == pytest.approx(expected, rel=2e-6)
    for index, expected in ((0, 4.12842e-5), (998, 0.75), (999, 0.999)):
        beta = 1 - (at_level("cosine", index + 1) / at_level("cosine", index)) ** 2
        assert beta == pytest.approx(expected, rel=1e-5)


def test_division_is_bounded_at_the_ends() -> None:
    one, zero, flow = torch.ones(1), torch.zeros(1), PATHS["flow"]

    def velocity(value: torch.Tensor, kind: Quantity, z: torch.Tensor, time: float) -> float:
        return convert(value, kind, "v", z, flow.at(torch.tensor(time)), 0.05).item()

    assert velocity(one, "x", zero, 0.99) == pytest.approx(20)
    assert velocity(one, "eps", zero, 0.0) == pytest.approx(-20)
    assert velocity(one, "x", zero, 0.9) == pytest.approx(10, rel=1e-6)
