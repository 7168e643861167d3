"""Bytes that ranks send each other and hold, measured on a small model; and what the formula gives for large ones.

Measured: every collective of one optimizer step, as PyTorch's dispatcher hands it to the process group, for every
backend and ZeRO stage on processes of this machine (gloo). Worked out: memory and communication of the shipped 1B and
7B configurations on clusters of 8-GPU nodes (train/estimate.py), and the time that published bandwidths allow for it.
"""

import gc
import importlib.util
import json
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.processes import together
from benchmarks.report import Result, Row, table
from train import estimate, pipeline, settings
from train.config import Config, EngineSection
from train.engine import Counts, fill_from, make_engine
from train.optimizer import WeightAverage
from train.ranks import Ranks

NVLINK = 450e9
"""Bytes per second and direction of an H100 SXM to the others of its node: 900 GB/s both ways (NVIDIA's data sheet)."""
NETWORK = 8 * 50e9
"""Bytes per second and direction of a node with eight 400 Gb/s adapters (DGX H100). A ring enters and leaves each node
once, and the library spreads its data over the adapters."""
PEAK, SHARE = 989e12, 0.4
"""FLOP per second of an H100 SXM in dense bfloat16 (data sheet), and the share that training is taken to reach."""
NODE = 8
CLUSTERS = (8, 64, 1024)
CONFIGS = ("configs/base-1b.yaml", "configs/base-7b.yaml")
PATCH_SHARE = 0.9
"""Patches of the slots of a row, in documents of one picture of data.max_patches and the text around it."""

Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")

_STEPS = 4  # ZeRO-3 joins weights ahead of time only once it has seen their order
_SMALL = (
    "--run.device=cpu", "--model.dim=128", "--model.num_layers=12", "--model.num_heads=4", "--model.num_kv_heads=2",
    "--model.head.width=96", "--model.head.depth=2", "--data.shapes.documents=300", "--data.max_grid=8",
    "--data.rows_per_step=8", "--data.workers=0",
)  # fmt: skip
_ZERO = {"reduce_bucket_size": 500_000, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
"""Sizes that fit the small model as DeepSpeed's defaults fit large ones."""
_KINDS = {
    "allreduce_": "all-reduce",
    "reduce_": "reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "broadcast_": "broadcast",
}


def run(ranks: int = 2) -> Result:
    """Measure on this machine, and work out the table of docs/distributed.md.

    Args:
        ranks: processes for the measured part.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError("deepspeed is not installed: pip install -e '.[deepspeed]'")
    rows: list[Row] = []
    summary: list[Row] = []
    for name, config in cases().items():
        found, formula = measure(config, ranks), expected(config, ranks)
        rows += [
            {"part": "measured", "case": name, "ranks": ranks, "what": what, "bytes": found.get(what, 0),
             "formula_bytes": formula.get(what, 0)}
            for what in sorted(found.keys() | formula.keys())
        ]  # fmt: skip
        summary.append({"case": name, **_compared(found, formula)})
    large = forecast()
    rows += [{"part": "worked out", **row} for row in large]
    notes = (
        f"Upper table: bytes that one optimizer step of two micro-batches on {ranks} ranks hands to collectives, and "
        "bytes of all tensors that a rank holds at the end of its last backward pass; in brackets the ratio to the "
        f"formula of train/estimate.py. A model of {_numbers() / 1e6:.2f}M parameters on CPUs (gloo).\n\n"
        f"Lower table: worked out, not measured. {forecast_notes()}\n\n{table(large)}"
    )
    return Result("communication", rows, summary, notes, packages=("deepspeed",))


def cases() -> dict[str, Config]:
    """What is measured: every backend and stage; at stage 3 also where weights stay joined; bf16; offload."""
    small = settings.parse(_SMALL)[0]

    def case(precision: Precision, stage: Stage | None = None, offload: bool = False, recompute: bool = False,
             reuse: int = 0) -> Config:  # fmt: skip
        engine = EngineSection(micro_batches=2, activation_checkpointing=recompute)
        if stage is not None:
            zero = {"zero_optimization": _ZERO | {"stage3_max_reuse_distance": reuse}}
            engine = replace(engine, backend="deepspeed", zero_stage=stage, offload=offload, deepspeed=zero)
        return replace(small, engine=engine, run=replace(small.run, precision=precision))

    found = {}
    for precision in PRECISIONS:
        found[f"torch, {precision}"] = case(precision)
        for stage in STAGES:
            found[f"ZeRO-{stage}, {precision}"] = case(precision, stage)
        found[f"ZeRO-3, all reused, {precision}"] = case(precision, 3, reuse=10**9)
    found["ZeRO-3, some reused, fp32"] = case("fp32", 3, reuse=2 * 10**6)
    found["ZeRO-3, some reused, recomputing, fp32"] = case("fp32", 3, reuse=2 * 10**6, recompute=True)
    for stage in STAGES[1:]:
        found[f"ZeRO-{stage}, offload, fp32"] = case("fp32", stage, offload=True)
    return found


def measure(config: Config, ranks: int) -> dict[str, int]:
    """Bytes of each kind of collective in one step of rank 0, and of its tensors before the update ("held")."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        together(ranks, _work, config, out)
        return json.loads(out.read_text())


def _work(config: Config, out: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(config)
    tokenizer = pipeline.make_tokenizer(config.data)
    mixture = pipeline.make_mixture(config, pipeline.make_encoder(config, tokenizer), "train")
    rows = pipeline.StepRows(mixture, config, ranks.rank, ranks.world)
    before = _held()
    engine = make_engine(config, tokenizer, ranks, fill_from(config.run.seed, None, ""))
    average = WeightAverage(engine.parts(), config.optim.ema_decay)
    for step in range(_STEPS):
        counter = _Counter()
        batches = rows[step].batches
        local = [batch.counts() for batch in batches]
        text, image = ranks.total([float(sum(c)) for c in zip(*local, strict=True)])
        with counter:
            for i, batch in enumerate(batches):
                engine.micro_step(batch, Counts(int(text), int(image)), is_last=i == len(batches) - 1)
            del batch, batches
            held = _held() - before
            engine.step(config.optim.lr)
        average.update(engine.parts(), step)
    if ranks.rank == 0:
        out.write_text(json.dumps({**counter.bytes, "held": held}))
    ranks.close()


def _held() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta":  # isinstance wakes lazy modules
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


class _Counter(TorchDispatchMode):
    """Bytes of the whole tensors of every collective: the larger of what goes in and what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d" and (kind := _KINDS.get(func.overloadpacket.__name__)):
            self.bytes[kind] += max(_size(argument) for argument in args)
        return func(*args, **(kwargs or {}))


def _size(argument: object) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(_size(item) for item in argument) if isinstance(argument, list | tuple) else 0


def _numbers() -> int:
    config = settings.parse(_SMALL)[0]
    return sum(config.model.num_parameters(pipeline.make_tokenizer(config.data).vocab_size).values())


def expected(config: Config, ranks: int) -> dict[str, int]:
    """What the formula gives for `measure`."""
    size = pipeline.make_tokenizer(config.data).vocab_size
    found = estimate.of(config, size, ranks, 0, 0, 0, 0, 0, device=torch.device("cpu"))
    # Stage 2 frees its buckets after each backward pass.
    buckets = 0 if config.engine.zero_stage == 2 and not config.engine.offload else found.buckets
    return {**found.collectives, "held": found.state + found.gradients + found.host + buckets}


def _compared(found: dict[str, int], formula: dict[str, int]) -> Row:
    def cell(what: str) -> str | None:
        if not formula.get(what):
            return f"{found[what]} B" if what in found else None
        return f"{estimate.size(found.get(what, 0))} ({found.get(what, 0) / formula[what]:.3f})"

    return {what: cell(what) for what in ("all-reduce", "reduce-scatter", "all-gather", "broadcast", "held")}


def forecast() -> list[Row]:
    """Memory per GPU and communication per step of the shipped large configurations at every ZeRO stage."""
    return [_large(path, gpus, stage) for path in CONFIGS for gpus in CLUSTERS for stage in STAGES]


def forecast_notes() -> str:
    """What the table of `forecast` takes for granted."""
    return (
        "bf16; micro-batches of one full row; as many rows in a step as the configuration has, or one per GPU. "
        f"{PATCH_SHARE:.0%} of the slots are patches, in documents of one picture of data.max_patches. Stage 0 is "
        "plain DistributedDataParallel. State: weights, gradients, optimizer, weight average. Memory: the most while "
        "training, without and with engine.activation_checkpointing. GB are 10^9 bytes per GPU. Sent: what a GPU "
        f"sends in a step. Communication: the least time for it, at {NVLINK / 1e9:.0f} GB/s and direction within a "
        f"node of {NODE} (H100 SXM, NVLink) and {NETWORK / 1e9:.0f} GB/s per node and direction between nodes (eight "
        "adapters of 400 Gb/s), without latency, not overlapped with computation. "
        f"Computation: at {SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s, without recomputation."
    )


def _large(path: str, gpus: int, stage: Stage) -> Row:
    config = settings.parse(["--config", path])[0]
    rows = max(config.data.rows_per_step, gpus)
    engine = EngineSection("deepspeed" if stage else "torch", stage, micro_batches=rows // gpus)
    config = replace(config, run=replace(config.run, precision="bf16"))
    plain, recomputing = (
        _estimate(replace(config, engine=replace(engine, activation_checkpointing=recompute)), gpus)
        for recompute in (False, True)
    )
    values = {
        "state, GB": (plain.state + plain.gradients) / 1e9,
        "memory, GB": plain.peak / 1e9,
        "with recomputation, GB": recomputing.peak / 1e9,
        "sent, GB": plain.sent / 1e9,
        "communication, s": plain.sent / (NVLINK if gpus <= NODE else min(NVLINK, NETWORK)),
        "computation, s": plain.flops / (SHARE * PEAK),
    }
    rounded = {key: round(value) if value >= 100 else float(f"{value:.3g}") for key, value in values.items()}
    return {"model": Path(path).stem, "GPUs": gpus, "stage": stage, "rows per GPU": rows // gpus, **rounded}


def _estimate(config: Config, gpus: int) -> estimate.Estimate:
    """For one row full of documents of one picture each."""
    slots = config.data.row_length
    patches = round(PATCH_SHARE * slots)
    document = config.data.max_patches / PATCH_SHARE
    vocabulary = pipeline.make_tokenizer(config.data).vocab_size
    return estimate.of(config, vocabulary, gpus, slots, round(slots * document), slots - patches, patches, patches,
                       groups=[(1, slots)], device=torch.device("cuda"))  # fmt: skip
