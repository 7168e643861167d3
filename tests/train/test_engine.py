"""The gradient of a step does not depend on how its rows are spread over processes and micro-batches.

The rows are as uneven as they can be: one rank has no image at all, the other learns no text. The reference knows
nothing of the engine: it takes one row after the other and writes the loss out as the specification does.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.ropeway import Losses, Ropeway
from tests.train.support import ranks as ranks_of
from tests.train.support import start_function
from tests.train.uneven import CONFIG, batch_of_step, count, distance, make_model, part
from train.config import Config, EngineSection
from train.engine import Counts, TorchEngine, objective
from train.ranks import Ranks, pick_device

STEPS = 3

# Every gradient is a sum of the same numbers in another order: float32 leaves about 1e-7 of its norm. The weights after
# three steps of AdamW may differ by more where a gradient is nearly zero, since AdamW divides by its size.
GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 1e-6, 1e-5

SPLITS = {
    "2-micro-batches": (1, 2),
    "4-micro-batches": (1, 4),
    "2-processes": (2, 1),
    "2-processes-2-micro-batches": (2, 2),
}


def work(config: Config, out: str) -> None:
    """Take STEPS steps with the engine, on this rank's share, and write gradients and weights."""
    torch.set_num_threads(1)
    ranks = Ranks(config)
    engine = TorchEngine(make_model(), config, ranks)
    tensors: dict[str, Tensor] = {}
    share, micro = 4 // ranks.world, config.engine.micro_batches
    for step in range(STEPS):
        first, size = ranks.rank * share, share // micro
        batches = [batch_of_step(step, list(range(r, r + size))) for r in range(first, first + share, size)]
        local = [batch.counts() for batch in batches]
        totals = ranks.total([float(sum(c)) for c in zip(*local, strict=True)])
        counts = Counts(int(totals[0]), int(totals[1]))
        assert counts == count(step)
        sums = [0.0, 0.0]
        for i, batch in enumerate(batches):
            losses = engine.micro_step(batch, counts, is_last=i == micro - 1)
            sums = [sums[0] + losses.text.item(), sums[1] + losses.image.item()]
        tensors[f"{step}.losses"] = torch.tensor(ranks.total(sums), dtype=torch.float64)
        for name, parameter in engine.model.named_parameters():
            assert parameter.grad is not None, name
            tensors[f"{step}.{name}"] = parameter.grad.clone()
        tensors[f"{step}.norm"] = torch.tensor(engine.step(lr=1e-3))
    for name, parameter in engine.model.named_parameters():
        tensors[f"weights.{name}"] = parameter.detach().clone()
    for kind, moments in engine.moments().items():
        tensors |= {f"{kind}.{name}": value.clone() for name, value in moments.items()}
    engine.close()
    ranks.close()
    save_file(tensors, f"{out}-{ranks.rank}.safetensors")


def results(folder: Path, world: int, micro: int, muon_lr: float | None = None) -> list[dict[str, Tensor]]:
    """What every rank wrote."""
    config = replace(CONFIG, engine=EngineSection(micro_batches=micro), optim=replace(CONFIG.optim, muon_lr=muon_lr))
    out = folder / f"{world}-{micro}"
    environments: list[dict[str, str]] = ranks_of(world) if world > 1 else [{}]
    started = [start_function(folder / f"{rank}", work, (config, str(out)), e) for rank, e in enumerate(environments)]
    for command in started:
        result = command.finish()
        assert result.status == 0, result.err
    return [load_file(f"{out}-{rank}.safetensors") for rank in range(world)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """One process, one batch."""
    return results(tmp_path_factory.mktemp("whole"), 1, 1)[0]


def reference(model: Ropeway, step: int, mean_of_means: bool = False) -> tuple[dict[str, Tensor], list[float]]:
    """Gradients of one step and its two loss sums, row by row: L = w_text/N_text sum CE + w_image/N_image sum flow.

    mean_of_means: the mistake of dividing by the counts of each row and then averaging over rows.
    """
    model.zero_grad()
    total, sums, counts = torch.zeros(()), [0.0, 0.0], count(step)
    for r in range(4):
        batch = batch_of_step(step, [r])
        losses: Losses = model(batch)
        text, image = batch.counts() if mean_of_means else counts
        share = 0.25 if mean_of_means else 1.0
        total = total + share * 0.7 * losses.text / max(text, 1) + share * 1.3 * losses.image / max(image, 1)
        sums = [sums[0] + losses.text.item(), sums[1] + losses.image.item()]
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sums


def gradients(tensors: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    return {key: value for key, value in part(tensors, str(step)).items() if key not in ("losses", "norm")}


def test_rows_are_uneven() -> None:
    for step in range(STEPS):
        first, second = batch_of_step(step, [0, 1]), batch_of_step(step, [2, 3])
        if step == 2:
            first, second = second, first
        assert len(first.patches_NP) == 0
        assert first.counts()[1] == 0
        assert second.counts()[0] == 0
        assert first.counts()[0] > 10
        assert second.counts()[1] > 10


def test_one_process_gives_the_gradient_of_the_loss_formula(whole: dict[str, Tensor]) -> None:
    model = make_model()
    expected, sums = reference(model, 0)
    found = gradients(whole, 0)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    assert distance(found, expected) < GRADIENT_TOLERANCE
    assert all(value.norm() > 0 for value in expected.values())
    assert whole["0.losses"].tolist() == pytest.approx(sums, rel=1e-6)
    norm = torch.cat([value.flatten() for value in expected.values()]).norm()
    assert whole["0.norm"].item() == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize(("world", "micro"), SPLITS.values(), ids=SPLITS.keys())
def test_any_split_gives_the_same_gradients_and_weights(
    tmp_path: Path, whole: dict[str, Tensor], world: int, micro: int
) -> None:
    for found in results(tmp_path, world, micro):
        assert found.keys() == whole.keys()
        for step in range(STEPS):
            tolerance = GRADIENT_TOLERANCE if step == 0 else WEIGHT_TOLERANCE  # later ones are at other weights
            assert distance(gradients(found, step), gradients(whole, step)) < tolerance
            torch.testing.assert_close(found[f"{step}.losses"], whole[f"{step}.losses"], rtol=1e-5, atol=0)
            torch.testing.assert_close(found[f"{step}.norm"], whole[f"{step}.norm"], rtol=1e-5, atol=0)
        assert distance(part(found, "weights"), part(whole, "weights")) < WEIGHT_TOLERANCE
        assert distance(part(found, "exp_avg"), part(whole, "exp_avg")) < WEIGHT_TOLERANCE


def test_ranks_hold_the_same_bits(tmp_path: Path) -> None:
    first, second = results(tmp_path, 2, 1)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_muon_on_two_ranks(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    first, second = results(tmp_path, 2, 1, muon_lr=1e-3)
    (alone,) = results(tmp_path, 1, 1, muon_lr=1e-3)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert distance(gradients(first, 0), gradients(alone, 0)) < GRADIENT_TOLERANCE
    assert distance(part(first, "weights"), part(alone, "weights")) < 10 * WEIGHT_TOLERANCE
    assert part(first, "momentum_buffer").keys() == part(alone, "momentum_buffer").keys() != set()
    assert distance(part(alone, "weights"), part(whole, "weights")) > 100 * WEIGHT_TOLERANCE


def test_a_mean_of_means_is_another_gradient(whole: dict[str, Tensor]) -> None:
    """Negative control: the comparison notices the mistake that it is there for."""
    wrong, _ = reference(make_model(), 0, mean_of_means=True)
    assert distance(wrong, gradients(whole, 0)) > 0.1


def test_counts_divide_and_no_target_divides_by_one() -> None:
    losses = Losses(torch.tensor(6.0), torch.tensor(10.0), torch.zeros(2, 10))
    assert objective(losses, Counts(3, 5), CONFIG.optim).item() == pytest.approx(0.7 * 2 + 1.3 * 2)
    assert objective(losses._replace(text=torch.tensor(0.0)), Counts(0, 5), CONFIG.optim) == pytest.approx(2.6)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    engine = TorchEngine(make_model(), CONFIG, Ranks(CONFIG))
    batch = batch_of_step(0, [0, 1, 2, 3])
    engine.micro_step(batch, count(0), is_last=True)
    engine.step(1e-3)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    moments = {k: {n: v.clone() for n, v in kind.items()} for k, kind in engine.moments().items()}
    engine.micro_step(batch, count(0), is_last=True)
    engine.model.backbone.get_parameter("norm.weight").grad.fill_(float("nan"))
    assert not engine.step(1e-3) < float("inf")
    for name, p in engine.model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
    for kind, values in engine.moments().items():
        assert all(torch.equal(values[name], moments[kind][name]) for name in values)


def test_clipping_bounds_the_update() -> None:
    engine = TorchEngine(make_model(), replace(CONFIG, optim=replace(CONFIG.optim, clip=1e-3)), Ranks(CONFIG))
    engine.micro_step(batch_of_step(0, [0, 1, 2, 3]), count(0), is_last=True)
    norm = engine.step(1e-3)
    moments = torch.cat([m.flatten() for m in engine.moments()["exp_avg"].values()])
    assert norm > 0.1
    assert moments.norm().item() == pytest.approx(1e-3 * (1 - CONFIG.optim.beta1), rel=1e-3)


@pytest.mark.parametrize("muon_lr", [None, 1e-3])
def test_optimizer_state_round_trip_in_another_order(muon_lr: float | None) -> None:
    """A step after loading the state, in the alphabetical order of a file, is the step without loading."""
    batch = batch_of_step(0, [0, 1, 2, 3])
    config = replace(CONFIG, optim=replace(CONFIG.optim, muon_lr=muon_lr))
    one = TorchEngine(make_model(), config, Ranks(config))
    one.micro_step(batch, count(0), is_last=True)
    one.step(1e-3)
    two = TorchEngine(make_model(), config, Ranks(config))
    two.model.load_state_dict(one.model.state_dict())
    state = one.moments()
    two.load_moments({k: {n: state[k][n].clone() for n in sorted(state[k])} for k in sorted(state)}, updates=1)
    for engine in (one, two):
        engine.micro_step(batch, count(0), is_last=True)
        engine.step(1e-3)
    for (name, a), b in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="PyTorch finds no GPU; use cpu or auto"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"
