"""The objective: draws, weights, and the reason for predicting x."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from model.config import HeadConfig
from model.diffusion.flow import draw, flow_loss
from model.diffusion.path import noised, velocity
from model.diffusion.sampler import SAMPLERS, uniform_grid
from tests.model.support import build, tiny_config

CPU = torch.device("cpu")


def head_config(**changes: object) -> HeadConfig:
    settings: dict = {"width": 24, "depth": 2, "draws": 2}
    return HeadConfig(**(settings | changes))


def case(count: int = 5) -> tuple[torch.Tensor, ...]:
    location = torch.tensor([[1, 1, 2, 3]]).repeat(count, 1)
    return torch.randn(count, 32), location, torch.rand(count, 12) * 2 - 1


@pytest.mark.parametrize("prediction", ["x", "v", "eps"])
def test_loss_at_the_start(prediction) -> None:
    """The head says 0: for x the loss is |x|^2 / max(1 - t, .05)^2, and so on."""
    config = head_config(prediction=prediction)
    head = build(tiny_config(head=config), silent=True).diffusion_head
    hidden, location, x = case(200)
    time, noise = draw([200], [3], 12, config, CPU)
    found = flow_loss(head, hidden, location, x, time, noise, config)
    expected = []
    for m in range(400):
        t, clean = float(time[m]), x[m // 2]
        z = t * clean + (1 - t) * noise[m]
        bounded = max(1 - t, 0.05)
        says = {"x": -z / bounded, "v": 0 * z, "eps": z / max(t, 0.05)}[prediction]
        expected.append(((says - (clean - z) / bounded) ** 2).mean())
    torch.testing.assert_close(found, torch.stack(expected).view(200, 2).mean(1), rtol=1e-4, atol=1e-5)
    if prediction == "x":
        weight = (1 / (1 - time[:, 0]).clamp_min(0.05) ** 2).view(200, 2).mean(1)
        torch.testing.assert_close(found, weight * x.square().mean(1), rtol=1e-4, atol=1e-5)


def test_several_draws_are_the_mean_over_single_draws() -> None:
    head = build().diffusion_head
    hidden, location, x = case()
    four, one = head_config(draws=4), head_config(draws=1)
    time, noise = draw([5], [11], 12, four, CPU)
    found = flow_loss(head, hidden, location, x, time, noise, four)
    time, noise = time.view(5, 4, 1), noise.view(5, 4, 12)
    single = [flow_loss(head, hidden, location, x, time[:, d], noise[:, d], one) for d in range(4)]
    torch.testing.assert_close(found, torch.stack(single).mean(0), rtol=1e-5, atol=1e-6)
    # With the same time and noise four times over, four draws are one.
    repeated = (time[:, :1].expand(5, 4, 1).reshape(20, 1), noise[:, :1].expand(5, 4, 12).reshape(20, 12))
    torch.testing.assert_close(flow_loss(head, hidden, location, x, *repeated, four), single[0], rtol=1e-5, atol=1e-6)


def test_draws_depend_on_the_seed_of_the_row_alone() -> None:
    config = head_config()
    time, noise = draw([3, 0, 5], [10, 20, 30], 12, config, CPU)
    for counts, seeds, part in (([3], [10], slice(0, 6)), ([5], [30], slice(6, 16)), ([1, 5], [4, 30], None)):
        alone_time, alone_noise = draw(counts, seeds, 12, config, CPU)
        if part is None:
            alone_time, alone_noise, part = alone_time[2:], alone_noise[2:], slice(6, 16)
        assert torch.equal(time[part], alone_time)
        assert torch.equal(noise[part], alone_noise)
    assert not torch.equal(draw([3], [11], 12, config, CPU)[1], noise[:6])


def test_draws_ignore_the_global_state() -> None:
    torch.manual_seed(1)
    first = draw([4], [5], 12, head_config(), CPU)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, draw([4], [5], 12, head_config(), CPU), strict=True))


@pytest.mark.parametrize(
    ("mean", "std", "median", "average", "late"), [(-0.8, 0.8, 0.3100, 0.3312, 1e-6), (0.0, 1.0, 0.5, 0.5, 0.0016)]
)
def test_logit_normal_times(mean, std, median, average, late) -> None:
    config = head_config(draws=1, time_mean=mean, time_std=std)
    time = draw([400_000], [0], 1, config, CPU)[0]
    assert time.shape == (400_000, 1)
    assert float(time.median()) == pytest.approx(median, abs=2e-3)
    assert float(time.mean()) == pytest.approx(average, abs=2e-3)
    assert float((time > 0.95).float().mean()) == pytest.approx(late, abs=3e-4)
    assert time.min() > 0
    assert time.max() < 1


def test_noise_has_its_scale() -> None:
    noise = draw([20_000], [0], 12, head_config(draws=1, noise_scale=2.0), CPU)[1]
    assert float(noise.std()) == pytest.approx(2, rel=0.01)
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)


def test_no_patches_give_an_empty_loss_with_a_graph() -> None:
    head = build().diffusion_head
    hidden, location, x = (part[:0] for part in case())
    config = head_config()
    loss = flow_loss(head, hidden, location, x, *draw([0, 0], [1, 2], 12, config, CPU), config)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in head.parameters())


class _Toy(nn.Module):
    """A plain MLP in the place of the head: 2-D data in many dimensions, no condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [width + 1, 256, 256, 256, 256, width]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])

    def condition(self, hidden: torch.Tensor, location: torch.Tensor) -> torch.Tensor:
        return hidden

    def forward(self, z: torch.Tensor, time: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat((z, time[:, None]), dim=-1))


@pytest.mark.slow
def test_predicting_x_keeps_samples_on_the_data_plane() -> None:
    """A spiral in a plane of 512 dimensions: predicting v leaks noise off the plane, predicting x does not."""
    dim, steps, batch = 512, 500, 256
    plane = torch.linalg.qr(torch.randn(dim, 2)).Q
    off_plane = {}
    for prediction in ("x", "v"):
        config = head_config(draws=1, prediction=prediction)
        torch.manual_seed(0)
        toy = _Toy(dim)
        optimizer = torch.optim.Adam(toy.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            turn = 3 * math.pi * torch.rand(batch).sqrt()
            flat = torch.stack((turn.cos(), turn.sin()), dim=-1) * (turn / (3 * math.pi))[:, None] * 2
            noise_and_time = draw([batch], [step], dim, config, CPU)
            nothing = torch.zeros(batch, 1)
            loss = flow_loss(toy, nothing, nothing, flat @ plane.T, *noise_and_time, config).mean()  # type: ignore[arg-type]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

        @torch.no_grad()
        def field(z: torch.Tensor, t: float, toy: _Toy = toy, kind: str = prediction) -> torch.Tensor:
            out = toy(z, torch.full((len(z),), t), z)
            return velocity(out, z, torch.tensor(t), kind, 0.0)  # type: ignore[arg-type]

        samples = SAMPLERS["heun"](field, torch.randn(256, dim), uniform_grid(50))
        off_plane[prediction] = float((samples - samples @ plane @ plane.T).norm(dim=1).median())
    assert off_plane["x"] < 1
    assert off_plane["v"] > 5 * off_plane["x"]


def test_noised_and_velocity_agree() -> None:
    x, e = torch.randn(2, 4, 3, dtype=torch.float64).unbind(0)
    t, h = torch.tensor(0.4, dtype=torch.float64), 1e-6
    slope = (noised(x, e, t + h) - noised(x, e, t - h)) / (2 * h)
    torch.testing.assert_close(velocity(x, noised(x, e, t), t, "x", 0.05), slope, rtol=1e-8, atol=1e-8)
