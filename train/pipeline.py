"""From the configuration to batches: tokenizer, sources, the mixture of packed rows, and a rank's share of them."""

import signal
from collections.abc import Generator
from typing import Literal

import numpy as np
from torch.utils.data import DataLoader, Dataset

from data.encode import Encoder
from data.mixture import Mixture
from data.plan import hash_ids
from data.source import Source
from data.source.digits import Digits
from data.source.jsonl import Jsonl
from data.source.shapes import Shapes
from data.source.stdlib import StandardLibrary
from data.tokenizer import Tokenizer
from model.batch import Batch
from model.config import Vocabulary
from train.config import Config, DataSection

Split = Literal["train", "test"]
_ROW_SEED = 17  # beside the uses of hashes in data/


def make_tokenizer(data: DataSection) -> Tokenizer:
    """The bytes tokenizer, or one from a file. Raises ValueError for a file that does not serve."""
    return Tokenizer.bytes(data.max_grid) if data.tokenizer == "bytes" else Tokenizer.load(data.tokenizer)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """What the model must know of a tokenizer."""
    names = ("pad", "bos", "eos", "boi", "eoi", "patch", "first_row", "first_col", "max_grid")
    return Vocabulary(size=tokenizer.vocab_size, **{name: getattr(tokenizer, name) for name in names})


def make_encoder(config: Config, tokenizer: Tokenizer) -> Encoder:
    """The encoder of documents for this model and data."""
    return Encoder(tokenizer, config.model.patch_size, config.data.min_patches, config.data.max_patches)


def make_sources(data: DataSection, split: Split) -> list[tuple[Source, int]]:
    """The configured sources with their repeats. Users' own files belong to `train` as a whole.

    Raises ValueError if there is none.
    """
    sources: list[tuple[Source, int]] = []
    if data.shapes:
        s = data.shapes
        sources.append((Shapes(s.seed, split, s.documents, s.canvases, s.max_objects, s.caption_fraction), s.repeats))
    if data.digits:
        passes = ((0.0, data.digits.drawn), (1.0, data.digits.read))
        sources += [(Digits(split, captioned), repeats) for captioned, repeats in passes if repeats]
    if data.text:
        sources.append((StandardLibrary(split, data.text.max_bytes), data.text.repeats))
    if split == "train":
        sources += [(Jsonl(files.path), files.repeats) for files in data.files]
        if not sources:
            raise ValueError("no data: set data.shapes, data.digits, data.text or data.files")
    return sources


def make_mixture(config: Config, encoder: Encoder, split: Split) -> Mixture:
    """The stream of packed rows. Held-out rows keep their conditions."""
    dropout = config.data.condition_dropout if split == "train" else 0.0
    return Mixture(make_sources(config.data, split), encoder, config.data.row_length, config.run.seed, dropout)


class StepRows(Dataset):
    """The micro-batches of one rank in one optimizer step, by step number.

    Step s always uses rows s * G .. (s + 1) * G - 1, whatever the number of ranks: rank r takes a contiguous share.
    """

    def __init__(self, mixture: Mixture, config: Config, rank: int, world: int) -> None:
        parts = world * config.engine.micro_batches
        if config.data.rows_per_step % parts:
            raise ValueError(
                f"data.rows_per_step {config.data.rows_per_step} is not a multiple of {parts} (ranks {world} times "
                f"engine.micro_batches {config.engine.micro_batches})"
            )
        self.mixture, self.seed, self.rank = mixture, config.run.seed, rank
        self.rows, self.micro = config.data.rows_per_step, config.engine.micro_batches
        self.share = self.rows // world

    def numbers(self, step: int) -> range:
        """The rows of this rank in a step."""
        first = step * self.rows + self.rank * self.share
        return range(first, first + self.share)

    def __getitem__(self, step: int) -> list[Batch]:
        rows, size = self.numbers(step), self.share // self.micro
        return [make_batch(self.mixture, list(rows[i : i + size]), self.seed) for i in range(0, self.share, size)]


def make_batch(mixture: Mixture, rows: list[int], seed: int) -> Batch:
    """Rows of a mixture by number; the noise of a row is a function of (seed, number)."""
    seeds = (hash_ids(np.array(rows), _ROW_SEED, seed) >> np.uint64(1)).tolist()
    return Batch.collate([mixture.row(row) for row in rows], seeds)


def load(rows: StepRows, first: int, last: int, workers: int) -> Generator[list[Batch]]:
    """Micro-batches of steps first .. last - 1, made ahead of time by worker processes. To be closed."""
    loader = DataLoader(
        rows,
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_leave_signals_to_the_loop,
    )
    batches = iter(loader)
    try:
        yield from batches
    except (ValueError, OSError) as error:  # from a worker it brings the worker's traceback along, the message last
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from None
    finally:
        if workers:  # The end of the process would wait for them for ever: they ignore the signal that ends them.
            batches._shutdown_workers()  # type: ignore[attr-defined]


def _leave_signals_to_the_loop(_: int) -> None:
    """Schedulers send their signals to every process of a job; the workers are still needed for the last step."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
