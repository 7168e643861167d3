"""Every backend and ZeRO stage trains the same weights, whoever holds which rows and whatever they hold."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.train.support import ranks as ranks_of
from tests.train.support import start_function
from tests.train.uneven import CONFIG, TOKENIZER, batch_of_step, count, distance, fill, part
from train.config import Config, EngineSection
from train.engine import make_engine
from train.optimizer import MOMENTS
from train.ranks import Joined, Ranks

pytest.importorskip("deepspeed", exc_type=ImportError)

STEPS = 20
BROKEN = 7  # the step whose gradient is not finite

# Sums in another order leave about 1e-7 per step. AdamW divides by the size of a gradient, so that where it is nearly
# zero the difference grows: the norm of each tensor is what the tolerance is relative to.
TOLERANCE = 2e-6
# Fused operations round in other places.
COMPILED_TOLERANCE = 2e-5
# bf16 autocast rounds to 8 bits, and DeepSpeed communicates the gradients and weights of linears in bf16.
BF16_TOLERANCE = 5e-3

BACKENDS = {
    "single": (1, EngineSection()),
    "ddp": (2, EngineSection()),
    "zero-0": (2, EngineSection("deepspeed", 0)),
    "zero-1": (2, EngineSection("deepspeed", 1)),
    "zero-2": (2, EngineSection("deepspeed", 2)),
    "zero-3": (2, EngineSection("deepspeed", 3)),
    "zero-2-alone": (1, EngineSection("deepspeed", 2)),
    "zero-3-alone": (1, EngineSection("deepspeed", 3)),
    "zero-1-offload": (2, EngineSection("deepspeed", 1, offload=True)),
    "zero-2-offload": (2, EngineSection("deepspeed", 2, offload=True)),
    "zero-3-offload": (2, EngineSection("deepspeed", 3, offload=True)),
    "ddp-recompute": (2, EngineSection(activation_checkpointing=True)),
    "zero-3-recompute": (2, EngineSection("deepspeed", 3, activation_checkpointing=True)),
    "single-compile": (1, EngineSection(compile=True, activation_checkpointing=True)),
    "zero-2-compile": (2, EngineSection("deepspeed", 2, compile=True)),
}
CASES = [(micro, uneven) for micro in (1, 2) for uneven in (False, True)]


def name_of(micro: int, uneven: bool) -> str:
    return f"{micro}-micro-batches-{'uneven' if uneven else 'even'}"


def work(config: Config, out: str) -> None:
    """All cases of a backend on this rank, one after the other; rank 0 writes what came out."""
    torch.set_num_threads(1)
    ranks = Ranks(config)
    tensors: dict[str, Tensor] = {}
    for micro, uneven in CASES:
        engine = make_engine(
            replace(config, engine=replace(config.engine, micro_batches=micro)), TOKENIZER, ranks, fill
        )
        losses, norms = [], []
        share = 4 // ranks.world
        for step in range(STEPS):
            first, size = ranks.rank * share, share // micro
            batches = [batch_of_step(step, list(range(r, r + size)), uneven) for r in range(first, first + share, size)]
            sums = [0.0, 0.0]
            for i, batch in enumerate(batches):
                bad = step == BROKEN and ranks.rank == 0 and i == 0  # one rank's bad numbers concern all of them
                engine.optim = replace(config.optim, text_weight=float("inf")) if bad else config.optim
                found = engine.micro_step(batch, count(step, uneven), is_last=i == micro - 1)
                sums = [sums[0] + found.text.item(), sums[1] + found.image.item()]
            losses.append(ranks.total(sums))
            norms.append(engine.step(lr=1e-3))
        case = name_of(micro, uneven)
        tensors[f"{case}.losses"] = torch.tensor(losses, dtype=torch.float64)
        tensors[f"{case}.norms"] = torch.tensor(norms, dtype=torch.float64)
        groups = {"weights": Joined(ranks, engine.parts(), engine.shapes), **engine.moments()}
        for group, values in groups.items():
            tensors |= {f"{case}.{group}.{name}": values[name].clone() for name in values}
        engine.close()
    if ranks.rank == 0:
        save_file(tensors, out)
    ranks.close()


def result(folder: Path, backend: str, precision: str = "fp32") -> dict[str, Tensor]:
    world, engine = BACKENDS[backend]
    config = replace(CONFIG, engine=engine, run=replace(CONFIG.run, precision=precision))
    out = folder / f"{backend}-{precision}.safetensors"
    environment = {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    environments = [e | environment for e in ranks_of(world)] if world > 1 else [environment]
    started = [start_function(folder / f"{rank}", work, (config, str(out)), e) for rank, e in enumerate(environments)]
    for command in started:
        done = command.finish()
        assert done.status == 0, done.err
    assert not (folder / "extensions").exists(), "an op was compiled"
    return load_file(out)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return result(tmp_path_factory.mktemp("single"), "single")


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            name, marks=pytest.mark.slow if name.endswith(("offload", "alone", "recompute", "compile")) else ()
        )
        for name in BACKENDS
        if name != "single"
    ],
)
def test_all_backends_train_the_same(tmp_path: Path, single: dict[str, Tensor], backend: str) -> None:
    found = result(tmp_path, backend)
    tolerance = COMPILED_TOLERANCE if BACKENDS[backend][1].compile else TOLERANCE
    assert found.keys() == single.keys()
    for case in (name_of(*case) for case in CASES):
        mine, expected = part(found, case), part(single, case)
        torch.testing.assert_close(mine["losses"], expected["losses"], rtol=tolerance, atol=0)
        finite = torch.arange(STEPS) != BROKEN
        assert torch.equal(mine["norms"].isfinite(), finite), case
        torch.testing.assert_close(mine["norms"][finite], expected["norms"][finite], rtol=10 * tolerance, atol=0)
        for group in ("weights", *MOMENTS):
            assert distance(part(mine, group), part(expected, group)) < tolerance, (case, group)


def test_the_weights_have_moved(single: dict[str, Tensor]) -> None:
    """What the tolerance is compared with: the same steps on other rows end elsewhere."""
    even, uneven = (part(part(single, name_of(1, kind)), "weights") for kind in (False, True))
    assert distance(even, uneven) > 100 * TOLERANCE


@pytest.mark.parametrize("backend", ["ddp", "zero-0", "zero-1", "zero-2", "zero-3"])
def test_bf16_stays_near_float32(tmp_path: Path, single: dict[str, Tensor], backend: str) -> None:
    found = result(tmp_path, backend, "bf16")
    for case in (name_of(*case) for case in CASES):
        mine, expected = part(found, case), part(single, case)
        torch.testing.assert_close(mine["losses"], expected["losses"], rtol=BF16_TOLERANCE, atol=0)
        weights, others = part(mine, "weights"), part(expected, "weights")
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
        # All weights as one vector: a bias that starts at zero has a norm of little more than its noise.
        one, two = (torch.cat([w[name].flatten() for name in others]) for w in (weights, others))
        assert float((one - two).norm() / two.norm()) < BF16_TOLERANCE, case
