"""Training with vector-quantised attention: the codebooks of all backends, resuming, and starting from other runs."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.attention.codebook import VQConfig
from tests.train.support import TINY, assert_one_line, metrics, start, start_function
from tests.train.support import ranks as ranks_of
from tests.train.uneven import CONFIG, TOKENIZER, batch_of_step, count, distance, fill
from train import checkpoint
from train.config import Config, EngineSection
from train.engine import fit_codebooks, make_engine
from train.ranks import Joined, Ranks

STEPS, BROKEN = 4, 2
VQ = ("--model.attention=vq", "--model.vq.window=16", "--model.vq.codes=8")

BACKENDS = {
    "single": (1, EngineSection()),
    "single-2-micro-batches": (1, EngineSection(micro_batches=2)),
    "single-recompute": (1, EngineSection(activation_checkpointing=True)),
    "single-compile": (1, EngineSection(compile=True, activation_checkpointing=True)),
    "ddp-2-micro-batches": (2, EngineSection(micro_batches=2)),
    "ddp-recompute": (2, EngineSection(activation_checkpointing=True)),
    "zero-0": (2, EngineSection("deepspeed", 0)),
    "zero-1": (2, EngineSection("deepspeed", 1)),
    "zero-2": (2, EngineSection("deepspeed", 2)),
    "zero-2-2-micro-batches": (2, EngineSection("deepspeed", 2, micro_batches=2)),
    "zero-3": (2, EngineSection("deepspeed", 3)),
    "zero-3-recompute": (2, EngineSection("deepspeed", 3, micro_batches=2, activation_checkpointing=True)),
}
_SLOW = ("single-compile", "ddp-recompute", "zero-1", "zero-2-2-micro-batches", "zero-3-recompute")


def work(config: Config, out: str) -> None:
    """Fit the codebooks and take STEPS steps, one of them not finite; every rank writes its codebooks after each."""
    torch.set_num_threads(1)
    ranks = Ranks(config)
    engine = make_engine(config, TOKENIZER, ranks, fill)
    fit_codebooks(engine, list(engine.model.codebooks().values()), batch_of_step(0, [0, 3]))
    share, micro = 4 // ranks.world, config.engine.micro_batches
    tensors = {f"fitted.{name}": buffer.clone() for name, buffer in engine.model.named_buffers()}
    for step in range(STEPS):
        engine.optim = replace(config.optim, text_weight=float("inf")) if step == BROKEN else config.optim
        first, size = ranks.rank * share, share // micro
        for r in range(first, first + share, size):
            engine.micro_step(
                batch_of_step(step, list(range(r, r + size))), count(step), is_last=r + size == first + share
            )
        engine.step(lr=1e-3)
        tensors |= {f"{step}.{name}": buffer.clone() for name, buffer in engine.model.named_buffers()}
    weights = Joined(ranks, engine.parts(), engine.shapes)
    tensors |= {f"weights.{name}": weights[name].clone() for name in weights}
    save_file(tensors, f"{out}-{ranks.rank}.safetensors")
    engine.close()
    ranks.close()


def results(folder: Path, backend: str, codebook: str, precision: str = "fp32") -> list[dict[str, torch.Tensor]]:
    world, engine = BACKENDS[backend]
    chunks = {"chunk_blocks": 1, "recompute_chunks": True} if "recompute" in backend else {}
    model = replace(CONFIG.model, attention="vq", vq=VQConfig(codes=8, window=16, codebook=codebook, **chunks))
    config = replace(CONFIG, engine=engine, model=model, run=replace(CONFIG.run, precision=precision))
    environments = ranks_of(world) if world > 1 else [{}]
    started = [start_function(folder / str(rank), work, (config, str(folder / "out")), environment)
               for rank, environment in enumerate(environments)]  # fmt: skip
    for command in started:
        done = command.finish()
        assert done.status == 0, done.err
    return [load_file(folder / f"out-{rank}.safetensors") for rank in range(world)]


@pytest.fixture(scope="module", params=["average", "simvq"])
def codebook(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, codebook: str) -> dict[str, torch.Tensor]:
    return results(tmp_path_factory.mktemp("single"), "single", codebook)[0]


@pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=pytest.mark.slow if name in _SLOW else ()) for name in BACKENDS if name != "single"],
)
def test_all_backends_have_the_same_codebooks(tmp_path: Path, single: dict[str, torch.Tensor], codebook: str,
                                              backend: str) -> None:  # fmt: skip
    if BACKENDS[backend][1].backend == "deepspeed":
        pytest.importorskip("deepspeed", exc_type=ImportError)
    found = results(tmp_path, backend, codebook)
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in found[0])
    assert found[0].keys() == single.keys()
    assert distance(found[0], single) < 1e-5
    for name in (name for name in single if name.startswith("weights.") and name.endswith(("key_sum_KCE", "count_KC"))):
        assert torch.equal(found[0][name], found[0][name.replace("weights", str(STEPS - 1))])


def test_bf16_rounds_keys_but_not_codebooks(tmp_path: Path, single: dict[str, torch.Tensor], codebook: str) -> None:
    (found,) = results(tmp_path, "single", codebook, precision="bf16")
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    books = [name for name in single if name.endswith(("key_sum_KCE", "count_KC"))]
    assert 1e-5 < distance(found, {name: single[name] for name in books}) < 0.01


def test_codebooks_move_unless_the_step_is_skipped(single: dict[str, torch.Tensor], codebook: str) -> None:
    names = [name.removeprefix("fitted.") for name in single if name.startswith("fitted.")]
    assert names
    for name in names:
        states = [single[f"{key}.{name}"] for key in ("fitted", *range(STEPS))]
        same = [torch.equal(one, other) for one, other in pairwise(states)]
        assert same == [step == BROKEN or codebook == "simvq" for step in range(STEPS)]
    maps = [tensor for name, tensor in single.items() if name.endswith("map_KEE")]
    assert len(maps) == (len(names) // 2 if codebook == "simvq" else 0)
    assert all(float((tensor - torch.eye(tensor.shape[-1])).abs().max()) > 1e-3 for tensor in maps)


def train(run: Path, *arguments: str) -> None:
    result = start(run.parent / "out", "train", *TINY, f"--run.dir={run}", *arguments).finish()
    assert result.status == 0, result.err


@pytest.mark.parametrize("kind", ["average", "simvq"])
def test_resuming_is_exact_and_metrics_are_logged(tmp_path: Path, kind: str) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = (*VQ, f"--model.vq.codebook={kind}")
    train(whole, *options)
    train(halves, *options, "--run.stop_after=4")
    train(halves, *options)
    one, two = (checkpoint.load(checkpoint.resolve(run)) for run in (whole, halves))
    for left, right in ((one.model, two.model), (one.ema, two.ema)):
        assert left.keys() == right.keys()
        assert any(name.endswith("codebook.count_KC") for name in left)
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert metrics(whole) == metrics(halves)
    last = metrics(whole)[-1]
    assert 1 <= last["vq/perplexity"] <= 8
    assert 0 < last["vq/error"] < 1.5
    assert 0 <= last["vq/dead"] <= 1


@pytest.mark.parametrize("kind", ["average", "simvq"])
def test_a_dense_checkpoint_starts_a_quantised_run(tmp_path: Path, kind: str) -> None:
    """Weights are taken over; the codebooks are fitted to the keys that these weights give."""
    dense, hybrid = tmp_path / "dense", tmp_path / "hybrid"
    train(dense, "--model.num_layers=2", "--run.stop_after=2")
    train(hybrid, "--model.num_layers=2", "--run.stop_after=1", "--optim.lr=1e-9", f"--run.init_from={dense}",
          *VQ, "--model.attention=[dense,vq]", f"--model.vq.codebook={kind}")  # fmt: skip
    before, after = (checkpoint.load(checkpoint.resolve(run)).model for run in (dense, hybrid))
    assert after.keys() - before.keys() == {f"backbone.layers.1.self_attn.kind.codebook.{name}"
                                            for name in ("key_sum_KCE", "count_KC", "map_KEE")[: 2 + (kind == "simvq")]
                                            }  # fmt: skip
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-7)
    assert metrics(hybrid)[0]["vq/error"] < 0.9  # random codewords are about 1.4 away from keys as long as they are


def test_a_window_smaller_than_the_largest_image_is_refused(tmp_path: Path) -> None:
    result = start(
        tmp_path / "out", "train", *TINY, f"--run.dir={tmp_path / 'run'}", *VQ, "--model.vq.window=8"
    ).finish()
    assert_one_line(result, 2, "model.vq.window is 8", "data.max_patches 16")


def test_a_map_that_nothing_would_move_is_refused(tmp_path: Path) -> None:
    result = start(tmp_path / "out", "train", *TINY, f"--run.dir={tmp_path / 'run'}", *VQ, "--model.vq.codebook=simvq",
                   "--optim.commit_weight=0").finish()  # fmt: skip
    assert_one_line(result, 2, "optim.commit_weight is 0", "simvq")


def test_a_list_of_kinds_must_fit_the_layers(tmp_path: Path) -> None:
    result = start(
        tmp_path / "out", "train", *TINY, f"--run.dir={tmp_path / 'run'}", "--model.attention=[vq,dense]"
    ).finish()
    assert_one_line(result, 2, "model.attention lists 2 kinds for 1 layers")
