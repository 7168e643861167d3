"""Where a training step and generation spend their time, operator by operator."""

import time

import torch
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import Result, Row
from data.source.shapes import held_out_captions
from train import pipeline, settings
from train.engine import Counts, TorchEngine
from train.generator import Generator, build_model, sampling_of
from train.optimizer import WeightAverage
from train.ranks import Ranks

_TOP = 12


def run(
    config: str = "configs/quickstart.yaml", steps: int = 5, pictures: int = 64, threads: int | None = None
) -> Result:
    """Profile training steps and the drawing of pictures of an untrained model.

    Args:
        config: configuration whose model, rows and sampler settings are used.
        steps: training steps to profile.
        pictures: pictures to draw in one batch.
        threads: CPU threads; default: PyTorch's own choice.
    """
    if threads:
        torch.set_num_threads(threads)
    settled = settings.parse(["--config", config])[0]
    tokenizer = pipeline.make_tokenizer(settled.data)
    encoder = pipeline.make_encoder(settled, tokenizer)
    model = build_model(settled, tokenizer)
    model.initialise(settled.run.seed)
    ranks = Ranks(settled)
    engine = TorchEngine(model, settled, ranks)
    average = WeightAverage(engine.parts(), settled.optim.ema_decay)
    rows = pipeline.StepRows(pipeline.make_mixture(settled, encoder, "train"), settled, 0, 1)
    phases: dict[str, float] = dict.fromkeys(("make rows", "forward and backward", "clip and update", "average"), 0.0)

    def step(number: int) -> None:
        marks = [time.perf_counter()]
        batches = rows[number].batches
        marks.append(time.perf_counter())
        text, image = (sum(c) for c in zip(*(batch.counts() for batch in batches), strict=True))
        for batch in batches:
            engine.micro_step(batch, Counts(text, image), is_last=True)
        marks.append(time.perf_counter())
        engine.step(settled.optim.lr)
        marks.append(time.perf_counter())
        average.update(engine.parts(), number)
        marks.append(time.perf_counter())
        for name, begin, end in zip(phases, marks, marks[1:], strict=False):
            phases[name] += end - begin

    step(0)
    phases = dict.fromkeys(phases, 0.0)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ranks.device.type == "cuda" else [])]
    with profile(activities=activities) as training:
        for number in range(1, steps + 1):
            step(number)
    generator = Generator(model, tokenizer, encoder, engine.bf16)
    sampling = sampling_of(settled)
    canvas = settled.data.shapes.canvases[0] if settled.data.shapes else (8, 8)
    captions = held_out_captions()[:pictures]
    generator.pictures(captions, canvas, sampling)
    with profile(activities=activities) as drawing:
        generator.pictures(captions, canvas, sampling)

    measured: list[Row] = [
        {
            "part": "training step",
            "operator": name,
            "milliseconds": 1e3 * seconds / steps,
            "percent": 100 * seconds / sum(phases.values()),
        }
        for name, seconds in phases.items()
    ]
    operators = [
        *_operators("operators of a training step", training, steps),
        *_operators(f"operators of drawing {len(captions)} pictures", drawing, 1),
    ]
    notes = f"Model and rows of `{config}`, {torch.get_num_threads()} thread(s), {'bf16' if engine.bf16 else 'fp32'}."
    return Result("profile", [*measured, *operators], [*measured, *operators], notes, _plot(operators), ranks.device)


def _operators(part: str, profiled: profile, times: int) -> list[Row]:
    """The operators with the largest own time."""
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {
            "part": part,
            "operator": event.key,
            "milliseconds": event.self_cpu_time_total / 1e3 / times,
            "percent": 100 * event.self_cpu_time_total / total,
        }
        for event in events[:_TOP]
    ]


def _plot(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(11, 4))
    parts = list(dict.fromkeys(row["part"] for row in rows))
    for axis, part in zip(figure.subplots(1, len(parts)), parts, strict=True):
        chosen = [row for row in rows if row["part"] == part][::-1]
        axis.barh([str(row["operator"]) for row in chosen], [row["percent"] for row in chosen])
        axis.set(title=str(part), xlabel="percent of own time")
        axis.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    return figure
