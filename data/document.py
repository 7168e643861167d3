"""The document: an ordered list of text and image segments, in memory and as one line of JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from data.image import image_size, load_image


@dataclass(frozen=True)
class Text:
    """A stretch of text. With learn=False it is read as context and not trained on.

    `ids` are its token ids, int32, where they are known already (prepared data); they follow from the text.
    """

    text: str
    learn: bool = True
    ids: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, eq=False)
class Image:
    """A picture of height x width pixels. With learn=False it is read as context and not trained on.

    `pixels` is (height, width, 3) uint8 RGB, or None where only the outline was asked for. `frame` is its number in a
    video, from 1; 0 is a picture by itself. See `continues`.
    """

    height: int
    width: int
    pixels: np.ndarray | None = None
    learn: bool = True
    frame: int = 0

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"image of {self.height} x {self.width} pixels; both sides must be at least 1")
        if self.pixels is not None:
            shape, dtype = self.pixels.shape, self.pixels.dtype
            if shape != (self.height, self.width, 3) or dtype != np.uint8:
                raise ValueError(f"pixels are {dtype} {shape}; expected uint8 {(self.height, self.width, 3)}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Image):
            return NotImplemented
        mine, theirs = ((one.height, one.width, one.learn, one.frame) for one in (self, other))
        if mine != theirs:
            return False
        if self.pixels is None or other.pixels is None:
            return self.pixels is other.pixels
        return np.array_equal(self.pixels, other.pixels)

    __hash__ = None  # type: ignore[assignment]  # arrays have no hash


@dataclass(frozen=True)
class Document:
    """Segments in reading order. `id` and `source` name the document in messages; nothing else reads them."""

    segments: tuple[Text | Image, ...]
    id: str = ""
    source: str = ""


def continues(segment: Text | Image | None, following: Text | Image | None) -> bool:
    """Whether `following` is the next frame of the video that `segment` is a frame of, when they are neighbours."""
    return (
        isinstance(segment, Image)
        and isinstance(following, Image)
        and segment.frame > 0
        and following.frame == segment.frame + 1
    )


@dataclass(frozen=True)
class ImageReference:
    """An image segment as it is written down, before the picture is read.

    `image` is whatever stands there: in JSON a path; elsewhere also the bytes of a file, or {"bytes", "path"}.
    """

    image: Any
    learn: bool = True
    frame: int = 0


def parse_outline(obj: Any, where: str = "document") -> tuple[tuple[Text | ImageReference, ...], str, str]:
    """(segments, id, source) of one decoded object of the canonical schema; no image is read.

    Raises ValueError, one line that begins with `where`, for anything that is not exactly the schema.
    """
    if not isinstance(obj, dict):
        raise ValueError(f"{where}: expected a JSON object, got {_kind(obj)}")
    _refuse_unknown(obj, {"id", "source", "segments"}, where)
    segments = obj.get("segments")
    if not isinstance(segments, list) or not segments:
        raise ValueError(f'{where}: "segments" must be a non-empty list')
    parsed = [_parse_segment(s, f"{where}: segment {k}") for k, s in enumerate(segments, 1)]
    return tuple(one for part in parsed for one in part), _string(obj, "id", where), _string(obj, "source", where)


def parse_document(obj: Any, folder: Path, pixels: bool = True, where: str = "document") -> Document:
    """Turn one decoded JSON object of the canonical schema into a Document.

    Relative image paths are taken from `folder`. With pixels=False only the headers of image files are read.
    Raises ValueError, one line that begins with `where` (such as "file.jsonl:12"), for anything that is not exactly
    the schema: unknown keys, wrong types, no segments, invalid Unicode, missing or unreadable images.
    """
    outline, id, source = parse_outline(obj, where)
    segments = [
        s if isinstance(s, Text) else _read_image(s, folder, pixels, f"{where}: segment {k}")
        for k, s in enumerate(outline, 1)
    ]
    return Document(tuple(segments), id, source)


def from_json(line: str | bytes, folder: Path, pixels: bool = True, where: str = "document") -> Document:
    """Parse one line of a JSONL file. See `parse_document`."""
    try:
        obj = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    return parse_document(obj, folder, pixels, where)


def to_json(document: Document, folder: Path) -> str:
    """One line of JSON without a line break. Images are written as PNG below `folder`/images, named by their content.

    Raises ValueError for an image without pixels.
    """
    segments: list[dict[str, Any]] = []
    for number, segment in enumerate(document.segments, 1):
        if isinstance(segment, Text):
            segments.append({"text": segment.text, "learn": segment.learn})
            continue
        if segment.pixels is None:
            raise ValueError(f"document {document.id!r}: segment {number}: the image has no pixels to write")
        shape = f"{segment.height}x{segment.width}:".encode()
        name = f"images/{hashlib.sha256(shape + segment.pixels.tobytes()).hexdigest()[:24]}.png"
        path = Path(folder, name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(segment.pixels).save(path)
        before = document.segments[number - 2] if number > 1 else None
        if continues(before, segment):
            segments[-1]["video"].append(name)
        elif segment.frame:
            segments.append({"video": [name], "learn": segment.learn})
        else:
            segments.append({"image": name, "learn": segment.learn})
    return json.dumps({"id": document.id, "source": document.source, "segments": segments}, ensure_ascii=False)


def _parse_segment(obj: Any, where: str) -> list[Text | ImageReference]:
    """One segment, or the frames of a video."""
    if not isinstance(obj, dict) or sum(key in obj for key in ("text", "image", "video")) != 1:
        raise ValueError(f'{where}: expected an object with one of "text", "image" and "video"')
    _refuse_unknown(obj, {"text", "image", "video", "learn"}, where)
    learn = obj.get("learn", True)
    if not isinstance(learn, bool):
        raise ValueError(f'{where}: "learn" must be true or false, got {_kind(learn)}')
    if "text" in obj:
        return [Text(_string(obj, "text", where), learn)]
    if "image" in obj:
        return [ImageReference(obj["image"], learn)]
    if not isinstance(obj["video"], list) or not obj["video"]:
        raise ValueError(f'{where}: "video" must be a non-empty list of images')
    return [ImageReference(image, learn, frame) for frame, image in enumerate(obj["video"], 1)]


def _read_image(reference: ImageReference, folder: Path, pixels: bool, where: str) -> Image:
    name = _string({"image": reference.image}, "image", where)
    if not name:
        raise ValueError(f'{where}: "image" is an empty path')
    path = Path(folder, name)
    try:
        if not pixels:
            height, width = image_size(path)
            return Image(height, width, None, reference.learn, reference.frame)
        array = load_image(path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Image(array.shape[0], array.shape[1], array, reference.learn, reference.frame)


def _string(obj: dict[str, Any], key: str, where: str) -> str:
    value = obj.get(key, "")
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{key}" must be a string, got {_kind(value)}')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f'{where}: "{key}" is not valid Unicode (lone surrogate at {error.start})') from error
    return value


def _refuse_unknown(obj: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(obj) - known)
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
