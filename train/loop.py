"""The training loop, top to bottom: set up, resume, and one optimizer step after the other."""

import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from data.encode import Encoder
from data.mixture import Mixture
from data.tokenizer import Tokenizer
from model.batch import Batch
from model.ropeway import Losses, Ropeway
from train import checkpoint, pipeline, settings
from train.config import Config
from train.engine import Counts, Engine, TorchEngine, pick_device
from train.generator import Generator, build_model, load_weights
from train.log import Log, environment, logger
from train.optimizer import WeightAverage, learning_rate
from train.samples import draw_samples

_MAY_CHANGE = ("run.dir", "run.steps", "run.stop_after", "run.init_from", "run.device", "run.precision", "run.threads",
               "data.workers", "engine", "checkpoint", "eval", "log")  # fmt: skip
"""Settings that may differ when a run is resumed: they do not change which rows are read or what is
computed, except for run.steps, which stretches the learning-rate schedule of a run that is made longer."""


@dataclass
class Run:
    """Everything that the loop works on."""

    config: Config
    engine: Engine
    encoder: Encoder
    rows: pipeline.StepRows
    held_out: Mixture | None
    average: WeightAverage
    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.encoder.tokenizer


def set_up(config: Config) -> Run:
    """Check everything and build it, resuming a run found in run.dir. Raises ValueError or OSError for wrong input."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = pick_device(config.run.device)
    if Path(config.run.dir).is_file():
        raise ValueError(f"run.dir {config.run.dir} is a file; choose a folder")
    found = checkpoint.load_newest(Path(config.run.dir), lambda message: logger.warning("warning: %s", message))
    if found:
        _refuse_other_settings(config, found.config)
    tokenizer = pipeline.make_tokenizer(config.data)
    encoder = pipeline.make_encoder(config, tokenizer)
    mixture = pipeline.make_mixture(config, encoder, "train")
    has_held_out = config.eval.every and pipeline.make_sources(config.data, "test")
    held_out = pipeline.make_mixture(config, encoder, "test") if has_held_out else None
    if config.data.files:
        mixture.measure()  # A document that is broken or does not fit stops the run here, not later in a worker.
    mixture.plan.row((found.step if found else 0) * config.data.rows_per_step)  # Workers inherit what this counts.
    model = build_model(config, tokenizer)
    model.initialise(config.run.seed)
    if found:
        load_weights(model, found.model, f"step {found.step} of {config.run.dir}")
    elif config.run.init_from:
        folder = checkpoint.resolve(config.run.init_from)
        load_weights(model, checkpoint.read_weights(folder / "model.safetensors"), str(folder))
    engine = TorchEngine(model, config, device)
    rows = pipeline.StepRows(mixture, config, engine.rank, engine.world)
    run = Run(config, engine, encoder, rows, held_out, WeightAverage(model, config.optim.ema_decay))
    if found:
        run.step, run.skipped = found.step, found.skipped
        run.average.weights = {name: weight.to(device) for name, weight in found.ema.items()}
        engine.load_optimizer_state(found.optimizer)
    return run


def train(run: Run, dry_run: bool) -> None:
    """Train from run.step to run.steps (or run.stop_after, or a signal), with checkpoints, metrics and samples."""
    config, engine = run.config, run.engine
    last = run.step + 1 if dry_run else min(config.run.steps, config.run.stop_after or config.run.steps)
    log = (
        Log(None if dry_run else run.folder, run.step, config.run.steps, config.log.tensorboard)
        if engine.rank == 0
        else None
    )
    if log and not dry_run:
        settings.write(config, run.folder / "config.yaml")
    _announce(run, dry_run)
    if run.step >= last:
        logger.info("nothing to do: step %d is done; raise run.steps or run.stop_after to go on", run.step)
    stop = _StopFlag()
    meter = _Meter()
    batches = pipeline.load(run.rows, run.step, last, 0 if dry_run else config.data.workers)
    while run.step < last:
        # ---- data ----------------------------------------------------------------------------------------------
        began = time.perf_counter()
        micro_batches = next(batches)
        waited = time.perf_counter() - began

        # ---- forward, backward, update -------------------------------------------------------------------------
        local = [batch.counts() for batch in micro_batches]
        text, image, stopping = engine.total([float(sum(c)) for c in zip(*local, strict=True)] + [float(stop.raised)])
        counts = Counts(int(text), int(image))
        for i, batch in enumerate(micro_batches):
            losses = engine.micro_step(batch, counts, is_last=i == len(micro_batches) - 1)
            meter.add(batch, losses, config, run.tokenizer.vocab_size)
        rate = learning_rate(run.step, config.run.steps, config.optim)
        norm = engine.step(rate)
        _count_skipped(run, norm)
        if norm < float("inf"):
            run.average.update(engine.model, run.step)
        run.step += 1

        # ---- log, evaluate, save -------------------------------------------------------------------------------
        meter.step(counts, waited, time.perf_counter() - began)
        ends = run.step == last or stopping > 0
        if run.step % config.log.every == 0 or ends:
            values = meter.values(engine) | {"lr": rate, "grad_norm": norm, "skipped": float(run.skipped)}
            if log:
                log.metrics(run.step, values)
                logger.info(_line(run.step, config.run.steps, values))
            meter = _Meter()
        if log:
            log.bar.update()
        if not dry_run and (run.step % config.checkpoint.every == 0 or ends):
            save(run)
        if not dry_run and config.eval.every and (run.step % config.eval.every == 0 or run.step == config.run.steps):
            evaluate(run, log)
        if stopping:
            logger.info("stopped by a signal after step %d; start the same command to go on", run.step)
            break
    if log:
        log.close()
    engine.close()


def save(run: Run) -> None:
    """Write a checkpoint; all ranks wait until it is there."""
    if run.engine.rank == 0:
        raw = {name: parameter.detach() for name, parameter in run.engine.model.named_parameters()}
        state = checkpoint.Checkpoint(
            run.config, run.step, raw, run.average.weights, run.engine.optimizer_state(), run.skipped
        )
        folder = checkpoint.save(run.folder, state, run.tokenizer, run.config.checkpoint.keep_last)
        logger.info("saved %s", folder)
    run.engine.barrier()


def evaluate(run: Run, log: Log | None) -> None:
    """Held-out losses and samples of the averaged weights."""
    with _averaged(run.engine.model, run.average):
        values: dict[str, float] = {}
        if run.held_out:
            values = _held_out_losses(run, run.held_out)
        if log:
            if config_samples := run.config.eval.samples:
                generator = Generator(run.engine.model, run.tokenizer, run.encoder, run.engine.bf16)
                draw_samples(generator, run.held_out or run.rows.mixture, config_samples, run.config.eval,
                             run.folder / "samples", run.step)  # fmt: skip
            if values:
                log.metrics(run.step, values)
                logger.info("step %d " + " ".join(f"{key} {value:.4f}" for key, value in values.items()), run.step)
    run.engine.model.train()
    run.engine.barrier()


@torch.no_grad()
def _held_out_losses(run: Run, mixture: Mixture) -> dict[str, float]:
    sums = [0.0] * 4
    for row in range(run.engine.rank, run.config.eval.rows, run.engine.world):
        batch = pipeline.make_batch(mixture, [row], run.config.run.seed).to(run.engine.device)
        with run.engine.autocast():
            losses = run.engine.model(batch)
        parts = (losses.text.item(), losses.image.item(), *batch.counts())
        sums = [total + part for total, part in zip(sums, parts, strict=True)]
    text, image, num_text, num_image = run.engine.total(sums)
    return {"held_out/text": text / max(num_text, 1), "held_out/image": image / max(num_image, 1)}


@contextmanager
def _averaged(model: Ropeway, average: WeightAverage) -> Iterator[None]:
    """The model with its averaged weights, for the length of the block."""
    raw = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    load_weights(model, average.weights, "the weight average")
    try:
        yield
    finally:
        load_weights(model, raw, "the raw weights")


class _Meter:
    """Sums between two lines of the log."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.text = self.image = torch.zeros(())

    def add(self, batch: Batch, losses: Losses, config: Config, vocabulary_size: int) -> None:
        self.text, self.image = self.text + losses.text.cpu(), self.image + losses.image.cpu()
        slots, text, image = int((batch.document_BS > 0).sum()), *batch.counts()
        self.sums["slots"] += slots
        self.sums["capacity"] += batch.document_BS.numel()
        self.sums["flops"] += config.model.flops_per_step(
            slots, batch.documents.squared_lengths, text, len(batch.patches_NP), image, vocabulary_size
        )

    def step(self, counts: Counts, waited: float, seconds: float) -> None:
        for key, value in zip(("num_text", "num_image", "waited", "seconds"), (*counts, waited, seconds), strict=True):
            self.sums[key] += value
        self.sums["steps"] += 1

    def values(self, engine: Engine) -> dict[str, float]:
        """Means over the steps and all ranks. A call that all ranks make together."""
        s = self.sums
        text, image, slots, capacity, flops = engine.total(
            [float(self.text), float(self.image), s["slots"], s["capacity"], s["flops"]]
        )
        return {
            "loss/text": text / max(s["num_text"], 1),
            "loss/image": image / max(s["num_image"], 1),
            "slots_per_second": slots / s["seconds"],
            "patches_per_second": s["num_image"] / s["seconds"],
            "gflops_per_second": flops / s["seconds"] / 1e9,
            "step_seconds": s["seconds"] / s["steps"],
            "data_wait_percent": 100 * s["waited"] / s["seconds"],
            "fill_percent": 100 * slots / capacity,
        }


class _StopFlag:
    """Raised by SIGTERM, SIGINT or SIGUSR1: finish the step, save, end. A second SIGINT ends at once."""

    def __init__(self) -> None:
        self.raised = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._raise)

    def _raise(self, number: int, frame: object) -> None:
        if self.raised and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised = True


def _count_skipped(run: Run, norm: float) -> None:
    if norm < float("inf"):
        run.skipped_in_row = 0
        return
    run.skipped += 1
    run.skipped_in_row += 1
    logger.warning("warning: the gradient of step %d is not finite; its update is skipped", run.step + 1)
    if run.skipped_in_row >= run.config.optim.max_skipped:
        raise ValueError(f"{run.skipped_in_row} gradients in a row are not finite; lower optim.lr or inspect the data")


def _refuse_other_settings(config: Config, saved: Config) -> None:
    here, there = _flat(settings.to_dict(config)), _flat(settings.to_dict(saved))
    differing = [
        f"{key} is {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key) and not any(key == f or key.startswith(f + ".") for f in _MAY_CHANGE)
    ]
    if differing:
        raise ValueError(f"{config.run.dir} holds a run with other settings ({'; '.join(differing[:3])}); "
                         "choose another run.dir, or go on with the old settings")  # fmt: skip


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _announce(run: Run, dry_run: bool) -> None:
    if run.engine.rank:
        return
    parts = run.config.model.num_parameters(run.tokenizer.vocab_size)
    logger.info("environment: %s", environment())
    logger.info("parameters: %.2fM (%s)", sum(parts.values()) / 1e6,
                ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in parts.items()))  # fmt: skip
    logger.info("%s from step %d to %d, %d rows of %d slots per step, %d process(es), %s, run folder %s",
                "dry run" if dry_run else "training", run.step, run.config.run.steps, run.config.data.rows_per_step,
                run.config.data.row_length, run.engine.world, "bf16" if run.engine.bf16 else "fp32",
                run.folder)  # fmt: skip


def _line(step: int, steps: int, values: dict[str, float]) -> str:
    return (f"step {step}/{steps} text {values['loss/text']:.4f} image {values['loss/image']:.4f} "
            f"norm {values['grad_norm']:.2f} lr {values['lr']:.2e} {values['step_seconds']:.2f} s/step "
            f"{values['slots_per_second']:.0f} slots/s wait {values['data_wait_percent']:.1f}%")  # fmt: skip
