"""Rows, models and slow references that the tests of the model share. No reference calls the code under test."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from model.attention import KINDS
from model.attention.codebook import Codebook, VQConfig
from model.batch import Batch
from model.config import HeadConfig, ModelConfig, Vocabulary
from model.ropeway import Ropeway

VOCABULARY = Vocabulary(
    size=38, pad=16, bos=17, eos=18, boi=19, eoi=20, patch=21, first_row=22, first_col=30, max_grid=8
)
COLUMNS = ("token", "document", "index", "row", "col", "rows", "cols", "learn")


class Words(NamedTuple):
    """Text of a test document."""

    tokens: list[int]
    learn: bool = True


class Picture(NamedTuple):
    """An image of a test document: patches is (rows * cols, P) uint8."""

    rows: int
    cols: int
    patches: np.ndarray
    learn: bool = True


Document = list[Words | Picture]


@dataclass
class Row:
    """One packed row with the column names that Batch.collate reads."""

    token: np.ndarray
    document: np.ndarray
    index: np.ndarray
    row: np.ndarray
    col: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    learn: np.ndarray
    patches: np.ndarray


def picture(rng: np.random.Generator, rows: int, cols: int, patch_size: int = 2, learn: bool = True) -> Picture:
    return Picture(rows, cols, rng.integers(0, 256, (rows * cols, 3 * patch_size**2), dtype=np.uint8), learn)


def random_document(rng: np.random.Generator, patch_size: int = 2, longest: int = 3) -> Document:
    document: Document = []
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.5:
            document.append(Words(rng.integers(0, VOCABULARY.pad, rng.integers(1, 6)).tolist()))
        else:
            document.append(picture(rng, *(int(n) for n in rng.integers(1, longest + 1, 2)), patch_size=patch_size))
    return document


def slots_of(document: Document, vocabulary: Vocabulary = VOCABULARY) -> list[tuple[int, int, int, int, int, bool]]:
    """(token, row, col, rows, cols, learn) of every slot, as the sequence layout of the design has it."""
    slots = [(vocabulary.bos, 0, 0, 0, 0, False)]
    for segment in document:
        if isinstance(segment, Words):
            slots += [(token, 0, 0, 0, 0, segment.learn) for token in segment.tokens]
            continue
        height, width, learn = segment.rows, segment.cols, segment.learn
        for token in (vocabulary.boi, vocabulary.first_row + height - 1, vocabulary.first_col + width - 1):
            slots.append((token, 0, 0, 0, 0, learn))
        for x in range(1, height + 1):
            for y in range(1, width + 1):
                slots.append((vocabulary.patch, x, y, height, width, learn))
        slots.append((vocabulary.eoi, 0, 0, 0, 0, learn))
    return [*slots, (vocabulary.eos, 0, 0, 0, 0, True)]


def pack(documents: list[Document], length: int | None = None, patch_size: int = 2) -> Row:
    """Documents one behind the other, then padding."""
    values: list[tuple] = []
    for number, document in enumerate(documents, start=1):
        for index, (token, *place, learn) in enumerate(slots_of(document), start=1):
            values.append((token, number, index, *place, learn))
    length = len(values) if length is None else length
    assert len(values) <= length
    values += [(VOCABULARY.pad, 0, 0, 0, 0, 0, 0, False)] * (length - len(values))
    columns = {
        name: np.array(column, dtype=bool if name == "learn" else np.int32)
        for name, column in zip(COLUMNS, zip(*values, strict=True), strict=True)
    }
    images = [segment.patches for document in documents for segment in document if isinstance(segment, Picture)]
    empty = np.zeros((0, 3 * patch_size**2), np.uint8)
    return Row(**columns, patches=np.concatenate([empty, *images]))


def batch_of(*rows: list[Document], length: int | None = None, patch_size: int = 2) -> Batch:
    """A batch whose rows hold these documents; the rows are padded to the longest, or to length."""
    longest = length or max(sum(len(slots_of(document)) for document in row) for row in rows)
    return Batch.collate([pack(row, longest, patch_size) for row in rows], seeds=range(100, 100 + len(rows)))


def tiny_config(**changes: object) -> ModelConfig:
    settings: dict = {
        "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "patch_size": 2,
        "head": HeadConfig(width=24, depth=2, draws=2),
        "vq": VQConfig(codes=12, window=5),  # so short that documents reach beyond it
    }  # fmt: skip
    return ModelConfig(**(settings | changes))


def make_kind(name: str, heads: int, kv_heads: int, width: int) -> nn.Module:
    """A kind of attention by name, its codebook initialised."""
    kind = KINDS[name](tiny_config(dim=heads * width, num_heads=heads, num_kv_heads=kv_heads))
    for module in kind.modules():
        if isinstance(module, Codebook):
            torch.manual_seed(0)
            module.initialise()
    return kind


def build(config: ModelConfig | None = None, seed: int = 0, silent: bool = False) -> Ropeway:
    """An initialised model. Unless silent, the layers that start at zero are filled too, so that nothing is hidden."""
    model = Ropeway(config or tiny_config(), VOCABULARY)
    model.initialise(seed)
    if not silent:
        fill(model, seed)
    return model


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> None:
    """Give every constant parameter (zeros, ones) some noise."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.numel() > 1 and parameter.std() == 0:
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter += scale * torch.randn(parameter.shape, generator=generator)


@dataclass
class Recorder:
    """Calls a function and keeps what it returned."""

    function: object
    results: list = field(default_factory=list)

    def __call__(self, *arguments: object, **named: object) -> object:
        self.results.append(self.function(*arguments, **named))  # type: ignore[operator]
        return self.results[-1]


def turn_by_complex_numbers(x: Tensor, p1: float, p2: float, base: float = 10000.0) -> Tensor:
    """Rotate one head vector in float64: pair i = (i, i + E/2) is a complex number, times exp(1j * p * theta_i)."""
    pairs = len(x) // 2
    z = torch.complex(x[:pairs].double(), x[pairs:].double())
    angle = torch.tensor([(p2 if i % 2 else p1) * base ** (-2 * i / len(x)) for i in range(pairs)], dtype=torch.float64)
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag))


def slow_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, document: Tensor) -> Tensor:
    """Softmax attention in float64, slot by slot and head by head. q (S, H, E), k, v (S, K, E), document (S,)."""
    num_slots, num_heads, width = q.shape
    share = num_heads // k.shape[1]
    out = []
    for i in range(num_slots):
        seen = [j for j in range(i + 1) if document[j] == document[i] and document[i] > 0]
        for head in range(num_heads):
            if not seen:
                out.append(torch.zeros(width, dtype=torch.float64))
                continue
            query = turn_by_complex_numbers(q[i, head], *positions[i].tolist())
            keys = torch.stack([turn_by_complex_numbers(k[j, head // share], *positions[j].tolist()) for j in seen])
            weight = (keys @ query / math.sqrt(width)).softmax(0)
            out.append(weight @ v[seen, head // share].double())
    return torch.stack(out).view(num_slots, num_heads, width)


def slow_vq(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, document: Tensor, codewords: Tensor, window: int,
            band: str = "strict", through_cache: bool = True, base: float = 10000.0) -> Tensor:  # fmt: skip
    """Softmax over all keys of the document, each replaced by its nearest codeword, in float64 and quadratic time.

    q (S, H, E), k, v (S, K, E), positions (S, 2), document (S,), codewords (K, C, E). In the band both sides are
    rotated to their positions, beyond it the query by window + 1. Gradients pass codewords straight through in the
    band, and not at all beyond it.
    """
    q, k, v, codewords = q.double(), k.double(), v.double(), codewords.double()
    num_slots, num_heads, width = q.shape
    share, pairs = num_heads // k.shape[1], width // 2
    theta = torch.tensor([base ** (-2 * i / width) for i in range(pairs)], dtype=torch.float64)
    even = torch.arange(pairs) % 2 == 0
    angle = torch.where(even, positions[:, :1].double(), positions[:, 1:].double()) * theta

    def turned(x: Tensor, angle: Tensor) -> Tensor:
        z = torch.complex(x[:, :pairs], x[:, pairs:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), dim=1)

    start = torch.tensor([int((document == d).nonzero()[0]) for d in document.tolist()])
    index = torch.arange(num_slots) - start
    i, j = index[:, None], index[None, :]
    near = i - j <= window if band == "strict" else i // window - j // window <= 1
    seen = (document[:, None] == document[None, :]) & (document > 0)[:, None] & (i >= j)
    out = []
    for head in range(num_heads):
        key, value = k[:, head // share], v[:, head // share]
        words = codewords[head // share]
        word = words[((key.detach()[:, None] - words) ** 2).sum(-1).argmin(1)]
        near_score = turned(q[:, head], angle) @ turned(word + key - key.detach(), angle).T
        far_score = turned(q[:, head], (window + 1) * theta.expand_as(angle)) @ word.T
        score = torch.where(near, near_score, far_score) / math.sqrt(width)
        weight = score.masked_fill(~seen, -torch.inf).softmax(1).nan_to_num(0)
        far_value = value if through_cache else value.detach()
        out.append((weight * near) @ value + (weight * ~near) @ far_value)
    return torch.stack(out, dim=1)
