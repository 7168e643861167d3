"""What the model reads: integer columns of packed rows, and the patches of all their images as bytes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.attention.documents import BLOCK, Documents
from model.positions import Grid


@dataclass(frozen=True)
class Batch:
    """Rows of slots. The hidden state of slot k predicts slot k + 1 of the same document.

    token: text or special id, the patch id in patch slots, the pad id in padding.
    document: 1-based in the row, 0 in padding. index: 1-based in its document, 0 in padding.
    row, col, rows, cols: 1-based place and size of the grid in patch slots, 0 elsewhere.
    learn: the slot is a target. patches: in slot order over the whole batch. seed: one per row, for time and noise.
    """

    token_BS: Tensor
    document_BS: Tensor
    index_BS: Tensor
    row_BS: Tensor
    col_BS: Tensor
    rows_BS: Tensor
    cols_BS: Tensor
    learn_BS: Tensor
    patches_NP: Tensor
    seed_B: tuple[int, ...]
    documents: Documents

    @classmethod
    def collate(cls, rows: Sequence[object], seeds: Sequence[int], block: int = BLOCK) -> "Batch":
        """Stack rows (objects with NumPy attributes token, document, index, row, col, rows, cols, learn, patches).

        block: what the padding of a document stays below, as in `ModelConfig.block`."""

        def stacked(name: str) -> Tensor:
            column = np.stack([getattr(row, name) for row in rows])
            return torch.from_numpy(column if column.dtype == bool else column.astype(np.int64))

        columns = {f"{name}_BS": stacked(name) for name in _COLUMNS}
        patches = torch.from_numpy(np.concatenate([row.patches for row in rows]))  # type: ignore[attr-defined]
        documents = Documents.of(columns["document_BS"], block=block)
        return cls(**columns, patches_NP=patches, seed_B=tuple(seeds), documents=documents)

    @property
    def grid(self) -> Grid:
        return Grid(self.index_BS, self.row_BS, self.col_BS, self.rows_BS, self.cols_BS)

    def targets(self) -> tuple[Tensor, Tensor]:
        """Two (B, S) masks: slots before a learned text token, and slots before a learned patch."""
        learned = torch.zeros_like(self.learn_BS)
        learned[:, :-1] = self.learn_BS[:, 1:] & (self.document_BS[:, 1:] == self.document_BS[:, :-1])
        patch_next = torch.zeros_like(learned)
        patch_next[:, :-1] = self.rows_BS[:, 1:] > 0
        return learned & ~patch_next, learned & patch_next

    def counts(self) -> tuple[int, int]:
        """Learned text tokens and learned patches."""
        text, image = self.targets()
        return int(text.sum()), int(image.sum())

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every tensor changed, in a fixed order."""
        tensors = (f.name for f in fields(self) if f.name not in ("seed_B", "documents"))
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in tensors}
        return replace(self, **changed, documents=self.documents.map(change))

    def to(self, device: torch.device | str) -> "Batch":
        return self.map(lambda tensor: tensor.to(device))


_COLUMNS = ("token", "document", "index", "row", "col", "rows", "cols", "learn")


def to_pixels(patches: Tensor) -> Tensor:
    """Bytes 0..255 to float32 in [-1, 1]."""
    return patches.float() / 127.5 - 1


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] (others are clamped) to the nearest bytes; the inverse of to_pixels on bytes."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
