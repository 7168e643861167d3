"""Where documents come from."""

from __future__ import annotations

from typing import Protocol

from data.document import Document


class Source(Protocol):
    """A fixed list of documents. `document` is a pure function of how the source was made and of the index."""

    @property
    def name(self) -> str:
        """Short name for messages and logs."""

    def __len__(self) -> int:
        """Number of documents."""

    def document(self, index: int, pixels: bool = True) -> Document:
        """Document number `index`, 0 <= index < len(self). With pixels=False images carry their size alone."""
