"""One document as columns: one entry per sequence slot, and the patches as bytes. See docs/data-format.md."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from data.document import Document, Image, Text, continues
from data.image import fit_grid, patchify, resize_to_grid
from data.tokenizer import Tokenizer

# Slots of an image beside its patches: <boi> <rows:h> <cols:w> ... <eoi>.
_IMAGE_FRAME = 4
# <bos> ... <eos>.
_DOCUMENT_FRAME = 2
# <bov> ... <eov>.
_VIDEO_FRAME = 2


@dataclass(frozen=True)
class Columns:
    """A sequence of S slots, holding P patch slots. All arrays but `patches` have shape (S,)."""

    token: np.ndarray  # int32: token id; in patch slots the id of <|patch|>, in padding that of <|pad|>
    document: np.ndarray  # int32: 1.. within the row, 0 in padding
    index: np.ndarray  # int32: place in its document, from 1; 0 in padding
    row: np.ndarray  # int32: patch row 1..rows; 0 outside patch slots
    col: np.ndarray  # int32: patch column 1..cols; 0 outside patch slots
    rows: np.ndarray  # int32: height of the patch's image in patches; 0 outside patch slots
    cols: np.ndarray  # int32: width of the patch's image in patches; 0 outside patch slots
    learn: np.ndarray  # bool: this slot is a target (it is predicted at the slot before it)
    patches: np.ndarray  # (P, patch_size**2 * 3) uint8: the patches in slot order


class Encoder:
    """Turns documents into columns: `<bos> {text | image | <bov> image+ <eov>}* <eos>`, where an image is
    `<boi> <rows:h> <cols:w> p1..pN <eoi>`.

    Images are brought to a grid of min_patches..max_patches patches of patch_size x patch_size pixels.
    """

    def __init__(self, tokenizer: Tokenizer, patch_size: int, min_patches: int, max_patches: int) -> None:
        if patch_size < 1:
            raise ValueError(f"patch_size is {patch_size}; it must be at least 1")
        if not 1 <= min_patches <= max_patches:
            raise ValueError(f"min_patches {min_patches} and max_patches {max_patches} must be 1 <= min <= max")
        self.tokenizer = tokenizer
        self.patch_size = patch_size
        self.min_patches = min_patches
        self.max_patches = max_patches
        self.grid(patch_size, patch_size)  # raises where the tokenizer's size tokens allow no such grid

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, cols) in patches for an image of height x width pixels."""
        limits = (self.min_patches, self.max_patches, self.tokenizer.max_grid)
        return fit_grid(height, width, self.patch_size, *limits)

    def length(self, document: Document) -> int:
        """Number of slots of `encode(document)`. Needs no pixels."""
        slots, before = _DOCUMENT_FRAME, None
        for segment in document.segments:
            if isinstance(segment, Text):
                slots += self.tokenizer.count(segment.text) if segment.ids is None else len(segment.ids)
            else:
                rows, cols = self.grid(segment.height, segment.width)
                slots += rows * cols + _IMAGE_FRAME
                if segment.frame and not continues(before, segment):
                    slots += len(self._video_tokens())
            before = segment
        return slots

    def patches(self, document: Document) -> int:
        """Number of patches of `encode(document)`. Needs no pixels."""
        return sum(math.prod(self.grid(s.height, s.width)) for s in document.segments if isinstance(s, Image))

    def encode(self, document: Document) -> Columns:
        """Columns of one document; `document` is 1 everywhere. Raises ValueError for an image without pixels.

        <bos> is never a target and <eos> always is; all other slots follow their segment's `learn`.
        """
        parts = list(self._parts(document))
        slots = 2 + sum(len(part) for part, _, _, _ in parts)
        token = np.empty(slots, np.int32)
        learn = np.empty(slots, bool)
        places = np.zeros((4, slots), np.int32)
        token[0], token[-1] = self.tokenizer.bos, self.tokenizer.eos
        learn[0], learn[-1] = False, True
        patches = [np.empty((0, self.patch_size**2 * 3), np.uint8)]
        start = 1
        for part, part_learn, grid, segment_patches in parts:
            end = start + len(part)
            token[start:end] = part
            learn[start:end] = part_learn
            if segment_patches is not None:
                rows, cols = grid
                place = places[:, start + 3 : end - 1].reshape(4, rows, cols)
                place[0] = np.arange(1, rows + 1)[:, None]
                place[1] = np.arange(1, cols + 1)
                place[2], place[3] = rows, cols
                patches.append(segment_patches)
            start = end
        return Columns(
            token=token,
            document=np.ones(slots, np.int32),
            index=np.arange(1, slots + 1, dtype=np.int32),
            row=places[0],
            col=places[1],
            rows=places[2],
            cols=places[3],
            learn=learn,
            patches=patches[1] if len(patches) == 2 else np.concatenate(patches),
        )

    def _parts(self, document: Document) -> Iterator[tuple[np.ndarray, bool, tuple[int, int], np.ndarray | None]]:
        """(ids, learn, grid, patches) of segments and of the brackets of videos, in order."""
        segments = document.segments
        for before, segment, after in zip((None, *segments), segments, (*segments[1:], None), strict=False):
            if isinstance(segment, Text):
                ids = self.tokenizer.encode_array(segment.text) if segment.ids is None else segment.ids
                yield ids, segment.learn, (0, 0), None
                continue
            if segment.frame and not continues(before, segment):
                yield self._video_tokens()[:1], segment.learn, (0, 0), None
            ids, grid, patches = self._image(segment, document)
            yield ids, segment.learn, grid, patches
            if segment.frame and not continues(segment, after):
                yield self._video_tokens()[1:], segment.learn, (0, 0), None

    def _video_tokens(self) -> np.ndarray:
        if self.tokenizer.bov is None or self.tokenizer.eov is None:
            raise ValueError(
                "the tokenizer has no <|bov|> and <|eov|> for a video; make one with --video (docs/data-format.md)"
            )
        return np.array([self.tokenizer.bov, self.tokenizer.eov], np.int32)

    def _image(self, segment: Image, document: Document) -> tuple[np.ndarray, tuple[int, int], np.ndarray]:
        if segment.pixels is None:
            raise ValueError(f"document {document.id!r} of {document.source!r}: an image has no pixels to encode")
        rows, cols = self.grid(segment.height, segment.width)
        token = np.full(rows * cols + _IMAGE_FRAME, self.tokenizer.patch, np.int32)
        token[:3] = self.tokenizer.boi, self.tokenizer.row(rows), self.tokenizer.col(cols)
        token[-1] = self.tokenizer.eoi
        pixels = resize_to_grid(segment.pixels, rows, cols, self.patch_size)
        return token, (rows, cols), patchify(pixels, self.patch_size)


def pack_row(parts: list[Columns], row_length: int, pad: int) -> Columns:
    """Lay documents one after the other into one row of row_length slots, numbered 1.., then padding.

    `parts` are results of `Encoder.encode`, at least one. Raises ValueError where they do not fit.
    """
    lengths = [len(part.token) for part in parts]
    filled = sum(lengths)
    if filled > row_length:
        raise ValueError(f"documents of {filled} slots do not fit a row of {row_length}; did a source change its data?")
    columns = {}
    for name in ("token", "index", "row", "col", "rows", "cols", "learn"):
        column = np.zeros(row_length, bool if name == "learn" else np.int32)
        np.concatenate([getattr(part, name) for part in parts], out=column[:filled])
        columns[name] = column
    columns["token"][filled:] = pad
    document = np.zeros(row_length, np.int32)
    document[:filled] = np.repeat(np.arange(1, len(parts) + 1, dtype=np.int32), lengths)
    return Columns(**columns, document=document, patches=np.concatenate([part.patches for part in parts]))


def drop_condition(document: Document, images: bool = False) -> Document:
    """The document without the text before its last learned image, for classifier-free guidance.

    images: leave out the images before it that are only read, too (for guidance by images); otherwise all images stay.
    Unchanged where there is no learned image or nothing to leave out.
    """
    segments = document.segments
    last = max((k for k, s in enumerate(segments) if isinstance(s, Image) and s.learn), default=0)
    kept = tuple(s for k, s in enumerate(segments) if k >= last or (isinstance(s, Image) and (s.learn or not images)))
    return document if len(kept) == len(segments) else replace(document, segments=kept)


def picture_first(document: Document) -> Document:
    """The document with its picture before its text, if it is one text and then one picture; else unchanged.

    What stands second keeps the `learn` of the second place: a caption that was only read to draw the picture becomes
    what is learned of the picture.
    """
    match document.segments:
        case (Text() as text, Image() as image):
            turned = (replace(image, learn=text.learn), replace(text, learn=image.learn))
            return replace(document, segments=turned)
    return document


def cut(document: Document, row_length: int, encoder: Encoder) -> list[Document]:
    """The document in pieces of at most row_length slots, each a document of as many next segments as fit.

    A video may be cut between frames; each piece has its own brackets.

    Raises ValueError naming a segment that does not fit a row alone.
    """
    pieces: list[list[Text | Image]] = []
    filled = row_length
    for number, segment in enumerate(document.segments, 1):
        slots = encoder.length(replace(document, segments=(segment,)))
        if slots > row_length:
            raise ValueError(
                f"segment {number} takes {slots} slots, but data.row_length is {row_length}; split the segment, lower "
                "data.max_patches or raise data.row_length"
            )
        more = slots - _DOCUMENT_FRAME
        goes_on = bool(pieces) and continues(pieces[-1][-1], segment)  # in the brackets of the frame before
        if filled + more - goes_on * _VIDEO_FRAME > row_length:
            pieces.append([])
            filled, goes_on = _DOCUMENT_FRAME, False
        pieces[-1].append(segment)
        filled += more - goes_on * _VIDEO_FRAME
    return [replace(document, segments=tuple(piece)) for piece in pieces]
