"""Attention over packed rows: documents gathered by length against one mask over the row, side by side."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.report import Result, Row
from model.attention.dense import DenseAttention
from model.attention.documents import Documents
from model.positions import LAYOUTS, Grid
from model.rope import Rotation, frequencies, rotate, rotation

_HEADS, _WIDTH = 4, 32


def run(lengths: list[int] | None = None, document: int = 30, slots: int = 4096, rounds: int = 5) -> Result:
    """Forward and backward of one attention layer (4 heads of 32) over rows full of short documents.

    Args:
        lengths: lengths of the rows; default 256, 1024, 4096.
        document: slots of a document, give or take a third.
        slots: slots of a batch; a row that is longer makes a batch of one.
        rounds: timed rounds; in each one both kinds take their turn.
    """
    lengths = lengths or [256, 1024, 4096]
    rows: list[Row] = []
    summary: list[Row] = []
    for length in lengths:
        calls = _calls(length, document, max(1, slots // length))
        torch.testing.assert_close(*(call() for call in calls.values()), rtol=1e-4, atol=1e-4)
        seconds: dict[str, list[float]] = {kind: [] for kind in calls}
        for _ in range(rounds):
            for kind, call in calls.items():
                began = time.perf_counter()
                call()
                seconds[kind].append(time.perf_counter() - began)
        for kind, taken in seconds.items():
            rows += [
                {"kind": kind, "device": "cpu", "pass": "forward+backward", "length": length, "seconds": s}
                for s in taken
            ]
        ratios = [mask / grouped for mask, grouped in zip(seconds["mask"], seconds["gathered"], strict=True)]
        summary.append(
            {
                "row length": length,
                "gathered, ms": 1e3 * statistics.median(seconds["gathered"]),
                "mask, ms": 1e3 * statistics.median(seconds["mask"]),
                "mask / gathered": statistics.median(ratios),
                "smallest": min(ratios),
                "largest": max(ratios),
            }
        )
    notes = (
        f"Documents of about {document} slots, batches of about {slots} slots, {torch.get_num_threads()} thread(s), "
        "float32. Both give the same output and gradient to 1e-4, checked before the timing."
    )
    figure = Figure(figsize=(5, 3.5))
    axis = figure.subplots()
    for kind in ("gathered", "mask"):
        axis.plot(lengths, [float(row[f"{kind}, ms"] or 0) for row in summary], marker="o", label=kind)
    axis.set(xlabel="row length in slots", ylabel="ms", xscale="log", yscale="log", title="attention over packed rows")
    axis.legend()
    return Result("packing", rows, summary, notes, figure)


def _calls(length: int, document: int, batch: int) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward of both kinds on the same rows; each call returns the gradient of the queries."""
    generator = torch.Generator().manual_seed(0)
    document_BS = torch.zeros(batch, length, dtype=torch.long)
    for row in document_BS:
        start, number = 0, 1
        while start < length:
            end = start + int(torch.randint(document * 2 // 3, document * 4 // 3 + 1, (1,), generator=generator))
            row[start:end] = number
            start, number = end, number + 1
    q, k, v = (torch.randn(batch, length, _HEADS, _WIDTH, generator=generator, requires_grad=True) for _ in range(3))
    angles = _angles(document_BS)
    kind = DenseAttention(_WIDTH)

    def gathered() -> Tensor:
        # Finding the documents is part of the price; the model pays it once per batch for all layers.
        out, _ = kind(q, k, v, angles, Documents.of(document_BS))
        return torch.autograd.grad(out.square().sum(), q)[0]

    def mask() -> Tensor:
        allowed_BSS = (document_BS[:, :, None] == document_BS[:, None, :]).tril()
        turned = (x.transpose(1, 2) for x in (rotate(q, angles), rotate(k, angles), v))
        query, key, value = turned
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed_BSS[:, None])
        return torch.autograd.grad(out.square().sum(), q)[0]

    return {"gathered": gathered, "mask": mask}


def _angles(document_BS: Tensor) -> Rotation:
    index_BS = torch.arange(1, document_BS.shape[1] + 1).expand_as(document_BS)
    zero = torch.zeros_like(document_BS)
    positions = LAYOUTS["flatten"](Grid(index_BS, zero, zero, zero, zero))
    return rotation(positions, frequencies(_WIDTH, 10000.0, "alternate", document_BS.device))
