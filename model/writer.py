"""One sample while it is generated: what it begins with, the grammar that it follows, and its randomness.

The grammar is enforced, so every sequence decodes:

    text: a text token, <boi> (if images are left) or <eos>      <boi>: a rows token      rows: a cols token
    cols: the first patch      patch: the next patch, after the last one <eoi>            <eoi>: text
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.config import Vocabulary


@dataclass(frozen=True)
class Prompt:
    """The sequence so far, 1-D integer arrays with one entry per slot (see model.batch.Batch), beginning with <bos>."""

    token: np.ndarray
    row: np.ndarray
    col: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    patches: np.ndarray
    """(patch slots, P) uint8."""


@dataclass(frozen=True)
class Request:
    """One sample to generate."""

    prompt: Prompt
    seed: int
    """Everything random about the sample is a function of this number."""
    begin_image: bool = False
    """Start with <boi> instead of asking the model."""
    grid: tuple[int, int] | None = None
    """Patch rows and columns of every image; None lets the model choose."""
    max_images: int = 1
    max_text: int = 256
    """Text tokens at most. A sample ends with <eos>, or when neither text nor images are left."""
    max_patches: int = 1024
    """Patches of an image at most, where the model chooses the grid."""

    def __post_init__(self) -> None:
        if self.max_images < 0 or self.max_text < 0 or self.max_patches < 1:
            raise ValueError("a request needs max_images >= 0, max_text >= 0 and max_patches >= 1")


@dataclass
class GeneratedText:
    tokens: list[int]


@dataclass
class GeneratedImage:
    rows: int
    cols: int
    patches: np.ndarray
    """(rows * cols, P) uint8."""


Segment = GeneratedText | GeneratedImage


class Writer:
    """The grammar and randomness of one sample."""

    def __init__(self, request: Request, vocabulary: Vocabulary, patch_width: int) -> None:
        self.request, self.vocabulary, self.patch_width = request, vocabulary, patch_width
        self.segments: list[GeneratedText | tuple[int, int, int]] = []
        """An image as its rows, columns and first slot."""
        self.text_random = torch.Generator().manual_seed(mix(request.seed, 0))
        self.phase = "boi" if request.begin_image and request.max_images else "text"
        self.num_text = self.num_images = self.rows = self.cols = self.written = 0
        self.length = len(request.prompt.token)
        self._end_if_spent()
        self.opening: list[int] = []
        """Tokens that are known before the model has said anything; they are written."""
        while (token := self.forced()) is not None:
            self.opening.append(token)
            self.write(token)

    @property
    def done(self) -> bool:
        return self.phase == "done"

    @property
    def _text_left(self) -> bool:
        return self.num_text < self.request.max_text

    @property
    def _images_left(self) -> bool:
        return self.num_images < self.request.max_images

    def _end_if_spent(self) -> None:
        if not self._text_left and not self._images_left:
            self.phase = "done"

    def forced(self) -> int | None:
        """The id of the next token where it is known."""
        v, grid = self.vocabulary, self.request.grid
        if self.phase == "rows" and grid:
            return v.first_row + grid[0] - 1
        if self.phase == "cols" and grid:
            return v.first_col + grid[1] - 1
        return {"boi": v.boi, "eoi": v.eoi}.get(self.phase)

    def allowed(self) -> Tensor:
        """Mask (V,) of the tokens that the grammar allows next."""
        v, mask = self.vocabulary, torch.zeros(self.vocabulary.size, dtype=torch.bool)
        if self.phase == "text":
            mask[: v.pad] = self._text_left
            mask[v.eos] = True
            mask[v.boi] = self._images_left
        else:
            first, across = (v.first_row, 1) if self.phase == "rows" else (v.first_col, self.rows)
            mask[first : first + max(1, min(v.max_grid, self.request.max_patches // across))] = True
        return mask

    def uniform(self) -> Tensor:
        return torch.rand(1, generator=self.text_random, dtype=torch.float64)

    def noise_NP(self) -> Tensor:
        """Noise of all patches of the image that has begun."""
        generator = torch.Generator().manual_seed(self.image_key)
        return torch.randn(self.rows * self.cols, self.patch_width, generator=generator)

    @property
    def image_key(self) -> int:
        """What is random about the image that has begun is a function of this number."""
        return mix(self.request.seed, self.num_images)

    def write_patch(self) -> None:
        """Take note that the next patch is drawn."""
        self.length += 1
        self.written += 1
        if self.written == self.rows * self.cols:
            self.phase = "eoi"
            self._end_if_spent()

    def write(self, token: int) -> None:
        """Take note of the token that was chosen, and move on in the grammar."""
        v = self.vocabulary
        self.length += 1
        if token == v.boi:
            self.phase = "rows"
        elif self.phase == "rows":
            self.rows, self.phase = token - v.first_row + 1, "cols"
        elif self.phase == "cols":
            self.cols, self.phase, self.written = token - v.first_col + 1, "patch", 0
            self.num_images += 1
            self.segments.append((self.rows, self.cols, self.length))
        elif token == v.eoi:
            self.phase = "text"
        elif token == v.eos:
            self.phase = "done"
        else:
            if not self.segments or not isinstance(self.segments[-1], GeneratedText):
                self.segments.append(GeneratedText([]))
            self.segments[-1].tokens.append(token)  # type: ignore[union-attr]
            self.num_text += 1
            self._end_if_spent()

    def result(self, drawn_TP: np.ndarray) -> list[Segment]:
        """What was written, given the patches by slot."""
        return [
            part
            if isinstance(part, GeneratedText)
            else GeneratedImage(part[0], part[1], drawn_TP[part[2] : part[2] + part[0] * part[1]].copy())
            for part in self.segments
        ]


def mix(seed: int, stream: int) -> int:
    """A 63-bit seed for one of a sample's random streams (splitmix64), so that neighbouring seeds share nothing."""
    z = (seed * 0x9E3779B97F4A7C15 + stream * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 1
