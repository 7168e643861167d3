"""Which documents share which row: a pure function of (seed, epoch, row), the same on every rank and machine."""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from functools import lru_cache

import numpy as np

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
# What a hash is used for comes first among its keys, so that no two uses share their bits.
_ORDER_DOCUMENTS, _ORDER_ROWS = 1, 2


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
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = splitmix64(state ^ np.uint64(key & _MASK))
    return splitmix64(splitmix64(state ^ ids.astype(np.uint64)))


class Plan:
    """An endless list of rows over num_documents documents; every epoch holds each document exactly once.

    Each epoch is shuffled and cut into windows of about `window` documents (by default 4096, or row_length where that
    is more); inside a window, documents are packed by best fit and the rows shuffled. So row r needs only the lengths
    of the windows up to its own. The number of rows of each window is kept (8 bytes per window); of the rows
    themselves only a few windows.

    `lengths(epoch, ids)` gives the slots of the documents `ids` (int64) in that epoch, as integers >= 1.
    """

    def __init__(
        self,
        lengths: Callable[[int, np.ndarray], np.ndarray],
        num_documents: int,
        row_length: int,
        seed: int,
        window: int | None = None,
    ) -> None:
        if num_documents < 1:
            raise ValueError("there are no documents to plan rows for")
        if window is None:
            window = max(4096, row_length)  # so that a window fills dozens of rows even with very short documents
        if row_length < 1 or window < 1:
            raise ValueError(f"row_length {row_length} and window {window} must be at least 1")
        self.num_documents = num_documents
        self.row_length = row_length
        self.seed = seed
        self._lengths = lengths
        # Windows of equal size: a last window of a few documents would be a nearly empty row in every epoch.
        self._windows = max(1, round(num_documents / window))
        self._ends = array("q")  # rows up to and including window 0, 1, ... counted through all epochs
        self._make_caches()

    def row(self, r: int) -> tuple[int, np.ndarray]:
        """(epoch, ids int64 of the documents) of row r >= 0.

        Raises ValueError for a document longer than row_length. Cheap for rows near each other. The first call for a
        far row counts the rows of all windows before it, about a microsecond per document; a process that resumes
        does well to ask for its first row before it forks its workers.
        """
        if r < 0:
            raise ValueError(f"row {r} does not exist; rows begin at 0")
        with self._lock:
            while not self._ends or self._ends[-1] <= r:
                window = len(self._ends)
                self._ends.append((self._ends[-1] if window else 0) + len(self._rows(window)[1]))
        window = bisect_right(self._ends, r)
        start = self._ends[window - 1] if window else 0
        ids, ends = self._rows(window)
        return window // self._windows, ids[ends[r - start - 1] if r > start else 0 : ends[r - start]]

    def _make_caches(self) -> None:
        self._lock = threading.Lock()
        self._order = lru_cache(maxsize=2)(self._compute_order)
        self._rows = lru_cache(maxsize=4)(self._compute_rows)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_order", "_rows")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._make_caches()

    def _compute_order(self, epoch: int) -> np.ndarray:
        """The permutation of all ids in this epoch."""
        keys = hash_ids(np.arange(self.num_documents), _ORDER_DOCUMENTS, self.seed, epoch)
        return np.argsort(keys, kind="stable")

    def _compute_rows(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of one window (counted through all epochs) row by row, and where in them each row ends."""
        epoch, part = divmod(window, self._windows)
        start, end = (k * self.num_documents // self._windows for k in (part, part + 1))
        ids = self._order(epoch)[start:end]
        lengths = np.asarray(self._lengths(epoch, ids))
        if lengths.max() > self.row_length:
            worst = int(lengths.argmax())
            raise ValueError(
                f"document {ids[worst]} has {lengths[worst]} slots, but data.row_length is {self.row_length}; "
                "split the document or raise data.row_length"
            )
        bins = best_fit(lengths, self.row_length)
        # Best fit leaves the long documents in the first bins; rows must not come in that order.
        keys = hash_ids(np.arange(bins.max() + 1), _ORDER_ROWS, self.seed, epoch, part)
        place = np.argsort(np.argsort(keys, kind="stable"), kind="stable")
        rows = place[bins]
        ids = ids[np.argsort(rows, kind="stable")]
        ids.flags.writeable = False  # `row` hands out views of it
        return ids, np.cumsum(np.bincount(rows))


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
