"""What the head learns: times and noises of the draws, and the loss of each draw.

    matching      the data itself: flow matching, or DDPM's simple loss on its paths (arXiv 2210.02747, 2006.11239)
    ddpm          also the variance of a step of 1/1000 of the way (arXiv 2102.09672, as in MAR)
    shortcut      also jumps of 1/64 to 1 of the way: one is two of half the size (arXiv 2410.12557)
    consistency   the end of the jump from a time is that from the next time (arXiv 2303.01469); the
                  next time lies on the line to the data, or where a trained flow leads

Each gives the clean patch that the prediction is compared with. The error is then measured in x, v or eps as
`model.head.loss` says.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import SHORTCUTS, HeadConfig
from model.diffusion.head import DiffusionHead
from model.diffusion.path import LEVELS, PATHS, Path, Prediction, convert, noised, shifted


class Draws(NamedTuple):
    """The random numbers of M = patches * draws losses, the draws of a patch side by side, float32."""

    time_M1: Tensor
    """In [0, 1); a multiple of 1 / steps where that is given."""
    noise_MP: Tensor
    steps_M1: Tensor
    """The loss is about a move over 1 / steps of the way; 0: about no move."""


def draw(count_B: list[int], seed_B: list[int], patch_width: int, config: HeadConfig,
         device: torch.device) -> Draws:  # fmt: skip
    """Draws for count_B[b] patches of row b, a function of seed_B[b] alone.

    One generator per row makes the draws independent of how rows are spread over ranks and micro-batches.
    """
    times, noises, steps = [], [], []
    for count, seed in zip(count_B, seed_B, strict=True):
        generator = torch.Generator(device).manual_seed(seed)
        draws = count * config.draws
        law = torch.rand if config.time_law == "uniform" else torch.randn
        times.append(law(draws, 1, generator=generator, device=device))
        noises.append(torch.randn(draws, patch_width, generator=generator, device=device))
        steps.append(_steps(draws, config, generator))
    time_M1, path, steps_M1 = torch.cat(times), PATHS[config.path], torch.cat(steps)
    if config.time_law == "logit-normal":
        time_M1 = torch.sigmoid(config.time_mean + config.time_std * time_M1)
    if config.time_shift != 1:
        time_M1 = path.own(shifted(path.straight(time_M1), config.time_shift))
    # Down to the start of the step that a time lies in.
    number_M1 = torch.minimum((time_M1 * steps_M1).floor(), steps_M1 - 1)
    time_M1 = torch.where(steps_M1 > 0, number_M1 / steps_M1.clamp_min(1), time_M1)
    return Draws(time_M1, config.noise_scale * torch.cat(noises), steps_M1)


def _steps(draws: int, config: HeadConfig, generator: torch.Generator) -> Tensor:
    zeros_M1 = torch.zeros(draws, 1, device=generator.device)
    if config.objective == "matching":
        return zeros_M1
    if config.objective == "shortcut":  # every fourth draw, in a size that is as likely as any other
        size_M1 = torch.randint(SHORTCUTS - 1, (draws, 1), generator=generator, device=generator.device)
        first = generator.initial_seed() % 4  # rows may hold fewer than four
        fourth_M1 = (first + torch.arange(draws, device=generator.device).unsqueeze(1)) % 4 == 3
        return torch.where(fourth_M1, 2.0**size_M1, zeros_M1)
    return zeros_M1 + (LEVELS if config.objective == "ddpm" else config.consistency_steps)


Network = Callable[..., Tensor]
"""What is trained, with what it knows of the draws: (z (K, P), time (K, 1), steps (K, 1), chosen (M,)) -> what it says,
(K, P), with learned variance (K, 2P), float32. steps: of the moves that shortcuts are asked for; default: none.
chosen: a mask of the K draws that are asked about; default: all of them."""


def head_loss(head: DiffusionHead, hidden_ND: Tensor, location_N4: Tensor, x_NP: Tensor, draws: Draws,
              config: HeadConfig, average: DiffusionHead | None = None, teacher: DiffusionHead | None = None
              ) -> Tensor:  # fmt: skip
    """The loss of every draw, averaged over the numbers of the patch. x_NP: clean patches in [-1, 1].

    With the default objective and loss, the target is (x - z) / max(1 - t, time_eps), so for x-prediction the loss is
    |x' - x|^2 / max(1 - t, time_eps)^2. Returns (M,) float32.

    average, teacher: for the objective consistency, the head that says where the second jump ends (default: the same
    head), and a trained flow of the same prediction that says where the first step of the way goes (default: the data).
    """

    def network(one: DiffusionHead) -> Network:
        condition_MW = one.condition(hidden_ND, location_N4).repeat_interleave(config.draws, dim=0)

        def says(z: Tensor, time: Tensor, steps: Tensor | None = None, chosen: Tensor | None = None) -> Tensor:
            condition = condition_MW if chosen is None else condition_MW[chosen]
            if steps is not None:
                condition = condition + one.shortcut_in(steps[:, 0])
            return one(z, time[:, 0], condition).float()

        return says

    x_MP = x_NP.float().repeat_interleave(config.draws, dim=0)
    return loss_of(network(head), x_MP, draws, config, average and network(average), teacher and network(teacher))


def loss_of(network: Network, x_MP: Tensor, draws: Draws, config: HeadConfig, average: Network | None = None,
            teacher: Network | None = None) -> Tensor:  # fmt: skip
    """The same for any network; x_MP: the clean patch of every draw."""
    return OBJECTIVES[config.objective](Case(network, x_MP, draws, config, average or network, teacher))


@dataclass(frozen=True)
class Case:
    """The draws of a batch, and what all objectives need of them."""

    network: Network
    x_MP: Tensor
    draws: Draws
    config: HeadConfig
    average: Network
    teacher: Network | None

    @property
    def path(self) -> Path:
        return PATHS[self.config.path]

    def z(self, time_M1: Tensor) -> Tensor:
        """The noised patch at a time, from this draw's noise."""
        return noised(self.x_MP, self.draws.noise_MP, self.path.at(time_M1))

    def error(self, predicted_MP: Tensor, x_MP: Tensor, noise_MP: Tensor) -> Tensor:
        """Mean squared difference of the prediction at the draws' times from a clean patch and its noise. (M,)"""
        config, at, z_MP = self.config, self.path.at(self.draws.time_M1), self.z(self.draws.time_M1)
        to = config.loss

        def value(given: Tensor, kind: Prediction) -> Tensor:
            return convert(given, kind, to, z_MP, at, config.time_eps)

        if config.prediction == "x":  # the same bounded division on both sides, so that the right x has no error
            target_MP = value(x_MP, "x")
        else:
            target_MP = {"x": x_MP, "v": at.p * x_MP - at.q * noise_MP, "eps": noise_MP}[to]
        error_MP = value(predicted_MP, config.prediction) - target_MP
        scales = [_pooled(error_MP, 2**scale).square().mean(dim=1) for scale in range(config.loss_scales)]
        return torch.stack(scales).mean(dim=0)


def _pooled(values_MP: Tensor, size: int) -> Tensor:
    """Means over size x size pixels of square patches of 3 colors."""
    if size == 1:
        return values_MP
    side = math.isqrt(values_MP.shape[1] // 3) // size
    return values_MP.view(-1, side, size, side, size, 3).mean(dim=(2, 4)).flatten(1)


def matching(case: Case) -> Tensor:
    time_M1, noise_MP, _ = case.draws
    return case.error(case.network(case.z(time_M1), time_M1), case.x_MP, noise_MP)


def ddpm(case: Case) -> Tensor:
    """The error of the mean, plus the divergence of the step from the true one, in nats per number, which trains the
    variance only. The last step, to t = 1, adds no noise and has none."""
    time_M1, noise_MP, steps_M1 = case.draws
    z_MP = case.z(time_M1)
    predicted_MP, spread_MP = case.network(z_MP, time_M1).chunk(2, dim=1)
    at = case.path.at(time_M1)
    x_MP = convert(predicted_MP.detach(), case.config.prediction, "x", z_MP, at, case.config.time_eps)
    last_M1 = time_M1 * steps_M1 > steps_M1 - 1.5
    after = case.path.at(torch.where(last_M1, time_M1, time_M1 + 1 / steps_M1))
    snr_M1 = ((after.alpha / after.sigma) ** 2 - (at.alpha / at.sigma) ** 2) / case.config.noise_scale**2
    # Logarithm of the said variance over that of q(z_after | z, x), and the divergence of two Gaussians.
    ratio_MP = log_variance(spread_MP, at.sigma / after.sigma)
    divergence_MP = (ratio_MP - 1 + (1 + snr_M1 * (x_MP - case.x_MP) ** 2) * torch.exp(-ratio_MP)) / 2
    return case.error(predicted_MP, case.x_MP, noise_MP) + divergence_MP.mean(dim=1)


def log_variance(spread: Tensor, sigmas: Tensor) -> Tensor:
    """Logarithm of the variance of a step over that of q(z_after | z, x): 0 where the spread is -1; at 1 it is the
    noise that the path adds. sigmas: sigma before the step over sigma after it."""
    return (spread + 1) * sigmas.log()


def shortcut(case: Case) -> Tensor:
    """Three draws in four learn the flow; the fourth that a jump is the mean of two of half the size, which are not
    trained."""
    time_M1, noise_MP, steps_M1 = case.draws
    z_MP, jumps_M = case.z(time_M1), steps_M1[:, 0] > 0
    x_MP, noise_MP = case.x_MP.clone(), noise_MP.clone()
    with torch.no_grad():
        z, time, half = z_MP[jumps_M], time_M1[jumps_M], 0.5 / steps_M1[jumps_M]

        def velocity(z: Tensor, time: Tensor) -> Tensor:
            out = case.network(z, time, 2 * steps_M1[jumps_M], jumps_M)
            return convert(out, case.config.prediction, "v", z, case.path.at(time))

        first = velocity(z, time)
        v = (first + velocity(z + half * first, time + half)) / 2
        x_MP[jumps_M], noise_MP[jumps_M] = z + (1 - time) * v, z - time * v
    return case.error(case.network(z_MP, time_M1, steps_M1), x_MP, noise_MP)


def consistency(case: Case) -> Tensor:
    """Where the jump from the next time ends, without a gradient; at the end of the way, where the way ends.

    The next time is on the same line to the data, or an Euler step of the teacher away (consistency distillation).
    """
    time_M1, noise_MP, steps_M1 = case.draws
    z_MP, after_M1 = case.z(time_M1), time_M1 + 1 / steps_M1
    last_M1 = time_M1 * steps_M1 > steps_M1 - 1.5

    def ends(network: Network, z: Tensor, time_M1: Tensor) -> Tensor:
        return convert(network(z, time_M1), case.config.prediction, "x", z, case.path.at(time_M1))

    with torch.no_grad():
        way_MP = ends(case.teacher, z_MP, time_M1) if case.teacher else case.x_MP
        after_M1 = torch.where(last_M1, time_M1, after_M1)  # any time will do for what is not used
        z = z_MP + (after_M1 - time_M1) / (1 - time_M1) * (way_MP - z_MP)
        x_MP = torch.where(last_M1, way_MP, ends(case.average, z, after_M1))
        noise_MP = convert(x_MP, "x", "eps", z_MP, case.path.at(time_M1))
    return case.error(case.network(z_MP, time_M1), x_MP, noise_MP)


OBJECTIVES: dict[str, Callable[[Case], Tensor]] = {
    "matching": matching,
    "ddpm": ddpm,
    "shortcut": shortcut,
    "consistency": consistency,
}
"""Every objective by name. A new one is added here and in HeadConfig; tests/model/test_objective.py holds it to the
contract."""
