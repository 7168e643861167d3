"""Numbers about the steps that were done: what is logged between two lines, and losses that jump."""

from collections import defaultdict
from dataclasses import asdict

import torch

from data.mixture import Seen
from model.batch import Batch
from model.ropeway import TIME_BINS, Losses, Ropeway
from train.config import Config
from train.engine import Counts
from train.log import logger
from train.ranks import Ranks


class Meter:
    """Sums between two lines of the log."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.text = self.image = torch.zeros(())
        self.image_by_time = torch.zeros(2, TIME_BINS)

    def add(self, batch: Batch, losses: Losses, config: Config, vocabulary_size: int) -> None:
        self.text, self.image = self.text + losses.text.cpu(), self.image + losses.image.cpu()
        self.image_by_time += losses.image_by_time.cpu()
        slots, text, image = int((batch.document_BS > 0).sum()), *batch.counts()
        self.sums["slots"] += slots
        self.sums["capacity"] += batch.document_BS.numel()
        self.sums["flops"] += config.model.flops_per_step(
            slots, batch.documents.squared_lengths, text, len(batch.patches_NP), image, vocabulary_size
        )

    def step(self, counts: Counts, waited: float, seconds: float, replaced: int) -> None:
        self.sums["replaced"] += replaced
        for key, value in zip(("num_text", "num_image", "waited", "seconds"), (*counts, waited, seconds), strict=True):
            self.sums[key] += value
        self.sums["steps"] += 1

    def values(self, ranks: Ranks) -> dict[str, float]:
        """Means over the steps and all ranks; loss/image/from_0.3 is over the draws with times in 0.3 .. 0.4, where
        there were some. A call that all ranks make together."""
        s = self.sums
        text, image, slots, capacity, flops, replaced, *by_time = ranks.total(
            [float(self.text), float(self.image), s["slots"], s["capacity"], s["flops"], s["replaced"],
             *self.image_by_time.flatten().tolist()]
        )  # fmt: skip
        return {
            "loss/text": text / max(s["num_text"], 1),
            "loss/image": image / max(s["num_image"], 1),
            "slots_per_second": slots / s["seconds"],
            "patches_per_second": s["num_image"] / s["seconds"],
            "gflops_per_second": flops / s["seconds"] / 1e9,
            "step_seconds": s["seconds"] / s["steps"],
            "data_wait_percent": 100 * s["waited"] / s["seconds"],
            "fill_percent": 100 * slots / capacity,
            "replaced": replaced,
        } | {
            f"loss/image/from_{part / TIME_BINS:g}": loss / count
            for part, (loss, count) in enumerate(zip(by_time[:TIME_BINS], by_time[TIME_BINS:], strict=True))
            if count
        }


def coverage(seen: dict[str, Seen]) -> dict[str, float]:
    """What was read of each source since the start of the run, as numbers of the log."""
    return {f"seen/{name}/{key}": value for name, one in seen.items() for key, value in asdict(one).items()}


class Spikes:
    """Reports a step whose loss is far above the mean of the steps before it."""

    _WARM_UP, _DECAY = 50, 0.98

    def __init__(self, config: Config) -> None:
        self.config, self.mean, self.seen = config, 0.0, 0

    def look(self, step: int, losses: list[float]) -> None:
        """losses: text and image, of the step that is the step-th (1-based); the same on all ranks."""
        optim, rows = self.config.optim, self.config.data.rows_per_step
        loss = optim.text_weight * losses[0] + optim.image_weight * losses[1]
        if not 0 < loss < float("inf"):
            return
        if self.seen >= self._WARM_UP and loss > optim.spike * self.mean:
            logger.warning("warning: the loss of step %d is %.4f, %.1f times its recent mean %.4f "
                           "(text %.4f, image %.4f, rows %d to %d)", step, loss, loss / self.mean, self.mean, *losses,
                           (step - 1) * rows, step * rows - 1)  # fmt: skip
        self.seen += 1
        self.mean += (loss - self.mean) * max(1 - self._DECAY, 1 / self.seen)


def codebook_values(model: Ropeway) -> dict[str, float]:
    """Means over the quantised layers of what their codebooks measured in the last step; nothing if there are none."""
    measured = [book.measured for book in model.codebooks().values() if book.measured]
    return {key: sum(values[key] for values in measured) / len(measured) for key in (measured[0] if measured else {})}


def line(step: int, steps: int, values: dict[str, float]) -> str:
    return (f"step {step}/{steps} text {values['loss/text']:.4f} image {values['loss/image']:.4f} "
            f"norm {values['grad_norm']:.2f} lr {values['lr']:.2e} {values['step_seconds']:.2f} s/step "
            f"{values['slots_per_second']:.0f} slots/s wait {values['data_wait_percent']:.1f}%")  # fmt: skip
