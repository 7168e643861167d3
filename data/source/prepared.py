"""Documents of a prepared set (`python -m data.prepare`), by memory map."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data.document import Document, Image, Text
from data.encode import Encoder
from data.image import fit_grid, load_image
from data.tokenizer import Tokenizer

FORMAT = 1
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("slots", pa.int32()),  # of the encoded document
        ("slots_dropped", pa.int32()),  # the same after data.encode.drop_condition
        ("patches", pa.int32()),
        (
            "segments",
            pa.list_(
                pa.struct(
                    [
                        ("text", pa.string()),
                        ("ids", pa.list_(pa.int32())),
                        ("image", pa.binary()),  # the file as it came
                        ("height", pa.int32()),  # in pixels, EXIF orientation applied
                        ("width", pa.int32()),
                        ("learn", pa.bool_()),
                        ("frame", pa.int32()),  # of an image: data.document.Image.frame; sets made earlier lack it
                    ]
                )
            ),
        ),
    ]
)
# Shards that a process keeps open: each holds a file descriptor.
_OPEN_SHARDS = 64


class _Batch(NamedTuple):
    """The columns of some documents of a shard; `first`: for each document and the end, its first segment."""

    id: pa.Array
    source: pa.Array
    first: list[int]
    text: pa.Array
    ids: pa.Array
    image: pa.Array
    height: pa.Array
    width: pa.Array
    learn: pa.Array
    frame: pa.Array | None

    @classmethod
    def of(cls, rows: pa.RecordBatch) -> _Batch:
        segments = rows.column("segments")
        parts = segments.values
        columns = {name: parts.field(name) for name in ("text", "ids", "image", "height", "width", "learn")}
        frame = parts.field("frame") if parts.type.get_field_index("frame") >= 0 else None
        return cls(rows.column("id"), rows.column("source"), segments.offsets.to_pylist(), frame=frame, **columns)


class Prepared:
    """The documents of the folder in which `python -m data.prepare` wrote them.

    `slots` is int32 (2, N), memory-mapped: the slots of each document, and those that it has after
    `data.encode.drop_condition`; `patches` is int32 (N,). They hold for the tokenizer and the patches that the set was
    prepared with; see `check`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises ValueError naming the file where the folder holds no prepared set of this format."""
        self.path = Path(path)
        self.name = self.path.resolve().name
        manifest = self._read_manifest()
        self.options: dict[str, Any] = manifest["options"]
        self._grid = tuple(self.options[name] for name in ("patch_size", "min_patches", "max_patches", "max_grid"))
        self._files: list[str] = [shard["file"] for shard in manifest["shards"]]
        self._first_batch = np.cumsum([0, *(shard["batches"] for shard in manifest["shards"])])
        self._documents: int = manifest["documents"]
        self._open()

    def __len__(self) -> int:
        return self._documents

    def document(self, index: int, pixels: bool = True) -> Document:
        """Document `index`, its texts with their ids, and its pixels in the size of their patch grid.

        Raises ValueError naming it where an image cannot be decoded.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: document {index} of {len(self)}")
        batch = int(np.searchsorted(self._batches, index, side="right")) - 1
        shard = int(np.searchsorted(self._first_batch, batch, side="right")) - 1
        rows = self._shard(shard)(batch - int(self._first_batch[shard]))
        row = index - int(self._batches[batch])
        id, source = rows.id[row].as_py(), rows.source[row].as_py()
        segments: list[Text | Image] = []
        for k in range(rows.first[row], rows.first[row + 1]):
            learn = rows.learn[k].as_py()
            if not rows.image[k].is_valid:
                segments.append(Text(rows.text[k].as_py(), learn, rows.ids[k].values.to_numpy()))
                continue
            size = rows.height[k].as_py(), rows.width[k].as_py()
            frame = rows.frame[k].as_py() if rows.frame is not None else 0
            if not pixels:
                segments.append(Image(*size, None, learn, frame))
                continue
            try:
                array = load_image(rows.image[k].as_py(), partial(self._fit, size))
            except ValueError as error:
                where = f"{self.path}: document {index} ({id!r}): segment {k - rows.first[row] + 1}"
                raise ValueError(f"{where}: {error}") from error
            segments.append(Image(array.shape[0], array.shape[1], array, learn, frame))
        return Document(tuple(segments), id, source)

    def check(self, encoder: Encoder) -> None:
        """Raises ValueError unless the encoder makes what the set was prepared for."""
        for name in ("patch_size", "min_patches", "max_patches"):
            if getattr(encoder, name) != self.options[name]:
                raise ValueError(
                    f"{self.path}: was prepared with {name} {self.options[name]}, the run has {getattr(encoder, name)}"
                )
        if Tokenizer.load(self.path / "tokenizer.json").inner.to_str() != encoder.tokenizer.inner.to_str():
            raise ValueError(f"{self.path}: was prepared with another tokenizer; use {self.path / 'tokenizer.json'}")

    def _fit(self, expected: tuple[int, int], height: int, width: int) -> tuple[int, int]:
        """The pixels of the patch grid of an image."""
        if (height, width) != expected:
            raise ValueError(f"is {height} x {width} pixels, not {expected[0]} x {expected[1]}")
        size, fewest, most, max_grid = self._grid
        rows, cols = fit_grid(height, width, size, fewest, most, max_grid)
        return rows * size, cols * size

    def _read_manifest(self) -> dict[str, Any]:
        path = self.path / "manifest.json"
        try:
            manifest = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{self.path}: no prepared set: it has no manifest.json") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValueError(f"{path}: is not of format {FORMAT}; prepare the data again")
        return manifest

    def _open(self) -> None:
        try:
            lengths = np.load(self.path / "lengths.npy", mmap_mode="r")
            self._batches = np.load(self.path / "batches.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path}: cannot be read: {error}") from None
        if lengths.shape != (3, len(self)) or lengths.dtype != np.int32 or self._batches[-1] != len(self):
            raise ValueError(f"{self.path}: lengths.npy or batches.npy does not fit manifest.json; prepare it again")
        self.slots: np.ndarray = lengths[:2]
        self.patches: np.ndarray = lengths[2]
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)

    def _open_shard(self, number: int) -> Callable[[int], _Batch]:
        """What gives the batches of a shard by number. They are kept as long as the shard is: each is a few kilobytes
        of outlines of what is in the file, and taking them out anew doubled the time that a document needs beside its
        pixels."""
        path = self.path / self._files[number]
        try:
            shard = pa.ipc.open_file(pa.memory_map(str(path)))
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
        return cache(lambda batch: _Batch.of(shard.get_batch(batch)))

    def __getstate__(self) -> dict[str, Any]:
        opened = ("slots", "patches", "_batches", "_shard")
        return {name: value for name, value in vars(self).items() if name not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()
