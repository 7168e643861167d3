"""One record (a JSON object, a table row, a tar sample) to segments, by the form that its keys show."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.adapters.files import shorten
from data.document import ImageReference, Text, parse_outline

Segment = Text | ImageReference
Outline = tuple[tuple[Segment, ...], str, str]

# The names under which pairs are commonly found; of several the first.
TEXT_KEYS = ("text", "caption", "txt")
IMAGE_KEYS = ("image", "images", "file_name", "file_names", "jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Column:
    """A part of every document: the text or image in a column (a list gives several), learned or read."""

    name: str
    is_image: bool
    learn: bool = True


@dataclass(frozen=True)
class Columns:
    """Which columns make a document, in reading order, and what `datasets.load_dataset` is asked for."""

    parts: tuple[Column, ...]
    id: str | None = None
    dataset: dict[str, Any] | None = None

    @property
    def streaming(self) -> bool:
        """Whether the dataset is read from where it is, file by file, rather than fetched as a whole first."""
        return bool((self.dataset or {}).get("streaming"))

    def local_folder(self) -> str | None:
        """The local folder that the dataset is read from, if it is one; image paths may lie in it."""
        names = [str((self.dataset or {}).get(key, "")) for key in ("data_dir", "path")]
        return next((name for name in names if os.path.isdir(name)), None)


def load_columns(path: str) -> Columns:
    """Read a column mapping (docs/data-format.md). Raises ValueError naming the file."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not set(content) <= {"segments", "id", "dataset"}:
        raise ValueError(f"{path}: must hold `segments`, and optionally `id` and `dataset`")
    parts = content.get("segments")
    if not isinstance(parts, list) or not parts:
        raise ValueError(f"{path}: `segments` must list columns, such as `- {{text: caption}}`")
    columns = []
    for part in parts:
        kinds = [kind for kind in ("text", "image") if isinstance(part, dict) and isinstance(part.get(kind), str)]
        if len(kinds) != 1 or not set(part) <= {kinds[0], "learn"} or not isinstance(part.get("learn", True), bool):
            raise ValueError(f"{path}: expected `text: COLUMN` or `image: COLUMN`, and optionally `learn`, got {part}")
        columns.append(Column(part[kinds[0]], kinds[0] == "image", part.get("learn", True)))
    dataset = content.get("dataset")
    known = {"path", "name", "split", "revision", "data_dir", "data_files", "streaming"}
    if dataset is not None and (not isinstance(dataset, dict) or "path" not in dataset or not set(dataset) <= known):
        raise ValueError(f"{path}: `dataset` must hold `path`; known are {', '.join(sorted(known))}")
    if not isinstance((dataset or {}).get("streaming", False), bool):
        raise ValueError(f"{path}: `streaming` must be true or false")
    if not isinstance(content.get("id", ""), str):
        raise ValueError(f"{path}: `id` must name a column")
    return Columns(tuple(columns), content.get("id"), dataset)


def parse_record(record: Any, columns: Columns | None) -> Outline:
    """(segments, id, source) of a record. Raises ValueError for one that has no known form."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    if columns is not None:
        return tuple(_mapped(record, columns)), _id(record, columns.id), ""
    if "segments" in record:
        segments = record["segments"]
        if isinstance(segments, list):
            segments = [_without_nulls(s) if isinstance(s, dict) else s for s in segments]
        return parse_outline({**_without_nulls(record), "segments": segments}, "document")
    if "conversations" in record:
        return tuple(_conversation(record)), _id(record, "id"), ""
    if isinstance(record.get("texts"), list) and isinstance(record.get("images"), list):
        return tuple(_parallel(record["texts"], record["images"])), _id(record, "id"), ""
    if "text_list" in record:
        return tuple(_matched(record)), _id(record, "id"), ""
    text = next((record[key] for key in TEXT_KEYS if key in record), None)
    image = next((record[key] for key in IMAGE_KEYS if key in record), None)
    if text is None and image is None:
        keys = shorten(", ".join(sorted(map(str, record))))
        raise ValueError(f"no known form has the keys {keys}; name the columns with --columns")
    return (*_values(text, "text", False), *_values(image, "image", True)), _id(record, "id"), ""


def _without_nulls(record: dict) -> dict:
    """What a table writes as null is absent, also an image of which neither bytes nor path are there."""
    return {
        key: value
        for key, value in record.items()
        if value is not None and not (isinstance(value, dict) and value and all(v is None for v in value.values()))
    }


def _id(record: dict, key: str | None) -> str:
    value = record.get(key) if key else None
    return shorten(str(value)) if isinstance(value, str | int) else ""


def _values(value: Any, name: str, is_image: bool, learn: bool = True) -> Iterator[Segment]:
    """The segments that one column makes; null makes none."""
    for item in value if isinstance(value, list) else [value]:
        if item is None:
            continue
        if is_image:
            yield ImageReference(item, learn)
        elif isinstance(item, str):
            yield Text(item, learn)
        else:
            raise ValueError(f"{shorten(name)!r} must be text, got {type(item).__name__}")


def _mapped(record: dict, columns: Columns) -> Iterator[Segment]:
    for column in columns.parts:
        if column.name not in record:
            raise ValueError(f"there is no column {column.name!r}; there are {shorten(', '.join(map(str, record)))}")
        yield from _values(record[column.name], column.name, column.is_image, column.learn)


def _parallel(texts: list, images: list) -> Iterator[Segment]:
    """OBELICS: at each place either a text or an image, the other null."""
    if len(texts) != len(images):
        raise ValueError(f"{len(texts)} texts and {len(images)} images; the lists must be of one length")
    for place, (text, image) in enumerate(zip(texts, images, strict=True), 1):
        if (text is None) == (image is None):
            raise ValueError(f"place {place}: expected either a text or an image, the other null")
        yield from _values(text, "texts", False) if image is None else _values(image, "images", True)


def _matched(record: dict) -> Iterator[Segment]:
    """MMC4: sentences, joined by blanks; each image comes before the sentence that it was matched to."""
    sentences, pictures = record["text_list"], record.get("image_info") or []
    if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
        raise ValueError('"text_list" must be a list of texts')
    if not isinstance(pictures, list) or not all(
        isinstance(p, dict) and isinstance(p.get("matched_text_index"), int) for p in pictures
    ):
        raise ValueError('"image_info" must be a list of objects with "matched_text_index"')
    before: dict[int, list[ImageReference]] = {}
    for picture in pictures:
        index = picture["matched_text_index"]
        if not 0 <= index < len(sentences):
            raise ValueError(f'"matched_text_index" {index} is not a place in "text_list"')
        before.setdefault(index, []).append(ImageReference(picture.get("image_name") or picture.get("raw_url")))
    for index, sentence in enumerate(sentences):
        yield from before.get(index, [])
        yield Text(sentence if index == len(sentences) - 1 else f"{sentence} ")


def _conversation(record: dict) -> Iterator[Segment]:
    """LLaVA: what the assistant says is learned; each <image> is the next image; turns are parted by a line break."""
    turns = record["conversations"]
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns
    ):
        raise ValueError('"conversations" must be a list of objects with "from" and "value"')
    images = list(_values(record.get("image", record.get("images")), "image", True, learn=False))
    marks = sum(turn["value"].count("<image>") for turn in turns)
    if marks != len(images):
        raise ValueError(f"{marks} <image> marks for {len(images)} images")
    left = iter(images)
    for number, turn in enumerate(turns, 1):
        if turn.get("from") not in ("system", "human", "user", "gpt", "assistant"):
            raise ValueError(f"turn {number}: unknown speaker {shorten(str(turn.get('from')))!r}")
        learn = turn["from"] in ("gpt", "assistant")
        value = turn["value"] if number == len(turns) else turn["value"] + "\n"
        for place, text in enumerate(value.split("<image>")):
            if place:
                yield next(left)
            yield Text(text, learn)
