"""The rows of a generation batch: what was written in them, and what the backbone has read of it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from model.attention.dense import KEY_MULTIPLE, rounded_up
from model.attention.documents import Documents
from model.batch import to_pixels
from model.noise import fold
from model.positions import Grid
from model.ropeway import Ropeway
from model.writer import Prompt, Request, Writer

ROW_MULTIPLE = 8
"""Rows of a generation batch are filled up to a multiple of this: matrix products of fewer rows take other code paths
with other rounding, and the pixels of a seed must not depend on the batch it is in."""

_PLACE = ("row", "col", "rows", "cols")


class Streams:
    """The rows of the batch: one per sample, then, if guided, one per sample without text, then perhaps one without
    the prompt's images too; with their decode states. What follows from the size of an image (places, positions) is
    written down when it begins, so that its patches need nothing from the host."""

    def __init__(self, model: Ropeway, writers: Sequence[Writer], count: int) -> None:
        """count: number of streams, see Guidance.streams."""
        self.model = model
        filled = list(writers) + [writers[-1]] * (-len(writers) % ROW_MULTIPLE)
        prompts = [writer.request.prompt for writer in filled]
        self.firsts = [stream * len(filled) for stream in range(count)]
        """The row of the first sample in each stream."""
        textless = [_without_text(prompt, model.vocabulary.pad) for prompt in prompts]
        imageless = [_beginning(prompt) for prompt in prompts]
        prompts = [prompt for stream in (prompts, textless, imageless)[:count] for prompt in stream]
        openings = [writer.opening for writer in filled] * count
        self.rows = len(prompts)
        lengths = [len(prompt.token) + len(opening) for prompt, opening in zip(prompts, openings, strict=True)]
        self.capacity = max(_new_slots(writer.request) for writer in writers)
        device = model.token_embedding.weight.device
        total = _rounded_up(max(lengths)) + self.capacity + 1
        columns_5RT = np.zeros((5, self.rows, total), np.int64)
        for r, (prompt, opening) in enumerate(zip(prompts, openings, strict=True)):
            begun = len(prompt.token)
            columns_5RT[:, r, :begun] = prompt.token, prompt.row, prompt.col, prompt.rows, prompt.cols
            columns_5RT[0, r, begun : begun + len(opening)] = opening
        self.token_RT, self.row_RT, self.col_RT, self.rows_RT, self.cols_RT = torch.from_numpy(columns_5RT).to(device)
        self.positions_RT2 = model.positions(self.grid(slice(None)))
        self.length_R = torch.tensor(lengths, device=device)
        self.every_R = torch.arange(self.rows, device=device)
        self.patch_RTP = torch.zeros(self.rows, total, model.config.patch_width, dtype=torch.uint8, device=device)
        row_N = np.concatenate([np.full(len(prompt.patches), row) for row, prompt in enumerate(prompts)])
        slot_N = np.concatenate([np.flatnonzero(prompt.rows) for prompt in prompts])
        patches_NP = np.concatenate([prompt.patches for prompt in prompts])
        row, slot, patches = (torch.from_numpy(x).to(device) for x in (row_N, slot_N, patches_NP))
        self.patch_RTP[row, slot] = patches
        self.noise: dict[int, Tensor] = {}
        """Of the patches of the image that each sample draws, (patches, P)."""
        self.key: dict[int, Tensor] = {}
        """Of the noise that some samplers add to these patches (model.noise), (patches,)."""
        self._active: list[bool] = []
        seen: dict[bytes, int] = {}
        contents = (columns_5RT[:, r, :length].tobytes() + prompt.patches.tobytes()
                    for r, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)))  # fmt: skip
        self.read(lengths, [seen.setdefault(content, row) for row, content in enumerate(contents)])

    def read(self, lengths: list[int], like: list[int]) -> None:
        """Read all that was written so far, anew. lengths: slots of every row. like: a row that holds the same as each;
        it is read once for all of them."""
        model, device = self.model, self.length_R.device
        self.longest, end = max(lengths), _rounded_up(max(lengths))
        own = sorted(set(like))
        place = {row: number for number, row in enumerate(own)}
        own += own[-1:] * (-len(own) % ROW_MULTIPLE)
        read_U = torch.tensor(own, device=device)
        slots, valid = slice(0, end), torch.arange(end) < torch.tensor(lengths)[own, None]
        is_patch_US = (self.rows_RT[read_U, slots] > 0) & valid.to(device)
        patches_NP = self.patch_RTP[read_U, slots][is_patch_US]
        # embed leaves the surplus unused
        pixels_NP = to_pixels(pad(patches_NP, (0, 0, 0, -len(patches_NP) % ROW_MULTIPLE)))
        x_USD = model.embed(self.token_RT[read_U, slots], is_patch_US, pixels_NP)
        angles = model.rotation(self.positions_RT2[read_U, slots])
        documents = Documents.of(valid.long(), KEY_MULTIPLE, model.config.block).to(device)
        documents = model.attended(documents, self.grid(read_U, slots))
        hidden_USD, states = model.backbone.prefill(x_USD, angles, documents)
        copies = [place[row] for row in like]
        copy_R = torch.tensor(copies, device=device)
        if copies != list(range(len(own))):
            for state in states:
                for name, value in vars(state).items():
                    setattr(state, name, value.index_select(0, copy_R))
        self.states = states
        self.hidden_RD = hidden_USD[copy_R, self.length_R - 1]

    def grid(self, row_X: slice | list[int] | Tensor, slots: slice = slice(None)) -> Grid:
        columns = [column[row_X, slots] for column in (self.row_RT, self.col_RT, self.rows_RT, self.cols_RT)]
        index_XT = torch.arange(1, columns[0].shape[1] + 1, device=columns[0].device).expand_as(columns[0])
        return Grid(index_XT, *columns)

    def begin_images(self, samples: list[int], writers: Sequence[Writer]) -> None:
        """Write down the slots of all patches of the images that these samples have announced."""
        device = self.length_R.device
        for rows, cols in {(writers[b].rows, writers[b].cols) for b in samples}:
            alike = [b for b in samples if (writers[b].rows, writers[b].cols) == (rows, cols)]
            every = [first + b for first in self.firsts for b in alike]
            ordinal_N = torch.arange(rows * cols, device=device)
            slot_XN = self.length_R[every].unsqueeze(1) + ordinal_N
            row_X1 = torch.tensor(every, device=device).unsqueeze(1)
            self.token_RT[row_X1, slot_XN] = self.model.vocabulary.patch
            columns = (self.row_RT, self.col_RT, self.rows_RT, self.cols_RT)
            for column_RT, values_N in zip(columns, places(rows, cols, device).unbind(1), strict=True):
                column_RT[row_X1, slot_XN] = values_N
            self.positions_RT2[every] = self.model.positions(self.grid(every))
            key_X1 = torch.tensor([[writers[b].image_key] for b in alike], device=device)
            self.key |= dict(zip(alike, fold(key_X1, ordinal_N), strict=True))
        self.noise |= {b: writers[b].noise_NP().to(device) for b in samples}

    def put(self, tokens: dict[int, int]) -> None:
        """Write tokens into the next slots of samples."""
        if tokens:
            samples, values = (torch.tensor(list(x), device=self.length_R.device) for x in (tokens, tokens.values()))
            for first in self.firsts:
                self.token_RT[first + samples, self.length_R[first + samples]] = values

    def advance(self, draws: list[int], tokens: dict[int, int]) -> None:
        """Read the slot that was written in the rows of these samples; text enters the first stream only. The other
        rows compute on junk that the next slot replaces."""
        active = [False] * self.rows
        for first in self.firsts:
            for b in (*draws, *(b for b, token in tokens.items() if not first or token >= self.model.vocabulary.pad)):
                active[first + b] = True
        if active != self._active:
            self._active, self.active_R = active, torch.tensor(active, device=self.length_R.device)
        every_R, length_R, reach = self.every_R, self.length_R, rounded_up(self.longest + 1)
        for state in self.states:
            state.reserve(reach, self.token_RT.shape[1])
        hidden = self.model.step(
            self.token_RT[every_R, length_R], self.patch_RTP[every_R, length_R] if draws else None,
            self.rows_RT[every_R, length_R] > 0, self.positions_RT2[every_R, length_R], length_R,
            reach, self.states,
        )  # fmt: skip
        self.hidden_RD = torch.where(self.active_R[:, None], hidden, self.hidden_RD)
        self.length_R = self.length_R + self.active_R
        self.longest += 1

    def drawn(self) -> np.ndarray:
        """Patches by sample and slot of its first stream, (B, T, P) uint8, on the host."""
        return self.patch_RTP[: self.rows // len(self.firsts)].cpu().numpy()


def places(rows: int, cols: int, device: torch.device) -> Tensor:
    """row, col (1-based), rows, cols of every patch of an image in order, (N, 4)."""
    ordinal_N = torch.arange(rows * cols, device=device)
    sizes = (torch.full_like(ordinal_N, size) for size in (rows, cols))
    return torch.stack((ordinal_N // cols + 1, ordinal_N % cols + 1, *sizes), dim=1)


def _new_slots(request: Request) -> int:
    patches = request.grid[0] * request.grid[1] if request.grid else request.max_patches
    return request.max_text + request.max_images * (patches + 4) + 1


def _rounded_up(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def _without_text(prompt: Prompt, first_special: int) -> Prompt:
    keep = prompt.token >= first_special
    columns = {name: getattr(prompt, name)[keep] for name in ("token", *_PLACE)}
    return Prompt(**columns, patches=prompt.patches)


def _beginning(prompt: Prompt) -> Prompt:
    """<bos> alone."""
    columns = {name: getattr(prompt, name)[:1] for name in ("token", *_PLACE)}
    return Prompt(**columns, patches=prompt.patches[:0])
