"""The mixture: rows hold exactly the documents of the plan, the dropout of conditions is a fixed draw."""

import pickle
from collections import Counter
from dataclasses import dataclass, fields

import numpy as np
import pytest

from data.document import Document, Image, Text
from data.encode import Columns, Encoder, drop_condition
from data.image import unpatchify
from data.mixture import Mixture
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


def make(dropout: float = 0.1, seed: int = 0, row_length: int = 64) -> Mixture:
    return Mixture([(Captions("c", 50), 3), (Words("w", 40), 2)], ENCODER, row_length, seed, dropout)


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


def epoch_rows(mixture: Mixture, epoch: int) -> list[int]:
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
            found.update(split(mixture.row(r)))
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


def test_pictures_come_through_bit_for_bit() -> None:
    mixture = Mixture([(Captions("c", 30), 1)], ENCODER, 64, 0, condition_dropout=0)
    seen = 0
    for r in epoch_rows(mixture, 0):
        row = mixture.row(r)
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
    expected = [front.row(r) for r in range(60)]
    other = make(0.3)
    other.measure()
    for r in (59, 3, 30, 0, 58):
        assert same(other.row(r), expected[r])
        assert same(pickle.loads(pickle.dumps(make(0.3))).row(r), expected[r])
    assert not same(make(0.3, seed=1).row(0), expected[0])


def test_rows_have_their_length_and_are_well_filled() -> None:
    mixture = Mixture([(Captions("c", 500), 3), (Words("w", 900), 1)], ENCODER, 256, 0, 0.2)
    rows = [mixture.row(r) for r in epoch_rows(mixture, 0)]
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
    mixture = Mixture([(Captions("c", 50), 1), (Words("w", 40, longest=99), 1)], ENCODER, 64, 0)
    message = "document 13 of source 'w' has 101 slots, but data.row_length is 64"
    with pytest.raises(ValueError, match=message):
        mixture.measure()
    with pytest.raises(ValueError, match=message):
        mixture.row(0)


def test_only_the_needed_window_is_measured() -> None:
    mixture = Mixture([(Words("w", 20_000), 1)], ENCODER, 64, 0)
    mixture.row(0)
    assert np.count_nonzero(mixture._slots[0]) == 4000  # five windows
    mixture.measure()
    assert np.all(mixture._slots > 0)


def test_bad_settings() -> None:
    for sources, dropout, message in (
        ([], 0.1, "no documents"),
        ([(Words("w", 0), 1)], 0.1, "source 'w' has no documents"),
        ([(Words("w", 5), 0)], 0.1, "repeats 0"),
        ([(Words("w", 5), 1)], 1.5, "condition_dropout is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture(sources, ENCODER, 64, 0, dropout)
