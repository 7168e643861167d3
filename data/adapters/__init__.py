"""Data as users have it, read into documents with the bytes of their image files. See docs/data-format.md.

`find_units` lists the input as units of work; `read` yields the documents of one unit, and a rejection with its reason
for everything that is not one. Nothing here raises for what is in the data, follows a path out of the input folder,
extracts an archive, unpickles, or downloads (but `datasets`, where a column mapping names a dataset of the Hub).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.adapters import lines, tables
from data.adapters.files import MAX_DOCUMENT_BYTES, image_bytes, is_inside, one_line, shorten
from data.adapters.forms import Columns, load_columns, parse_record
from data.adapters.tar import tar_records
from data.document import Text

# Bytes of one text segment in UTF-8 at most.
MAX_TEXT_BYTES = 2**20

KINDS = ("jsonl", "json", "csv", "parquet", "arrow", "webdataset", "text", "hf")
_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow", ".tar": "webdataset", ".tar.gz": "webdataset", ".tgz": "webdataset", ".txt": "text",
    ".yaml": "hf", ".yml": "hf",
}  # fmt: skip
# An image folder's table, as `datasets` calls it; other files beside it are not looked at.
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class RawImage:
    """An image as the bytes of its file."""

    data: bytes
    learn: bool = True
    frame: int = 0
    """In a video, as `data.document.Image.frame`."""


@dataclass(frozen=True)
class RawDocument:
    """A document and the place it was found at: the file, and the line, row or sample in it."""

    input: str
    where: str
    segments: tuple[Text | RawImage, ...]
    id: str = ""
    source: str = ""


@dataclass(frozen=True)
class Rejection:
    """Something that did not become a document."""

    input: str
    where: str
    reason: str


@dataclass(frozen=True)
class Unit:
    """A contiguous part of the input, the same whenever the same input is listed again."""

    kind: str
    """One of KINDS, or "link" for a link that leaves the input folder."""
    paths: tuple[str, ...]
    """One file; several for text."""
    root: str
    """Real path of the folder that no image path may leave."""
    start: int = 0
    """First byte (jsonl, csv), row group (parquet) or row (hf; of a stream the number of a file)."""
    stop: int | None = None
    """The end, not included; None: that of the file."""
    first: int = 1
    """Number of the first line or row."""


def find_units(inputs: list[str], format: str = "auto", documents: int = 4096) -> list[Unit]:
    """The units of the input files and folders, in the order given, a folder's files sorted by path.

    Files that can be divided make units of about `documents` documents. Raises ValueError where an input is missing,
    or where it is not clear how to read it.
    """
    units: list[Unit] = []
    files: list[tuple[str | None, str]]
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            root = os.path.realpath(path)
            files = [(kind if is_inside(file, root) else "link", file) for kind, file in _files_of(path, format)]
        elif path.is_file():
            root = os.path.realpath(path.parent)
            files = [(_kind(path.name) if format == "auto" else format, name)]
        else:
            raise ValueError(f"{name}: no such file or folder")
        texts = [file for kind, file in files if kind == "text"]
        units += [Unit("text", tuple(texts[k : k + documents]), root) for k in range(0, len(texts), documents)]
        for kind, file in files:
            if kind is None:
                raise ValueError(f"{file}: unknown kind of file; say which with --format ({', '.join(KINDS)})")
            if kind != "text":
                units += [Unit(kind, (file,), root, *part) for part in _divide(kind, file, documents)]
    if not units:
        raise ValueError("the input is empty; name files or folders with --input")
    return units


def read(
    unit: Unit, columns: Columns | None = None, image_folder: str | None = None
) -> Iterator[RawDocument | Rejection]:
    """Everything in a unit, in order, as it is read. Raises OSError where a stream breaks off.

    `columns` says which columns make a document, None: those with known names. Image paths are taken from
    `image_folder` and must not leave it, None: from the folder of the file that names them.
    """
    root = os.path.realpath(image_folder) if image_folder else unit.root
    for path in unit.paths:
        if unit.kind == "link":
            yield Rejection(path, "file", "a link that leaves the input folder")
            continue
        folder = image_folder or os.path.dirname(path) or "."
        where = ""
        try:
            if unit.kind == "hf":
                columns = load_columns(path)
                folder = image_folder or columns.local_folder() or folder
                root = os.path.realpath(folder)
            for where, record, members in _records(unit, path, columns):
                try:
                    yield _document(path, where, record, columns, folder, root, members)
                except (ValueError, RecursionError) as error:
                    yield Rejection(path, where, one_line(error))
        except Exception as error:  # decoders of broken files raise all kinds of exceptions
            if unit.kind == "hf" and columns and columns.streaming and not isinstance(error, ValueError):
                # Not the data's fault: what is left would be lost with a rejection, and is there when tried again.
                last = where or "its start"
                raise OSError(f"{path}: the stream broke off behind {last}: {one_line(error)}") from None
            yield Rejection(path, f"after {where}" if where else "file", f"cannot be read on: {one_line(error)}")


def _files_of(folder: Path, format: str) -> list[tuple[str, str]]:
    """(kind, path) of the files in a folder that hold documents, links to other folders not followed."""
    found = [
        os.path.join(directory, name)
        for directory, _, names in os.walk(folder)
        for name in names
        if os.path.isfile(os.path.join(directory, name))
    ]
    tables_of_images = [path for path in found if os.path.basename(path) in _METADATA]
    files = [(kind, path) for path in sorted(tables_of_images or found) if (kind := _kind(path)) and kind != "hf"]
    kinds = {kind for kind, _ in files}
    if format != "auto":
        kinds = {format}
    elif len(kinds) > 1:
        kinds -= {"text"}  # a README beside the data
    if len(kinds) > 1:
        raise ValueError(f"{folder}: holds files of several kinds ({', '.join(sorted(kinds))}); choose with --format")
    files = [(kind, path) for kind, path in files if kind in kinds]
    if not files:
        raise ValueError(f"{folder}: holds no {'known' if format == 'auto' else format} data files")
    return files


def _kind(name: str) -> str | None:
    name = name.lower()
    return next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), None)


def _divide(kind: str, path: str, documents: int) -> list[lines.Part]:
    whole: list[lines.Part] = [(0, None, 1)]
    if kind == "hf":
        return tables.divide_dataset(load_columns(path), path, documents)
    try:
        match kind:
            case "jsonl":
                return lines.divide_jsonl(path, documents) or whole
            case "csv":
                return lines.divide_csv(path, documents) or whole
            case "parquet":
                return tables.divide_parquet(path, documents) or whole
    except Exception:  # the file is one unit, and reading it will tell why
        pass
    return whole


def _records(unit: Unit, path: str, columns: Columns | None) -> Iterator[tuple[str, Any, dict[str, bytes] | None]]:
    """(place, record or ValueError, the files that come with it) of everything in one file of a unit."""
    match unit.kind:
        case "webdataset":
            yield from tar_records(path)
            return
        case "jsonl":
            found = lines.jsonl_records(path, unit.start, unit.stop, unit.first)
        case "json":
            found = lines.json_records(path)
        case "csv":
            found = lines.csv_records(path, unit.start, unit.stop, unit.first)
        case "parquet":
            found = tables.parquet_records(path, unit.start, unit.stop, unit.first)
        case "arrow":
            found = tables.arrow_records(path)
        case "hf":
            assert columns is not None
            found = tables.dataset_records(columns, path, unit.start, unit.stop)
        case _:
            found = lines.text_records(path)
            columns = None
    for where, record in found:
        yield where, record, None


def _document(
    path: str,
    where: str,
    record: Any,
    columns: Columns | None,
    folder: str,
    root: str,
    members: dict[str, bytes] | None,
) -> RawDocument:
    if isinstance(record, ValueError):
        raise record
    outline, id, source = parse_record(record, columns)
    segments: list[Text | RawImage] = []
    size = 0
    for number, segment in enumerate(outline, 1):
        try:
            if isinstance(segment, Text):
                segments.append(Text(_checked(segment.text), segment.learn))
                continue
            image = segment.image
            if members is not None and isinstance(image, str):
                if image not in members:
                    raise ValueError(f"{shorten(image)}: the sample has no such member")
                image = members[image]
            data = image_bytes(image, folder, root)
        except ValueError as error:
            raise ValueError(f"segment {number}: {error}") from None
        size += len(data)
        if size > MAX_DOCUMENT_BYTES:
            raise ValueError(f"its images are more than {MAX_DOCUMENT_BYTES} bytes")
        segments.append(RawImage(data, segment.learn, segment.frame))
    if not any(isinstance(segment, RawImage) or segment.text for segment in segments):
        raise ValueError("holds neither text nor image")
    return RawDocument(path, where, tuple(segments), id, source)


def _checked(text: str) -> str:
    """The text itself. Raises ValueError for text that cannot be meant."""
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ValueError(f"text is not valid Unicode (character {error.start})") from None
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"text of {size} bytes is more than the limit of {MAX_TEXT_BYTES}; split it")
    if "\0" in text:
        raise ValueError("text holds a NUL character; is it a binary file?")
    return text
