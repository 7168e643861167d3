"""Several sources as one stream of packed rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.document import Document
from data.encode import Columns, Encoder, drop_condition, pack_row
from data.plan import Plan, hash_ids
from data.source import Source

_DROP_CONDITION = 3  # beside the uses of hashes in data/plan.py


class Mixture:
    """Rows over the concatenation of sources, each repeated a number of times per epoch.

    Document ids count through the first source, its repeats, then the next source. Everything is a pure function of
    the arguments and the row, so any process can make any row. In a part `condition_dropout` of the documents with a
    learned image the text before it is left out, drawn anew in each epoch and for each repeat.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, int]],
        encoder: Encoder,
        row_length: int,
        seed: int,
        condition_dropout: float = 0.1,
    ) -> None:
        """`sources` holds (source, repeats), repeats >= 1. Raises ValueError for empty sources and bad numbers."""
        if not 0 <= condition_dropout <= 1:
            raise ValueError(f"condition_dropout is {condition_dropout}; it must be between 0 and 1")
        for source, repeats in sources:
            if len(source) < 1:
                raise ValueError(f"source {source.name!r} has no documents")
            if repeats < 1:
                raise ValueError(f"source {source.name!r} has repeats {repeats}; it must be at least 1")
        self.encoder = encoder
        self.row_length = row_length
        self.seed = seed
        self._sources = [source for source, _ in sources]
        counts = np.array([len(source) for source in self._sources], np.int64)
        repeats_all = np.array([repeats for _, repeats in sources], np.int64)
        self._counts = counts
        self._first_id = np.concatenate([[0], np.cumsum(counts * repeats_all)])  # of each source, and the end
        self._first_item = np.concatenate([[0], np.cumsum(counts)])  # the same without repeats
        # Slots with and without the condition of each item; 0 where it is not measured yet.
        self._slots = np.zeros((2, self._first_item[-1]), np.int32)
        self._drop_below = round(condition_dropout * 2**53)
        self.plan = Plan(self._lengths, int(self._first_id[-1]), row_length, seed)

    def row(self, r: int) -> Columns:
        """Columns of row r >= 0, of length row_length. Raises ValueError for a document longer than a row."""
        epoch, ids = self.plan.row(r)
        parts = [self.encoder.encode(document) for document in self.documents(epoch, ids)]
        return pack_row(parts, self.row_length, self.encoder.tokenizer.pad)

    def documents(self, epoch: int, ids: np.ndarray) -> list[Document]:
        """The documents `ids` as they are used in this epoch, conditions dropped where the draw says so."""
        where, index = self._locate(ids)
        dropped = self._is_dropped(epoch, ids).tolist()
        documents = []
        for source, position, drop in zip(where.tolist(), index.tolist(), dropped, strict=True):
            document = self._sources[source].document(position)
            documents.append(drop_condition(document) if drop else document)
        return documents

    def measure(self) -> None:
        """Measure every document now rather than when its window is first planned.

        Finds documents that are broken or too long before training starts, and lets forked workers share the result.
        """
        for item in np.flatnonzero(self._slots[0] == 0).tolist():
            self._measure(item)

    def _locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the source, index in the source) of each document id."""
        where = np.searchsorted(self._first_id, ids, side="right") - 1
        return where, (ids - self._first_id[where]) % self._counts[where]

    def _is_dropped(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        return (hash_ids(ids, _DROP_CONDITION, self.seed, epoch) >> np.uint64(11)) < self._drop_below

    def _lengths(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        where, index = self._locate(ids)
        items = self._first_item[where] + index
        for item in np.unique(items[self._slots[0, items] == 0]).tolist():
            self._measure(item)
        return self._slots[self._is_dropped(epoch, ids).astype(np.int64), items]

    def _measure(self, item: int) -> None:
        number = int(np.searchsorted(self._first_item, item, side="right")) - 1
        index = item - int(self._first_item[number])
        document = self._sources[number].document(index, pixels=False)
        slots = self.encoder.length(document)
        if slots > self.row_length:
            raise ValueError(
                f"document {index} of source {self._sources[number].name!r} has {slots} slots, but data.row_length is "
                f"{self.row_length}; split the document or raise data.row_length"
            )
        shorter = drop_condition(document)
        self._slots[1, item] = slots if shorter is document else self.encoder.length(shorter)
        self._slots[0, item] = slots
