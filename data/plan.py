"""Which documents share which row: a pure function of (seed, epoch, row), the same on every rank and machine."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
# What a hash is used for comes first among its keys, so that no two uses share their bits.
_ORDER_DOCUMENTS, _ORDER_ROWS, _ORDER_HANDS = 1, 2, 5
_ROUNDS = 6


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on uint64 of any shape. A bijection."""
    z = x + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash_ids(ids: np.ndarray, *keys: int) -> np.ndarray:
    """A uniform uint64 per id (any integer dtype and shape), a pure function of (keys, id).

    Integer arithmetic only, so that the numbers are the same on every platform and with every NumPy.
    """
    return splitmix64(splitmix64(_state(keys) ^ ids.astype(np.uint64)))


@lru_cache(maxsize=4096)  # The same few keys hash the documents of every row.
def _state(keys: tuple[int, ...]) -> np.ndarray:
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = splitmix64(state ^ np.uint64(key & _MASK))
    state.flags.writeable = False
    return state


class Shuffle:
    """A permutation of range(size), a pure function of (size, keys), that keeps only about sqrt(size) numbers.

    A Feistel network on pairs (x // b, x % b) with a * b just above size (Black and Rogaway 2002): in turn one half is
    moved round by a hash of the other. What lands at size or above is sent through again.
    """

    def __init__(self, size: int, *keys: int) -> None:
        self.size = size
        self._a = math.isqrt(max(size - 1, 0)) + 1
        self._b = -(-size // self._a)
        halves = ((self._b, self._a), (self._a, self._b))  # (numbers hashed, numbers moved)
        self._steps = [self._step(number, *halves[number % 2], keys) for number in range(_ROUNDS)]

    @staticmethod
    def _step(number: int, hashed: int, moved: int, keys: Sequence[int]) -> np.ndarray:
        high = hash_ids(np.arange(hashed), *keys, number) >> np.uint64(32)
        return (high * np.uint64(moved) >> np.uint64(32)).astype(np.int64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Where the positions (integers 0..size-1, shape (N,)) go, int64 (N,)."""
        placed = self._once(np.asarray(positions, np.int64))
        while (outside := np.flatnonzero(placed >= self.size)).size:
            placed[outside] = self._once(placed[outside])
        return placed

    def _once(self, x: np.ndarray) -> np.ndarray:
        left, right = np.divmod(x, self._b)
        for number, step in enumerate(self._steps):
            half, other, end = (right, left, self._b) if number % 2 else (left, right, self._a)
            half += step[other]
            half -= end * (half >= end)
        return left * self._b + right


class Plan:
    """An endless list of rows over num_documents documents; every epoch holds each document exactly once.

    Each epoch is shuffled and cut into windows of equal size. The documents of a window, longest first, are cut into
    classes of `hands` documents of nearly the same length, and dealt: each hand gets one document of every class. The
    longest documents of all classes are packed by best fit, once; all hands are packed alike, since theirs are no
    longer. So a row needs the lengths of its own window, and to find its window the number of rows of those before it.

    `lengths(epoch, ids)` gives (ids, slots) of what stands for the documents `ids` (int64) in that epoch, slots being
    integers >= 1: the same ids, or, for a document cut into pieces, its id plus 0, 1, 2, ... times num_documents.
    `parts` are the ends of the ranges of ids that `seen` counts, the last one num_documents.
    """

    def __init__(
        self,
        lengths: Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]],
        num_documents: int,
        row_length: int,
        seed: int,
        hands: int = 1,
        hand: int | None = None,
        parts: Sequence[int] | None = None,
    ) -> None:
        """`hand`: documents of a hand, by default 4096, or twice row_length where that is more."""
        if num_documents < 1:
            raise ValueError("there are no documents to plan rows for")
        if hand is None:
            hand = max(4096, 2 * row_length)  # so that a hand fills dozens of rows even with very short documents
        if row_length < 1 or hand < 1 or hands < 1:
            raise ValueError(f"row_length {row_length}, hand {hand} and hands {hands} must be at least 1")
        self.num_documents = num_documents
        self.row_length = row_length
        self.seed = seed
        self._lengths = lengths
        self._hand = hand
        self._parts = np.asarray([num_documents] if parts is None else parts, np.int64)
        # Windows of equal size: a last window of a few documents would be a nearly empty row in every epoch.
        self._windows = max(1, round(num_documents / (hand * hands)))
        self._ends: list[int] = []  # rows up to and including window 0, 1, ... counted through all epochs
        self._seen = [np.zeros((len(self._parts), 2), np.int64)]  # `seen` before window 0, 1, ...
        self._make_caches()

    def row(self, r: int) -> tuple[int, np.ndarray]:
        """(epoch, ids int64 of the documents) of row r >= 0.

        Raises ValueError for a document longer than row_length. Cheap for rows near each other. The first call for a
        far row counts the rows of all windows before it; a process that resumes does well to ask for its first row
        before it forks its workers.
        """
        number, place = self._find(r)
        return number // self._windows, self._window(number).row(place)

    def seen(self, r: int) -> np.ndarray:
        """Documents and slots of each part in rows 0 .. r - 1, int64 (parts, 2).

        A document that is cut counts in the row of its first piece.
        """
        number, place = self._find(r)
        window = self._window(number)
        return self._seen[number] + self._count(window, window.is_before(place))

    def _find(self, r: int) -> tuple[int, int]:
        """The window of row r, counted through all epochs, and the row's place in it."""
        if r < 0:
            raise ValueError(f"row {r} does not exist; rows begin at 0")
        with self._lock:
            while not self._ends or self._ends[-1] <= r:
                window = self._window(len(self._ends))
                self._seen.append(self._seen[-1] + self._count(window, slice(None)))
                self._ends.append((self._ends[-1] if self._ends else 0) + window.num_rows)
        number = bisect_right(self._ends, r)
        return number, r - (self._ends[number - 1] if number else 0)

    def _count(self, window: _Window, chosen: np.ndarray | slice) -> np.ndarray:
        piece, ids = np.divmod(window.ids[chosen], self.num_documents)
        part = np.searchsorted(self._parts, ids, side="right")
        return np.stack([np.bincount(part, weights=weights, minlength=len(self._parts)).astype(np.int64)
                         for weights in (piece == 0, window.lengths[chosen])], axis=1)  # fmt: skip

    def _make_caches(self) -> None:
        self._lock = threading.Lock()
        self._order = lru_cache(maxsize=2)(self._make_order)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_order", "_window")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._make_caches()

    def _make_order(self, epoch: int) -> Shuffle:
        return Shuffle(self.num_documents, _ORDER_DOCUMENTS, self.seed, epoch)

    def _make_window(self, number: int) -> _Window:
        """Window `number`, counted through all epochs."""
        epoch, part = divmod(number, self._windows)
        start, end = (k * self.num_documents // self._windows for k in (part, part + 1))
        ids, lengths = self._lengths(epoch, self._order(epoch)(np.arange(start, end)))
        if lengths.max() > self.row_length:
            worst = int(lengths.argmax())
            raise ValueError(
                f"document {ids[worst]} has {lengths[worst]} slots, but data.row_length is {self.row_length}; "
                "split the document or raise data.row_length"
            )
        hands = max(1, round((end - start) / self._hand))
        return _Window.deal(ids, lengths, hands, self.row_length, (self.seed, epoch, part))


@dataclass(frozen=True)
class _Window:
    """Documents in rows. Class c holds documents c * hands .. (c + 1) * hands - 1, of which the last class may lack
    some; a pattern is a set of classes; there is a row for each pattern and hand."""

    ids: np.ndarray  # int64 (N,), longest first; read-only, as `row` may hand out views
    lengths: np.ndarray  # (N,)
    hands: int
    bins: np.ndarray  # the pattern of each class
    turns: np.ndarray  # hand h gets number (h + turn) % hands of a class
    classes: np.ndarray  # classes by pattern
    ends: np.ndarray  # where in `classes` each pattern ends
    num_rows: int
    order: Shuffle  # of the rows: best fit leaves the long documents in the first ones

    @classmethod
    def deal(cls, ids: np.ndarray, lengths: np.ndarray, hands: int, row_length: int, keys: tuple[int, ...]) -> _Window:
        # NumPy sorts 16-bit integers in linear time.
        room = (row_length - lengths).astype(np.uint16 if row_length < 2**16 else np.int64)
        longest_first = np.argsort(room, kind="stable")
        ids, lengths = ids[longest_first], lengths[longest_first]
        ids.flags.writeable = False
        bins = best_fit(lengths[::hands], row_length)
        sizes = np.bincount(bins)
        # Best fit opens bins in order and the last class comes last: alone in a bin, it is in the last one, and hands
        # that get nothing of it have no such row.
        lacking = len(bins) * hands - len(ids) if sizes[bins[-1]] == 1 and bins[-1] == len(sizes) - 1 else 0
        num_rows = len(sizes) * hands - lacking
        turns = (hash_ids(np.arange(len(bins)), _ORDER_HANDS, *keys) % np.uint64(hands)).astype(np.int64)
        turns[-1] = 0  # The first hands get what there is of the last class.
        return cls(ids, lengths, hands, bins, turns, np.argsort(bins, kind="stable"), np.cumsum(sizes), num_rows,
                   Shuffle(num_rows, _ORDER_ROWS, *keys))  # fmt: skip

    def row(self, place: int) -> np.ndarray:
        """Ids of the row at this place of the window, 0 <= place < num_rows."""
        pattern, hand = divmod(int(self.order(np.array([place]))[0]), self.hands)
        classes = self.classes[self.ends[pattern - 1] if pattern else 0 : self.ends[pattern]]
        numbers = classes * self.hands + (hand + self.turns[classes]) % self.hands
        found = self.ids[numbers[numbers < len(self.ids)]]
        found.flags.writeable = False
        return found

    def is_before(self, place: int) -> np.ndarray:
        """Which documents are in rows before this place, bool (N,)."""
        done = np.zeros(len(self.ends) * self.hands, bool)
        done[self.order(np.arange(place))] = True
        classes, dealt = np.divmod(np.arange(len(self.ids)), self.hands)
        return done[self.bins[classes] * self.hands + (dealt - self.turns[classes]) % self.hands]


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Pack items by best fit, longest first: each goes where it leaves the least room, or opens a new bin.

    lengths: integers 1..capacity, shape (N,). Returns the bin of each item, int64 (N,), bins counted from 0.
    """
    bins = [0] * len(lengths)
    num_bins = 0
    rooms: list[int] = []  # the different rooms left in open bins, ascending
    open_bins: dict[int, list[int]] = {}  # the bins that have this room left
    sizes = lengths.tolist()
    for item in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        size = sizes[item]
        at = bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            bin = open_bins[room].pop()
            if not open_bins[room]:
                del open_bins[room], rooms[at]
        else:
            room, bin = capacity, num_bins
            num_bins += 1
        bins[item] = bin
        left = room - size
        if left in open_bins:
            open_bins[left].append(bin)
        elif left:
            open_bins[left] = [bin]
            insort(rooms, left)
    return np.array(bins, np.int64)
