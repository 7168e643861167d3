"""Captioned pictures: `data.prepare` and the training loader beside `datasets` and WebDataset; the loop's wait."""

import io
import json
import multiprocessing
import os
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.report import Result, Row
from data import prepare
from data.encode import Encoder
from data.source.shapes import Shapes
from data.tokenizer import Tokenizer
from train import loop, pipeline, settings

_TOKENIZER = "configs/shapes-tokenizer.json"
_SIZES = ((384, 512), (512, 384), (448, 448), (360, 640))  # height, width
_PATCH, _MAX_PATCHES, _ROW_LENGTH, _ROWS = 16, 256, 2048, 8
_BATCH = 64  # samples of a batch of the others: about as many as a step of 8 rows holds
_PARTS = 4  # files of each kind
_CAPTIONS = 10  # sentences of a caption

Counted = tuple[int, int]
"""Pictures and text tokens of a batch."""


def run(pictures: int = 2000, rounds: int = 5, steps: int = 30) -> Result:
    """Read the same JPEG pictures and captions in turns, each reader in a process of its own with one worker.

    Args:
        pictures: pictures to generate; 384 x 512 pixels and other shapes of that size.
        rounds: turns of every reader; each reads all pictures once.
        steps: steps of configs/quickstart.yaml whose wait for data is measured.
    """
    for name, value, least in (("pictures", pictures, 100), ("rounds", rounds, 1), ("steps", steps, 2)):
        if value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    _webdataset_is_installed()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_pictures(folder, pictures)
        for number in range(rounds):
            for reader in READERS:
                rows.append({"reader": reader, "round": number, **_in_process(_read, reader, folder, number)})
        waits = _in_process(_train, folder / "run", steps)
    rows += [{"reader": "quickstart", "step": step, **values} for step, values in enumerate(waits, 1)]
    summary = _summarise(rows)
    return Result("loader", rows, summary, _notes(pictures, waits), _plot(summary),
                  packages=("datasets", "webdataset", "pillow", "numpy", "pyarrow"))  # fmt: skip


def _webdataset_is_installed() -> None:
    import webdataset  # noqa: F401  # one line now rather than a traceback after minutes


# ---- the pictures ----------------------------------------------------------------------------------------------------


def _write_pictures(folder: Path, number: int) -> None:
    """The same pictures and captions as tars (WebDataset) and as Parquet."""
    captions, rng = Shapes(0, "train", number * _CAPTIONS), np.random.default_rng(0)
    for part in range(_PARTS):
        table: dict[str, list] = {"image": [], "caption": []}
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for index in range(part, number, _PARTS):
                file = io.BytesIO()
                _picture(rng, *_SIZES[index % len(_SIZES)]).save(file, "JPEG", quality=90)
                found = (captions.document(index * _CAPTIONS + k, pixels=False) for k in range(_CAPTIONS))
                caption = ", ".join(s.text for d in found for s in d.segments if hasattr(s, "text"))
                for suffix, content in (("jpg", file.getvalue()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                table["image"].append({"bytes": file.getvalue(), "path": None})
                table["caption"].append(caption)
        pq.write_table(pa.table(table), folder / f"{part}.parquet", row_group_size=100)


def _picture(rng: np.random.Generator, height: int, width: int) -> PIL.Image.Image:
    """Coarse and fine noise, so that the file is about as large as that of a photograph."""
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (height // 32, width // 32, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), PIL.Image.Resampling.BICUBIC), np.int16)
    fine = rng.integers(-12, 13, (height, width, 1), np.int16)
    return PIL.Image.fromarray(np.clip(smooth + fine, 0, 255).astype(np.uint8))


# ---- the readers -----------------------------------------------------------------------------------------------------


def _encoder() -> Encoder:
    return Encoder(Tokenizer.named(_TOKENIZER), _PATCH, 1, _MAX_PATCHES)


def _prepare(folder: Path, number: int) -> Iterator[Counted]:
    """`python -m data.prepare`, all in this process."""
    out = folder / f"prepared-{number}"
    tars = [str(folder / f"{part}.tar") for part in range(_PARTS)]
    with redirect_stdout(io.StringIO()):
        prepare.main(["--input", *tars, "--out", str(out), "--tokenizer", _TOKENIZER, "--workers", "0",
                      f"--patch_size={_PATCH}", f"--max_patches={_MAX_PATCHES}"])  # fmt: skip
    counts = json.loads((out / "statistics.json").read_bytes())
    yield counts["images"], counts["tokens"]


def _ropeway(folder: Path, number: int) -> Iterator[Counted]:
    """The steps of an epoch of training, as the loop gets them."""
    prepared = json.dumps([{"path": str(folder / "prepared-0")}])
    config = settings.parse([
        f"--data.prepared={prepared}", f"--data.tokenizer={_TOKENIZER}", f"--data.max_patches={_MAX_PATCHES}",
        f"--model.patch_size={_PATCH}", f"--data.row_length={_ROW_LENGTH}", f"--data.rows_per_step={_ROWS}",
        "--data.condition_dropout=0",
    ])[0]  # fmt: skip
    encoder = pipeline.make_encoder(config, pipeline.make_tokenizer(config.data))
    mixture = pipeline.make_mixture(config, encoder, "train")
    steps = int(mixture.streams[0].sources[0].slots[0].sum()) // (_ROW_LENGTH * _ROWS)  # type: ignore[attr-defined]
    rows, special = pipeline.StepRows(mixture, config, 0, 1), encoder.tokenizer

    def count() -> Iterator[Counted]:
        with closing(pipeline.load(rows, 0, steps, workers=1)) as loaded:
            for step in loaded:
                token = step.batches[0].token_BS
                yield int((token == special.boi).sum()), int((token < special.pad).sum())

    return count()


def _datasets(folder: Path, number: int) -> Iterator[Counted]:
    """`datasets` streaming with a DataLoader."""
    import datasets

    files = [str(folder / f"{part}.parquet") for part in range(_PARTS)]
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    stream = stream.cast_column("image", datasets.Image())
    return _counted(stream, _Collate("image", "caption"))


def _webdataset(folder: Path, number: int) -> Iterator[Counted]:
    """WebDataset with a DataLoader."""
    import webdataset

    files = [str(folder / f"{part}.tar") for part in range(_PARTS)]
    stream = webdataset.WebDataset(files, shardshuffle=False).decode("pil")
    return _counted(stream, _Collate("jpg", "txt"))


READERS: dict[str, Callable[[Path, int], Iterator[Counted]]] = {
    "data.prepare": _prepare,
    "Ropeway": _ropeway,
    "datasets": _datasets,
    "WebDataset": _webdataset,
}


class _Collate:
    """What the others do with their samples: the resize and the tokens of Ropeway, as three tensors of a batch."""

    def __init__(self, image: str, text: str) -> None:
        self.image, self.text, self.encoder = image, text, _encoder()

    def __call__(self, samples: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
        pixels, ids, sizes = [], [], []
        for sample in samples:
            picture = sample[self.image].convert("RGB")
            rows, cols = self.encoder.grid(picture.height, picture.width)
            small = picture.resize((cols * _PATCH, rows * _PATCH), PIL.Image.Resampling.LANCZOS)
            pixels.append(np.asarray(small).reshape(-1))
            ids.append(self.encoder.tokenizer.encode_array(sample[self.text]))
            sizes.append((rows, cols, len(ids[-1])))
        return torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(np.concatenate(ids)), torch.tensor(sizes)


def _counted(stream: Any, collate: _Collate) -> Iterator[Counted]:
    # Forked as Ropeway's worker is: in a spawned process the default is to spawn, and to import everything once more.
    loader = DataLoader(stream, _BATCH, num_workers=1, prefetch_factor=4, collate_fn=collate,
                        multiprocessing_context="fork")  # fmt: skip
    for _, ids, sizes in loader:
        yield len(sizes), len(ids)


# ---- measuring -------------------------------------------------------------------------------------------------------


def _in_process(work: Callable, *arguments: object) -> Any:
    """What work(*arguments) returns in a new process. Raises OSError if that fails."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_send, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        raise OSError("a process of the measurement failed; its message is above") from None
    process.join()
    return found


def _send(sender: Connection, work: Callable, arguments: tuple) -> None:
    sender.send(work(*arguments))


def _cpu_seconds() -> float:
    """Of this process and of those that it has ended."""
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _read(reader: str, folder: Path, number: int) -> Row:
    torch.set_num_threads(1)
    batches = READERS[reader](folder, number)
    cpu, wall, images, tokens = _cpu_seconds(), time.perf_counter(), 0, 0
    for images_here, tokens_here in batches:
        images, tokens = images + images_here, tokens + tokens_here
    cpu, wall = _cpu_seconds() - cpu, time.perf_counter() - wall
    return {"images": images, "tokens": tokens, "cpu_seconds": cpu, "seconds": wall,
            "images_per_cpu_second": images / cpu, "tokens_per_cpu_second": tokens / cpu}  # fmt: skip


def _train(folder: Path, steps: int) -> list[dict[str, float]]:
    """Seconds and wait of the first steps of the quickstart."""
    config = settings.parse(["--config", "configs/quickstart.yaml", f"--run.dir={folder}", f"--run.stop_after={steps}",
                             "--eval.every=0", "--log.every=1"])[0]  # fmt: skip
    loop.train(loop.set_up(config), dry_run=False)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{"step_seconds": line["step_seconds"], "wait_percent": line["data_wait_percent"]} for line in lines]


def _share(waits: Sequence[dict[str, float]]) -> float:
    """Wait as a percentage of all the time."""
    total = sum(step["step_seconds"] for step in waits)
    return sum(step["step_seconds"] * step["wait_percent"] for step in waits) / total


def _summarise(rows: Sequence[Row]) -> list[Row]:
    rates = {
        reader: [float(row["images_per_cpu_second"] or 0) for row in rows if row["reader"] == reader]
        for reader in READERS
    }
    summary: list[Row] = []
    for reader, each in rates.items():
        tokens = [float(row["tokens_per_cpu_second"] or 0) for row in rows if row["reader"] == reader]
        ratios = [own / other for own, other in zip(rates["Ropeway"], each, strict=True)]
        beside = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        summary.append(
            {
                "reader": reader,
                "images per core and second": statistics.median(each),
                "smallest": min(each),
                "largest": max(each),
                "text tokens per core and second": statistics.median(tokens),
                "Ropeway / it": beside if reader in ("datasets", "WebDataset") else "",
            }
        )
    return summary


def _notes(pictures: int, waits: Sequence[dict[str, float]]) -> str:
    step = statistics.median(one["step_seconds"] for one in waits)
    return f"""
{pictures} JPEG pictures of about 200,000 pixels, each brought to at most {_MAX_PATCHES} patches of {_PATCH} x {_PATCH}
pixels by the same function of its size (Pillow, Lanczos), with captions of {_CAPTIONS} sentences in the same tokens. A
core second is one of CPU time of the process and its one worker, from the start of the loader to its end; medians, and
ratios within a round. `data.prepare` reads the tars, in one process, and does not decode. Ropeway is the training
loader on what it wrote: shuffled, patches cut, packed into rows of {_ROW_LENGTH} slots; its tokens are not made again.
The others read their own files in order, make the tokens, and hand over batches of {_BATCH} samples as three tensors;
they neither shuffle, pack nor cut patches.

The wait of the training loop on `configs/quickstart.yaml`: {_share(waits[1:]):.2f} % of the time of steps 2 to
{len(waits)} (median step {step:.2f} s, {len(os.sched_getaffinity(0))} cores), {_share(waits):.2f} % with the first
step, in which the worker starts."""


def _plot(summary: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(5, 2.5))
    axis = figure.subplots()
    loaders = [row for row in summary if row["reader"] != "data.prepare"][::-1]
    axis.barh(
        [str(row["reader"]) for row in loaders], [float(row["images per core and second"] or 0) for row in loaders]
    )
    axis.set(xlabel="images per core and second", title="decode, resize, tokens, batches")
    return figure
