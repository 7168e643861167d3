"""Documents from a JSONL file in the canonical schema (docs/data-format.md), image files beside it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from data.document import Document, from_json

_CHUNK = 2**24


class Jsonl:
    """One document per non-blank line. Image paths are relative to the file's folder.

    The file is scanned once for line breaks (8 bytes are kept per document) and each document read when asked for.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises ValueError naming the file where it cannot be read or holds no document."""
        self.path = Path(path)
        self.name = self.path.stem
        try:
            self._starts, self._ends = _find_lines(self.path)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read: {error.strerror}") from error
        if len(self._starts) == 0:
            raise ValueError(f"{self.path}: holds no documents")

    def __len__(self) -> int:
        return len(self._starts)

    def document(self, index: int, pixels: bool = True) -> Document:
        """Document `index`, parsed strictly. Raises ValueError beginning with "path:line" for a bad one."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: document {index} of {len(self)}")
        start, end = int(self._starts[index]), int(self._ends[index])
        with open(self.path, "rb", buffering=0) as file:  # reopened, so that it works in forked and spawned workers
            file.seek(start)
            line = file.read(end - start)
        try:
            return from_json(line, self.path.parent, pixels)
        except ValueError:
            # Only now worth the time of finding the line's number: parse again with the name in the message.
            return from_json(line, self.path.parent, pixels, where=f"{self.path}:{self._line_number(start)}")

    def _line_number(self, start: int) -> int:
        with open(self.path, "rb") as file:
            number = 1
            while start > 0 and (chunk := file.read(min(_CHUNK, start))):
                number += chunk.count(b"\n")
                start -= len(chunk)
        return number


def _find_lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Byte offsets (start, end) of the lines that are not blank, int64."""
    breaks = [np.array([-1], np.int64)]
    size = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
    edges = np.concatenate([*breaks, [size]])
    starts, ends = edges[:-1] + 1, edges[1:]
    filled = ends > starts
    starts, ends = starts[filled], ends[filled]
    # Lines short enough to be blanks only ("\r", spaces) are looked at; a document needs more bytes than this.
    with open(path, "rb") as file:
        blank = np.zeros(len(starts), bool)
        for k in np.flatnonzero(ends - starts < len('{"segments":[{}]}')).tolist():
            file.seek(int(starts[k]))
            blank[k] = not file.read(int(ends[k] - starts[k])).strip()
    return starts[~blank], ends[~blank]
