"""Schedule, weight-decay groups, AdamW, Muon and the weight average against slow float64 references."""

import math
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from tests.train.support import TINY
from train import settings
from train.config import OptimSection
from train.optimizer import Muon, WeightAverage, adamw, learning_rate, optimizers, orthogonalised
from train.pipeline import make_tokenizer, vocabulary_of

CONFIG = OptimSection(lr=2e-3, final_lr_ratio=0.1, warmup_steps=10, weight_decay=0.25, eps=1e-7)


class Net(nn.Module):
    """Parameters of every kind, in an order that is not alphabetical."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.z = nn.Parameter(torch.randn(4, 3, generator=random))
        self.token_embedding = nn.Embedding(5, 3)
        self.a = nn.Parameter(torch.randn(4, 3, generator=random))
        self.norm = nn.Parameter(torch.randn(3, generator=random))


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


def test_schedule() -> None:
    rates = [learning_rate(step, 110, CONFIG) for step in range(110)]
    assert rates[0] == pytest.approx(2e-4)
    assert rates[4] == pytest.approx(1e-3)
    assert rates[9] == rates[10] == pytest.approx(2e-3)
    assert rates[60] == pytest.approx(2e-3 * (0.1 + 0.9 / 2))
    assert rates[35] == pytest.approx(2e-3 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert learning_rate(110, 110, CONFIG) == pytest.approx(2e-4)
    assert all(a <= b for a, b in pairwise(rates[:10]))
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert min(rates) > 0


def test_schedule_without_warm_up_and_with_nothing_else() -> None:
    assert learning_rate(0, 5, OptimSection(lr=1.0, warmup_steps=0)) == 1.0
    assert [learning_rate(s, 3, OptimSection(lr=1.0, warmup_steps=3)) for s in range(3)] == [1 / 3, 2 / 3, 1.0]


def test_weight_decay_groups_by_name() -> None:
    from model.ropeway import Ropeway

    config = settings.parse([*TINY, "--model.patch_bottleneck=8", "--model.head.objective=shortcut"])[0]
    model = Ropeway(config.model, vocabulary_of(make_tokenizer(config.data)))
    made = adamw(model, config.optim)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in made.param_groups)
    assert [group["weight_decay"] for group in made.param_groups] == [config.optim.weight_decay, 0.0]
    assert decayed | free == set(names.values())
    assert not decayed & free
    matrices = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    expected = {n for n in names.values() if n.startswith("backbone.") and n.split(".")[-2] in matrices}
    assert len(expected) == 7
    for layer in ("patch_in", "condition_in", "location_in", "time_in", "time_out", "patch_out"):
        expected.add(f"diffusion_head.{layer}.weight")
    expected |= {"diffusion_head.blocks.0.up.weight", "diffusion_head.blocks.0.down.weight"}
    assert decayed == expected
    assert {"token_embedding.weight", "text_head.weight", "patch_embedding.0.weight", "patch_embedding.1.weight",
            "diffusion_head.shortcut_in.weight",
            "diffusion_head.blocks.0.modulation.weight", "diffusion_head.blocks.0.norm.weight"} <= free  # fmt: skip


def test_adamw_against_its_formula() -> None:
    net = Net()
    optimizer = adamw(net, CONFIG)
    weights = {name: p.detach().double().clone() for name, p in net.named_parameters()}
    m = {name: torch.zeros_like(w) for name, w in weights.items()}
    v = {name: torch.zeros_like(w) for name, w in weights.items()}
    random = torch.Generator().manual_seed(1)
    for step in range(20):
        rate = learning_rate(step, 20, CONFIG)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, p in net.named_parameters():
            p.grad = torch.randn(p.shape, generator=random) * 10.0 ** (step % 5 - 3)
            g = p.grad.double()
            decay = 0.0 if name in ("norm", "token_embedding.weight") else CONFIG.weight_decay
            m[name] = CONFIG.beta1 * m[name] + (1 - CONFIG.beta1) * g
            v[name] = CONFIG.beta2 * v[name] + (1 - CONFIG.beta2) * g * g
            unbiased_m = m[name] / (1 - CONFIG.beta1 ** (step + 1))
            unbiased_v = v[name] / (1 - CONFIG.beta2 ** (step + 1))
            weights[name] = weights[name] * (1 - rate * decay) - rate * unbiased_m / (unbiased_v.sqrt() + CONFIG.eps)
        optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach().double(), weights[name], rtol=1e-5, atol=1e-6)


def test_muon_against_its_definition() -> None:
    """A matrix moves by 0.2 sqrt(longer side) of the orthogonal factor of its averaged gradient, as far as five steps
    of Newton-Schulz reach it; what does not decay moves as under AdamW."""
    config, net = replace(CONFIG, muon_lr=4e-3), Net()
    start, other = deepcopy(net), deepcopy(net)
    both, alone = optimizers(net, config, bf16=False), adamw(other, config)
    average = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in net.named_parameters()}
    random = torch.Generator().manual_seed(1)
    for _ in range(5):
        before = {name: p.detach().double().clone() for name, p in net.named_parameters()}
        for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=random)
            q.grad = p.grad.clone()
            average[name] = 0.95 * average[name] + 0.05 * p.grad.double()
        for each in (*both, alone):
            for group in each.param_groups:
                group["lr"] = 1e-3 * group.get("scale", 1.0)
            each.step()
        for name in ("z", "a"):
            p = net.get_parameter(name)
            direction = 0.95 * average[name] + 0.05 * p.grad.double()  # type: ignore[union-attr]  # Nesterov
            u, _, v = torch.linalg.svd(direction, full_matrices=False)
            rate = 1e-3 * 4e-3 / CONFIG.lr
            moved = (before[name] * (1 - rate * CONFIG.weight_decay) - p.detach().double()) / rate
            assert (moved - 0.4 * u @ v).norm() < 0.35 * (0.4 * u @ v).norm()
    for name in ("token_embedding.weight", "norm"):
        assert torch.equal(net.get_parameter(name), other.get_parameter(name))
        assert not torch.equal(net.get_parameter(name), start.get_parameter(name))


@pytest.mark.parametrize("bf16", [True, False])
def test_muon_against_pytorch(bf16: bool) -> None:
    """More matrices of a shape than are worked on together, tall and wide ones; PyTorch's own rounds to bfloat16."""
    random = torch.Generator().manual_seed(0)
    shapes = [(24, 16)] * 11 + [(16, 24), (16, 16)]
    ours = [nn.Parameter(torch.randn(shape, generator=random)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    one = Muon([{"params": ours, "weight_decay": 0.25}], lr=1e-2, bf16=bf16)
    two = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.25, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=random) * 10.0 ** (step - 3)
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in theirs]
        one.step()
        two.step()
        for p, q, old in zip(ours, theirs, before, strict=True):
            assert (p - q).norm() < 0.03 * (step + 1) * (q - old).norm()


@pytest.mark.parametrize(("value", "expected"), [
    (0.001, 0.47054), (0.003, 1.11036), (0.005, 1.15437), (0.01, 0.69892), (0.02, 0.68183), (0.05, 0.75812),
    (0.1, 0.71212), (0.2, 0.74677), (0.3, 1.07959), (0.5, 0.76544), (0.7, 1.12032), (0.9, 0.68201),
])  # fmt: skip
def test_singular_values_of_newton_schulz(value: float, expected: float) -> None:
    turn = torch.linalg.qr(torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    x = turn[0] @ torch.diag(torch.tensor([value, math.sqrt(1 - value**2), 0.0], dtype=torch.float64)) @ turn[1]
    found = turn[0].mT @ orthogonalised(x[None], bf16=False)[0] @ turn[1].mT
    assert found[0, 0].item() == pytest.approx(expected, abs=1e-5)
    assert (found - torch.diag(found.diagonal())).abs().max() < 1e-6


@pytest.mark.parametrize(("rows", "columns", "expected"), [(1024, 1024, 0.0445), (2048, 1024, 0.0295)])
def test_newton_schulz_of_gaussian_matrices(rows: int, columns: int, expected: float) -> None:
    x = torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(0))
    once = orthogonalised(x, bf16=False)[0]
    assert (torch.linalg.svdvals(once) - 1).square().mean().item() == pytest.approx(expected, rel=0.05)
    assert (orthogonalised(-1000 * x.mT, bf16=False)[0].mT + once).norm() < 1e-4 * once.norm()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_weight_average_against_its_formula(decay: float) -> None:
    net = Net()
    average = WeightAverage(weights_of(net), decay)
    expected = {name: p.detach().double().clone() for name, p in net.named_parameters()}
    random = torch.Generator().manual_seed(1)
    for step in range(50):
        for name, p in net.named_parameters():
            p.data.add_(torch.randn(p.shape, generator=random))
            used = min(decay, (1 + step) / (10 + step))
            expected[name] = used * expected[name] + (1 - used) * p.detach().double()
        average.update(weights_of(net), step)
    assert_close(average.parts, expected)
    if decay == 0:
        assert_close(average.parts, dict(net.named_parameters()))


def test_weight_average_goes_by_name() -> None:
    """A checkpoint file holds tensors in alphabetical order, the model does not."""
    net = Net()
    average, reordered = WeightAverage(weights_of(net), 0.9), WeightAverage(weights_of(net), 0.9)
    reordered.parts = {name: reordered.parts[name] for name in sorted(reordered.parts)}
    for step in range(3):
        for p in net.parameters():
            p.data.add_(1)
        average.update(weights_of(net), step)
        reordered.update(weights_of(net), step)
    for name in average.parts:
        assert torch.equal(average.parts[name], reordered.parts[name])


def test_weight_average_is_float32_and_a_copy() -> None:
    net = Net().bfloat16()
    average = WeightAverage(weights_of(net), 0.9)
    first = average.parts["a"].clone()
    net.a.data.add_(1)
    assert torch.equal(average.parts["a"], first)
    assert average.parts["a"].dtype == torch.float32


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name].double(), expected[name].double(), rtol=1e-5, atol=1e-5)
