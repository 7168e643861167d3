"""Where documents come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from data.document import Document

if TYPE_CHECKING:
    from data.encode import Encoder


class Source(Protocol):
    """A fixed list of documents. `document` is a pure function of how the source was made and of the index."""

    @property
    def name(self) -> str:
        """Short name for messages and logs."""

    def __len__(self) -> int:
        """Number of documents."""

    def document(self, index: int, pixels: bool = True) -> Document:
        """Document number `index`, 0 <= index < len(self). With pixels=False images carry their size alone."""


@runtime_checkable
class MeasuredSource(Source, Protocol):
    """A source that knows the lengths of its documents for one encoder, so that none has to be read to plan rows."""

    @property
    def slots(self) -> np.ndarray:
        """int32 (2, len(self)): slots of each document whole, and without its condition (`drop_condition`)."""

    @property
    def patches(self) -> np.ndarray:
        """int32 (len(self),): patches of each document."""

    def check(self, encoder: Encoder) -> None:
        """Raises ValueError, one line, unless the lengths are those that `encoder` gives."""
