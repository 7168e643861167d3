"""The objectives: draws, weights, targets, and the reason for predicting x."""

import math
from dataclasses import replace
from itertools import pairwise, product
from typing import get_args

import pytest
import torch
from torch import nn

from model.config import HeadConfig
from model.diffusion.objective import OBJECTIVES, Draws, draw, head_loss, log_variance
from model.diffusion.path import PATHS, convert
from model.diffusion.sampler import SAMPLERS, uniform_grid
from tests.model.support import build, tiny_config

CPU = torch.device("cpu")
KINDS = ("x", "v", "eps")


def head_config(**changes: object) -> HeadConfig:
    settings: dict = {"width": 24, "depth": 2, "draws": 2}
    if changes.get("objective") == "consistency":
        settings |= {"time_law": "uniform", "loss": "x"}
    return HeadConfig(**(settings | changes))


def every_config() -> list:
    """Every objective with every prediction, loss and path that it goes with."""
    found = []
    for objective, path, prediction, loss in product(OBJECTIVES, PATHS, KINDS, KINDS):
        try:
            config = head_config(objective=objective, path=path, prediction=prediction, loss=loss, draws=4)
        except ValueError:
            continue
        found.append(pytest.param(config, id=f"{objective}-{path}-{prediction}-{loss}"))
    return found


def case(count: int = 5) -> tuple[torch.Tensor, ...]:
    location = torch.tensor([[1, 1, 2, 3]]).repeat(count, 1)
    return torch.randn(count, 32), location, torch.rand(count, 12) * 2 - 1


@pytest.mark.parametrize("prediction", ["x", "v", "eps"])
def test_loss_at_the_start(prediction) -> None:
    """The head says 0: for x the loss is |x|^2 / max(1 - t, .05)^2, and so on."""
    config = head_config(prediction=prediction)
    head = build(tiny_config(head=config), silent=True).diffusion_head
    hidden, location, x = case(200)
    draws = draw([200], [3], 12, config, CPU)
    time, noise, _ = draws
    found = head_loss(head, hidden, location, x, draws, config).view(200, 2).mean(1)
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


def test_several_draws_are_single_draws() -> None:
    head = build().diffusion_head
    hidden, location, x = case()
    four, one = head_config(draws=4), head_config(draws=1)
    draws = draw([5], [11], 12, four, CPU)
    found = head_loss(head, hidden, location, x, draws, four).view(5, 4)
    for d in range(4):
        single = Draws(*(part[d::4] for part in draws))
        expected = head_loss(head, hidden, location, x, single, one)
        torch.testing.assert_close(found[:, d], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_draws_depend_on_the_seed_of_the_row_alone(objective) -> None:
    config = head_config(objective=objective)
    time, noise, steps = draw([3, 0, 5], [10, 20, 30], 12, config, CPU)
    for counts, seeds, part in (([3], [10], slice(0, 6)), ([5], [30], slice(6, 16)), ([1, 5], [4, 30], None)):
        alone = draw(counts, seeds, 12, config, CPU)
        if part is None:
            alone, part = Draws(*(column[2:] for column in alone)), slice(6, 16)
        for together, single in zip((time, noise, steps), alone, strict=True):
            assert torch.equal(together[part], single)
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


@pytest.mark.parametrize("path", PATHS)
def test_uniform_and_shifted_times(path) -> None:
    config = head_config(draws=1, time_law="uniform", path=path)
    time = draw([100_000], [0], 1, config, CPU).time_M1
    quarters = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(time[:, 0].quantile(quarters), quarters, rtol=0, atol=0.01)
    shifted = draw([100_000], [0], 1, head_config(draws=1, time_law="uniform", path=path, time_shift=2.0), CPU).time_M1
    before, after = PATHS[path].at(time), PATHS[path].at(shifted)
    inside = shifted > 1e-3  # a schedule that starts with some signal left has no times of more noise
    ratio = (before.alpha / before.sigma) / (after.alpha / after.sigma)
    torch.testing.assert_close(ratio[inside].median(), torch.tensor(2.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("objective", "steps"), [("ddpm", 1000), ("consistency", 2), ("consistency", 32)])
def test_times_on_a_grid(objective, steps) -> None:
    config = head_config(draws=1, objective=objective, consistency_steps=min(steps, 32), time_law="uniform")
    time, _, said = draw([20_000], [0], 1, config, CPU)
    assert (said == steps).all()
    number = time * steps
    torch.testing.assert_close(number, number.round(), rtol=0, atol=1e-4)
    assert set(number.round().unique().tolist()) == set(range(steps))


def test_shortcut_draws() -> None:
    """Three in four learn the flow; the others a jump of 2^-m with its start at a multiple, that ends by t = 1."""
    config = head_config(draws=4, objective="shortcut")
    time, _, steps = draw([20_000], [0], 1, config, CPU)
    assert (steps.view(-1, 4)[:, :3] == 0).all()
    jumps = steps.view(-1, 4)[:, 3]
    share = {int(n): float((jumps == n).float().mean()) for n in jumps.unique()}
    assert share == pytest.approx(dict.fromkeys((1, 2, 4, 8, 16, 32, 64), 1 / 7), abs=0.01)
    start = time.view(-1, 4)[:, 3]
    assert torch.equal((start * jumps).round(), start * jumps)
    assert (start + 1 / jumps <= 1).all()
    flow = draw([20_000], [0], 1, head_config(draws=4), CPU).time_M1.view(-1, 4)
    assert torch.equal(time.view(-1, 4)[:, :3], flow[:, :3])


def test_every_objective_of_the_configuration_is_there() -> None:
    assert get_args(HeadConfig.__annotations__["objective"]) == tuple(OBJECTIVES)


@pytest.mark.parametrize("config", every_config())
class TestEveryObjective:
    def test_empty_batches_keep_the_graph(self, config) -> None:
        head = build(tiny_config(head=config)).diffusion_head
        hidden, location, x = (part[:0] for part in case())
        loss = head_loss(head, hidden, location, x, draw([0, 0], [1, 2], 12, config, CPU), config)
        assert loss.shape == (0,)
        loss.sum().backward()
        assert all(p.grad is not None and (p.grad == 0).all() for p in head.parameters())

    def test_loss_is_finite_and_reaches_every_parameter(self, config) -> None:
        head = build(tiny_config(head=config)).diffusion_head
        hidden, location, x = case(40)
        hidden.requires_grad_()
        loss = head_loss(head, hidden, location, x, draw([40], [1], 12, config, CPU), config)
        assert loss.shape == (160,)
        assert loss.dtype == torch.float32
        loss.sum().backward()
        for gradient in (hidden.grad, *(p.grad for p in head.parameters())):
            assert gradient is not None
            assert torch.isfinite(gradient).all()
            assert gradient.abs().max() > 0


class _Oracle(nn.Module):
    """A head that knows the data: N(0, s^2) in every number, with noise N(0, 1)."""

    def __init__(self, config: HeadConfig, x: torch.Tensor | None = None, noise: torch.Tensor | None = None) -> None:
        super().__init__()
        self.config, self.x, self.noise = config, x, noise
        self.anchor = nn.Parameter(torch.zeros(()))
        self.calls: list[tuple] = []

    def condition(self, hidden: torch.Tensor, location: torch.Tensor) -> torch.Tensor:
        return hidden

    def shortcut_in(self, steps: torch.Tensor) -> torch.Tensor:
        return steps[:, None]

    def forward(self, z: torch.Tensor, time: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        self.calls.append((z, time, condition, torch.is_grad_enabled()))
        truth = {"x": self.x, "eps": self.noise}
        if self.config.path == "flow":
            truth["v"] = self.x - self.noise  # type: ignore[operator]
        else:
            at = PATHS[self.config.path].at(time[:, None])
            truth["v"] = at.sigma * self.x - at.alpha * self.noise  # type: ignore[operator]
        out = truth[self.config.prediction] + self.anchor
        return torch.cat((out, -torch.ones_like(out)), dim=1) if self.config.objective == "ddpm" else out  # type: ignore[operator]


@pytest.mark.parametrize(("path", "prediction", "loss"), [*product(PATHS, KINDS, KINDS)])
@pytest.mark.parametrize("objective", ["matching", "ddpm"])
def test_the_truth_has_no_error(path, prediction, loss, objective) -> None:
    config = head_config(draws=1, path=path, prediction=prediction, loss=loss, time_law="uniform", objective=objective)
    hidden, location, x = case(300)
    draws = draw([300], [5], 12, config, CPU)
    # Near t = 0 dividing by alpha is bounded, and the velocity of what says the noise falls short.
    time = draws.time_M1.clamp_min(0.3) if prediction == "eps" else draws.time_M1
    draws = draws._replace(time_M1=(time * 1000).round() / 1000)
    found = head_loss(_Oracle(config, x, draws.noise_MP), hidden, location, x, draws, config)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.zeros(300), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("path", "prediction"), [*product(PATHS, KINDS)])
def test_loss_spaces_differ_by_a_factor_of_the_time(path, prediction) -> None:
    """|e' - e|^2 = (alpha / sigma)^2 |x' - x|^2 and |v' - v|^2 = |x' - x|^2 / sigma^2 for one and the same x'."""
    hidden, location, x = case(50)
    config = head_config(draws=1, path=path, prediction=prediction)
    draws = draw([50], [5], 12, config, CPU)
    draws = draws._replace(time_M1=0.2 + 0.6 * draws.time_M1)
    head = build(tiny_config(head=config)).diffusion_head
    found = {loss: head_loss(head, hidden, location, x, draws, replace(config, loss=loss)) for loss in KINDS}
    at = PATHS[path].at(draws.time_M1[:, 0])
    torch.testing.assert_close(found["v"], found["x"] / at.sigma**2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["eps"], found["x"] * (at.alpha / at.sigma) ** 2, rtol=1e-4, atol=1e-5)


def test_multi_scale_loss() -> None:
    """One scale is the plain mean; three are the mean over the error pooled by 1, 2 and 4."""
    config = tiny_config(patch_size=4, head=head_config(draws=1, loss="x"))
    head = build(config).diffusion_head
    hidden, location, _ = case(7)
    x = torch.rand(7, 48) * 2 - 1
    draws = draw([7], [1], 48, config.head, CPU)
    found = head_loss(head, hidden, location, x, draws, head_config(draws=1, loss="x", loss_scales=3))
    with torch.no_grad():
        t = draws.time_M1
        says = head(t * x + (1 - t) * draws.noise_MP, t[:, 0], head.condition(hidden, location))
        error = (says - x).view(7, 4, 4, 3).permute(0, 3, 1, 2)
    pooled = [nn.functional.avg_pool2d(error, size).square().mean((1, 2, 3)) for size in (1, 2, 4)]
    torch.testing.assert_close(found, sum(pooled) / 3, rtol=1e-5, atol=1e-6)


def test_pooled_noise() -> None:
    from model.diffusion.objective import _pooled

    noise = torch.randn(2000, 3 * 8 * 8)
    for size in (1, 2, 4, 8):
        assert float(_pooled(noise, size).std()) == pytest.approx(1 / size, rel=0.03)


def shortcut_by_hand(head, z, t, n, condition):  # type: ignore[no-untyped-def]
    """The mean of two half jumps from (z, t), each of 1 / 2n, for a head that predicts v."""
    half = 1 / (2 * n)
    first = head(z, t, condition + head.shortcut_in(2 * n))
    second = head(z + half[:, None] * first, t + half, condition + head.shortcut_in(2 * n))
    return (first + second) / 2


def test_shortcut_loss_by_hand() -> None:
    config = head_config(draws=4, objective="shortcut", prediction="v")
    head = build(tiny_config(head=config)).diffusion_head
    hidden, location, x = case(60)
    draws = draw([60], [9], 12, config, CPU)
    found = head_loss(head, hidden, location, x, draws, config)
    x, (time, noise, steps) = x.repeat_interleave(4, 0), draws
    z, t, n = time * x + (1 - time) * noise, time[:, 0], steps[:, 0]
    condition = head.condition(hidden, location).repeat_interleave(4, 0)
    with torch.no_grad():
        jumps = n > 0
        target = x - noise
        target[jumps] = shortcut_by_hand(head, z[jumps], t[jumps], n[jumps], condition[jumps])
        expected = (head(z, t, condition + head.shortcut_in(n)) - target).square().mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_shortcut_targets_have_no_gradient() -> None:
    config = head_config(draws=4, objective="shortcut", prediction="v")
    head = build(tiny_config(head=config)).diffusion_head
    hidden, location, x = case(60)
    draws = draw([60], [9], 12, config, CPU)
    loss, steps = head_loss(head, hidden, location, x, draws, config), draws.steps_M1[:, 0]
    # The wish for half the size is used for targets alone, so a jump's loss gives it no gradient.
    (gradient,) = torch.autograd.grad(loss[steps == 1].sum(), [head.shortcut_in.weight], retain_graph=True)
    assert gradient[7].abs().max() > 0
    assert (gradient[:7] == 0).all()
    (gradient,) = torch.autograd.grad(loss[steps == 0].sum(), [head.shortcut_in.weight])
    assert gradient[0].abs().max() > 0
    assert (gradient[1:] == 0).all()


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_shortcuts_of_a_constant_velocity_have_no_error(prediction) -> None:
    """One pair of patch and noise: the flow is a straight line, and every jump follows it."""
    config = head_config(draws=4, objective="shortcut", prediction=prediction)
    _, location, _ = case(100)
    hidden = torch.zeros(100, 1)  # the condition is then the wish alone
    x, noise = torch.randn(2, 1, 12).unbind(0)

    class Line(_Oracle):
        def forward(self, z: torch.Tensor, time: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            self.calls.append((z, time, condition, torch.is_grad_enabled()))
            return (x if prediction == "x" else x - noise).expand(len(z), -1) + self.anchor

    draws = draw([100], [3], 12, config, CPU)
    draws = draws._replace(noise_MP=noise.expand(400, -1))
    head = Line(config)
    found = head_loss(head, hidden, location, x.expand(100, -1), draws, config)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.zeros(400), rtol=0, atol=1e-6)
    halves = [call for call in head.calls if not call[3]]
    assert len(halves) == 2
    for _, time, wish, _ in halves:
        assert (time < 1).all()
        assert set(wish[:, 0].tolist()) <= {2, 4, 8, 16, 32, 64, 128}


def test_consistency_loss_by_hand() -> None:
    config = head_config(draws=4, objective="consistency", prediction="v", consistency_steps=3)
    head = build(tiny_config(head=config)).diffusion_head
    hidden, location, x = case(30)
    draws = draw([30], [9], 12, config, CPU)
    found = head_loss(head, hidden, location, x, draws, config)
    x, (time, noise, _) = x.repeat_interleave(4, 0), draws
    condition = head.condition(hidden, location).repeat_interleave(4, 0)

    def jump(t: torch.Tensor) -> torch.Tensor:
        z = t * x + (1 - t) * noise
        return z + (1 - t) * head(z, t[:, 0], condition)

    with torch.no_grad():
        last = time > 0.6
        target = torch.where(last, x, jump((time + 1 / 3).clamp_max(1)))
        expected = (jump(time) - target).square().mean(1)
    assert last.any()
    assert not last.all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["x", "v"])
@pytest.mark.parametrize("distils", [False, True])
def test_consistency_with_an_average_and_a_teacher_by_hand(prediction, distils) -> None:
    """The target is the average's jump from the next time, which is on the line or an Euler step of the teacher away;
    from the last time before the end there is no jump: the target is where that step ends."""
    config = head_config(draws=4, objective="consistency", prediction=prediction, consistency_steps=3)
    head, average, teacher = (build(tiny_config(head=config), seed=n).diffusion_head for n in range(3))
    hidden, location, x = case(30)
    draws = draw([30], [9], 12, config, CPU)
    found = head_loss(head, hidden, location, x, draws, config, average, teacher if distils else None)
    x, (time, noise, _) = x.repeat_interleave(4, 0), draws

    def velocity(who, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        out = who(z, t[:, 0], who.condition(hidden, location).repeat_interleave(4, 0))
        return (out - z) / (1 - t) if prediction == "x" else out

    with torch.no_grad():
        z = time * x + (1 - time) * noise
        after = time + 1 / 3
        there = z + velocity(teacher, z, time) / 3 if distils else after * x + (1 - after) * noise
        last, safe = time > 0.6, after.clamp_max(0.9)
        target = torch.where(last, there, there + (1 - after) * velocity(average, there, safe))
        expected = (z + (1 - time) * velocity(head, z, time) - target).square().mean(1)
    assert last.any()
    assert not last.all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_average_and_teacher_get_no_gradient() -> None:
    config = head_config(draws=4, objective="consistency")
    head, average, teacher = (build(tiny_config(head=config), seed=n).diffusion_head for n in range(3))
    hidden, location, x = case(30)
    head_loss(head, hidden, location, x, draw([30], [9], 12, config, CPU), config, average, teacher).sum().backward()
    assert any(parameter.grad is not None for parameter in head.parameters())
    others = [*average.parameters(), *teacher.parameters()]
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in others)


def test_consistency_over_one_step_is_flow_matching() -> None:
    """At the boundary the target is the patch itself."""
    one = head_config(objective="consistency", consistency_steps=1)
    head = build(tiny_config(head=one)).diffusion_head
    hidden, location, x = case(20)
    draws = draw([20], [9], 12, one, CPU)
    assert (draws.time_M1 == 0).all()
    found, plain = (head_loss(head, hidden, location, x, draws, config) for config in (one, head_config()))
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("objective", ["consistency", "ddpm", "shortcut"])
def test_the_second_evaluation_has_no_gradient(objective) -> None:
    config = head_config(draws=4, objective=objective)
    hidden, location, x = case(30)
    draws = draw([30], [9], 12, config, CPU)
    head = _Oracle(config, x.repeat_interleave(4, 0), draws.noise_MP)
    if objective == "shortcut":
        head.x = head.noise = torch.zeros(1, 12)
    head_loss(head, hidden, location, x, draws, config)  # type: ignore[arg-type]
    assert [call[3] for call in head.calls] == {"consistency": [False, True], "ddpm": [True],
                                                "shortcut": [False, False, True]}[objective]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_divergence_of_the_learned_variance(path) -> None:
    """Against PyTorch's divergence of Gaussians with the variances of arXiv 2102.09672."""
    config = head_config(draws=4, path=path, objective="ddpm", prediction="eps", loss="eps")
    head = build(tiny_config(head=config)).diffusion_head
    hidden, location, x = case(40)
    draws = draw([40], [2], 12, config, CPU)
    draws = draws._replace(time_M1=draws.time_M1.clamp_min(0.3).mul(1000).round() / 1000)
    found = head_loss(head, hidden, location, x, draws, config).double()
    x, (time, noise, _) = x.repeat_interleave(4, 0), draws
    with torch.no_grad():
        at, next_ = (PATHS[path].at(t.double()) for t in (time, time.double() + 1e-3))
        z = at.alpha * x + at.sigma * noise
        condition = head.condition(hidden, location).repeat_interleave(4, 0)
        eps, share = head(z.float(), time[:, 0], condition).double().chunk(2, dim=1)
        a = at.alpha / next_.alpha
        beta = at.sigma**2 - a**2 * next_.sigma**2
        posterior = beta * next_.sigma**2 / at.sigma**2

        def mean(x: torch.Tensor) -> torch.Tensor:
            return (a * next_.sigma**2 * z + next_.alpha * beta * x) / at.sigma**2

        share = (share + 1) / 2
        variance = torch.exp(share * beta.log() + (1 - share) * posterior.log())
        divergence = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean(x), posterior.sqrt()),
            torch.distributions.Normal(mean((z - at.sigma * eps) / at.alpha), variance.sqrt()),
        )
        expected = (eps - noise).square().mean(1) + divergence.mean(1)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_learned_variance_moves_no_mean() -> None:
    """The divergence reaches the half of the output that says the variance, and the error the other half."""
    config = head_config(draws=4, objective="ddpm")
    head = build(tiny_config(head=config)).diffusion_head
    hidden, location, x = case(40)
    draws = draw([40], [2], 12, config, CPU)
    head_loss(head, hidden, location, x, draws, config).sum().backward()
    both = head.patch_out.bias.grad.clone()
    plain = build(tiny_config(head=head_config(draws=4))).diffusion_head
    own = {name: value.clone() for name, value in head.state_dict().items()}
    own |= {name: own[name][:12] for name in ("patch_out.weight", "patch_out.bias")}
    plain.load_state_dict(own)
    head_loss(plain, hidden, location, x, draws, head_config(draws=4)).sum().backward()
    torch.testing.assert_close(both[:12], plain.patch_out.bias.grad, rtol=1e-4, atol=1e-4)
    assert both[12:].abs().max() > 0


def test_ends_of_the_learned_variance() -> None:
    sigmas = torch.tensor(3.0)
    assert float(log_variance(torch.tensor(-1.0), sigmas)) == 0
    assert float(log_variance(torch.tensor(1.0), sigmas)) == pytest.approx(2 * math.log(3))


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


def spiral(count: int) -> torch.Tensor:
    turn = 3 * math.pi * torch.rand(count).sqrt()
    return torch.stack((turn.cos(), turn.sin()), dim=-1) * (turn / (3 * math.pi))[:, None] * 2


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 512])
def test_predicting_x_keeps_samples_on_the_data_plane(dim) -> None:
    """A spiral in a plane of 512 dimensions: predicting v leaks noise off the plane, predicting x does not. Of 2
    dimensions there is nothing but the plane, and both are as near to the spiral."""
    steps, batch = 2000, 512
    torch.manual_seed(1)
    plane, true = torch.linalg.qr(torch.randn(dim, 2)).Q, spiral(4000)
    off_plane, off_spiral = {}, {}
    for prediction in ("x", "v"):
        config = head_config(draws=1, prediction=prediction)
        torch.manual_seed(0)
        toy = _Toy(dim)
        optimizer = torch.optim.Adam(toy.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            draws = draw([batch], [step], dim, config, CPU)
            x, nothing = spiral(batch) @ plane.T, torch.zeros(batch, 1)
            loss = head_loss(toy, nothing, nothing, x, draws, config).mean()  # type: ignore[arg-type]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

        @torch.no_grad()
        def field(z: torch.Tensor, t: float, toy: _Toy = toy, kind: str = prediction) -> torch.Tensor:
            out = toy(z, torch.full((len(z),), t), z)
            return convert(out, kind, "v", z, PATHS["flow"].at(torch.tensor(t)))  # type: ignore[arg-type]

        samples = SAMPLERS["heun"](field, torch.randn(256, dim), uniform_grid(50))
        off_plane[prediction] = float((samples - samples @ plane @ plane.T).norm(dim=1).median())
        off_spiral[prediction] = float(torch.cdist(samples @ plane, true).min(dim=1).values.median())
    # Its arms are 4/3 apart: what lies between them is up to 2/3 away.
    assert off_spiral["x"] < 0.2
    if dim == 2:
        assert off_spiral["v"] < 2 * off_spiral["x"]
    else:
        assert off_plane["x"] < 1
        assert off_plane["v"] > 5 * off_plane["x"]


@pytest.mark.slow
def test_consistency_training_from_scratch_reaches_its_fixed_point() -> None:
    """Of Gaussian data all jumps are linear: the best jump from a time is the regression of the next one's end on z.

    From pure noise it is then the mean, plus the product of these slopes times z. It shrinks the data (every regression
    loses what it cannot know), the less the more times there are.
    """
    mean, deviation, times = 0.4, 0.5, 8
    slope = 1.0
    for k in range(times):
        t, after = k / times, (k + 1) / times
        slope *= (t * after * deviation**2 + (1 - t) * (1 - after)) / (t**2 * deviation**2 + (1 - t) ** 2)
    assert 0.35 < slope < 0.45, "the closed form: below the deviation, 0.5"

    config = head_config(objective="consistency", consistency_steps=times, draws=1)
    torch.manual_seed(0)
    toy, count, steps = _Toy(2), 512, 800
    optimizer = torch.optim.Adam(toy.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    nothing = torch.zeros(count, 1)
    for step in range(steps):
        x = mean + deviation * torch.randn(count, 2)
        loss_M = head_loss(toy, nothing, nothing, x, draw([count], [step], 2, config, CPU), config)  # type: ignore[arg-type]
        optimizer.zero_grad()
        loss_M.mean().backward()
        optimizer.step()
        schedule.step()
    z = torch.randn(4000, 2)
    with torch.no_grad():
        end = toy(z, torch.zeros(len(z)), z)
    assert end.mean().item() == pytest.approx(mean, abs=0.05)
    assert ((end - mean) * z).mean().item() == pytest.approx(slope, abs=0.05)
