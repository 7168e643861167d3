"""Softmax attention over all keys against Transformer-VQ: training and decoding, time and memory, by length."""

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.report import Result, Row
from model.attention.codebook import VQConfig
from model.attention.dense import DenseAttention, DenseState, rounded_up
from model.attention.documents import Documents
from model.attention.vq import VQAttention
from model.rope import Rotation, frequencies, rotation
from train.ranks import keep_freed_memory, pick_device

_TRAIN, _DECODE = "forward+backward", "decode"
_BASE = {_TRAIN: 8192, _DECODE: 1024}
"""The length from which on the cost per slot shall not grow."""
_BANDS: dict[str, Literal["strict", "block"]] = {"vq": "strict", "vq block": "block"}


def run(
    lengths: list[int] | None = None,
    decode_lengths: list[int] | None = None,
    dense_up_to: int = 32768,
    heads: int = 8,
    width: int = 64,
    codes: int = 256,
    window: int = 256,
    chunk_blocks: int = 32,
    recompute_chunks: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    rounds: int = 5,
    steps: int = 300,
) -> Result:
    """One attention layer over rows of a single document, with random queries, keys and values.

    Args:
        lengths: slots of the row for forward and backward; default 1024, 2048, ..., 131072.
        decode_lengths: slots that are held when one more is decoded; default 1024, 8192, 32768, 131072.
        dense_up_to: longest row that dense attention is trained on with all heads. Beyond, one head is trained, once,
            and counts as often as there are heads, which are computed one by one.
        heads: query and key/value heads. width: of a head.
        codes: codewords. window, chunk_blocks, recompute_chunks: see model.vq. Both bands take part.
        dtype: of queries, keys and values.
        device: cpu, cuda or auto.
        rounds: timed rounds; in each one all kinds take their turn at all lengths.
        steps: decoded slots per round.
    """
    place, kind_of = pick_device(device), getattr(torch, dtype)
    keep_freed_memory()  # as training does
    lengths = lengths or [2**n for n in range(10, 18)]
    decode_lengths = decode_lengths or [1024, 8192, 32768, 131072]
    kinds: dict[str, nn.Module] = {"dense": DenseAttention(width)}
    for name, band in _BANDS.items():
        config = VQConfig(codes, window, band, chunk_blocks=chunk_blocks, recompute_chunks=recompute_chunks)
        vq = VQAttention(width, heads, 10000.0, "alternate", config)
        torch.manual_seed(0)
        vq.codebook.initialise()
        kinds[name] = vq.to(place)
    rows: list[Row] = []
    longest = _inputs(max(lengths), heads, width, kind_of, place)
    for number in tqdm(range(-1, rounds), _TRAIN, unit="round"):
        for length in lengths:
            for name, kind in kinds.items():
                if name != "dense" or length <= dense_up_to:
                    rows += _timed(_training(kind, longest, length), name, _TRAIN, length, number, place)
                elif number == 0:
                    one_head = _training(kind, [x[:, :, :1].contiguous() for x in longest], length)
                    (row,) = _timed(one_head, name, _TRAIN, length, number, place)
                    rows.append(
                        row | {key: heads * float(row[key] or 0) for key in ("seconds", "bytes")} | {"heads": 1}
                    )
    del longest
    calls = {(name, length): _decoding(kind, length, heads, width, kind_of, place, steps)
             for name, kind in kinds.items() for length in decode_lengths}  # fmt: skip
    for number in tqdm(range(-1, rounds), _DECODE, unit="round"):
        for (name, length), call in calls.items():
            rows += _timed(call, name, _DECODE, length, number, place, steps)
    summary = [*_summary(rows, _TRAIN, lengths), *_summary(rows, _DECODE, decode_lengths)]
    notes = (
        f"{heads} heads of {width}, {codes} codewords, window {window}, strict and block band, {dtype}, batch 1, "
        f"{torch.get_num_threads()} thread(s). Times: medians of {rounds} round(s), in each of which all kinds "
        "take their turn at all lengths; ratios: medians of those within rounds. Growth: cost per slot over that at "
        f"{_base(_TRAIN, lengths)} slots, decoding at {_base(_DECODE, decode_lengths)}. Decoding: per slot. Memory: "
        f"{'the peak' if place.type == 'cuda' else 'what autograd keeps for the backward pass'}, and the decode "
        "state. Forward and backward includes the search for the nearest codewords and the codebook's sums. "
        f"Dense beyond {dense_up_to} slots is extrapolated: one head, once, times {heads}. Its decode state holds "
        f"random keys. {_findings(summary)}"
    )
    return Result("attention", rows, summary, notes, _figure(summary), device=place)


def _inputs(length: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Queries, keys, values, and the gradient of the output."""
    return [torch.randn(1, length, heads, width, dtype=dtype, device=device) for _ in range(4)]


def _training(kind: nn.Module, longest: list[Tensor], length: int) -> Callable[[], int]:
    """Forward and backward over the first slots of a row; the call returns bytes."""
    *inputs, weight = (x[:, :length] for x in longest)
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    device = q.device
    angles = _angles(length, q.shape[-1], device)
    documents = Documents.of(torch.ones(1, length, dtype=torch.long)).to(device)

    def call() -> int:
        kept: dict[int, int] = {}
        inputs = {x.untyped_storage().data_ptr() for x in longest}

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            own = x.nbytes if storage.data_ptr() in inputs else storage.nbytes()
            kept[storage.data_ptr()] = max(own, kept.get(storage.data_ptr(), 0))
            return x

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out, _ = kind(q, k, v, angles, documents)
        torch.autograd.grad(out, (q, k, v), weight)
        return torch.cuda.max_memory_allocated() - before if device.type == "cuda" else sum(kept.values())

    return call


@torch.no_grad()
def _decoding(kind: nn.Module, length: int, heads: int, width: int, dtype: torch.dtype, device: torch.device,
              steps: int) -> Callable[[], int]:  # fmt: skip
    """`steps` slots more than `length`; the call returns the bytes of the state."""
    state: Any
    if isinstance(kind, VQAttention):
        q, k, v = torch.randn(3, 1, length, heads, width, dtype=dtype, device=device)
        documents = Documents.of(torch.ones(1, length, dtype=torch.long)).to(device)
        _, state = kind.eval().prefill(q, k, v, _angles(length, width, device), documents)
        kind.train()
    else:
        state = DenseState(*torch.randn(2, 1, heads, rounded_up(length + steps), width, dtype=dtype, device=device))
    one = torch.randn(3, 1, 1, heads, width, dtype=dtype, device=device)
    angles = _angles(1, width, device)

    @torch.no_grad()
    def call() -> int:
        for step in range(length, length + steps):
            kind.step(*one, angles, torch.tensor([step], device=device), rounded_up(step + 1), state)  # type: ignore[operator]
        if isinstance(kind, VQAttention):
            state.summed_B = (state.summed_B - steps).clamp(min=0)  # the next round decodes the same slots
        return sum(x.nbytes for x in vars(state).values())

    return call


def _timed(call: Callable[[], int], name: str, what: str, length: int, number: int, device: torch.device,
           parts: int = 1) -> list[Row]:  # fmt: skip
    """The row of one call in round `number`; none in the first, -1, which warms up."""
    _wait(device)
    began = time.perf_counter()
    size = call()
    _wait(device)
    seconds = (time.perf_counter() - began) / parts
    row: Row = {"kind": name, "device": device.type, "pass": what, "length": length, "round": number,
                "seconds": seconds, "bytes": size}  # fmt: skip
    return [row] if number >= 0 else []


def _summary(rows: list[Row], what: str, lengths: list[int]) -> list[Row]:
    table: list[Row] = []
    base = _base(what, lengths)
    for length in lengths:
        found: Row = {"pass": what, "length": length}
        seconds = {name: _rounds(rows, what, name, length, "seconds") for name in ("dense", *_BANDS)}
        for name, mine in seconds.items():
            found[f"{name}, ms"] = 1e3 * statistics.median(mine)
            found[f"{name}, MB"] = _rounds(rows, what, name, length, "bytes")[0] / 1e6
        for name in _BANDS:
            slots, base_slots = (length, base) if what == _TRAIN else (1, 1)
            found[f"dense / {name}"] = _ratio(seconds["dense"], seconds[name])
            found[f"{name}, us per slot"] = 1e3 * _ms(found, name) / slots
            growth = _ratio(seconds[name], _rounds(rows, what, name, base, "seconds")) * base_slots / slots
            found[f"{name}, growth"] = growth
        table.append(found)
    return table


def _base(what: str, lengths: list[int]) -> int:
    """The length that growth is relative to: the first that is long enough."""
    return next((length for length in lengths if length >= _BASE[what]), lengths[0])


def _rounds(rows: list[Row], what: str, name: str, length: int, key: str) -> list[float]:
    return [float(row[key] or 0) for row in rows if (row["pass"], row["kind"], row["length"]) == (what, name, length)]


def _ratio(one: list[float], other: list[float]) -> float:
    """Median of the ratios within rounds, which drift of the machine hardly changes. What was measured in one round
    only is compared with the median of the other's rounds."""
    if len(one) != len(other):
        return statistics.median(one) / statistics.median(other)
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def _ms(row: Row, name: str) -> float:
    return float(row[f"{name}, ms"] or 0)


def _findings(summary: list[Row]) -> str:
    """Where VQ begins to be faster, and how its cost per slot changes between the lengths that are to be compared."""
    said = []
    for name in _BANDS:
        trained = [row for row in summary if row["pass"] == _TRAIN]
        slower = [number for number, row in enumerate(trained) if _ms(row, "dense") <= _ms(row, name)]
        faster = trained[slower[-1] + 1 if slower else 0 :]
        said.append(f"{name} trains faster from {faster[0]['length']} slots on." if faster
                    else f"{name} is not faster at {trained[-1]['length']} slots.")  # fmt: skip
        for what in _BASE:
            mine = [row for row in summary if row["pass"] == what]
            last, base = mine[-1], _base(what, [int(row["length"] or 0) for row in mine])
            said.append(f"Its {what} costs {float(last[f'{name}, growth'] or 0) - 1:+.0%} per slot at {last['length']} "
                        f"slots, against {base}.")  # fmt: skip
    return " ".join(said)


def _figure(summary: list[Row]) -> Figure:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axis, what in zip(figure.subplots(1, 2), (_TRAIN, _DECODE), strict=True):
        for name in ("dense", *_BANDS):
            points = [(row["length"], row[f"{name}, ms"]) for row in summary if row["pass"] == what]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xlabel="slots", ylabel="ms", xscale="log", yscale="log", title=what)
        axis.legend()
    return figure


def _angles(length: int, width: int, device: torch.device) -> Rotation:
    positions = torch.arange(1.0, length + 1, device=device)[None, :, None].expand(1, length, 2)
    return rotation(positions, frequencies(width, 10000.0, "alternate", device))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
