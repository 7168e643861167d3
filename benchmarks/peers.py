"""Training and generation speed beside autoregressive-diffusion-pytorch and transfusion-pytorch on handwritten digits.

All systems run in one process, one thread, float32, and take turns in short rounds, so that other load on the machine
and the processor's clock affect them alike. Time is CPU time of the process. Install the peers with `make bench`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.report import Result, Row
from benchmarks.systems import (
    AutoregressiveSystem,
    RopewaySystem,
    System,
    TransfusionSystem,
    caption_of,
    count,
    picture_of,
)
from data.document import Document
from data.source.digits import Digits
from model.config import HeadConfig, ModelConfig

MODEL = ModelConfig(dim=192, num_layers=6, num_heads=6, patch_size=2, head=HeadConfig(width=384, depth=3))
PASSES = ("train", "generate")


def run(rounds: int = 5, steps: int = 3, documents: int = 32, images: int = 16) -> Result:
    """Measure, and return one row per system, pass and round.

    Args:
        rounds: turns of every system.
        steps: optimizer steps of a system in a turn.
        documents: captioned pictures per optimizer step.
        images: pictures that a system draws in a turn, as one batch.
    """
    for name, value in (("rounds", rounds), ("steps", steps), ("documents", documents), ("images", images)):
        if value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    source = Digits("train", caption_fraction=0.0)
    chosen = [source.document(i % len(source)) for i in range(max(documents, images))]
    side = picture_of(chosen[0]).shape[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        systems = build(side)
        rows = measure(systems, chosen[:documents], [caption_of(d) for d in chosen[:images]], rounds, steps)
    finally:
        torch.set_num_threads(threads)
    return Result(
        benchmark="peers",
        rows=rows,
        summary=[summarise(system, step, rows) for step in PASSES for system in systems],
        notes=_notes(systems, side, documents, images),
        figure=plot(systems, rows),
        packages=("autoregressive-diffusion-pytorch", "transfusion-pytorch", "x-transformers", "numpy"),
    )


def build(side: int) -> list[System]:
    """Ropeway first, then the peers with as many parameters. Pictures are side x side pixels."""
    size = MODEL.patch_size
    one_draw = replace(MODEL, head=replace(MODEL.head, draws=1))
    ours = [RopewaySystem("Ropeway", MODEL, side), RopewaySystem("Ropeway, one noise draw", one_draw, side)]
    parameters = count(ours[0].model)
    return [
        *ours,
        AutoregressiveSystem("flow", parameters, side, size),
        AutoregressiveSystem("diffusion", parameters, side, size),
        TransfusionSystem(parameters, side, size),
    ]


def measure(
    systems: Sequence[System], documents: Sequence[Document], captions: Sequence[str], rounds: int, steps: int
) -> list[Row]:
    """Rows of all rounds. Every system warms up once first, and the order of the turns rotates."""
    turns: list[tuple[System, Callable[[int], None], Callable[[], Any]]] = []
    for system in systems:
        turns.append((system, _trainer(system, documents), partial(system.draw, captions)))
    for _, train, draw in turns:
        train(1)
        draw()
    patches = (picture_of(documents[0]).shape[0] // MODEL.patch_size) ** 2
    rows = []
    for number in range(rounds):
        first = number % len(turns)
        for system, train, draw in turns[first:] + turns[:first]:
            shared: Row = {"system": system.name, "round": number, "parameters": count(system.model)}
            learned, positions = len(documents) * steps, system.positions(documents) * steps
            seconds = cpu_seconds(partial(train, steps))
            rows.append(shared | {"pass": "train"} | _rates(learned, learned * patches, positions, seconds))
            seconds = cpu_seconds(draw)
            rows.append(shared | {"pass": "generate"} | _rates(len(captions), len(captions) * patches, None, seconds))
    return rows


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time that the process spends on work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def _trainer(system: System, documents: Sequence[Document]) -> Callable[[int], None]:
    """A number of optimizer steps on the documents, prepared once; clipping and AdamW are the same for every system."""
    batch = system.prepare(documents)
    optimizer = torch.optim.AdamW(system.model.parameters(), lr=3e-4, fused=True)

    def train(steps: int) -> None:
        system.model.train()
        for _ in range(steps):
            system.loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(system.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return train


def _rates(images: int, patches: int, positions: int | None, seconds: float) -> Row:
    return {
        "images": images,
        "cpu_seconds": seconds,
        "images_per_cpu_second": images / seconds,
        "patches_per_cpu_second": patches / seconds,
        "positions_per_cpu_second": positions / seconds if positions else None,
    }


def series(rows: Sequence[Row], system: str, step: str, key: str = "images_per_cpu_second") -> list[float]:
    """The figures of a system in one pass, in the order of the rounds."""
    chosen = [row for row in rows if (row["system"], row["pass"]) == (system, step)]
    return [float(row[key] or 0) for row in sorted(chosen, key=lambda row: int(row["round"] or 0))]


def summarise(system: System, step: str, rows: Sequence[Row]) -> Row:
    """Medians over the rounds, and how many times faster Ropeway is, computed round by round."""
    ours, theirs = (series(rows, name, step) for name in ("Ropeway", system.name))
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return {
        "pass": step,
        "system": system.name,
        "parameters": f"{count(system.model) / 1e6:.2f} M",
        "images / CPU-second": median(theirs),
        "patches / CPU-second": round(median(series(rows, system.name, step, "patches_per_cpu_second"))),
        "positions / CPU-second": round(median(series(rows, system.name, step, "positions_per_cpu_second"))) or None,
        "Ropeway's images / this system's (lowest to highest)": "1" if system.name == "Ropeway" else spread,
    }


def plot(systems: Sequence[System], rows: Sequence[Row]) -> Figure:
    """Median rates as bars with the range over the rounds, one panel per pass."""
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    for axes, step in zip(figure.subplots(1, len(PASSES), sharey=True), PASSES, strict=True):
        rates = [series(rows, system.name, step) for system in systems]
        middle = [median(values) for values in rates]
        low = [m - min(values) for m, values in zip(middle, rates, strict=True)]
        high = [max(values) - m for m, values in zip(middle, rates, strict=True)]
        colors = ["tab:blue" if system.name.startswith("Ropeway") else "tab:gray" for system in systems]
        axes.barh([system.name for system in systems], middle, xerr=[low, high], color=colors)
        axes.set_xlabel(f"{step}: images per CPU-second")
    axes.invert_yaxis()
    return figure


def _notes(systems: Sequence[System], side: int, documents: int, images: int) -> str:
    settings = "\n".join(f"* **{system.name}**: {system.settings}." for system in systems)
    size = MODEL.patch_size
    return f"""
Handwritten digits of {side} x {side} pixels as {size} x {size} RGB patches, {documents} captioned pictures per
optimizer step, {images} pictures per generation batch; one thread, float32. Each system has the same depth (6 blocks)
and heads of width 32, and the width that brings its number of parameters nearest to Ropeway's. Everything else is its
own default:

{settings}

Positions are places in the Transformer's sequence (text bytes, markers and patches, without padding): the systems with
captions read about twice as many per picture. A training step is forward, backward, gradient clipping and AdamW on
batches prepared beforehand, so that no system's data pipeline is measured. Both Ropeway lines draw with the same code,
so the difference between them there is the error of the measurement. Speed is not quality: the systems solve different
problems (one of them reads no text), and these figures say nothing about how good the pictures are after the same
number of steps.
"""
