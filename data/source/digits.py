"""The 1,797 real handwritten digits that ship inside scikit-learn, captioned.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (the test
part of that set), CC BY 4.0. Pictures are 8 x 8 with gray levels 0..16, light ink on a dark ground.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Literal

import numpy as np
import sklearn.datasets

from data.document import Document, Image, Text

SIDE = 8  # pixels
_TEST_PART = 0.2  # of every class


def caption(label: int) -> str:
    """The caption of digit 0..9."""
    return f"the digit {label}"


@cache
def arrays(split: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
    """All digits of a split: pixels (number, 8, 8, 3) uint8 RGB, and labels (number,) int64 0..9; both read-only.

    Gray level v of 0..16 becomes round(v * 255 / 16) in all three channels: 0 is black, 16 is white. A fifth of each
    class is the test split, chosen by a fixed hash of the digit's number in scikit-learn's order.
    """
    if split not in ("train", "test"):
        raise ValueError(f"digits: split must be 'train' or 'test', not {split!r}")
    data = sklearn.datasets.load_digits()
    labels = np.asarray(data.target, np.int64)
    order = sorted(range(len(labels)), key=lambda number: hashlib.blake2b(f"digit {number}".encode()).digest())
    test = np.zeros(len(labels), bool)
    for label in range(10):
        members = [number for number in order if labels[number] == label]
        test[members[: round(_TEST_PART * len(members))]] = True
    chosen = test if split == "test" else ~test
    gray = np.rint(np.asarray(data.images)[chosen] * (255 / 16)).astype(np.uint8)
    pixels, labels = np.repeat(gray[..., None], 3, axis=3), labels[chosen]
    pixels.setflags(write=False)
    labels.setflags(write=False)
    return pixels, labels


class Digits:
    """Captioned digits of one split, in scikit-learn's order.

    `caption_fraction` 0..1: this part of the documents, chosen by a hash of `seed` and index, shows the picture first,
    as read-only context, and learns the caption; in the others the caption comes first and both are learned. To show
    every digit in both directions, mix one source with fraction 0 and one with fraction 1.
    """

    name = "digits"

    def __init__(self, split: Literal["train", "test"], caption_fraction: float = 0.5, seed: int = 0) -> None:
        if not 0.0 <= caption_fraction <= 1.0:
            raise ValueError(f"digits: caption_fraction must be in 0..1, not {caption_fraction}")
        if seed < 0:
            raise ValueError(f"digits: seed must be >= 0, not {seed}")
        self.split: Literal["train", "test"] = split
        self.caption_fraction, self.seed = caption_fraction, seed
        self._length = len(arrays(split)[1])

    def __len__(self) -> int:
        return self._length

    def document(self, index: int, pixels: bool = True) -> Document:
        """Document `index` in 0..len-1; `pixels=False` leaves the pixels out."""
        if not 0 <= index < len(self):
            raise IndexError(f"digits: document {index} of {len(self)}")
        pictures, labels = arrays(self.split)
        read = np.random.default_rng((self.seed, self.split == "test", index)).random() < self.caption_fraction
        image = Image(SIDE, SIDE, pictures[index] if pixels else None, learn=not read)
        text = Text(caption(int(labels[index])))
        return Document((image, text) if read else (text, image), id=f"{self.split}/{index}", source=self.name)
