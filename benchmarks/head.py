"""What each choice of the diffusion head buys: one factor at a time around the default, then samplers and steps.

A cell is one way to draw from one trained model; its scores are a file in the model's run folder. A killed table goes
on where it was: models resume, and cells that have scores are not computed again. Where the folder is lost, result
files of earlier tables (`--known`) tell what need not be measured again.
"""

import json
import logging
import math
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.head_rows import SETTINGS, Setting, label
from benchmarks.report import Result, Row, commit
from model.diffusion.path import PATHS
from model.diffusion.sampler import LEARNED, SAMPLERS, evaluations, grid_of
from model.sampling import Sampling
from train import checkpoint, settings
from train.config import Config
from train.distill import consistency_config, distill_consistency, distill_solver, write_run
from train.evaluate import SUITES, Scores, Task
from train.generator import Generator
from train.loop import set_up, train

ROOT = Path(__file__).parents[1]
BASES = {"digits": ("configs/digits.yaml", 600), "shapes": ("configs/quickstart.yaml", 400)}
"""The configuration that is varied, and its steps: fewer than its own, so that the table takes hours."""
ACCURACY = {"digits": "recognised as prompted", "shapes": "one object, drawn, all"}
SOLVER_UPDATES = 100


@dataclass(frozen=True)
class Cell:
    """One way to draw from one model."""

    data: str
    setting: Setting
    seed: int
    sampling: Sampling
    config: Config
    """Of the model's run."""
    pictures: int
    default: Config
    """Of the default's run with the same seed."""

    @property
    def run(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def name(self) -> tuple[object, ...]:
        """What tells its row in a result file from the others."""
        return self.data, self.setting.name, self.seed, label(self.sampling), self.pictures, self.config.run.steps

    @property
    def scores(self) -> Path:
        return self.run / "scores" / f"{_slug(label(self.sampling))}-{self.pictures}.json"

    @property
    def trained(self) -> bool:
        return checkpoint.step_folder(self.run, self.config.run.steps).is_dir()


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() or c in ".-" else " " for c in name).split())


def run(
    data: Literal["digits", "shapes", "both"] = "both",
    rows: list[str] | None = None,
    seeds: int = 3,
    pictures: int = 500,
    steps: int | None = None,
    minutes: float | None = None,
    folder: Path = Path("runs/head"),
    known: list[Path] | None = None,
) -> Result:
    """Train and draw what has no scores yet, and return the table of all that was asked for.

    Args:
        data: what the models learn.
        rows: names of rows, or of their factors; default: all.
        seeds: models per row, with seeds 0, 1, ...
        pictures: drawn per cell (shapes: 537 at most).
        steps: training steps of every model; default 600 on digits, 400 on shapes.
        minutes: begin nothing new after this time, and write the table of what there is; 0: only write it.
        folder: of the runs and scores.
        known: result files of earlier tables; what they hold is taken from there, whatever the configurations were.
    """
    for name, value in (("seeds", seeds), ("pictures", pictures), ("steps", 1 if steps is None else steps)):
        if value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    cells = plan(("digits", "shapes") if data == "both" else (data,), rows, seeds, pictures, steps, folder)
    for config in {str(config.run.dir): config for cell in cells for config in (cell.default, cell.config)}.values():
        refuse_other_settings(config)
    code()
    measured = read_known(known or [])
    todo = [cell for cell in cells if cell.name not in measured and not cell.scores.is_file()]
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    if time.monotonic() < end:
        announce(todo, len(cells))
    for cell in todo:
        if time.monotonic() > end:
            print(f"{minutes:g} minutes have passed; the same command goes on from here", file=sys.stderr)
            break
        if not cell.scores.is_file():  # by another process, with other rows of the same table
            work(cell)
    return report(cells, measured)


def read_known(files: Sequence[Path]) -> dict[tuple[object, ...], Row]:
    """The rows of result files, by Cell.name, each with the commit that measured it. Raises ValueError for files of
    another kind, and where two disagree."""
    found: dict[tuple[object, ...], Row] = {}
    for path in files:
        try:
            result = json.loads(path.read_text())
            for row in result["rows"]:
                name = tuple(row[key] for key in ("data", "row", "seed", "drawn", "pictures", "training_steps"))
                row |= {"commit": row.get("commit") or result["commit"]}
                if found.setdefault(name, row)["accuracy_percent"] != row["accuracy_percent"]:
                    raise ValueError(f"--known {path} disagrees with another file about {name}; give one of them")
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"--known {path} is not a result file of this benchmark: {error!r}") from error
    return found


def plan(data: Sequence[str], rows: list[str] | None, seeds: int, pictures: int, steps: int | None, folder: Path
         ) -> list[Cell]:  # fmt: skip
    """All cells in the order of work: all of a seed before the next."""
    known = {setting.name for setting in SETTINGS} | {setting.factor for setting in SETTINGS if setting.factor}
    if unknown := [name for name in rows or [] if name not in known]:
        raise ValueError(f"--rows names {unknown[0]!r}; choose from {', '.join(sorted(known))}")
    chosen = [setting for setting in SETTINGS if rows is None or setting.name in rows or setting.factor in rows]
    by_name = {setting.name: setting for setting in SETTINGS}
    cells = []
    for seed in range(seeds):
        for kind in data:
            number = steps or BASES[kind][1]
            for setting in [setting for setting in chosen if kind in setting.data]:
                own = by_name[setting.model] if setting.model else setting
                model, default = (config_of(one, kind, number, seed, folder) for one in (own, by_name["default"]))
                cells += [Cell(kind, setting, seed, drawing, model, pictures, default) for drawing in setting.drawings]
    return cells


def config_of(model: Setting, data: str, steps: int, seed: int, folder: Path) -> Config:
    """The run of a model."""
    config = base_of(data)
    run = replace(config.run, dir=str(folder / f"{data}-{steps}" / _slug(model.name) / f"seed-{seed}"), steps=steps,
                  seed=seed)  # fmt: skip
    config = replace(config, run=run)
    for key, value in model.options:
        config = changed(config, key.split("."), value)
    return consistency_config(config, config.model.head.consistency_steps) if model.distilled else config


@cache
def base_of(data: str) -> Config:
    """The configuration that is varied."""
    return settings.parse([
        "--config", str(ROOT / BASES[data][0]), "--eval.every=0", "--log.every=50", "--data.workers=0",
        "--checkpoint.every=200", "--checkpoint.keep_last=1",
    ])[0]  # fmt: skip


def changed(config: Any, keys: Sequence[str], value: object) -> Any:
    """A copy of nested dataclasses with another value at the path of keys."""
    first, *rest = keys
    return replace(config, **{first: changed(getattr(config, first), rest, value) if rest else value})


def work(cell: Cell) -> None:
    """Train the model if it is not, draw, and write the scores, whole or not at all."""
    if not cell.trained:
        print(f"{cell.data}, {cell.run.parent.name}, seed {cell.seed}: training", file=sys.stderr)
        learn(cell)
    began = time.perf_counter()
    cell.scores.parent.mkdir(exist_ok=True)
    generator = Generator.load(cell.run)
    if cell.sampling.sampler == LEARNED:
        generator.model.requires_grad_(False)
        steps, grid = cell.sampling.steps, cell.sampling.grid
        generator.model.solver, _ = distill_solver(generator, cell.config, steps, grid, SOLVER_UPDATES, 1e-2)
    # The first cell of a row says all; the others only how the pictures are.
    only_draw = cell.sampling != cell.setting.drawings[0] or bool(cell.setting.model)
    task = Task(generator, cell.config, cell.sampling, cell.pictures, 0, cell.scores.parent, False, only_draw)
    scores = SUITES[cell.data](task)
    partial = cell.scores.with_suffix(".tmp")
    partial.write_text(json.dumps(scores | {"commit": code()}, indent=1) + "\n")
    partial.replace(cell.scores)
    right, seconds = 100 * scores[ACCURACY[cell.data]], time.perf_counter() - began
    print(f"{cell.data}, {cell.run.parent.name}, seed {cell.seed}, {label(cell.sampling)}: {right:.1f} % "
          f"({seconds:.0f} s)", file=sys.stderr)  # fmt: skip


@cache
def code() -> str | None:
    """The commit of this process, whatever becomes of the working tree meanwhile."""
    return commit()


def refuse_other_settings(config: Config) -> None:
    """Raises ValueError if there is a trained model in this run's place, but of another configuration."""
    folder = checkpoint.step_folder(Path(config.run.dir), config.run.steps)
    if folder.is_dir():
        found = checkpoint.read_config(folder)
        if (replace(found, run=config.run), found.run.seed) != (config, config.run.seed):
            raise ValueError(f"{config.run.dir} was trained with other settings than its row has now; choose another "
                             "--folder")  # fmt: skip


def learn(cell: Cell) -> None:
    """Train the model of a cell, the default before one that is distilled from it."""
    if not cell.setting.distilled:
        train_model(cell.config)
        return
    if not checkpoint.step_folder(Path(cell.default.run.dir), cell.default.run.steps).is_dir():
        train_model(cell.default)
    generator = Generator.load(cell.default.run.dir)
    generator.model.requires_grad_(False)
    made, _ = distill_consistency(generator, cell.config, cell.config.run.steps, 5e-4, 0.95, cell.setting.from_data)
    write_run(made, generator, cell.run)


def train_model(config: Config) -> None:
    """Train to the end; a signal ends the run with a checkpoint, and then the table too."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    run = set_up(config)
    train(run, dry_run=False)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if run.step < (config.run.stop_after or config.run.steps):
        raise SystemExit(f"stopped at step {run.step} of {config.run.dir}; the same command goes on from there")


def announce(cells: Sequence[Cell], planned: int) -> None:
    """Print what is to do, with the time that measured steps and pictures of each model promise."""
    total = 0.0
    by_model: dict[Path, list[Cell]] = {}
    for cell in cells:
        by_model.setdefault(cell.run, []).append(cell)
    measured: dict[str, Scores] = {}
    for path, todo in by_model.items():
        config = todo[0].config
        alike = str(replace(config, run=replace(config.run, dir="", seed=0)))
        if alike not in measured:
            measured[alike] = speed(config)
        seconds = measured[alike]
        training = 0 if todo[0].trained else seconds["step"] * config.run.steps
        drawing = sum(
            cell.pictures * (seconds["picture"] + seconds["evaluation"] * _evaluations(cell.sampling)) for cell in todo
        )
        total += training + drawing
        print(f"{path.relative_to(path.parents[2])}: {training / 60:.1f} min of training, {drawing / 60:.1f} min of "
              f"drawing, {len(todo)} cell(s)", file=sys.stderr)  # fmt: skip
    print(f"to do: {len(cells)} of {planned} cells, about {total / 3600:.1f} h", file=sys.stderr)


def _evaluations(sampling: Sampling) -> int:
    """Of the head per patch, in all streams."""
    guidance, seen = sampling.guidance, []
    if guidance.streams == 1:
        return evaluations(sampling.sampler, sampling.steps)

    def velocity(z: Tensor, time: float) -> Tensor:
        seen.append(guidance.streams_at(time))
        return z

    times, nothing = grid_of(sampling.grid, sampling.steps, PATHS["flow"], sampling.time_shift), torch.zeros(1)
    SAMPLERS[sampling.sampler](velocity, nothing, times, lambda *_: nothing)
    return sum(seen)


def speed(config: Config) -> Scores:
    """Seconds of a training step, of a picture without and per evaluation of the head, in a run of three steps."""
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        short = replace(config, run=replace(config.run, dir=folder, stop_after=4), log=replace(config.log, every=1))
        train_model(short)
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        generator = Generator.load(folder)
    logging.disable(logging.NOTSET)
    size = (8, 8) if config.data.digits else (32, 32)
    taken = []
    for steps in (1, 9):
        began = time.perf_counter()
        generator.pictures(
            ["the digit 7" if config.data.digits else "a small red circle"] * 32, size, Sampling(steps=steps)
        )
        taken.append((time.perf_counter() - began) / 32)
    evaluation = max(taken[1] - taken[0], 0) / 8
    return {"step": statistics.median(line["step_seconds"] for line in lines[1:]), "evaluation": evaluation,
            "picture": taken[0]}  # fmt: skip


def report(cells: Sequence[Cell], measured: Mapping[tuple[object, ...], Row]) -> Result:
    """The table of the cells that have scores, here or in what was measured before."""
    done = [cell for cell in cells if cell.scores.is_file() or cell.name in measured]
    if not done:
        raise ValueError("nothing was measured in the given time; start the same command again")
    rows = [measurement(cell) if cell.scores.is_file() else measured[cell.name] for cell in done]
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["row"], row["drawn"]), []).append(row)
    summary = [summarise(group) for group in groups.values()]
    return Result("head", rows, summary, notes(rows, done), figure(rows), packages=("numpy", "scikit-learn"))


def measurement(cell: Cell) -> Row:
    """The scores of a cell."""
    scores = json.loads(cell.scores.read_text())
    prefix = "one object, " if cell.data == "shapes" else ""
    real = "held-out pictures" if prefix else "test split"

    def score(name: str) -> float | None:
        value = scores.get(prefix + name)
        return None if value is None or math.isnan(value) else value

    log = cell.run / "metrics.jsonl"
    metrics = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    seam, real_seam = score("seam energy"), score(f"seam energy, {real}")
    side = 8 if cell.data == "digits" else 32
    count = _evaluations(cell.sampling)
    whole = cell.config.model.image_mode == "transfusion"
    parts = 1 if whole else (side // cell.config.model.patch_size) ** 2
    return {
        "data": cell.data,
        "row": cell.setting.name,
        "factor": cell.setting.factor,
        "seed": cell.seed,
        "drawn": label(cell.sampling),
        "sampler": cell.sampling.sampler,
        "steps": cell.sampling.steps,
        "evaluations_per_patch": count,
        "evaluations_per_picture": count * parts,
        "cpu_seconds_per_picture": score("CPU seconds per picture"),
        "pictures": cell.pictures,
        "accuracy_percent": 100 * scores[ACCURACY[cell.data]],
        "frechet_distance": score(f"frechet distance to {'held-out pictures' if prefix else 'the test split'}"),
        "seam_energy_over_real": seam / real_seam if seam and real_seam else None,
        "saturated_percent": _percent(score("saturated")),
        "saturated_percent_real": _percent(score(f"saturated, {real}")),
        "image_loss_held_out": score("image loss, held-out pictures"),
        "image_loss_own": score("image loss, own pictures"),
        "captions_exact_percent": _percent(score("caption exact" if prefix else "test split, caption exact")),
        "training_steps": cell.config.run.steps,
        "commit": scores.get("commit"),
        "training_tflop": cell.config.run.steps / 1000 * statistics.mean(
            line["gflops_per_second"] * line["step_seconds"] for line in metrics) if metrics else None,
    }  # fmt: skip


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def summarise(rows: Sequence[Row]) -> Row:
    """Mean over the seeds of one way to draw, with the range."""
    first = rows[0]

    def mean(key: str, digits: int, unit: float = 1) -> str | None:
        values = [unit * float(row[key]) for row in rows if row[key] is not None]  # type: ignore[arg-type]
        if not values:
            return None
        spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    return {
        "data": first["data"],
        "row": first["row"],
        "drawn": first["drawn"],
        "evaluations / patch": first["evaluations_per_patch"],
        "right, %": mean("accuracy_percent", 1),
        "Frechet distance": mean("frechet_distance", 1),
        "seams / real": mean("seam_energy_over_real", 2),
        "saturated, %": mean("saturated_percent", 1),
        "loss, real": mean("image_loss_held_out", 3),
        "loss, own": mean("image_loss_own", 3),
        "captions, %": mean("captions_exact_percent", 1),
        "CPU ms / picture": mean("cpu_seconds_per_picture", 1, 1000),
        "training, TFLOP": mean("training_tflop", 1),
        "seeds": len(rows),
    }  # fmt: skip


def average(rows: Sequence[Row], data: str, key: str) -> dict[tuple[str, str], tuple[int, float]]:
    """(evaluations per patch, mean of the key) by (row, way to draw)."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["data"] == data and row[key] is not None:
            found.setdefault((str(row["row"]), str(row["drawn"])), []).append(row)
    return {
        name: (int(group[0]["evaluations_per_patch"] or 0), statistics.mean(float(row[key] or 0) for row in group))
        for name, group in found.items()
    }


def notes(rows: Sequence[Row], cells: Sequence[Cell]) -> str:
    """What was compared, and which few steps reach 50 steps of Heun."""
    lines = []
    for data in dict.fromkeys(str(row["data"]) for row in rows):
        base, _ = BASES[data]
        steps = next(cell.config.run.steps for cell in cells if cell.data == data)
        lines.append(f"* **{data}**: `{base}` with {steps} steps; a row changes what its name says.")
        found = average(rows, data, "accuracy_percent")
        if ("default", "heun 50") in found:
            best = found["default", "heun 50"][1]
            distance = average(rows, data, "frechet_distance")
            few = []
            for key, (count, accuracy) in found.items():
                if count <= 4 and accuracy > best - 2:
                    also = f", Frechet distance {distance[key][1]:.0f}" if key in distance else ""
                    few.append(f"{', '.join(key)} ({accuracy:.1f} %{also})")
            lines.append(f"  50 steps of Heun: {best:.1f} % right. Within 2 points in 4 evaluations or less: "
                         f"{'; '.join(few) or 'none'}.")  # fmt: skip
    commits = ", ".join(f"{str(name)[:7]} ({n})" for name, n in Counter(row.get("commit") for row in rows).items())
    return (
        "\n".join(lines)
        + f"""

Right: an independent classifier recognises the digit that was asked for, or the oracle reads colour, shape, size and
place of the caption in the picture; {rows[0]["pictures"]} pictures per cell and seed. Frechet distance: of raw gray
pixels to the test split, on shapes of 8 x 8 means to held-out pictures. Look at both, since blurred digits, means over
what a patch could be, are recognised best.
Seams: steps between neighbouring pixels at borders of patches over those inside, over the same of real pictures.
Loss: of the head on real pictures and on the model's own, as the row's loss counts it.
Whole images are drawn by the Transformer itself, which is evaluated as often for all patches at once.
Evaluations of the head count both streams where guidance acts. Ranges are over seeds; those of the CPU time say more of
what else the machine did. A distilled head has learned for as many updates more as the default, whose TFLOP its column
does not show.
Every row of the JSON names the commit that measured it: {commits}.
"""
    )


def figure(rows: Sequence[Row]) -> Figure:
    """Quality against evaluations per patch: for each data set a panel of accuracy and one of the Frechet distance."""
    model = {setting.name: setting.model or setting.name for setting in SETTINGS}
    plain = [row for row in rows if row["drawn"] == f"{row['sampler']} {row['steps']}"]
    panels = [(data, "accuracy_percent") for data in dict.fromkeys(str(row["data"]) for row in rows)]
    panels += [(data, "frechet_distance") for data, _ in panels]
    result = Figure(figsize=(5.5 * len(panels), 6), layout="constrained")
    colours: dict[str, int] = {}  # the same in every panel
    for axes, (data, key) in zip(result.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        lines: dict[str, dict[int, float]] = {}
        for (row, drawn), (count, value) in average(plain, data, key).items():
            lines.setdefault(f"{model[row]}, {drawn.split()[0]}", {})[count] = value
        for name, points in lines.items():
            if len(points) > 1:
                colour = colormaps["tab20"](colours.setdefault(name, len(colours)))
                axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=name, color=colour)
        axes.set(xlabel="evaluations per patch", ylabel=key.replace("_", " "), xscale="log", title=data)
        if key == "frechet_distance":
            axes.set_yscale("log")
        if axes.lines:
            axes.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return result
