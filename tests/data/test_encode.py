"""Columns against a slow reference that appends one slot at a time."""

from dataclasses import fields

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.document import Document, Image, Text
from data.encode import Columns, Encoder, drop_condition, pack_row
from data.image import unpatchify
from data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes(max_grid=6)
P = 2
ENCODER = Encoder(TOKENIZER, patch_size=P, min_patches=1, max_patches=16)


def picture(height: int, width: int, seed: int = 0, learn: bool = True) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image(height, width, pixels, learn)


SEGMENT = st.builds(Text, st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.booleans()) | st.builds(
    picture, st.integers(1, 14), st.integers(1, 14), st.integers(0, 9), st.booleans()
)
DOCUMENTS = st.builds(Document, st.lists(SEGMENT, max_size=5).map(tuple))


def slow_encode(document: Document) -> Columns:
    """One slot after the other: (token, row, col, rows, cols, learn), and each patch cut out with Pillow."""
    t = TOKENIZER
    slots: list[tuple[int, int, int, int, int, bool]] = [(t.bos, 0, 0, 0, 0, False)]
    patches = []
    for segment in document.segments:
        if isinstance(segment, Text):
            slots += [(byte, 0, 0, 0, 0, segment.learn) for byte in segment.text.encode()]
            continue
        rows, cols = ENCODER.grid(segment.height, segment.width)
        image = PIL.Image.fromarray(segment.pixels)
        if image.size != (cols * P, rows * P):
            image = image.resize((cols * P, rows * P), PIL.Image.Resampling.LANCZOS)
        for token in (t.boi, t.first_row + rows - 1, t.first_col + cols - 1):
            slots.append((token, 0, 0, 0, 0, segment.learn))
        for x in range(1, rows + 1):
            for y in range(1, cols + 1):
                slots.append((t.patch, x, y, rows, cols, segment.learn))
                patches.append(list(image.crop((y * P - P, x * P - P, y * P, x * P)).tobytes()))
        slots.append((t.eoi, 0, 0, 0, 0, segment.learn))
    slots.append((t.eos, 0, 0, 0, 0, True))
    token, row, col, rows_, cols_, learn = (np.array(column) for column in zip(*slots, strict=True))
    numbers = np.arange(1, len(slots) + 1)
    patch_array = np.array(patches, np.uint8).reshape(-1, 3 * P * P)
    return Columns(token, np.ones(len(slots), int), numbers, row, col, rows_, cols_, learn, patch_array)


def assert_same(a: Columns, b: Columns) -> None:
    for field in fields(Columns):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert x.shape == y.shape, field.name
        assert np.array_equal(x, y), field.name


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS)
def test_encode_is_the_slow_reference(document: Document) -> None:
    columns = ENCODER.encode(document)
    assert_same(columns, slow_encode(document))
    assert ENCODER.length(document) == len(columns.token)
    for field in fields(Columns):
        expected = {"learn": np.bool_, "patches": np.uint8}.get(field.name, np.int32)
        assert getattr(columns, field.name).dtype == expected, field.name
    assert len(columns.patches) == np.count_nonzero(columns.token == TOKENIZER.patch)


def test_worked_example() -> None:
    """The table of docs/data-format.md."""
    image = Image(2, 4, np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    columns = ENCODER.encode(Document((Text("Hi", learn=False), image)))
    t = TOKENIZER
    assert columns.token.tolist() == [t.bos, 72, 105, t.boi, t.row(1), t.col(2), t.patch, t.patch, t.eoi, t.eos]
    assert columns.index.tolist() == list(range(1, 11))
    assert columns.row.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 0, 0]
    assert columns.col.tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 0, 0]
    assert columns.rows.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 0, 0]
    assert columns.cols.tolist() == [0, 0, 0, 0, 0, 0, 2, 2, 0, 0]
    assert columns.learn.tolist() == [False, False, False, True, True, True, True, True, True, True]
    assert columns.patches.tolist() == [[0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17], [*range(6, 12), *range(18, 24)]]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9))
def test_pixels_survive_bit_for_bit(rows: int, cols: int, seed: int) -> None:
    image = picture(rows * P, cols * P, seed)
    columns = ENCODER.encode(Document((Text("x"), image)))
    assert np.array_equal(unpatchify(columns.patches, rows, cols, P), image.pixels)


def test_length_needs_no_pixels() -> None:
    document = Document((Text("é"), Image(5, 9), Text("!")))
    rows, cols = ENCODER.grid(5, 9)
    assert ENCODER.length(document) == 2 + 2 + 4 + rows * cols + 1
    with pytest.raises(ValueError, match="no pixels"):
        ENCODER.encode(document)


@settings(max_examples=60, deadline=None)
@given(st.lists(DOCUMENTS, min_size=1, max_size=4), st.integers(0, 20))
def test_pack_row(documents: list[Document], spare: int) -> None:
    parts = [ENCODER.encode(document) for document in documents]
    filled = sum(len(part.token) for part in parts)
    row = pack_row(parts, filled + spare, TOKENIZER.pad)
    assert all(len(getattr(row, f.name)) == filled + spare for f in fields(Columns) if f.name != "patches")
    for number, part in enumerate(parts, 1):
        mine = row.document == number
        for name in ("token", "index", "row", "col", "rows", "cols", "learn"):
            assert np.array_equal(getattr(row, name)[mine], getattr(part, name)), name
            assert getattr(row, name).dtype == getattr(part, name).dtype
    assert np.array_equal(row.patches, np.concatenate([part.patches for part in parts]))
    assert np.all(np.diff(row.document[:filled]) >= 0)
    assert not row.document[filled:].any()
    assert np.all(row.token[filled:] == TOKENIZER.pad)
    assert not row.learn[filled:].any()
    for name in ("index", "row", "col", "rows", "cols"):
        assert not getattr(row, name)[filled:].any()
    with pytest.raises(ValueError, match=f"{filled} slots do not fit a row of {filled - 1}"):
        pack_row(parts, filled - 1, TOKENIZER.pad)


@given(DOCUMENTS)
def test_drop_condition(document: Document) -> None:
    dropped = drop_condition(document)
    kept = []
    for k, segment in enumerate(document.segments):
        learned_image_later = any(isinstance(s, Image) and s.learn for s in document.segments[k + 1 :])
        if isinstance(segment, Image) or not learned_image_later:
            kept.append(segment)
    assert list(dropped.segments) == kept
    if len(kept) == len(document.segments):
        assert dropped is document
    assert ENCODER.length(dropped) <= ENCODER.length(document)


def test_drop_condition_examples() -> None:
    caption, picture_, read = Text("a circle", learn=False), picture(4, 4), picture(4, 4, learn=False)
    assert drop_condition(Document((caption, picture_), "7", "s")) == Document((picture_,), "7", "s")
    describe = Document((read, Text("a circle")))
    assert drop_condition(describe) is describe
    assert drop_condition(Document((read, caption, picture_, caption))).segments == (read, picture_, caption)
    edited = Document((read, picture_, caption, picture_, caption, read))
    assert drop_condition(edited, images=True).segments == (picture_, picture_, caption, read)
    assert drop_condition(describe, images=True) is describe
    assert drop_condition(Document((read, picture_)), images=True).segments == (picture_,)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="patch_size is 0"):
        Encoder(TOKENIZER, 0, 1, 4)
    with pytest.raises(ValueError, match="min_patches 5 and max_patches 4"):
        Encoder(TOKENIZER, 2, 5, 4)
    with pytest.raises(ValueError, match="no patch grid has 37 to 40 patches and sides of at most 6"):
        Encoder(TOKENIZER, 2, 37, 40)
