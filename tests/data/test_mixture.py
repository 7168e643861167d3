"""Streams: rows hold exactly the documents of the plan, drawn forms, pieces, stand-ins. Mixtures: exact shares."""

import pickle
from collections import Counter
from dataclasses import dataclass, fields
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.document import Document, Image, Text
from data.encode import Columns, Encoder, cut, drop_condition, picture_first
from data.image import unpatchify
from data.mixture import Mixture, Seen, Stream, Turns
from data.source import MeasuredSource
from data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes(max_grid=8)
ENCODER = Encoder(TOKENIZER, patch_size=2, min_patches=1, max_patches=16)


@dataclass(frozen=True)
class Captions:
    """Documents (caption, picture) of several sizes; the caption says which document it is."""

    name: str
    count: int

    def __len__(self) -> int:
        return self.count

    def document(self, index: int, pixels: bool = True) -> Document:
        height, width = 2 + 2 * (index % 4), 2 + 2 * (index % 3)
        values = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image(height, width, values if pixels else None)
        return Document((Text(f"{self.name}{index}", learn=False), image, Text("." * (index % 5))), self.name)


@dataclass(frozen=True)
class Words:
    name: str
    count: int
    longest: int = 40

    def __len__(self) -> int:
        return self.count

    def document(self, index: int, pixels: bool = True) -> Document:
        if index == 13:
            return Document((Text("x" * self.longest),))
        return Document((Text(f"{self.name}{index}:"), Text("y" * (index * 7 % 30))))


def make(dropout: float = 0.1, seed: int = 0, row_length: int = 64) -> Stream:
    return Stream([(Captions("c", 50), 3), (Words("w", 40), 2)], ENCODER, row_length, seed, dropout)


def split(row: Columns) -> list[tuple[bytes, bytes]]:
    """(text bytes, patch bytes) of each document in a row."""
    found = []
    patch_document = row.document[row.token == TOKENIZER.patch]
    for number in range(1, row.document.max() + 1):
        token = row.token[row.document == number]
        assert token[0] == TOKENIZER.bos
        assert token[-1] == TOKENIZER.eos
        found.append((bytes(token[token < 256].tolist()), row.patches[patch_document == number].tobytes()))
    return found


def epoch_rows(mixture: Stream, epoch: int) -> list[int]:
    rows = []
    r = 0
    while (at := mixture.plan.row(r)[0]) <= epoch:
        rows += [r] if at == epoch else []
        r += 1
    return rows


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_each_epoch_holds_every_document_and_repeat_once(dropout: float) -> None:
    mixture = make(dropout)
    sources = [(Captions("c", 50), 3), (Words("w", 40), 2)]
    by_id = [source.document(k) for source, repeats in sources for _ in range(repeats) for k in range(len(source))]
    for epoch in (0, 1):
        found: Counter = Counter()
        for r in epoch_rows(mixture, epoch):
            found.update(split(mixture.row(r)[0]))
        ids = np.arange(230)
        drop = mixture._is_dropped(epoch, ids)
        if dropout in (0, 1):
            assert drop.all() == drop.any() == bool(dropout)
        else:
            assert 80 < drop.sum() < 150
        expected = Counter(
            split(ENCODER.encode(drop_condition(document) if drop[id] else document))[0]
            for id, document in enumerate(by_id)
        )
        assert found == expected


@dataclass(frozen=True)
class Edits:
    """A picture that is read, what to do, and the picture that comes of it; every third is longer than 32 slots."""

    name: str
    count: int

    def __len__(self) -> int:
        return self.count

    def document(self, index: int, pixels: bool = True) -> Document:
        width = 8 if index % 3 == 0 else 4
        before, after = np.zeros((4, width, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
        return Document(
            (
                Image(4, width, before if pixels else None, learn=False),
                Text("e" * (3 + index % 4), learn=False),
                Image(4, 4, after if pixels else None),
            ),
            self.name,
        )


def test_half_of_the_documents_without_condition_lose_the_images_that_are_read_too() -> None:
    mixture = Stream([(Edits("e", 400), 1)], ENCODER, 32, 0, condition_dropout=0.5)
    for epoch in (0, 1):
        ids = np.arange(400)
        drop = mixture._is_dropped(epoch, ids)
        bare = mixture._is_bare(epoch, ids, drop)
        assert not (bare & ~drop).any()
        assert 60 < bare.sum() < 140
        expected: Counter = Counter()
        for id, document in enumerate(map(mixture.sources[0].document, range(400))):
            form = drop_condition(document, images=bool(bare[id])) if drop[id] else document
            expected.update(split(ENCODER.encode(piece))[0] for piece in cut(form, 32, ENCODER))
        found: Counter = Counter()
        for r in epoch_rows(mixture, epoch):
            found.update(split(mixture.row(r)[0]))
        assert found == expected


def test_pictures_come_through_bit_for_bit() -> None:
    mixture = Stream([(Captions("c", 30), 1)], ENCODER, 64, 0, condition_dropout=0)
    seen = 0
    for r in epoch_rows(mixture, 0):
        row = mixture.row(r)[0]
        slots = np.flatnonzero(row.token == TOKENIZER.patch)
        for number in range(1, row.document.max() + 1):
            mine = row.document == number
            name = bytes(row.token[mine & (row.token < 256)].tolist()).decode().rstrip(".")
            image = Captions("c", 30).document(int(name[1:])).segments[1]
            grid = row.rows[mine].max(), row.cols[mine].max()
            patches = row.patches[mine[slots]]
            assert np.array_equal(unpatchify(patches, *grid, 2), image.pixels)
            seen += 1
    assert seen == 30


def same(a: Columns, b: Columns) -> bool:
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(Columns))


def test_rows_are_a_pure_function() -> None:
    front = make(0.3)
    expected = [front.row(r)[0] for r in range(60)]
    other = make(0.3)
    other.measure()
    for r in (59, 3, 30, 0, 58):
        assert same(other.row(r)[0], expected[r])
        assert same(pickle.loads(pickle.dumps(make(0.3))).row(r)[0], expected[r])
    assert not same(make(0.3, seed=1).row(0)[0], expected[0])


def test_rows_have_their_length_and_are_well_filled() -> None:
    mixture = Stream([(Captions("c", 500), 3), (Words("w", 900), 1)], ENCODER, 256, 0, 0.2)
    rows = [mixture.row(r)[0] for r in epoch_rows(mixture, 0)]
    assert all(len(row.token) == 256 for row in rows)
    assert np.mean([np.count_nonzero(row.document) / 256 for row in rows]) >= 0.95


def test_rate_of_condition_dropout() -> None:
    mixture = make(0.1)
    ids = np.arange(100_000)
    first, second = mixture._is_dropped(0, ids), mixture._is_dropped(1, ids)
    for drawn in (first, second):
        assert abs(drawn.mean() - 0.1) < 0.005
    assert abs((first & second).mean() - 0.01) < 0.002  # independent between epochs
    assert not np.array_equal(first, make(0.1, seed=1)._is_dropped(0, ids))


def test_too_long_documents_are_named() -> None:
    mixture = Stream([(Captions("c", 50), 1), (Words("w", 40, longest=99), 1)], ENCODER, 64, 0)
    message = "document 13 of source 'w': segment 1 takes 101 slots, but data.row_length is 64"
    with pytest.raises(ValueError, match=message):
        mixture.measure()
    with pytest.raises(ValueError, match=message):
        mixture.row(0)


def test_only_the_needed_window_is_measured() -> None:
    mixture = Stream([(Words("w", 20_000), 1)], ENCODER, 64, 0)
    mixture.row(0)
    assert np.count_nonzero(mixture._slots[0][0]) == 4000  # five windows
    mixture.measure()
    assert np.all(mixture._slots[0] > 0)


def test_bad_settings() -> None:
    for sources, dropout, message in (
        ([], 0.1, "no documents"),
        ([(Words("w", 0), 1)], 0.1, "source 'w' has no documents"),
        ([(Words("w", 5), 0)], 0.1, "repeats 0"),
        ([(Words("w", 5), 1)], 1.5, "condition_dropout is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            Stream(sources, ENCODER, 64, 0, dropout)


# ---- forms and pieces of documents -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed:
    """The documents it is given; pixels are drawn from the index."""

    name: str
    given: tuple[Document, ...]

    def __len__(self) -> int:
        return len(self.given)

    def document(self, index: int, pixels: bool = True) -> Document:
        return self.given[index]


def picture(rows: int, cols: int, value: int = 0, learn: bool = True) -> Image:
    return Image(2 * rows, 2 * cols, np.full((2 * rows, 2 * cols, 3), value, np.uint8), learn)


def kinds(document: Document) -> list[tuple[str, bool]]:
    return [(segment.text if isinstance(segment, Text) else "image", segment.learn) for segment in document.segments]


def test_picture_first_turns_pairs_alone_and_leaves_learn_in_its_place() -> None:
    text, image = Text("t", learn=False), picture(1, 1)
    assert kinds(picture_first(Document((text, image)))) == [("image", False), ("t", True)]
    for segments in ((image, text), (text,), (image,), (text, image, text), (text, text)):
        assert picture_first(Document(segments)) == Document(segments)


def test_rate_of_picture_first() -> None:
    document = Document((Text("t", learn=False), picture(1, 1)))
    for dropout in (0.0, 0.5):
        stream = Stream([(Fixed("f", (document,) * 2000), 1)], ENCODER, 64, 0, dropout, picture_first=0.25)
        found = Counter(str(kinds(d)) for d in stream.documents(0, np.arange(2000))[0])
        assert found["[('image', True)]"] == pytest.approx(2000 * dropout, abs=150)
        assert found["[('image', False), ('t', True)]"] == pytest.approx(500 * (1 - dropout), abs=110)
        ids, lengths = stream.plan._lengths(0, np.arange(50))
        assert ids.tolist() == list(range(50))
        assert lengths.tolist() == [ENCODER.length(d) for d in stream.documents(0, ids)[0]]


def test_cut_at_segment_borders_alone() -> None:
    """Slots: 2 for <bos> and <eos>, a byte per letter, 4 and its patches per picture. Rows of 20."""
    segments = (Text("a" * 10), Text("b" * 8), picture(2, 2), Text("c"), Text("d" * 9), Text(""), picture(3, 4))
    pieces = cut(Document(segments, "name", "source"), 20, ENCODER)
    assert [len(piece.segments) for piece in pieces] == [2, 4, 1]
    # a and b fill a row to the last slot; so do the picture, c and d, and the empty text still fits.
    assert [ENCODER.length(piece) for piece in pieces] == [20, 20, 18]
    assert tuple(s for piece in pieces for s in piece.segments) == segments
    assert {(piece.id, piece.source) for piece in pieces} == {("name", "source")}
    with pytest.raises(ValueError, match=r"segment 2 takes 18 slots, but data\.row_length is 17"):
        cut(Document((Text("a"), picture(3, 4))), 17, ENCODER)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_long_documents_come_in_pieces_once_per_epoch(dropout: float) -> None:
    rng = np.random.default_rng(0)
    documents = []
    for number in range(60):
        texts = [Text(f"{number}.{k}" + "x" * int(rng.integers(30))) for k in range(int(rng.integers(1, 9)))]
        documents.append(Document((*texts, picture(2, 3, number), Text(f"{number} ends"))))
    stream = Stream([(Fixed("f", tuple(documents)), 2)], ENCODER, 48, 0, dropout)
    assert sum(ENCODER.length(document) > 48 for document in documents) > 30
    for epoch in (0, 1):
        found = Counter(part for r in epoch_rows(stream, epoch) for part in split(stream.row(r)[0]))
        expected: Counter = Counter()
        for id, drop in enumerate(stream._is_dropped(epoch, np.arange(120))):
            document = drop_condition(documents[id % 60]) if drop else documents[id % 60]
            expected.update(split(ENCODER.encode(piece))[0] for piece in cut(document, 48, ENCODER))
        assert found == expected
    stream.measure()
    assert stream.work(3).slots == np.count_nonzero(stream.row(3)[0].document)
    # A cut document counts once.
    rows = len(epoch_rows(stream, 0))
    assert stream.seen(rows)["f"].documents == 120
    assert stream.seen(rows)["f"].epochs == 2  # its two repeats


def test_documents_of_odd_kinds() -> None:
    """Only images, only text, nothing at all, a single patch, a long and narrow picture: each has its place."""
    given = (
        Document((picture(1, 1),)),
        Document((picture(2, 2), picture(1, 3, 7))),
        Document((Text("text"),)),
        Document((Text(""),)),
        Document((Text(""), picture(1, 8, 9), Text(""))),
        Document((Image(2, 4000, np.zeros((2, 4000, 3), np.uint8)), Text("narrow"))),
    )
    stream = Stream([(Fixed("f", given), 1)], ENCODER, 64, 0, 0.5)
    for epoch in range(4):
        drop = stream._is_dropped(epoch, np.arange(6))
        expected = Counter(split(ENCODER.encode(drop_condition(d) if drop[k] else d))[0] for k, d in enumerate(given))
        assert Counter(part for r in epoch_rows(stream, epoch) for part in split(stream.row(r)[0])) == expected


@dataclass(frozen=True)
class WithLengths(Captions):
    """Knows its lengths, and counts what is read of it."""

    read: list[int]

    @property
    def slots(self) -> np.ndarray:
        documents = [Captions("c", self.count).document(k, pixels=False) for k in range(self.count)]
        whole = [ENCODER.length(document) for document in documents]
        return np.array([whole, [ENCODER.length(drop_condition(d)) for d in documents]], np.int32)

    @property
    def patches(self) -> np.ndarray:
        return np.array([(1 + k % 4) * (1 + k % 3) for k in range(self.count)], np.int32)

    def check(self, encoder: Encoder) -> None:
        if encoder.patch_size != 2:
            raise ValueError("measured for patches of 2")

    def document(self, index: int, pixels: bool = True) -> Document:
        self.read.append(index)
        return super().document(index, pixels)


def test_a_source_that_knows_its_lengths_is_not_read_to_plan() -> None:
    known = WithLengths("c", 300, [])
    assert isinstance(known, MeasuredSource)
    assert not isinstance(Captions("c", 300), MeasuredSource)
    stream, other = (Stream([(source, 2)], ENCODER, 64, 0, 0.3) for source in (known, Captions("c", 300)))
    stream.measure()
    rows = epoch_rows(stream, 1)
    works = [stream.work(r) for r in rows]
    assert known.read == []
    assert stream.seen(rows[-1])["c"].documents > 1000
    assert works[0].patches == np.count_nonzero(stream.row(rows[0])[0].rows)
    assert len(known.read) > 0
    assert [other.plan.row(r)[1].tolist() for r in rows] == [stream.plan.row(r)[1].tolist() for r in rows]
    with pytest.raises(ValueError, match="measured for patches of 2"):
        Stream([(known, 1)], Encoder(TOKENIZER, 4, 1, 16), 64, 0)


# ---- documents that cannot be read -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken(Captions):
    """Some documents have a picture whose header alone can be read."""

    bad: frozenset[int]

    def document(self, index: int, pixels: bool = True) -> Document:
        if pixels and index in self.bad:
            raise OSError(f"picture {index} is truncated")
        return super().document(index, pixels)


def test_what_cannot_be_read_is_replaced_by_the_next_that_fits() -> None:
    good, bad = Captions("c", 60), frozenset({3, 20, 21, 22, 59})
    stream, whole = (
        Stream([(Words("w", 10), 1), (source, 1)], ENCODER, 64, 0, 0.2) for source in (Broken("c", 60, bad), good)
    )
    reasons: list[str] = []
    for r in epoch_rows(stream, 0):
        row, replaced = stream.row(r)
        reasons += replaced
        expected = whole.row(r)[0]
        ids = whole.plan.row(r)[1]
        assert [id - 10 in bad for id in ids].count(True) == len(replaced)
        got, wanted = split(row), split(expected)
        for id, one, other in zip(ids.tolist(), got, wanted, strict=True):
            assert one == other if id - 10 not in bad else one != other
        assert same(row, Stream(list(zip(stream.sources, (1, 1), strict=True)), ENCODER, 64, 0, 0.2).row(r)[0])
    assert sorted(reasons) == sorted(f"picture {index} is truncated" for index in bad)


def test_a_source_that_cannot_be_read_at_all_stops_the_run() -> None:
    stream = Stream([(Broken("c", 60, frozenset(range(60))), 1)], ENCODER, 64, 0)
    with pytest.raises(ValueError, match="is truncated; and none of the 100 documents after it can be read"):
        stream.row(0)


# ---- weights and stages ----------------------------------------------------------------------------------------------

WEIGHTS = st.lists(st.integers(0, 400), min_size=1, max_size=9).filter(any)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(0, 10**12))
def test_turns_keep_every_share_to_within_one_row(weights: list[int], far: int) -> None:
    turns = Turns(weights)
    counts, total = [0] * len(weights), sum(weights)
    for r in range(min(2 * total, 300)):
        assert turns.counts(r).tolist() == counts
        assert all(abs(n - Fraction(r * w, total)) < 1 for n, w in zip(counts, weights, strict=True))
        counts[turns.at(r)] += 1
    now, then = turns.counts(far), turns.counts(far + 1)
    assert now.sum() == far
    assert (then - now).tolist() == [int(k == turns.at(far)) for k in range(len(weights))]
    assert all(abs(n - Fraction(far * w, total)) < 1 for n, w in zip(now.tolist(), weights, strict=True))


def test_weights_are_taken_as_they_are_written() -> None:
    assert Turns([0.7, 0.2, 0.1]).counts(10**15).tolist() == [7 * 10**14, 2 * 10**14, 10**14]
    for weights, message in (
        ([0.0, 0.0], "one of them above 0"),
        ([1.0, -1.0], "at least 0"),
        ([1.0, float("nan")], "at least 0"),
        ([1.0, 3.14159265], "too fine"),
    ):
        with pytest.raises(ValueError, match=message):
            Turns(weights)


def two_streams() -> tuple[Stream, Stream]:
    return tuple(Stream([(source, 1)], ENCODER, 64, 0, 0.2) for source in (Captions("c", 50), Words("w", 40)))


def test_stages_change_weights_and_streams_go_on_where_they_were() -> None:
    captions, words = two_streams()
    finer = Stream([(Captions("c", 50), 1)], Encoder(TOKENIZER, 2, 1, 20), 64, 1, 0.2)
    mixture = Mixture([
        (0, [(captions, 3), (words, 1)]), (10, [(captions, 0), (words, 1)]), (13, [(finer, 1), (words, 1)]),
        (15, [(captions, 1), (words, 0)]),
    ])  # fmt: skip
    streams = mixture.streams
    assert streams == [captions, words, finer]
    had = [0, 0, 0]
    by_hand: dict[str, list[int]] = {"c": [0, 0], "w": [0, 0]}
    for r in range(40):
        assert mixture.places(r).tolist() == had
        seen = mixture.seen(r)
        assert {name: [one.documents, one.slots] for name, one in seen.items()} == by_hand
        assert seen["c"].epochs == pytest.approx(by_hand["c"][0] / 50)
        stream, n = mixture.locate(r)
        number = streams.index(stream)
        assert n == had[number]
        had[number] += 1
        assert same(mixture.row(r), stream.row(n)[0])
        for name, source in (("c", (captions, finer)), ("w", (words,))):
            if stream in source:
                by_hand[name][0] += len(stream.plan.row(n)[1])
                by_hand[name][1] += np.count_nonzero(mixture.row(r).document)
        allowed = {0: {0, 1}, 10: {1}, 13: {1, 2}, 15: {0}}
        assert number in allowed[max(first for first in allowed if first <= r)]
    assert [had[0] - 25, had[2]] in ([[7, 1], [8, 1]])
    for firsts in ([1], [0, 5, 5], [0, 9, 3], []):
        with pytest.raises(ValueError, match="begin at 0 and ascend"):
            Mixture([(first, [(words, 1)]) for first in firsts])


def test_one_stream_is_the_mixture() -> None:
    stream = make(0.3)
    mixture = Mixture([(0, [(stream, 1.0)])])
    assert all(same(mixture.row(r), stream.row(r)[0]) for r in range(20))
    assert mixture.seen(0) == {"c": Seen(0, 0, 0.0), "w": Seen(0, 0, 0.0)}
