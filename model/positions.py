"""Unified positions of text and image patches: every layout maps the columns of a row to two float32 coordinates.

L is the number of text-equivalent tokens already placed in the document; an image has h rows and w columns of patches,
x = 1..h, y = 1..w. Text token n sits at (n, n), so pure text is exactly RoPE-1D in every layout.

    layout     patch (x, y)                                             running L after the image
    flatten    (i, i), i the index in the document                      L + wh
    tie        (L + x(w+1), L + y(h+1))                                 L + (w+1)(h+1) - 1
    tie_frac   (L + x(wh+1)/(h+1), L + y(wh+1)/(w+1))                   L + wh
    tv         (L + (wh-h)/2 + x, L + (wh-w)/2 + y)                     L + wh
    mrope      (L + x, L + y)                                           L + max(h, w)

Sources: Su Jianlin, spaces.ac.cn/archives/10040 (RoPE-Tie), /10352 (RoPE-TV, and M-RoPE of Qwen2-VL).
`python -m model.positions --layout tv "T2 I2x2 T1"` prints a table.
"""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """What positions depend on, each (B, S) integer: index is 1-based in its document (0 in padding);
    row, col are 1-based in patch slots; row, col, rows, cols are 0 in all other slots."""

    index_BS: Tensor
    row_BS: Tensor
    col_BS: Tensor
    rows_BS: Tensor
    cols_BS: Tensor


def flatten(grid: Grid) -> Tensor:
    """RoPE-1D over the raster order. Returns (B, S, 2) float32."""
    return _stack(grid.index_BS, grid.index_BS)


def tie(grid: Grid) -> Tensor:
    """RoPE-Tie with integer spacing. Returns (B, S, 2) float32."""
    height, width = grid.rows_BS, grid.cols_BS
    placed_BS = _placed(grid, (width + 1) * (height + 1) - 1 - width * height)
    return _stack(placed_BS + grid.row_BS * (width + 1), placed_BS + grid.col_BS * (height + 1), grid, placed_BS)


def tie_frac(grid: Grid) -> Tensor:
    """RoPE-Tie with real spacing, so that an image spans its number of patches. Returns (B, S, 2) float32."""
    height, width = grid.rows_BS.float(), grid.cols_BS.float()
    placed_BS = _placed(grid)
    span = width * height + 1
    p1 = placed_BS + grid.row_BS * span / (height + 1)
    p2 = placed_BS + grid.col_BS * span / (width + 1)
    return _stack(p1, p2, grid, placed_BS)


def tv(grid: Grid) -> Tensor:
    """RoPE-TV (RoPE-Tie-v2): unit spacing, centred on the image's share of the sequence. Returns (B, S, 2) float32."""
    placed_BS = _placed(grid)
    p1, p2 = centred(placed_BS, (grid.row_BS, grid.col_BS), (grid.rows_BS, grid.cols_BS))
    return _stack(p1, p2, grid, placed_BS)


def centred(placed: Tensor, coordinates: Sequence[Tensor], sides: Sequence[Tensor]) -> list[Tensor]:
    """RoPE-TV of a block behind `placed` text-equivalents: coordinate x (1-based) along a side of length h is at
    L + (n - h) / 2 + x, n being the number of slots of the block. Two sides for an image, three for a video."""
    slots = math.prod(sides)
    return [placed + (slots - side).float() / 2 + x for x, side in zip(coordinates, sides, strict=True)]


def mrope(grid: Grid) -> Tensor:
    """M-RoPE: unit spacing from the corner; text goes on after the longer side. Returns (B, S, 2) float32."""
    height, width = grid.rows_BS, grid.cols_BS
    placed_BS = _placed(grid, torch.maximum(height, width) - width * height)
    return _stack(placed_BS + grid.row_BS, placed_BS + grid.col_BS, grid, placed_BS)


LAYOUTS: dict[str, Callable[[Grid], Tensor]] = {f.__name__: f for f in (flatten, tie, tie_frac, tv, mrope)}
"""Every layout by name. A new one is one function added here; tests/model/test_positions.py tests it."""


def _placed(grid: Grid, extra_BS: Tensor | None = None) -> Tensor:
    """L of each slot: for a patch the text-equivalents before its image, for text its own index less one.

    extra_BS: how much further than its number of patches an image moves the text behind it, constant over the image.
    """
    is_patch = grid.rows_BS > 0
    raster_BS = torch.where(is_patch, (grid.row_BS - 1) * grid.cols_BS + grid.col_BS, 1)
    placed_BS = grid.index_BS - raster_BS
    if extra_BS is None:
        return placed_BS
    ends = is_patch & (grid.row_BS == grid.rows_BS) & (grid.col_BS == grid.cols_BS)
    added_BS = torch.where(ends, extra_BS, 0)
    before_BS = added_BS.cumsum(1) - added_BS
    # What was added in earlier documents of the row is subtracted: positions restart with each document.
    slot_BS = torch.arange(grid.index_BS.shape[1], device=added_BS.device).expand_as(grid.index_BS)
    start_BS = torch.where(grid.index_BS > 0, slot_BS - grid.index_BS + 1, slot_BS)
    return placed_BS + before_BS - before_BS.gather(1, start_BS)


def _stack(p1_BS: Tensor, p2_BS: Tensor, grid: Grid | None = None, placed_BS: Tensor | None = None) -> Tensor:
    if grid is not None and placed_BS is not None:
        is_patch = grid.rows_BS > 0
        p1_BS = torch.where(is_patch, p1_BS, placed_BS + 1)
        p2_BS = torch.where(is_patch, p2_BS, placed_BS + 1)
    return torch.stack((p1_BS.float(), p2_BS.float()), dim=-1)


def parse_document(text: str) -> Grid:
    """Columns of one document written as "T2 I2x3 T1": two tokens, an image of 2 rows and 3 columns, one token."""
    columns: list[tuple[int, int, int, int]] = []
    for word in text.split():
        match = re.fullmatch(r"T([1-9]\d*)|I([1-9]\d*)x([1-9]\d*)", word)
        if not match:
            raise ValueError(f"{word!r} is neither text such as T2 nor an image such as I2x3 (rows x columns)")
        if match[1]:
            columns += [(0, 0, 0, 0)] * int(match[1])
        else:
            height, width = int(match[2]), int(match[3])
            columns += [(x + 1, y + 1, height, width) for x in range(height) for y in range(width)]
    if not columns:
        raise ValueError("the document is empty; write for example 'T2 I2x2 T1'")
    row, col, rows, cols = torch.tensor(columns).T.unsqueeze(1)
    return Grid(torch.arange(1, len(columns) + 1).unsqueeze(0), row, col, rows, cols)


def main() -> None:
    """Print the positions of a document, one line per slot: slot, kind, p1, p2."""
    parser = argparse.ArgumentParser(prog="python -m model.positions", description=main.__doc__)
    parser.add_argument("--layout", default="tv", choices=LAYOUTS, help="position layout (default: tv)")
    parser.add_argument("document", help='for example "T2 I2x2 T1": two tokens, an image of 2x2 patches, one token')
    arguments = parser.parse_args()
    try:
        grid = parse_document(arguments.document)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print("slot kind p1 p2")
    for slot, (p1, p2) in enumerate(LAYOUTS[arguments.layout](grid)[0].tolist()):
        print(slot + 1, "image" if grid.rows_BS[0, slot] else "text", f"{p1:g}", f"{p2:g}")


if __name__ == "__main__":
    main()
