"""Rows as uneven as they can be, and a model that they move in every parameter."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data.document import Document, Image, Text
from data.encode import Columns, Encoder, pack_row
from data.tokenizer import Tokenizer
from model.batch import Batch
from model.ropeway import Ropeway
from tests.train.support import TINY
from train import settings
from train.engine import Counts
from train.generator import build_model

CONFIG = settings.parse([*TINY, "--optim.text_weight=0.7", "--optim.image_weight=1.3", "--optim.lr=0.001"])[0]
TOKENIZER = Tokenizer.bytes(8)
ROW_LENGTH = 96


def picture(rng: np.random.Generator, rows: int, cols: int, learn: bool = True) -> Image:
    pixels = rng.integers(0, 256, (8 * rows, 8 * cols, 3), dtype=np.uint8)
    return Image(8 * rows, 8 * cols, pixels, learn)


def only_patches(columns: Columns) -> Columns:
    """Learn the patches alone: no text token counts, not even the end of the document."""
    return replace(columns, learn=columns.learn & (columns.rows > 0))


def rows_of_step(step: int, uneven: bool = True) -> list[Columns]:
    """Four rows. Rows 0 and 1 (rank 0 of 2) have no image, rows 2 and 3 no text target; in step 2 it is the reverse.
    Not uneven: every row has the same numbers of both."""
    rng = np.random.default_rng(step)
    encoder = Encoder(TOKENIZER, 8, 1, 16)

    def row(*documents: tuple) -> Columns:
        return pack_row([encoder.encode(Document(segments)) for segments in documents], ROW_LENGTH, TOKENIZER.pad)

    if not uneven:
        return [row((Text(f"row {number} of {step}"), picture(rng, 2, 2))) for number in range(4)]
    long = row((Text("a text of some length, and then more"),), (Text("another"),), (Text("third one " * (step % 4)),))
    short = row((Text("short"),))
    small = only_patches(row((Text("not learned", learn=False), picture(rng, 1, 2))))
    large = only_patches(row((picture(rng, 3, 4), picture(rng, 2, 2, learn=False)), (picture(rng, 1, 1 + step % 4),)))
    rows = [long, short, small, large]
    return rows[::-1] if step == 2 else rows


def batch_of_step(step: int, rows: list[int], uneven: bool = True) -> Batch:
    columns = rows_of_step(step, uneven)
    return Batch.collate([columns[r] for r in rows], [1000 * step + r for r in rows])


def count(step: int, uneven: bool = True) -> Counts:
    """Learned text tokens and patches of a step, slot by slot."""
    text = image = 0
    for columns in rows_of_step(step, uneven):
        for slot in range(1, ROW_LENGTH):
            if columns.learn[slot] and columns.document[slot] == columns.document[slot - 1] > 0:
                image += int(columns.rows[slot] > 0)
                text += int(columns.rows[slot] == 0)
    return Counts(text, image)


def fill(model: Ropeway, writable: Callable) -> None:
    """Give a model its weights. The head starts silent: stir it, so that a gradient reaches every parameter."""
    model.initialise(CONFIG.run.seed, writable)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "modulation" in name or "patch_out" in name:
                with writable(parameter):
                    parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(number))


def make_model() -> Ropeway:
    model = build_model(CONFIG, TOKENIZER)
    fill(model, nullcontext)
    return model


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference over tensors, relative to the norm of the tensor."""
    return max(float((a[k] - b[k]).norm() / b[k].norm().clamp(min=1e-12)) for k in b)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix + "."): value for key, value in tensors.items() if key.startswith(prefix + ".")}
