"""Pictures per second at equal quality: this generator, its first version, and two peers, on handwritten digits.

Every system has as many parameters and learns from the same pictures for the same CPU time, with the same optimizer;
one of ours spends a part of it on distilling its head to few steps. Then all draw in turns, so that other load on the
machine affects them alike. Time is CPU time of one thread. What is done is kept in a folder: an interrupted run goes on
from there. Install the peers with `make bench`.
"""

import io
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count as endless
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from sklearn.svm import SVC

from benchmarks.peers import cpu_seconds
from benchmarks.report import Result, Row
from benchmarks.systems import AutoregressiveSystem, PeerSampling, RopewaySystem, System, TransfusionSystem, count
from data.source import digits
from data.tokenizer import Tokenizer
from model.config import HeadConfig, ModelConfig
from model.sampling import Sampling
from train.distill import ConsistencyLesson
from train.evaluate import frechet_distance, seam_energy
from train.precision import autocast, uses_bf16
from train.ranks import keep_freed_memory

MODEL = ModelConfig(
    dim=128, num_layers=4, num_heads=4, num_kv_heads=1, patch_size=2, head=HeadConfig(width=192, depth=3, draws=1)
)
"""One noise draw per patch, like the peers: in so short a time more draws cost more than they teach."""
FIRST_VERSION = "84e9aab"
"""The first commit with a generator. It reads the weights of today's models."""
_FIRST = "Ropeway, first version"
_DISTILLED, _TEACHER = "Ropeway, distilled", "Ropeway, to be distilled"
_GOAL = 5
_CPU = torch.device("cpu")
_FLOW_SHARE = 0.7
"""Of its time that the distilled model learns the flow."""
_SIDE = 8


@dataclass(frozen=True)
class Way:
    """A trained system and how it draws."""

    name: str
    system: System
    sampling: Sampling | PeerSampling


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def _weights(folder: Path, name: str) -> Path:
    return folder / f"{_slug(name)}.safetensors"


def run(
    seconds: float = 240.0, images: int = 1000, batch: int = 100, documents: int = 64, lr: float = 1e-3,
    steps: tuple[int, ...] = (1, 2, 4, 8, 20), peer_steps: tuple[int, ...] = (2, 3, 5, 9),
    precision: Literal["auto", "fp32", "bf16"] = "auto", folder: Path = Path("runs/generation"),
) -> Result:  # fmt: skip
    """Train what is not trained yet, draw what is not drawn yet, and return one row per way of drawing and batch.

    Args:
        seconds: CPU time that every system learns.
        images: pictures that every way draws; Frechet distances depend on their number.
        batch: pictures that are drawn at once.
        documents: captioned pictures per optimizer step.
        lr: learning rate of AdamW after 50 steps; it falls to 0 as a cosine over the time.
        steps: numbers of Euler steps of Ropeway.
        peer_steps: of the peers, as their packages count them, beside their defaults.
        precision: in which all learn and draw; auto: bf16 autocast where there are units for it.
        folder: where trained weights and pictures are kept; another one for other settings.
    """
    for name, value in (
        ("seconds", seconds),
        ("images", images),
        ("batch", batch),
        ("documents", documents),
        ("lr", lr),
    ):
        if not value > 0:
            raise ValueError(f"--{name} is {value}; it must be positive")
    if images % batch:
        raise ValueError(f"--images {images} is not a multiple of --batch {batch}")
    folder.mkdir(parents=True, exist_ok=True)
    systems, bf16 = _systems(), uses_bf16(precision, _CPU)
    settings = {"seconds": seconds, "documents": documents, "lr": lr, "batch": batch, "bf16": bf16,
                "systems": [system.settings for system in systems], "flow_share": _FLOW_SHARE,
                "models": [repr(s.config) for s in systems if isinstance(s, RopewaySystem)]}  # fmt: skip
    _keep(folder / "settings.json", settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()  # for all systems, as `launch.generate` does
    try:
        for system in systems:
            learn = _distil if system.name == _DISTILLED else _train
            learn(system, folder, seconds, documents, lr, bf16)
        systems[2:2] = [_compiled(system, folder) for system in systems[:2]]
        ways = _ways(systems, steps, peer_steps)
        warm: set[str] = set()
        with tempfile.TemporaryDirectory() as archive:
            _unpack_first_version(Path(archive))
            for number in range(images // batch):
                for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                    _draw(way, folder, number, batch, Path(archive), warm, bf16)
    finally:
        torch.set_num_threads(threads)
    rows = [_row(way, folder, images // batch) for way in ways]
    peers = [system.name for system in systems if not isinstance(system, RopewaySystem)]
    return Result(
        benchmark="generation", rows=rows, summary=[_summarised(row, rows) for row in rows],
        notes=verdict(rows, peers) + _notes(systems, seconds, images, batch, documents, lr, bf16), figure=_plot(rows),
        packages=("autoregressive-diffusion-pytorch", "transfusion-pytorch", "x-transformers", "numpy", "scikit-learn"),
    )  # fmt: skip


def _systems() -> list[System]:
    distilled = replace(MODEL, head=replace(MODEL.head, objective="consistency", loss="x", time_law="uniform"))
    ours = [RopewaySystem("Ropeway", MODEL, _SIDE), RopewaySystem(_DISTILLED, distilled, _SIDE)]
    parameters = count(ours[0].model)
    return [
        *ours,
        AutoregressiveSystem("flow", parameters, _SIDE, MODEL.patch_size),
        AutoregressiveSystem("diffusion", parameters, _SIDE, MODEL.patch_size),
        TransfusionSystem(parameters, _SIDE, MODEL.patch_size),
    ]


def _ways(systems: Sequence[System], steps: Sequence[int], peer_steps: Sequence[int]) -> list[Way]:
    ways = [Way(_FIRST, systems[0], Sampling())]
    for system in systems:
        if isinstance(system, RopewaySystem):
            sampler = "consistency" if system.name.startswith(_DISTILLED) else "euler"
            ways += [Way(f"{system.name}, {n} step{'s' * (n > 1)}", system, Sampling(sampler=sampler, steps=n))
                     for n in steps]  # fmt: skip
        elif isinstance(system, AutoregressiveSystem | TransfusionSystem):
            ways.append(Way(f"{system.name}, by default", system, system.sampling))
            few = [PeerSampling(n) for n in peer_steps]
            if system.sampling.scale != 1:
                few.append(PeerSampling(system.sampling.steps))
            ways += [Way(f"{system.name}, {system.evaluations_of(one)} evaluations", system, one) for one in few]
    return ways


def _train(system: System, folder: Path, seconds: float, documents: int, lr: float, bf16: bool) -> None:
    """Fill the model with its average over the last steps of training, by EMA, from the folder if it is there."""
    model = system.model
    path = _weights(folder, system.name)
    if path.exists():
        model.load_state_dict(load_file(path))
        return
    source, random = digits.Digits("train", caption_fraction=0.0), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    model.train()
    spent = 0.0
    for step in endless():
        batch = system.prepare([source.document(int(i)) for i in random.integers(len(source), size=documents)])
        began = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * spent / seconds)) / 2
        with autocast(_CPU, bf16):
            loss = system.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.995, (step + 1) / (step + 10))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                average[name].lerp_(value, 1 - decay)
        spent += time.process_time() - began
        if spent >= seconds:
            break
        if step % 100 == 0:
            print(f"{system.name}: step {step}, {spent:.0f} of {seconds:g} s", file=sys.stderr)
    model.load_state_dict(average)
    model.eval()
    _write(path, lambda to: save_file({name: value.contiguous() for name, value in average.items()}, to))


def _distil(system: System, folder: Path, seconds: float, documents: int, lr: float, bf16: bool) -> None:
    """A flow, and then its head taught to jump to the data; from the folder if it is there."""
    assert isinstance(system, RopewaySystem)
    model, path = system.model, _weights(folder, system.name)
    if path.exists():
        model.load_state_dict(load_file(path))
        return
    flow = RopewaySystem(_TEACHER, MODEL, _SIDE)
    _train(flow, folder, _FLOW_SHARE * seconds, documents, lr, bf16)
    model.load_state_dict(flow.model.state_dict())
    source, random = digits.Digits("train", caption_fraction=0.0), np.random.default_rng(1)
    lesson = ConsistencyLesson(flow.model, system.config.head, lr=5e-4, decay=0.95, ema_decay=0.995, from_data=True)
    spent = 0.0
    while spent < (1 - _FLOW_SHARE) * seconds:
        batch = system.prepare([source.document(int(i)) for i in random.integers(len(source), size=documents)])
        began = time.process_time()
        with autocast(_CPU, bf16):
            lesson.learn(batch)
        spent += time.process_time() - began
    model.load_state_dict(flow.model.state_dict() | lesson.averaged())
    model.eval()
    _write(path, lambda to: save_file({name: value.contiguous() for name, value in model.state_dict().items()}, to))


def _compiled(system: System, folder: Path) -> RopewaySystem:
    """The same model with its drawing compiled."""
    assert isinstance(system, RopewaySystem)
    other = RopewaySystem(f"{system.name}, compiled", system.config, _SIDE)
    other.model.load_state_dict(load_file(_weights(folder, system.name)))
    other.model.eval().compile_drawing()
    return other


def _draw(way: Way, folder: Path, number: int, batch: int, archive: Path, warm: set[str], bf16: bool) -> None:
    """Pictures of one batch and the CPU time they took, into the folder unless they are there. warm: ways that have
    drawn in this process. The others may draw in float32 where that is faster."""
    path = folder / f"{_slug(way.name)}-{number}.npz"
    if path.exists():
        return
    print(f"{way.name}: batch {number}", file=sys.stderr)
    wanted = np.arange(number * batch, (number + 1) * batch) % 10
    captions = [digits.caption(int(digit)) for digit in wanted]
    today = isinstance(way.system, RopewaySystem) and way.name != _FIRST
    tries = []
    for in_bf16 in {bf16} if today else {bf16, False}:
        torch.manual_seed(number)
        if way.name == _FIRST:
            tries.append(_first_version(way, folder, captions, number * batch, archive, in_bf16))
        else:
            tries.append(_timed(way, captions, number * batch, warm, in_bf16))
    pictures, seconds = min(tries, key=lambda tried: tried[1])
    _write(path, lambda to: np.savez(to, pictures=pictures, wanted=wanted, seconds=seconds))


def _timed(way: Way, captions: list[str], first_seed: int, warm: set[str], bf16: bool) -> tuple[np.ndarray, float]:
    """Pictures, and the CPU time they took."""
    way.system.sampling = way.sampling
    if isinstance(way.system, RopewaySystem):
        way.system.first_seed = first_seed
    made: list[np.ndarray] = []
    with autocast(_CPU, bf16):
        if way.name not in warm:  # compiles, where it does
            way.system.draw(captions)
            warm.add(way.name)
        seconds = cpu_seconds(lambda: made.append(way.system.draw(captions)))
    return made[0], seconds


def _unpack_first_version(archive: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    tar = subprocess.run(["git", "-C", root, "archive", FIRST_VERSION, "model"], capture_output=True, check=False)
    if tar.returncode:
        raise OSError(f"the first version, commit {FIRST_VERSION}, is not in this clone: fetch its whole history")
    with tarfile.open(fileobj=io.BytesIO(tar.stdout)) as files:
        files.extractall(archive, filter="data")


_FIRST_CODE = """
import json, sys, time
import numpy as np, torch
from safetensors.torch import load_file
from model.config import HeadConfig, ModelConfig, Vocabulary
from model.generate import Prompt, Request, Sampling, generate
from model.ropeway import Ropeway
torch.set_num_threads(1)
job = json.load(sys.stdin)
config = ModelConfig(**job["model"], head=HeadConfig(**job["head"]))
model = Ropeway(config, Vocabulary(**job["vocabulary"]))
model.load_state_dict(load_file(job["weights"]))
requests = []
for seed, token in enumerate(job["tokens"], job["first_seed"]):
    token = np.array(token)
    zero = np.zeros_like(token)
    prompt = Prompt(token, zero, zero, zero, zero, np.zeros((0, config.patch_width), np.uint8))
    requests.append(Request(prompt, seed, True, tuple(job["grid"]), max_text=0))
with torch.autocast("cpu", torch.bfloat16, enabled=job["bf16"]):
    generate(model, requests[:8], Sampling(steps=2))
    began = time.process_time()
    made = generate(model, requests, Sampling(steps=job["steps"]))
    seconds = time.process_time() - began
np.savez(job["out"], patches=np.stack([parts[0].patches for parts in made]), seconds=seconds)
"""


def _first_version(
    way: Way, folder: Path, captions: list[str], first_seed: int, archive: Path, bf16: bool
) -> tuple[np.ndarray, float]:
    """The same weights, prompts and seeds, drawn by the first version in a process of its own."""
    from data.image import unpatchify

    system = way.system
    assert isinstance(system, RopewaySystem)
    tokenizer, out = Tokenizer.bytes(), archive / "out.npz"
    job = {
        "model": {"dim": MODEL.dim, "num_layers": MODEL.num_layers, "num_heads": MODEL.num_heads,
                  "num_kv_heads": MODEL.num_kv_heads, "patch_size": MODEL.patch_size},
        "head": {"width": MODEL.head.width, "depth": MODEL.head.depth},
        "vocabulary": vars(system.model.vocabulary),
        "weights": str(_weights(folder, system.name).resolve()),
        "tokens": [[tokenizer.bos, *tokenizer.encode(caption)] for caption in captions],
        "grid": [system.grid] * 2, "first_seed": first_seed, "steps": way.sampling.steps, "out": str(out),
        "bf16": bf16,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _FIRST_CODE], input=json.dumps(job), text=True, cwd=archive, check=False,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(archive)},
    )  # fmt: skip
    if done.returncode:
        raise OSError(f"the first version failed: {done.stderr.strip().splitlines()[-1]}")
    with np.load(out) as made:
        pictures = [unpatchify(patches, system.grid, system.grid, MODEL.patch_size) for patches in made["patches"]]
        return np.stack(pictures), float(made["seconds"])


def _row(way: Way, folder: Path, batches: int) -> Row:
    pictures, wanted, seconds = [], [], []
    for number in range(batches):
        with np.load(folder / f"{_slug(way.name)}-{number}.npz") as made:
            pictures.append(made["pictures"])
            wanted.append(made["wanted"])
            seconds.append(float(made["seconds"]))
    drawn, labels = np.concatenate(pictures), np.concatenate(wanted)
    train_pixels, train_labels = digits.arrays("train")
    test_pixels, _ = digits.arrays("test")
    classifier = SVC(gamma=0.001, C=10).fit(_gray(train_pixels), train_labels)
    right = float(np.mean(classifier.predict(_gray(drawn)) == labels)) if way.system.reads_captions else None
    return {
        "system": way.name,
        "learned_as": _FIRST if way.name == _FIRST else way.system.name,
        "parameters": count(way.system.model),
        "steps": way.sampling.steps,
        "images": len(drawn),
        "cpu_seconds_per_batch": median(seconds),
        "images_per_cpu_second": len(pictures[0]) / median(seconds),
        "frechet_distance": frechet_distance(_gray(drawn), _gray(test_pixels)),
        "accuracy": right,
        "seam_energy": seam_energy(drawn, MODEL.patch_size),
    }


def _gray(pixels: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) bytes to (N, H * W) in 0..16, the range of the original digits."""
    return pixels.astype(np.float64).mean(-1).reshape(len(pixels), -1) * 16 / 255


def fastest(row: Row, rows: Sequence[Row], compiled: bool = True) -> Row | None:
    """The fastest of today's ways of drawing whose Frechet distance is no larger than that of the row. compiled: also
    among those that are compiled."""
    ours = [other for other in rows if str(other["system"]).startswith("Ropeway") and other["system"] != _FIRST]
    good = [other for other in ours if float(other["frechet_distance"]) <= float(row["frechet_distance"])  # type: ignore[arg-type]
            and (compiled or "compiled" not in str(other["system"]))]  # fmt: skip
    return max(good, key=lambda other: float(other["images_per_cpu_second"] or 0), default=None)


def ratio_to(row: Row, rows: Sequence[Row], compiled: bool = True) -> float:
    """How many times faster `fastest` is; 0 where nothing of today's is as good."""
    best = fastest(row, rows, compiled)
    return float(best["images_per_cpu_second"] or 0) / float(row["images_per_cpu_second"] or 1) if best else 0.0


def verdict(rows: Sequence[Row], names: Sequence[str]) -> str:
    """How many times faster than every other system Ropeway is: as they draw by default, and by the fastest of their
    ways whose Frechet distance is within a tenth of their best."""

    def speed(row: Row) -> float:
        return float(row["images_per_cpu_second"] or 0)

    defaults, fast = [], []
    for name in names:
        ways = [row for row in rows if str(row["system"]).startswith(name)]
        defaults.append(next(row for row in ways if str(row["system"]).endswith("by default")))
        limit = 1.1 * min(float(row["frechet_distance"] or 0) for row in ways)
        fast.append(max((row for row in ways if float(row["frechet_distance"] or 0) <= limit), key=speed))
    first = [row for row in rows if row["system"] == _FIRST]
    lines = []
    for what, chosen in (
        ("every peer, as they draw by default", defaults),
        ("every peer, the fastest way within a tenth of its best", fast),
        ("the first version", first),
    ):
        plain, any_way = ([ratio_to(row, rows, compiled) for row in chosen] for compiled in (False, True))
        said = [f"{one:.1f}, compiled {other:.1f} ({row['system']})" if other else f"none is as good as {row['system']}"
                for row, one, other in zip(chosen, plain, any_way, strict=True)]  # fmt: skip
        worst, best = min(plain, default=0), min(any_way, default=0)
        reached = "reached" if worst >= _GOAL else "reached where compiled" if best >= _GOAL else "missed"
        lines.append(f"* of {what}: {'; '.join(said)}. The goal of {_GOAL} is {reached}.\n")
    return "Ropeway, at an equal or better Frechet distance, draws so many times as fast:\n\n" + "".join(lines)


def _summarised(row: Row, rows: Sequence[Row]) -> Row:
    best = fastest(row, rows)
    rival = row["system"] == _FIRST or not str(row["system"]).startswith("Ropeway")
    ratio = ratio_to(row, rows)
    said = f"{ratio:.1f} ({best['system']})" if best else "none is as good"
    return {
        "system": row["system"],
        "parameters": f"{int(row['parameters'] or 0) / 1e6:.2f} M",
        "images / CPU-second": row["images_per_cpu_second"],
        "Frechet distance": row["frechet_distance"],
        "recognised as prompted": row["accuracy"],
        "Ropeway, as good: how many times faster": said if rival else None,
    }  # fmt: skip


def _plot(rows: Sequence[Row]) -> Figure:
    """Frechet distance over speed, a line for each system; numbers are steps, as each one counts them."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["learned_as"] for row in rows):
        mine = sorted((row for row in rows if row["learned_as"] == name), key=lambda row: float(row["steps"] or 0))
        points = [(float(row["images_per_cpu_second"] or 0), float(row["frechet_distance"] or 0)) for row in mine]
        axes.plot(*zip(*points, strict=True), "o-", label=name)
        for row, point in zip(mine, points, strict=True):
            axes.annotate(str(row["steps"]), point, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="images per CPU-second", ylabel="Frechet distance to the test split")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _keep(path: Path, settings: dict) -> None:
    """Settings of what the folder holds. Raises ValueError if it was begun with others."""
    if path.exists() and json.loads(path.read_text()) != settings:
        raise ValueError(f"{path.parent} was begun with other settings, {path.read_text()}; choose another --folder")
    path.write_text(json.dumps(settings))


def _write(path: Path, save) -> None:  # type: ignore[no-untyped-def]
    """A file, whole or not at all."""
    partial = path.with_name("partial" + path.suffix)
    save(partial)
    partial.replace(path)


def _notes(systems: Sequence[System], seconds: float, images: int, batch: int, documents: int, lr: float,
           bf16: bool) -> str:  # fmt: skip
    learned = "\n".join(f"* **{s.name}**: {s.settings}." for s in systems if not s.name.endswith("compiled"))
    return f"""
Handwritten digits of {_SIDE} x {_SIDE} pixels as {MODEL.patch_size} x {MODEL.patch_size} RGB patches. Every system
learned {seconds:g} s of CPU time (data preparation left out), {documents} pictures per step, AdamW at {lr:g}, 50 steps
of warm-up, cosine to 0 over the time, gradients clipped at 1; all draw with an average of their weights (0.995).
All learned and drew {"under bf16 autocast" if bf16 else "in float32"}, on one thread; the first version and the peers
drew every batch in float32, too, and the faster one counts.
{_DISTILLED} learned the flow for {100 * _FLOW_SHARE:g} % of that time, and in the rest jumps to the data
(`train.distill consistency --from_data`). This, the share and the draws per patch were chosen by tries like this run.
Compiled: with `compile_drawing` (`--compile`), whose half a minute at the start is left out.
{images} pictures of every way of drawing, {batch} at a time, in turns; the rate is the median over the batches. Frechet
distance on raw pixels (0 to 16) to the test split; accuracy is that of a support vector machine, and says nothing of
systems that read no captions.

The first version ({FIRST_VERSION}) draws with the weights of "Ropeway" and 20 steps of Euler, the default of both.
The peers draw by their defaults and with fewer evaluations of what draws (per patch; transfusion-pytorch per picture,
without guidance).

{learned}
"""
