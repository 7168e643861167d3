"""Several sources as one stream of packed rows."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data.document import Document
from data.encode import Columns, Encoder, cut, drop_condition, pack_row, picture_first
from data.plan import Plan, hash_ids
from data.source import MeasuredSource, Source

# Beside the uses of hashes in data/plan.py.
_DROP_CONDITION, _PICTURE_FIRST, _DROP_IMAGES = 3, 4, 6
# Hands of a window where lengths are only looked up; it is one where documents have to be read to be measured.
HANDS_MEASURED = 256
# Documents that are tried in place of one that cannot be read.
_STAND_INS = 100
# Longest period of the turns of weighted streams.
_MAX_PERIOD = 2**16


@dataclass(frozen=True)
class Work:
    """What a row costs to compute: slots and patches that are filled, and the squared lengths of the documents."""

    slots: int
    patches: int
    squared_lengths: int


@dataclass(frozen=True)
class Seen:
    """What was read of a source so far. A document that is cut counts with its first piece."""

    documents: int
    slots: int
    epochs: float


@dataclass(frozen=True)
class _Use:
    """How a document, or a piece of it, is used in an epoch."""

    id: int  # of the whole document
    piece: int
    source: int  # number of the source
    index: int  # in the source
    slots: int  # of the whole document in this form
    dropped: bool
    bare: bool
    turned: bool


class Stream:
    """Rows over the concatenation of sources, each repeated a number of times per epoch.

    Document ids count through the first source, its repeats, then the next source. Everything is a pure function of
    the arguments and the row, so any process can make any row. In a part `condition_dropout` of the documents with a
    learned image the text before it is left out, and in half of these also the images before it that are only read
    (their room in the row stays empty), and in a part `picture_first` of the other documents of one text and then one
    picture these change places; all is drawn anew in each epoch and for each repeat. What is longer than a row even so
    is cut (`data.encode.cut`).
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, int]],
        encoder: Encoder,
        row_length: int,
        seed: int,
        condition_dropout: float = 0.1,
        picture_first: float = 0.0,
    ) -> None:
        """`sources` holds (source, repeats), repeats >= 1. Raises ValueError for empty sources and bad numbers."""
        for name, part in (("condition_dropout", condition_dropout), ("picture_first", picture_first)):
            if not 0 <= part <= 1:
                raise ValueError(f"{name} is {part}; it must be between 0 and 1")
        for source, repeats in sources:
            if len(source) < 1:
                raise ValueError(f"source {source.name!r} has no documents")
            if repeats < 1:
                raise ValueError(f"source {source.name!r} has repeats {repeats}; it must be at least 1")
            if isinstance(source, MeasuredSource):
                source.check(encoder)
        self.encoder = encoder
        self.row_length = row_length
        self.seed = seed
        self.sources = [source for source, _ in sources]
        # Slots with and without the condition of each document; 0 where it is not measured yet.
        self._slots = [s.slots if isinstance(s, MeasuredSource) else np.zeros((2, len(s)), np.int32)
                       for s in self.sources]  # fmt: skip
        self._patches = [s.patches if isinstance(s, MeasuredSource) else np.zeros(len(s), np.int32)
                         for s in self.sources]  # fmt: skip
        repeated = [len(source) * repeats for source, repeats in sources]
        self._first_id = np.concatenate([[0], np.cumsum(np.array(repeated, np.int64))])  # of each source, and the end
        self._drop_below = round(condition_dropout * 2**53)
        self._turn_below = round(picture_first * 2**53)
        known = all(isinstance(source, MeasuredSource) for source in self.sources)
        self.plan = Plan(self._pieces, int(self._first_id[-1]), row_length, seed,
                         hands=HANDS_MEASURED if known else 1, parts=self._first_id[1:].tolist())  # fmt: skip

    def row(self, n: int) -> tuple[Columns, list[str]]:
        """Columns of row n >= 0, of length row_length, and why which documents were replaced.

        Raises ValueError for a segment longer than a row, and where nothing can replace a document.
        """
        documents, replaced = self.documents(*self.plan.row(n))
        parts = [self.encoder.encode(document) for document in documents]
        return pack_row(parts, self.row_length, self.encoder.tokenizer.pad), replaced

    def documents(self, epoch: int, ids: np.ndarray) -> tuple[list[Document], list[str]]:
        """The documents `ids` of the plan as they are used in this epoch, and why which of them were replaced.

        One that cannot be read is replaced by the next of its source that is no longer and can be read.
        """
        found, replaced = [], []
        for use in self._uses(epoch, ids):
            try:
                found.append(self._make(use))
            except (ValueError, OSError) as error:
                replaced.append(str(error))
                found.append(self._stand_in(epoch, use, error))
        return found, replaced

    def work(self, n: int) -> Work:
        """The cost of row n; images that condition dropout leaves out count like the others."""
        lengths, patches = [], 0
        for use in self._uses(*self.plan.row(n)):
            slots = use.slots
            if slots > self.row_length:
                document = self._make(use, pixels=False)
                slots = self.encoder.length(document)
                patches += self.encoder.patches(document)
            else:
                patches += int(self._patches[use.source][use.index])
            lengths.append(slots)
        return Work(sum(lengths), patches, sum(length**2 for length in lengths))

    def seen(self, n: int) -> dict[str, Seen]:
        """What rows 0 .. n - 1 hold of each source, by its name."""
        sizes, totals = self.sizes(), dict.fromkeys(self.sizes(), np.zeros(2, np.int64))
        for source, counts in zip(self.sources, self.plan.seen(n), strict=True):
            totals[source.name] = totals[source.name] + counts
        return {name: Seen(int(d), int(s), int(d) / sizes[name]) for name, (d, s) in totals.items()}

    def sizes(self) -> dict[str, int]:
        """Documents of each source, by its name; sources of one name are counted together."""
        names = dict.fromkeys(source.name for source in self.sources)
        return {name: sum(len(source) for source in self.sources if source.name == name) for name in names}

    def measure(self) -> None:
        """Measure every document now rather than when its window is first planned.

        Finds documents that are broken or too long before training starts, and lets forked workers share the result.
        """
        for number, source in enumerate(self.sources):
            if not isinstance(source, MeasuredSource):
                for index in np.flatnonzero(self._slots[number][0] == 0).tolist():
                    self._measure(number, index)
            for form in (0, 1) if self._drop_below else (0,):
                for index in np.flatnonzero(self._slots[number][form] > self.row_length).tolist():
                    document = source.document(index, pixels=False)
                    self._cut(number, index, drop_condition(document) if form else document)

    def _is_dropped(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        return self._is_below(self._drop_below, ids, _DROP_CONDITION, self.seed, epoch)

    def _is_bare(self, epoch: int, ids: np.ndarray, dropped: np.ndarray) -> np.ndarray:
        """Which of the documents that lose their text lose images too."""
        return dropped & self._is_below(2**52, ids, _DROP_IMAGES, self.seed, epoch)

    def _is_turned(self, epoch: int, ids: np.ndarray, dropped: np.ndarray) -> np.ndarray:
        """Only of documents that keep their condition, so that turning changes no length."""
        return self._is_below(self._turn_below, ids, _PICTURE_FIRST, self.seed, epoch) & ~dropped

    @staticmethod
    def _is_below(limit: int, ids: np.ndarray, *keys: int) -> np.ndarray:
        """Whether what is drawn for the ids, uniform in 0 .. 2^53 - 1, is below a limit."""
        if limit == 0:
            return np.zeros(len(ids), bool)
        return (hash_ids(ids, *keys) >> np.uint64(11)) < limit

    def _whole_slots(self, ids: np.ndarray, dropped: np.ndarray) -> np.ndarray:
        """Slots of documents, before any is cut."""
        form = dropped.astype(np.int64)
        if len(self.sources) == 1:
            return self._slots_of(0, form, ids % len(self.sources[0]))
        slots = np.empty(len(ids), np.int32)
        where = np.searchsorted(self._first_id, ids, side="right") - 1
        for number, source in enumerate(self.sources):
            mine = np.flatnonzero(where == number)
            slots[mine] = self._slots_of(number, form[mine], (ids[mine] - self._first_id[number]) % len(source))
        return slots

    def _slots_of(self, number: int, form: np.ndarray, index: np.ndarray) -> np.ndarray:
        table = self._slots[number]
        slots: np.ndarray = table[form, index]
        if (unknown := index[slots == 0]).size:
            for one in np.unique(unknown).tolist():
                self._measure(number, one)
            slots = table[form, index]
        return slots

    def _measure(self, number: int, index: int) -> None:
        document = self.sources[number].document(index, pixels=False)
        slots = self.encoder.length(document)
        shorter = drop_condition(document)
        self._slots[number][1, index] = slots if shorter is document else self.encoder.length(shorter)
        self._patches[number][index] = self.encoder.patches(document)
        self._slots[number][0, index] = slots

    def _pieces(self, epoch: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `Plan` asks for: ids and slots, documents longer than a row in pieces."""
        slots = self._whole_slots(ids, self._is_dropped(epoch, ids))
        too_long = slots > self.row_length
        if not too_long.any():
            return ids, slots
        cut_ids, cut_slots = [], []
        for id, use in zip(ids[too_long].tolist(), self._uses(epoch, ids[too_long]), strict=True):
            for piece, document in enumerate(self._cut(use.source, use.index, self._form(use, pixels=False))):
                cut_ids.append(id + piece * self.plan.num_documents)
                cut_slots.append(self.encoder.length(document))
        return np.concatenate([ids[~too_long], cut_ids]), np.concatenate([slots[~too_long], cut_slots])

    def _uses(self, epoch: int, ids: np.ndarray) -> list[_Use]:
        pieces, whole = np.divmod(ids, self.plan.num_documents)
        sources = np.searchsorted(self._first_id, whole, side="right") - 1
        sizes = np.array([len(source) for source in self.sources])[sources]
        indices = (whole - self._first_id[sources]) % sizes
        dropped = self._is_dropped(epoch, whole)
        slots, turned = self._whole_slots(whole, dropped), self._is_turned(epoch, whole, dropped)
        bare = self._is_bare(epoch, whole, dropped)
        columns = (whole, pieces, sources, indices, slots, dropped, bare, turned)
        return [_Use(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]

    def _form(self, use: _Use, pixels: bool) -> Document:
        document = self.sources[use.source].document(use.index, pixels)
        if use.dropped:
            return drop_condition(document, images=use.bare)
        return picture_first(document) if use.turned else document

    def _make(self, use: _Use, pixels: bool = True) -> Document:
        document = self._form(use, pixels)
        if use.slots <= self.row_length:
            return document
        return self._cut(use.source, use.index, document)[use.piece]

    def _cut(self, number: int, index: int, document: Document) -> list[Document]:
        try:
            return cut(document, self.row_length, self.encoder)
        except ValueError as error:
            raise ValueError(f"document {index} of source {self.sources[number].name!r}: {error}") from None

    def _stand_in(self, epoch: int, use: _Use, error: Exception) -> Document:
        first, end = self._first_id[use.source : use.source + 2].tolist()
        room = self._pieces(epoch, np.array([use.id]))[1][use.piece]
        after = first + (np.arange(use.id + 1, use.id + 1 + _STAND_INS) - first) % (end - first)
        for other in self._uses(epoch, after):
            if other.slots <= room:
                try:
                    return self._make(other)
                except (ValueError, OSError):
                    continue
        raise ValueError(f"{error}; and none of the {_STAND_INS} documents after it can be read and fits its place")


class Mixture:
    """The rows of a run: streams that take turns by their weights, and stages in which other weights hold.

    Each row is one stream's. Of any number of first rows of a stage, every stream has its weight's share to within
    less than one row. A stream that was used in an earlier stage goes on where it was.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[tuple[Stream, float]]]]) -> None:
        """`stages` holds (first row, (stream, weight >= 0) ...), the first of them beginning at row 0."""
        self.streams = list({id(stream): stream for _, weighted in stages for stream, _ in weighted}.values())
        self._first_rows = [first for first, _ in stages]
        if self._first_rows[:1] != [0] or sorted(set(self._first_rows)) != self._first_rows:
            raise ValueError(f"stages begin at rows {self._first_rows}; they must begin at 0 and ascend")
        self._turns: list[Turns] = []
        self._places: list[np.ndarray] = []
        places = np.zeros(len(self.streams), np.int64)
        for number, (first, weighted) in enumerate(stages):
            if number:
                places = places + self._turns[-1].counts(first - self._first_rows[number - 1])
            self._places.append(places)
            self._turns.append(Turns([sum(w for s, w in weighted if s is stream) for stream in self.streams]))

    def locate(self, r: int) -> tuple[Stream, int]:
        """The stream of row r >= 0 and the number of the row in it."""
        if r < 0:
            raise ValueError(f"row {r} does not exist; rows begin at 0")
        stream = self._turns[self._stage(r)].at(r - self._first_rows[self._stage(r)])
        return self.streams[stream], int(self.places(r)[stream])

    def places(self, r: int) -> np.ndarray:
        """How many of the rows 0 .. r - 1 each of `streams` has, int64."""
        stage = self._stage(r)
        return self._places[stage] + self._turns[stage].counts(r - self._first_rows[stage])

    def row(self, r: int) -> Columns:
        """Columns of row r >= 0."""
        return self.row_and_replaced(r)[0]

    def row_and_replaced(self, r: int) -> tuple[Columns, list[str]]:
        """Columns of row r >= 0, and why which documents in it were replaced. See `Stream.row`."""
        stream, n = self.locate(r)
        return stream.row(n)

    def work(self, r: int) -> Work:
        """The cost of row r."""
        stream, n = self.locate(r)
        return stream.work(n)

    def seen(self, r: int) -> dict[str, Seen]:
        """What rows 0 .. r - 1 hold of each source, by its name."""
        found: dict[str, Seen] = {}
        for stream, n in zip(self.streams, self.places(r).tolist(), strict=True):
            for name, now in stream.seen(n).items():
                then = found.get(name, Seen(0, 0, 0.0))
                found[name] = Seen(then.documents + now.documents, then.slots + now.slots, then.epochs + now.epochs)
        return found

    def measure(self) -> None:
        """Measure every document now. See `Stream.measure`."""
        for stream in self.streams:
            stream.measure()

    def _stage(self, r: int) -> int:
        return bisect_right(self._first_rows, r) - 1


class Turns:
    """Which of several streams has row 0, 1, 2, ..., such that each always has its weight's share to within one row.

    The n-th row of a stream with the share w is due in the rows floor(n / w) .. ceil((n + 1) / w) - 1; of the streams
    that are due the one whose time ends first has its turn (Baruah et al. 1996, for one processor).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Raises ValueError unless the weights are >= 0, not all 0, and in proportion to moderate whole numbers."""
        if not 0 < sum(weights) < math.inf or min(weights) < 0:
            raise ValueError(f"weights {list(weights)} must be at least 0, and one of them above 0")
        exact = [Fraction(str(weight)) for weight in weights]
        whole = [int(weight * math.lcm(*(w.denominator for w in exact))) for weight in exact]
        self._whole = np.array([weight // math.gcd(*whole) for weight in whole], np.int64)
        period = int(self._whole.sum())
        if period > _MAX_PERIOD:
            raise ValueError(f"weights {list(weights)} are too fine: in whole numbers they add up to {period}, but "
                             f"{_MAX_PERIOD} is the most; round them")  # fmt: skip
        self._order = np.empty(period, np.int64)
        self._before = np.zeros((period + 1, len(weights)), np.int64)
        had, share = [0] * len(weights), self._whole.tolist()
        for r in range(period):
            due = (s for s in range(len(share)) if had[s] * period < share[s] * (r + 1))
            turn = min(due, key=lambda s: -(-(had[s] + 1) * period // share[s]))
            self._order[r] = turn
            had[turn] += 1
            self._before[r + 1] = had

    def at(self, r: int) -> int:
        """The stream of row r."""
        return int(self._order[r % len(self._order)])

    def counts(self, r: int) -> np.ndarray:
        """How many of the rows 0 .. r - 1 each stream has, int64."""
        periods, rest = divmod(r, len(self._order))
        return periods * self._whole + self._before[rest]
