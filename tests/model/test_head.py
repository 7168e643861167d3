"""The network of the head: silent at the start, and equal to the formula of the published one."""

import math

import torch

from model.config import HeadConfig
from model.diffusion.head import DiffusionHead, sinusoid
from tests.model.support import build, fill, tiny_config

CONFIG = tiny_config()


def inputs(count: int = 6) -> tuple[torch.Tensor, ...]:
    z, time, hidden = torch.randn(count, 12), torch.rand(count), torch.randn(count, 32)
    location = torch.tensor([[1, 2, 3, 4], [2, 2, 2, 2], [1, 1, 1, 1], [3, 1, 4, 2], [8, 8, 8, 8], [1, 8, 2, 8]])
    return z, time, hidden, location[:count]


def test_output_is_exactly_zero_at_the_start() -> None:
    head = build(silent=True).diffusion_head
    z, time, hidden, location = inputs()
    assert (head(z, time, head.condition(hidden, location)) == 0).all()
    for name, parameter in head.named_parameters():
        silent = "modulation" in name or name.startswith("patch_out") or name.endswith("bias")
        assert bool((parameter == 0).all()) == silent, name


def slow_head(head: DiffusionHead, z, t, hidden, location) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """One patch, from the prose of the specification."""
    linear = {name: (m.weight, m.bias) for name, m in head.named_modules() if isinstance(m, torch.nn.Linear)}

    def apply(name: str, x: torch.Tensor) -> torch.Tensor:
        return linear[name][0] @ x + linear[name][1]

    def silu(x: torch.Tensor) -> torch.Tensor:
        return x / (1 + torch.exp(-x))

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-6)

    def waves(value: float, half: int) -> list[float]:
        angles = [value * 1e4 ** (-i / half) for i in range(half)]
        return [math.cos(a) for a in angles] + [math.sin(a) for a in angles]

    row, col, rows, cols = location.tolist()
    place = [wave for value in (row, col, rows - row, cols - col) for wave in waves(value, 32)]
    time = apply("time_out", silu(apply("time_in", torch.tensor(waves(float(t), 128)))))
    y = silu(time + apply("condition_in", hidden) + apply("location_in", torch.tensor(place)))
    u = apply("patch_in", z)
    for n, block in enumerate(head.blocks):
        shift, scale, gate = apply(f"blocks.{n}.modulation", y).chunk(3)
        inner = (norm(u) * block.norm.weight + block.norm.bias) * (1 + scale) + shift
        u = u + gate * apply(f"blocks.{n}.down", silu(apply(f"blocks.{n}.up", inner)))
    shift, scale = apply("final_modulation", y).chunk(2)
    return apply("patch_out", norm(u) * (1 + scale) + shift)


def test_equals_the_formula() -> None:
    head = DiffusionHead(CONFIG)
    head.initialise()
    fill(head)
    z, time, hidden, location = inputs()
    found = head(z, time, head.condition(hidden, location))
    expected = torch.stack([slow_head(head, *row) for row in zip(z, time, hidden, location, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert found.abs().max() > 0.1


def test_place_and_time_matter() -> None:
    head = build().diffusion_head
    z, time, hidden, location = (x[:1] for x in inputs())
    here = head(z, time, head.condition(hidden, location))
    for column in range(4):
        moved = location.clone()
        moved[0, column] += 1
        assert not torch.allclose(head(z, time, head.condition(hidden, moved)), here)
    assert not torch.allclose(head(z, time + 0.1, head.condition(hidden, location)), here)


def test_wishes_for_a_step_size() -> None:
    """64, 32, ..., 1 steps have a row each; 0 and 128 and more, the flow, share one."""
    head = build(tiny_config(head=HeadConfig(width=24, depth=2, objective="shortcut"))).diffusion_head
    steps = torch.tensor([0, 256, 128, 64, 32, 16, 8, 4, 2, 1])
    found = head.shortcut_in(steps)
    rows = [0, 0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert torch.equal(found, head.shortcut_in.weight[rows])
    assert len(head.shortcut_in.weight) == 8
    silent = build(tiny_config(head=HeadConfig(width=24, depth=2, objective="shortcut")), silent=True).diffusion_head
    assert (silent.shortcut_in.weight == 0).all()


def test_sinusoid() -> None:
    found = sinusoid(torch.tensor([0.0, 2.5]), 8)
    angle = [2.5 * 1e4 ** (-i / 4) for i in range(4)]
    torch.testing.assert_close(found[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(found[1], torch.tensor([*map(math.cos, angle), *map(math.sin, angle)]))


def test_time_embedding_stays_float32_under_autocast() -> None:
    head = build().diffusion_head
    z, _, hidden, location = (x[:2] for x in inputs())
    seen = []
    head.time_out.register_forward_hook(lambda module, arguments, out: seen.append(out))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head(z, torch.tensor([0.5, 0.5001]), head.condition(hidden, location))
    assert seen[0].dtype == torch.float32
    assert not torch.equal(seen[0][0], seen[0][1])
