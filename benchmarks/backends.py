"""Seconds of an optimizer step on every backend against a bare loop, of a checkpoint, and of two processes."""

import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.processes import together
from benchmarks.report import Result, Row
from model.batch import Batch
from train import checkpoint, pipeline, settings
from train.config import Config, EngineSection
from train.engine import Counts, Engine, fill_from, make_engine, objective
from train.generator import build_model
from train.optimizer import WeightAverage, adamw
from train.precision import autocast
from train.ranks import Joined, Ranks

ENGINES = {
    "torch": EngineSection(),
    **{f"ZeRO-{stage}": EngineSection("deepspeed", stage) for stage in (0, 1, 2, 3)},
}
_BARE = "bare loop"


def run(config: str = "configs/quickstart.yaml", rounds: int = 15, processes: int = 2) -> Result:
    """Time every backend on one process and on several, each process with one thread and the same number of rows.

    Args:
        config: configuration whose model and rows are used; its rows_per_step are those of one process.
        rounds: timed rounds; in each one every backend takes one step, so that all meet the same machine.
        processes: of the second part.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError("deepspeed is not installed: pip install -e '.[deepspeed]'")
    if rounds < 1 or processes < 2:
        raise ValueError("--rounds must be at least 1 and --processes at least 2")
    settled = settings.parse(["--config", config, "--optim.muon_lr=null"])[0]  # AdamW is what all of them have
    rows = [row for world in (1, processes) for row in _measure(settled, rounds, world)]
    bare = {(row["round"]): float(row["step_seconds"] or 0) for row in rows if row["backend"] == _BARE}
    summary: list[Row] = []
    for world in (1, processes):
        for name in dict.fromkeys(str(row["backend"]) for row in rows if row["processes"] == world):
            mine = [row for row in rows if (row["processes"], row["backend"]) == (world, name)]
            step = statistics.median(float(row["step_seconds"] or 0) for row in mine)
            ratios = [float(row["step_seconds"] or 0) / bare[row["round"]] for row in mine]
            line: Row = {
                "processes": world,
                "backend": name,
                "step, ms": 1e3 * step,
                # On several processes the rounds are others than those of the bare loop: medians, not pairs.
                "step / bare loop": statistics.median(ratios)
                if world == 1
                else step / statistics.median(bare.values()),
            }
            if name != _BARE:
                for kind in ("waiting", "in background"):
                    pause = statistics.median(float(row[f"save_{kind}_seconds"] or 0) for row in mine)
                    every = settled.checkpoint.every
                    line[f"save {kind}, ms"] = 1e3 * pause
                    line[f"% of training, {kind}"] = 100 * pause / (pause + every * step)
            summary.append(line)
    # The bare loop knows no checkpoints.
    columns = dict.fromkeys(key for line in summary for key in line)
    summary = [{key: line.get(key) for key in columns} for line in summary]
    one, many = (
        next(float(line["step, ms"] or 0) for line in summary if (line["processes"], line["backend"]) == (w, "torch"))
        for w in (1, processes)
    )
    notes = (
        f"Model and rows of `{config}`: {settled.data.rows_per_step} rows of {settled.data.row_length} slots for each "
        "process, float32, one thread per process, gloo. A step is forward, backward, clipping, AdamW and the weight "
        "average, with the rows at hand; the bare loop is the same model in ten lines of PyTorch without the average. "
        "A save is what training waits for: the whole checkpoint, or with `checkpoint.background` the copy of the "
        "state. Its share is that of a checkpoint every "
        f"{settled.checkpoint.every} steps.\n\nWeak scaling of `torch`: {processes} processes do {processes} times the "
        f"rows in {many / one:.2f} times the seconds, an efficiency of {100 * one / many:.0f} %."
    )
    figure = Figure(figsize=(7, 3.5))
    axis = figure.subplots()
    labels = [f"{line['backend']}, {line['processes']}" for line in summary][::-1]
    axis.barh(labels, [float(line["step / bare loop"] or 0) for line in summary][::-1])
    axis.set(xlabel="seconds of a step / bare loop on one process", ylabel="backend, processes")
    return Result("backends", rows, summary, notes, figure, packages=("deepspeed",))


def _measure(config: Config, rounds: int, world: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        together(world, _work, config, rounds, Path(folder))
        return json.loads((Path(folder) / "rows.json").read_text())


def _work(config: Config, rounds: int, folder: Path) -> None:
    world = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    config = replace(
        config,
        run=replace(config.run, device="cpu", precision="fp32"),
        data=replace(config.data, rows_per_step=world * config.data.rows_per_step),
    )
    ranks = Ranks(replace(config, engine=ENGINES["ZeRO-1"]))  # DeepSpeed wants a process group for one process too.
    tokenizer = pipeline.make_tokenizer(config.data)
    mixture = pipeline.make_mixture(config, pipeline.make_encoder(config, tokenizer), "train")
    rows = pipeline.StepRows(mixture, config, ranks.rank, ranks.world)
    engines = {}
    for name, section in ENGINES.items():
        chosen = replace(config, engine=section)
        engines[name] = make_engine(chosen, tokenizer, ranks, fill_from(config.run.seed, None, ""))
    averages = {name: WeightAverage(engine.parts(), config.optim.ema_decay) for name, engine in engines.items()}
    steps: dict[str, Callable[[list[Batch], Counts], object]] = {_BARE: _bare(config)} if world == 1 else {}
    steps |= {name: _step(engine, averages[name], config.optim.lr) for name, engine in engines.items()}
    saver = checkpoint.Saver(folder, tokenizer, config.checkpoint, writes=ranks.rank == 0)
    found: list[Row] = []
    for number in range(rounds + 1):
        batches = rows[number].batches
        local = [batch.counts() for batch in batches]
        text, image = ranks.total([float(sum(c)) for c in zip(*local, strict=True)])
        for name, step in steps.items():
            ranks.total([0.0])  # All begin together.
            began = time.perf_counter()
            step(batches, Counts(int(text), int(image)))
            ranks.total([0.0])
            row: Row = {"processes": world, "backend": name, "round": number,
                        "step_seconds": time.perf_counter() - began}  # fmt: skip
            if name != _BARE:
                chosen = replace(config, engine=ENGINES[name])
                for kind, background in (("waiting", False), ("in background", True)):
                    row[f"save_{kind}_seconds"] = _save(
                        saver, chosen, engines[name], averages[name], 2 * number + background, background
                    )
            found.append(row)
    for engine in engines.values():
        engine.close()
    ranks.close()
    if ranks.rank == 0:
        (folder / "rows.json").write_text(json.dumps([row for row in found if row["round"]]))  # 0 is to warm up


def _step(engine: Engine, average: WeightAverage, lr: float) -> Callable[[list[Batch], Counts], object]:
    def step(batches: list[Batch], counts: Counts) -> None:
        for batch in batches:
            engine.micro_step(batch, counts, is_last=batch is batches[-1])
        engine.step(lr)
        average.update(engine.parts(), 0)

    return step


def _bare(config: Config) -> Callable[[list[Batch], Counts], object]:
    model = build_model(config, pipeline.make_tokenizer(config.data))
    model.initialise(config.run.seed)
    optimizer = adamw(model, config.optim)

    def step(batches: list[Batch], counts: Counts) -> None:
        for batch in batches:
            with autocast(torch.device("cpu"), False):
                losses = model(batch)
            objective(losses, counts, config.optim).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _save(saver: checkpoint.Saver, config: Config, engine: Engine, average: WeightAverage, step: int,
          background: bool) -> float:  # fmt: skip
    """Seconds that training waits for a checkpoint."""
    weights, averaged = (Joined(engine.ranks, parts, engine.shapes) for parts in (engine.parts(), average.parts))
    engine.ranks.total([0.0])
    began = time.perf_counter()
    saver.begin(checkpoint.Checkpoint(config, step, weights, averaged, engine.moments(), 0), background)
    if not background:
        saver.finish()
    engine.ranks.total([0.0])
    seconds = time.perf_counter() - began
    saver.finish()
    return seconds
