"""From the configuration to batches: tokenizer, sources, the mixture of packed rows, and a rank's share of them."""

import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.encode import Encoder
from data.mixture import Mixture, Stream
from data.plan import hash_ids
from data.source import Source
from data.source.digits import Digits
from data.source.jsonl import Jsonl
from data.source.shapes import Shapes
from data.source.stdlib import StandardLibrary
from data.tokenizer import Tokenizer
from model.batch import Batch
from model.config import Vocabulary
from train.config import Config, DataSection, StageSection

Split = Literal["train", "test"]
_ROW_SEED, _STAGE_SEED = 17, 18  # beside the uses of hashes in data/
_AHEAD = 4  # steps that each worker makes ahead of time


def make_tokenizer(data: DataSection) -> Tokenizer:
    """See `Tokenizer.named`."""
    return Tokenizer.named(data.tokenizer, data.max_grid)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """What the model must know of a tokenizer."""
    names = ("pad", "bos", "eos", "boi", "eoi", "patch", "first_row", "first_col", "max_grid")
    return Vocabulary(size=tokenizer.vocab_size, **{name: getattr(tokenizer, name) for name in names})


def make_encoder(config: Config, tokenizer: Tokenizer) -> Encoder:
    """The encoder of documents for this model and data."""
    return Encoder(tokenizer, config.model.patch_size, config.data.min_patches, config.data.max_patches)


def make_sources(data: DataSection, split: Split) -> list[tuple[float | None, list[tuple[Source, int]]]]:
    """What is configured: (weight, sources with their repeats). Users' own files belong to `train` as a whole.

    Raises ValueError if there is none.
    """
    found: list[tuple[float | None, list[tuple[Source, int]]]] = []
    if data.shapes:
        s = data.shapes
        shapes = Shapes(s.seed, split, s.documents, s.canvases, s.max_objects, s.caption_fraction)
        found.append((s.weight, [(shapes, s.repeats)]))
    if data.digits:
        passes = ((0.0, data.digits.drawn), (1.0, data.digits.read))
        found.append((data.digits.weight, [(Digits(split, captioned), n) for captioned, n in passes if n]))
    if data.text:
        found.append((data.text.weight, [(StandardLibrary(split, data.text.max_bytes), data.text.repeats)]))
    if split == "train":
        found += [(files.weight, [(Jsonl(files.path), files.repeats)]) for files in data.files]
        if data.prepared:
            from data.source.prepared import Prepared

            found += [(part.weight, [(Prepared(part.path), part.repeats)]) for part in data.prepared]
        if not found:
            raise ValueError("no data: set data.shapes, data.digits, data.text, data.files or data.prepared")
    return found


def make_mixture(config: Config, encoder: Encoder, split: Split) -> Mixture:
    """The rows of the run, or the held-out ones: these keep their conditions and know no weights and no stages."""
    data, seed, found = config.data, config.run.seed, make_sources(config.data, split)
    if split == "test":
        together = [source for _, sources in found for source in sources]
        return Mixture([(0, [(Stream(together, encoder, data.row_length, seed, 0.0), 1.0)])])
    if found[0][0] is None:
        groups = {"": (1.0, [source for _, sources in found for source in sources])}
    else:
        groups = {sources[0][0].name: (weight or 0.0, sources) for weight, sources in found if sources}
        if len(groups) < len(found):
            raise ValueError("two sources of data have the same name; sources with weights need different names: "
                             + ", ".join(sources[0][0].name for _, sources in found if sources))  # fmt: skip
    streams: dict[tuple[str, int], Stream] = {}
    stages = []
    for number, stage in enumerate([StageSection(0), *data.stages]):
        if unknown := sorted(stage.weights.keys() - groups.keys()):
            raise ValueError(f"the stage from step {stage.from_step} has a weight for {unknown[0]!r}; the sources are "
                             f"{', '.join(groups)}")  # fmt: skip
        max_patches = stage.max_patches or data.max_patches
        weighted = []
        for name, (weight, sources) in groups.items():
            weight = stage.weights.get(name, 0.0) if stage.weights else weight
            if weight == 0:  # It may be prepared for the patches of another stage.
                continue
            if (name, max_patches) not in streams:
                # Another resolution begins with another order: what was read last must not come first.
                stage_seed = int(hash_ids(np.array([number]), _STAGE_SEED, seed)[0]) if number else seed
                own = Encoder(encoder.tokenizer, encoder.patch_size, data.min_patches, max_patches)
                streams[name, max_patches] = Stream(sources, own, data.row_length, stage_seed, data.condition_dropout,
                                                    data.picture_first)  # fmt: skip
            weighted.append((streams[name, max_patches], weight))
        stages.append((stage.from_step * data.rows_per_step, weighted))
    return Mixture(stages)


@dataclass(frozen=True)
class Step:
    """What one rank reads in one optimizer step."""

    batches: list[Batch]
    """One per micro-batch."""
    replaced: list[str]
    """Why which documents could not be read and were replaced."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Step":
        """The step with every tensor changed."""
        return replace(self, batches=[batch.map(change) for batch in self.batches])


@dataclass(frozen=True)
class Parcel:
    """A step on its way from a worker, all its tensors as one: each tensor that a process hands to another costs a
    connection of its own, and a step has a dozen."""

    outline: Step
    """The step with tensors that have shapes and types alone (on the device `meta`)."""
    content_N: Tensor
    """uint8: what is in them, one behind the other."""

    def unwrap(self) -> Step:
        """The step, its tensors being views of `content_N`."""
        end = 0

        def take(shell: Tensor) -> Tensor:
            nonlocal end
            start, end = end, end + shell.nbytes + -shell.nbytes % 8
            return self.content_N[start : start + shell.nbytes].view(shell.dtype).view(shell.shape)

        return self.outline.map(take)

    def pin_memory(self) -> "Parcel":
        """A copy that a GPU can fetch by itself (the DataLoader calls this)."""
        return replace(self, content_N=self.content_N.pin_memory())

    def copy(self) -> "Parcel":
        """The same in memory of this process."""
        return replace(self, content_N=self.content_N.clone())


class Wrapper:
    """Makes parcels in shared memory, and uses it again: getting it anew takes longer than filling it.

    A parcel has to be copied before the next `parcels` parcels have been made.
    """

    def __init__(self, parcels: int) -> None:
        self.memory = [torch.empty(0, dtype=torch.uint8) for _ in range(parcels)]

    def __call__(self, step: Step) -> Parcel:
        parts: list[Tensor] = []

        def put(tensor: Tensor) -> Tensor:
            flat_N = tensor.flatten().view(torch.uint8)
            parts.extend([flat_N, flat_N.new_zeros(-len(flat_N) % 8)])  # The next one may be of a wider type.
            return tensor.to("meta")

        outline, size = step.map(put), sum(map(len, parts))
        memory_M = self.memory.pop(0)
        if len(memory_M) < size:
            memory_M = torch.empty(size, dtype=torch.uint8).share_memory_()
        self.memory.append(memory_M)
        return Parcel(outline, torch.cat(parts, out=memory_M[:size]))


class StepRows(Dataset):
    """What one rank reads in each optimizer step, by step number.

    Step s always uses rows s * G .. (s + 1) * G - 1, whatever the number of ranks. They are put in an order in which
    contiguous shares cost about the same, and each rank takes its share.
    """

    def __init__(self, mixture: Mixture, config: Config, rank: int, world: int) -> None:
        parts = world * config.engine.micro_batches
        if config.data.rows_per_step % parts:
            raise ValueError(
                f"data.rows_per_step {config.data.rows_per_step} is not a multiple of {parts} (ranks {world} times "
                f"engine.micro_batches {config.engine.micro_batches})"
            )
        self.mixture, self.model, self.seed, self.rank = mixture, config.model, config.run.seed, rank
        self.rows, self.micro = config.data.rows_per_step, config.engine.micro_batches
        self.share = self.rows // world

    def numbers(self, step: int) -> list[int]:
        """The rows of this rank in a step."""
        first = step * self.rows
        order = balance([self.cost(row) for row in range(first, first + self.rows)])
        return [first + place for place in order[self.rank * self.share : (self.rank + 1) * self.share]]

    def cost(self, row: int) -> float:
        """FLOPs of a row, all of it taken for learned."""
        work, vocabulary = self.mixture.work(row), self.mixture.streams[0].encoder.tokenizer.vocab_size
        text = work.slots - work.patches
        return self.model.flops_per_step(work.slots, work.squared_lengths, text, work.patches, work.patches, vocabulary)

    def __getitem__(self, step: int) -> Step:
        rows, size = self.numbers(step), self.share // self.micro
        made = [self.mixture.row_and_replaced(row) for row in rows]
        seeds, columns = row_seeds(rows, self.seed), [columns for columns, _ in made]
        batches = [
            Batch.collate(columns[i : i + size], seeds[i : i + size], self.model.block)
            for i in range(0, self.share, size)
        ]
        return Step(batches, [reason for _, replaced in made for reason in replaced])


def balance(costs: Sequence[float]) -> list[int]:
    """An order of the items in which contiguous shares of equal size have about the same sum, for any number of shares.

    The dearest is joined to the cheapest, the next to the next; then these pairs in the same way, and so on. So shares
    of 2, 4, 8, ... items are balanced, as long as they divide the number of items.
    """
    groups, sums = [[item] for item in range(len(costs))], list(costs)
    while len(groups) > 1 and len(groups) % 2 == 0:
        order = sorted(range(len(groups)), key=sums.__getitem__)
        pairs = list(zip(order[: len(order) // 2], reversed(order), strict=False))
        groups, sums = [groups[a] + groups[b] for a, b in pairs], [sums[a] + sums[b] for a, b in pairs]
    return [item for group in groups for item in group]


def row_seeds(rows: list[int], seed: int) -> list[int]:
    """The seeds of the noise of rows, a function of (seed, number)."""
    return (hash_ids(np.array(rows), _ROW_SEED, seed) >> np.uint64(1)).tolist()


def make_batch(mixture: Mixture, rows: list[int], seed: int) -> Batch:
    """Rows of a mixture by number."""
    return Batch.collate([mixture.row(row) for row in rows], row_seeds(rows, seed))


def load(rows: StepRows, first: int, last: int, workers: int, pin: bool = False) -> Generator[Step]:
    """Steps first .. last - 1, made ahead of time by worker processes; `pin`ned for a GPU to fetch. To be closed."""
    loader = DataLoader(
        rows,
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        multiprocessing_context="fork" if workers else None,
        pin_memory=pin,
        # Without a batch size it gets the item itself. A worker makes a step no sooner than the one _AHEAD before has
        # been fetched, and of the one before that a copy has been made by then.
        collate_fn=Wrapper(_AHEAD + 1),  # type: ignore[arg-type]
        worker_init_fn=_leave_signals_to_the_loop,
    )
    batches = iter(loader)
    try:
        if not workers:
            yield from iter(lambda: _take(batches), None)
            return
        # A thread takes over the next step while this one is computed: the training process waits for nothing.
        with ThreadPoolExecutor(1) as ahead:
            following = ahead.submit(_take, batches)
            while step := following.result():
                following = ahead.submit(_take, batches)
                yield step
    except (ValueError, OSError) as error:  # from a worker it brings the worker's traceback along, the message last
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from None
    finally:
        if workers:  # The end of the process would wait for them for ever: they ignore the signal that ends them.
            batches._shutdown_workers()  # type: ignore[attr-defined]


def _take(parcels: Iterator[Parcel]) -> Step | None:
    """The next step, None at the end."""
    parcel = next(parcels, None)
    if parcel is None:
        return None
    return (parcel if parcel.content_N.is_pinned() else parcel.copy()).unwrap()


def _leave_signals_to_the_loop(_: int) -> None:
    """Schedulers send their signals to every process of a job; the workers are still needed for the last step."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
