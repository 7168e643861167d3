"""Where the documents of a batch lie, so that the cost of attention follows the documents and not the row."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 256
"""Slots that the padding of a document stays below by default; with `vq` it is the window."""


@dataclass(frozen=True)
class Group:
    """Documents of similar length. slot_GL holds indices into the flattened (B * S) slots; where a document is shorter
    than L the index repeats its last slot and valid_GL is False."""

    slot_GL: Tensor
    valid_GL: Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of a batch in groups of similar length, and whether they are simply the rows (no regrouping)."""

    groups: tuple[Group, ...]
    squared_lengths: int
    """Sum of length squared over documents, for FLOP counts."""
    image_X: Tensor | None = None
    """Number of the image of every flattened slot, 0 for text: given if patches shall see all of their image."""

    @classmethod
    def of(cls, document_BS: Tensor, multiple: int = 1, block: int = BLOCK) -> "Documents":
        """Find the documents of a batch. document_BS (CPU integers) is 0 in padding; a document is a run of one value.

        Groups collect lengths of the same number of blocks, up to one block lengths between two powers of two: padding
        is shorter than a document and than a block. Their length L is rounded up to a multiple, below it to a power of
        two, for callers whose rounding must not depend on the other documents.
        """
        flat = document_BS.flatten()
        row_length = document_BS.shape[1]
        slot = torch.arange(flat.numel())
        starts_here = torch.ones_like(flat, dtype=torch.bool)
        starts_here[1:] = flat[1:] != flat[:-1]
        starts_here |= slot % row_length == 0
        bounds = torch.cat((slot[starts_here], torch.tensor([flat.numel()])))
        real = flat[bounds[:-1]] > 0
        start, length = bounds[:-1][real], (bounds[1:] - bounds[:-1])[real]
        groups = []
        octave, blocks = torch.log2(length.double()).ceil().long(), -(-length // block)
        size = torch.where(blocks > 1, -blocks, octave)
        for value in size.unique():
            chosen = size == value
            unit = multiple if value < 0 else min(multiple, 1 << int(value))
            offset = torch.arange(-(-int(length[chosen].max()) // unit) * unit)
            valid_GL = offset < length[chosen, None]
            slot_GL = start[chosen, None] + torch.minimum(offset, length[chosen, None] - 1)
            groups.append(Group(slot_GL, valid_GL))
        return cls(tuple(groups), int((length**2).sum()))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Documents":
        """The same with every tensor changed, in a fixed order."""
        groups = tuple(Group(change(group.slot_GL), change(group.valid_GL)) for group in self.groups)
        return replace(self, groups=groups)

    def to(self, device: torch.device | str) -> "Documents":
        return self.map(lambda tensor: tensor.to(device))

    def with_images(self, row_BS: Tensor, col_BS: Tensor) -> "Documents":
        """Patches see all of their image. row, col: 1-based place in the image, 0 for text."""
        first_X = ((row_BS == 1) & (col_BS == 1)).flatten()
        return replace(self, image_X=first_X.cumsum(0) * (row_BS > 0).flatten())
