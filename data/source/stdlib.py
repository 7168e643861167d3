"""Text that every machine has: the running Python's own standard library, cut into documents at line borders."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Literal

import numpy as np

from data.document import Document, Text

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_SKIPPED_PREFIX = "_sysconfigdata"  # generated when this Python was built; full of the build machine's paths
_TEST_PART = 20  # one file in so many is held out


class StandardLibrary:
    """Source code in pieces of at most `max_bytes` UTF-8 bytes, file after file in order of the paths.

    Whole lines as long as they fit; a line longer than `max_bytes` is cut between characters. The pieces of a file,
    joined, are the file. About 5 % of the files, chosen by a fixed hash of the relative path, are the test split. Test
    folders, installed packages, links and files that are not UTF-8 are left out. The text depends on the version of
    Python: compare numbers between runs of the same version only. Raises OSError where the library's files cannot be
    read, and ValueError where there are none.
    """

    name = "stdlib"

    def __init__(self, split: Literal["train", "test"], max_bytes: int = 1024) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"stdlib: split must be 'train' or 'test', not {split!r}")
        if max_bytes < 4:
            raise ValueError(f"stdlib: max_bytes must be at least 4, the longest character, not {max_bytes}")
        self.split, self.max_bytes = split, max_bytes
        folder = Path(sysconfig.get_path("stdlib"))
        self._paths: list[str] = []
        self._files: list[bytes] = []  # about 12 MB in all, so that drawing a document touches no disk
        pieces: list[tuple[int, int, int]] = []  # file, first byte, end
        for path in _paths(folder):
            if _held_out(path) != (split == "test"):
                continue
            content = (folder / path).read_bytes()
            try:
                content.decode("utf-8")
            except UnicodeDecodeError:
                continue
            pieces += [(len(self._files), start, end) for start, end in _cut(content, max_bytes)]
            self._paths.append(path)
            self._files.append(content)
        if not pieces:
            raise ValueError(f"stdlib: {folder} holds no Python files; is this Python installed without its sources?")
        self._pieces = np.array(pieces, np.int64)

    def __len__(self) -> int:
        return len(self._pieces)

    def document(self, index: int, pixels: bool = True) -> Document:
        """Document `index` in 0..len-1: one learned text, named "path:first byte". `pixels` changes nothing here."""
        if not 0 <= index < len(self):
            raise IndexError(f"stdlib: document {index} of {len(self)}")
        file, start, end = self._pieces[index].tolist()
        text = self._files[file][start:end].decode("utf-8")
        return Document((Text(text),), id=f"{self._paths[file]}:{start}", source=self.name)


def _paths(folder: Path) -> list[str]:
    """Relative paths, with slashes, of all Python files below `folder` that belong to the library itself, sorted."""
    found = []
    for root, folders, files in os.walk(folder):  # never follows links to folders
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for name in files:
            path = Path(root, name)
            if name.endswith(".py") and not name.startswith(_SKIPPED_PREFIX) and not path.is_symlink():
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def _held_out(path: str) -> bool:
    return hashlib.blake2b(path.encode()).digest()[0] % _TEST_PART == 0


def _cut(content: bytes, max_bytes: int) -> list[tuple[int, int]]:
    """Byte ranges of at most `max_bytes` that cover `content`, ending at line borders wherever a line fits."""
    borders = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + 1
    ranges, start = [], 0
    while start < len(content):
        end = min(start + max_bytes, len(content))
        if end < len(content):
            last = int(np.searchsorted(borders, end, side="right")) - 1
            if last >= 0 and borders[last] > start:
                end = int(borders[last])
            else:
                while content[end] & 0xC0 == 0x80:  # inside a character
                    end -= 1
        ranges.append((start, end))
        start = end
    return ranges
