"""The training loop, top to bottom: set up, resume, and one optimizer step after the other."""

import json
import shutil
import signal
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

from data.encode import Encoder
from data.mixture import Mixture
from data.tokenizer import Tokenizer
from model.batch import Batch
from model.ropeway import Ropeway
from train import checkpoint, estimate, pipeline, settings
from train.config import Config
from train.engine import Counts, Engine, fill_from, fit_codebooks, make_engine
from train.generator import Generator, build_model, load_weights
from train.log import Log, check_tensorboard, environment, logger
from train.meter import Meter, Spikes, codebook_values, coverage, line
from train.optimizer import WeightAverage, learning_rate
from train.precision import autocast
from train.ranks import Joined, Ranks
from train.samples import draw_samples

_MAY_CHANGE = ("run.dir", "run.steps", "run.stop_after", "run.init_from", "run.device", "run.precision", "run.threads",
               "data.workers", "engine", "checkpoint", "eval", "log")  # fmt: skip
"""Settings that may differ when a run is resumed: they do not change which rows are read or what is
computed, except for run.steps, which stretches the learning-rate schedule of a run that is made longer."""


_KEYS_PER_CODE = 16
"""Slots per codeword that new codebooks are fitted to, if a step has so many."""


@dataclass
class Run:
    """Everything that the loop works on."""

    config: Config
    ranks: Ranks
    engine: Engine
    encoder: Encoder
    rows: pipeline.StepRows
    held_out: Mixture | None
    average: WeightAverage
    saver: checkpoint.Saver
    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def stop_file(self) -> Path:
        return self.folder / "stop"

    @property
    def tokenizer(self) -> Tokenizer:
        return self.encoder.tokenizer

    def state(self) -> checkpoint.Checkpoint:
        """What a checkpoint holds. Its tensors are made by all ranks together."""
        weights, average = (Joined(self.ranks, parts, self.engine.shapes)
                            for parts in (self.engine.parts(), self.average.parts))  # fmt: skip
        return checkpoint.Checkpoint(self.config, self.step, weights, average, self.engine.moments(), self.skipped)


def set_up(config: Config) -> Run:
    """Check everything and build it, resuming a run found in run.dir. Raises ValueError or OSError for wrong input."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    if config.log.tensorboard:
        check_tensorboard()
    ranks = Ranks(config)
    folder = Path(config.run.dir)
    if folder.is_file():
        raise ValueError(f"run.dir {folder} is a file; choose a folder")
    found = _find(folder, ranks)
    if found:
        _refuse_other_settings(config, found.config)
    tokenizer = pipeline.make_tokenizer(config.data)
    encoder = pipeline.make_encoder(config, tokenizer)
    mixture = pipeline.make_mixture(config, encoder, "train")
    has_held_out = config.eval.every and pipeline.make_sources(config.data, "test")
    held_out = pipeline.make_mixture(config, encoder, "test") if has_held_out else None
    if config.data.files or config.data.prepared:
        mixture.measure()  # A document that is broken or does not fit stops the run here, not later in a worker.
    rows = pipeline.StepRows(mixture, config, ranks.rank, ranks.world)
    if found and ranks.rank == 0:  # There is no log yet; this goes to standard error.
        logger.warning("resuming %s at step %d, after counting the documents before it", folder, found.step)
    rows.numbers(found.step if found else 0)  # Workers inherit what this counts.
    weights, where = (found.model, f"step {found.step} of {folder}") if found else (None, "")
    if not found and config.run.init_from:
        start = checkpoint.resolve(config.run.init_from)
        weights, where = checkpoint.Weights(start / "model"), str(start)
    fill = fill_from(config.run.seed, weights, where, may_lack_codebooks=not found)
    engine = make_engine(config, tokenizer, ranks, fill)
    if not found:
        new = [book for name, book in engine.model.codebooks().items() if f"{name}.count_KC" not in (weights or {})]
        if new:
            number = -(-_KEYS_PER_CODE * config.model.vq.codes // config.data.row_length)
            first = list(range(min(number, config.data.rows_per_step)))
            fit_codebooks(engine, new, pipeline.make_batch(mixture, first, config.run.seed))
    average = WeightAverage(engine.parts(), config.optim.ema_decay)
    saver = checkpoint.Saver(folder, tokenizer, config.checkpoint, writes=ranks.rank == 0)
    run = Run(config, ranks, engine, encoder, rows, held_out, average, saver)
    if found:
        run.step, run.skipped = found.step, found.skipped
        for name, part in average.parts.items():
            own = ranks.part(found.ema[name])
            part[: len(own)] = own
        engine.load_moments(found.optimizer, updates=found.step - found.skipped)
    return run


def _find(folder: Path, ranks: Ranks) -> checkpoint.Checkpoint | None:
    """The newest sound checkpoint, chosen and checked by rank 0."""
    newest = None
    if ranks.rank == 0:
        newest = checkpoint.newest(folder, lambda message: logger.warning("warning: %s", message))
    step = ranks.from_first(newest.step if newest else -1)
    return newest if newest or step < 0 else checkpoint.load(checkpoint.step_folder(folder, step), check=False)


def train(run: Run, dry_run: bool) -> None:
    """Train from run.step to run.steps (or run.stop_after, a signal or a stop file), with checkpoints, metrics and
    samples. Raises OSError if a checkpoint cannot be written, ValueError if training cannot go on."""
    config, engine, ranks = run.config, run.engine, run.ranks
    last = run.step + 1 if dry_run else min(config.run.steps, config.run.stop_after or config.run.steps)
    log = (
        Log(None if dry_run else run.folder, run.step, config.run.steps, config.log.tensorboard)
        if ranks.rank == 0
        else None
    )
    if log and not dry_run:
        settings.write(config, run.folder / "config.yaml")
    _announce(run, dry_run)
    if run.step >= last:
        logger.info("nothing to do: step %d is done; raise run.steps or run.stop_after to go on", run.step)
    stop = _StopFlag()
    meter, spikes = Meter(), Spikes(config)
    sums = [0.0, 0.0]
    named: set[str] = set()
    workers, pin = 0 if dry_run else config.data.workers, ranks.device.type == "cuda"
    with closing(pipeline.load(run.rows, run.step, last, workers, pin)) as steps:
        while run.step < last:
            # ---- data ----------------------------------------------------------------------------------------------
            began = time.perf_counter()
            step = next(steps)
            micro_batches, waited = step.batches, time.perf_counter() - began
            for reason in step.replaced:
                if reason not in named:
                    logger.warning("warning: another document takes the place of one that cannot be read: %s", reason)
                named.add(reason)
            if dry_run:
                _announce_estimate(run, micro_batches[0])

            # ---- forward, backward, update -------------------------------------------------------------------------
            local = [batch.counts() for batch in micro_batches]
            asked = stop.raised or (ranks.rank == 0 and run.stop_file.exists())
            text, image, stopping, *last_sums = ranks.total(
                [float(sum(c)) for c in zip(*local, strict=True)] + [float(asked), *sums]
            )
            spikes.look(run.step, last_sums)  # The losses of the step before: no rank has to wait for this step's.
            counts = Counts(int(text), int(image))
            done = [engine.micro_step(batch, counts, is_last=batch is micro_batches[-1]) for batch in micro_batches]
            rate = learning_rate(run.step, config.run.steps, config.optim)
            norm = engine.step(rate)
            # Not before: reading a number off a GPU waits for it.
            sums = [0.0, 0.0]
            for batch, losses in zip(micro_batches, done, strict=True):
                meter.add(batch, losses, config, run.tokenizer.vocab_size)
                sums[0] += losses.text.item() / max(counts.text, 1)
                sums[1] += losses.image.item() / max(counts.image, 1)
            if norm < float("inf"):
                run.average.update(engine.parts(), run.step)
            _count_skipped(run, norm)
            run.step += 1

            # ---- log, evaluate, save -------------------------------------------------------------------------------
            meter.step(counts, waited, time.perf_counter() - began, len(step.replaced))
            ends = run.step == last or stopping > 0
            if run.step % config.log.every == 0 or ends:
                values = meter.values(ranks) | {"lr": rate, "grad_norm": norm, "skipped": float(run.skipped)}
                values |= codebook_values(engine.model)
                if log:
                    seen = coverage(run.rows.mixture.seen(run.step * config.data.rows_per_step))
                    log.metrics(run.step, values | seen)
                    logger.info(line(run.step, config.run.steps, values))
                meter = Meter()
            if log:
                log.bar.update()
            if not dry_run and (run.step % config.checkpoint.every == 0 or ends):
                save(run, background=config.checkpoint.background and not ends)
            evaluates = config.eval.every and not dry_run
            if evaluates and (run.step % config.eval.every == 0 or run.step == config.run.steps):
                evaluate(run, log)
            if stopping:
                logger.info("stopped on request after step %d; start the same command to go on", run.step)
                if ranks.rank == 0:
                    run.stop_file.unlink(missing_ok=True)
                break
    finish_save(run)
    if dry_run:
        if ranks.device.type == "cuda":
            logger.info("measured on the GPU: %.2f GB at the peak", torch.cuda.max_memory_allocated() / 1e9)
        _rehearse_saving(run)
    if log:
        log.close()
    engine.close()
    ranks.close()


def save(run: Run, background: bool) -> None:
    """Write a checkpoint; in the background, or all ranks wait until it is there."""
    finish_save(run)
    run.saver.begin(run.state(), background)
    if not background:
        finish_save(run)


def finish_save(run: Run) -> None:
    """Wait for the checkpoint being written, if there is one. Raises OSError on all ranks if it could not be."""
    problem = None
    try:
        if folder := run.saver.finish():
            logger.info("saved %s", folder)
    except OSError as error:
        problem = error
    if run.ranks.total([float(problem is not None)])[0]:
        raise problem or OSError("rank 0 could not write a checkpoint")


def evaluate(run: Run, log: Log | None) -> None:
    """Held-out losses and samples of the averaged weights, in a copy of the model."""
    average = Joined(run.ranks, run.average.parts, run.engine.shapes)
    model = build_model(run.config, run.tokenizer).to(run.ranks.device).eval()
    load_weights(model, average, "the weight average")
    values: dict[str, float] = {}
    if run.held_out:
        values = _held_out_losses(run, model, run.held_out)
    if log:
        if run.config.eval.samples:
            generator = Generator(model, run.tokenizer, run.encoder, run.engine.bf16)
            draw_samples(generator, run.held_out or run.rows.mixture, run.config, run.folder / "samples", run.step)
        if values:
            log.metrics(run.step, values)
            logger.info("step %d " + " ".join(f"{key} {value:.4f}" for key, value in values.items()), run.step)
    run.ranks.total([0.0])  # The others wait for rank 0's samples.


@torch.no_grad()
def _held_out_losses(run: Run, model: Ropeway, mixture: Mixture) -> dict[str, float]:
    sums = [0.0] * 4
    for row in range(run.ranks.rank, run.config.eval.rows, run.ranks.world):
        batch = pipeline.make_batch(mixture, [row], run.config.run.seed).to(run.ranks.device)
        with autocast(run.ranks.device, run.engine.bf16):
            losses = model(batch)
        parts = (losses.text.item(), losses.image.item(), *batch.counts())
        sums = [total + part for total, part in zip(sums, parts, strict=True)]
    text, image, num_text, num_image = run.ranks.total(sums)
    return {"held_out/text": text / max(num_text, 1), "held_out/image": image / max(num_image, 1)}


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
    """Stop, with the rows saved, after too many steps in a row whose gradient is not finite. All ranks agree."""
    if norm < float("inf"):
        run.skipped_in_row = 0
        return
    run.skipped += 1
    run.skipped_in_row += 1
    logger.warning("warning: the gradient of step %d is not finite; its update is skipped", run.step + 1)
    if run.skipped_in_row >= run.config.optim.max_skipped:
        folder = _save_rows(run)
        raise ValueError(f"{run.skipped_in_row} gradients in a row are not finite; the rows of step {run.step + 1} are "
                         f"in {folder}; lower optim.lr or inspect the data")  # fmt: skip


@torch.no_grad()
def _save_rows(run: Run) -> Path:
    """This rank's rows of the step with the losses of each one alone, for a person to look at."""
    folder = run.folder / "non_finite" / f"step-{run.step + 1:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(run.config, run.tokenizer).to(run.ranks.device)
    load_weights(model, run.state().model, "the engine")
    lines = []
    for row in run.rows.numbers(run.step):
        batch = pipeline.make_batch(run.rows.mixture, [row], run.config.run.seed).to(run.ranks.device)
        with autocast(run.ranks.device, run.engine.bf16):
            losses = model(batch)
        stream, number = run.rows.mixture.locate(row)
        epoch, documents = stream.plan.row(number)
        save_file({"token_S": batch.token_BS[0], "patches_NP": batch.patches_NP}, folder / f"row-{row}.safetensors")
        lines.append({"row": row, "epoch": epoch, "documents": documents.tolist(),
                      "loss/text": losses.text.item(), "loss/image": losses.image.item()})  # fmt: skip
    (folder / f"rank-{run.ranks.rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _announce_estimate(run: Run, batch: Batch) -> None:
    """Memory, disk and work of the run, taking `batch` for what a micro-batch holds."""
    if run.ranks.rank:
        return
    text, learned = batch.counts()
    documents = batch.documents
    needs = estimate.of(
        run.config, run.tokenizer.vocab_size, run.ranks.world, batch.document_BS.numel(), documents.squared_lengths,
        text, len(batch.patches_NP), learned,
    )  # fmt: skip
    for row in estimate.lines(needs):
        logger.info(row)


def _rehearse_saving(run: Run) -> None:
    """Write a checkpoint beside the run's folder, read it again, and remove it."""
    place = next(folder for folder in run.folder.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=place) as folder:
        saver = checkpoint.Saver(Path(folder), run.tokenizer, run.config.checkpoint, writes=run.ranks.rank == 0)
        began = time.perf_counter()
        saver.begin(run.state(), background=False)
        if written := saver.finish():
            seconds = time.perf_counter() - began
            size = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
            model = build_model(run.config, run.tokenizer)
            load_weights(model, checkpoint.load(written).model, str(written))
            logger.info("a checkpoint of %.2f GB was written in %.1f s, read and checked in %.1f s; %.1f GB are free",
                        size / 1e9, seconds, time.perf_counter() - began - seconds,
                        shutil.disk_usage(place).free / 1e9)  # fmt: skip


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
    if run.ranks.rank:
        return
    parts = run.config.model.num_parameters(run.tokenizer.vocab_size)
    logger.info("environment: %s", environment())
    logger.info("parameters: %.2fM (%s)", sum(parts.values()) / 1e6,
                ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in parts.items()))  # fmt: skip
    logger.info("%s from step %d to %d, %d rows of %d slots per step, %d process(es), %s, run folder %s",
                "dry run" if dry_run else "training", run.step, run.config.run.steps, run.config.data.rows_per_step,
                run.config.data.row_length, run.ranks.world, "bf16" if run.engine.bf16 else "fp32",
                run.folder)  # fmt: skip
    if run.ranks.device.type == "cuda" and "vq" in run.config.model.layer_kinds and find_spec("triton") is None:
        logger.warning("warning: Triton is not installed; attention vq takes slower PyTorch operations")
