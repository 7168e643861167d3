"""From a trained model to pictures and text: the one path of training samples, evaluation, command line and demo."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data.document import Document, Image, Text
from data.encode import Encoder
from data.image import unpatchify
from data.tokenizer import Tokenizer
from model.diffusion.guidance import Guidance
from model.generate import generate
from model.ropeway import Ropeway
from model.sampling import Sampling
from model.writer import GeneratedText, Prompt, Request
from train import checkpoint
from train.config import Config
from train.pipeline import make_encoder, vocabulary_of
from train.precision import autocast, bf16_units
from train.ranks import keep_freed_memory, pick_device

Segment = Text | Image


@dataclass(frozen=True)
class Order:
    """One sample to make: a document to go on from, and what may follow."""

    document: Document
    seed: int
    begin_image: bool = False
    """Start a picture at once."""
    size: tuple[int, int] | None = None
    """Height and width of every picture in pixels; None lets the model choose."""
    max_images: int = 1
    max_text: int = 256
    """Tokens of text at most."""


class Generator:
    """A model with its tokenizer and patch grid."""

    def __init__(self, model: Ropeway, tokenizer: Tokenizer, encoder: Encoder, bf16: bool = False) -> None:
        self.model, self.tokenizer, self.encoder, self.bf16 = model, tokenizer, encoder, bf16

    @classmethod
    def load(cls, place: str | Path, weights: Literal["ema", "raw"] = "ema", device: str = "auto",
             compiled: bool = False) -> "Generator":  # fmt: skip
        """From a run folder (its latest checkpoint) or a checkpoint folder. Raises ValueError if it is not sound.

        compiled: torch.compile what draws patch by patch, at the first batch.
        """
        folder = checkpoint.resolve(place)
        config = checkpoint.read_config(folder)
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        model = build_model(config, tokenizer)
        stem = folder / ("ema" if weights == "ema" else "model")
        load_weights(model, checkpoint.Weights(stem), str(stem))
        model.solver = checkpoint.load_solver(folder, config.model.patch_width)
        chosen = pick_device(device)
        if chosen.type == "cpu":
            keep_freed_memory()
        model = model.to(chosen).eval()
        if compiled:
            if chosen.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
                raise ValueError(
                    "compiling for a CPU needs a C++ compiler, g++ or the one that CXX names; there is none"
                )
            model.compile_drawing()
        return cls(model, tokenizer, make_encoder(config, tokenizer), bf16_units(chosen))

    def __call__(self, orders: Sequence[Order], sampling: Sampling, batch_size: int = 64,
                 progress: bool = False) -> list[tuple[Segment, ...]]:  # fmt: skip
        """The new segments of every order, in order. Raises ValueError for a size that the model cannot draw.

        A sample depends on its order and the sampling alone, not on the others or the batch size.
        """
        return list(self.as_made(orders, sampling, batch_size, progress))

    def as_made(self, orders: Sequence[Order], sampling: Sampling, batch_size: int, progress: bool
                ) -> Iterator[tuple[Segment, ...]]:  # fmt: skip
        """The same, each batch as soon as it is made."""
        requests = [self._request(order) for order in orders]
        device = self.model.token_embedding.weight.device
        for start in tqdm(range(0, len(requests), batch_size), disable=not progress, unit="batch"):
            with autocast(device, self.bf16):
                made = generate(self.model, requests[start : start + batch_size], sampling, progress=progress)
            yield from (tuple(self._segment(part) for part in parts) for parts in made)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patch rows and columns of a picture. Raises ValueError unless both sides are whole patches, within limits."""
        patch, limit = self.encoder.patch_size, self.tokenizer.max_grid
        if height % patch or width % patch or not 0 < min(height, width) <= max(height, width) <= patch * limit:
            raise ValueError(
                f"a picture of {height} x {width} pixels cannot be drawn: both sides must be multiples of {patch}, "
                f"{patch} to {patch * limit}"
            )
        if height // patch * (width // patch) > self.encoder.max_patches:
            raise ValueError(
                f"a picture of {height} x {width} pixels has more than the {self.encoder.max_patches} patches of "
                f"{patch} x {patch} that this model was trained on (data.max_patches)"
            )
        return height // patch, width // patch

    def _request(self, order: Order) -> Request:
        columns = self.encoder.encode(order.document)
        # Without <eos>, which `encode` puts behind every document: the model goes on from here.
        slots = {name: getattr(columns, name)[:-1] for name in ("token", "row", "col", "rows", "cols")}
        prompt = Prompt(**slots, patches=columns.patches)
        grid = self.grid(*order.size) if order.size else None
        return Request(
            prompt, order.seed, order.begin_image, grid, order.max_images, order.max_text, self.encoder.max_patches
        )

    def _segment(self, part) -> Segment:  # type: ignore[no-untyped-def]
        if isinstance(part, GeneratedText):
            return Text(self.tokenizer.decode(part.tokens))
        pixels = unpatchify(part.patches, part.rows, part.cols, self.encoder.patch_size)
        return _image(pixels)

    def pictures(self, captions: Sequence[str], size: tuple[int, int] | Sequence[tuple[int, int]], sampling: Sampling,
                 first_seed: int = 0, progress: bool = False) -> list[np.ndarray]:  # fmt: skip
        """One picture per caption, (height, width, 3) uint8; the i-th has seed first_seed + i."""
        sizes = [size] * len(captions) if isinstance(size[0], int) else size
        orders = [
            Order(Document((Text(caption),)), first_seed + i, begin_image=True, size=of, max_text=0)  # type: ignore[arg-type]
            for i, (caption, of) in enumerate(zip(captions, sizes, strict=True))
        ]
        return [_pixels(parts[0]) for parts in self(orders, sampling, progress=progress)]

    def captions(self, pictures: Sequence[np.ndarray], sampling: Sampling, first_seed: int = 0, max_text: int = 256,
                 batch_size: int = 64, progress: bool = False) -> list[str]:  # fmt: skip
        """One caption per picture, (height, width, 3) uint8."""
        orders = [
            Order(Document((_image(pixels),)), first_seed + i, max_images=0, max_text=max_text)
            for i, pixels in enumerate(pictures)
        ]
        made = self(orders, sampling, batch_size, progress)
        return ["".join(part.text for part in parts if isinstance(part, Text)) for parts in made]


def sampling_of(config: Config) -> Sampling:
    """How the pictures of a run are drawn where nothing else is asked for: as its `eval` says; a head that learned
    where jumps end, which is no flow, jumps."""
    sampler = "consistency" if config.model.head.objective == "consistency" else "euler"
    return Sampling(guidance=Guidance(config.eval.guidance), sampler=sampler, steps=config.eval.sampler_steps)


def build_model(config: Config, tokenizer: Tokenizer) -> Ropeway:
    """The model with memory for its weights, but no values in it."""
    with torch.device("meta"):
        model = Ropeway(config.model, vocabulary_of(tokenizer))
    return model.to_empty(device="cpu")


@torch.no_grad()
def load_weights(model: Ropeway, weights: Mapping[str, torch.Tensor], where: str,
                 writable: Callable[[torch.Tensor], AbstractContextManager] = nullcontext,
                 may_lack_codebooks: bool = False) -> None:  # fmt: skip
    """Copy weights and codebooks by name, parameters within writable(parameter). Raises ValueError naming what is
    missing, unexpected or of another shape. may_lack_codebooks: what is missing of them is new, to be fitted."""
    own = model.tensors()
    if may_lack_codebooks:
        for name, codebook in model.codebooks().items():
            lacking = {f"{name}.{part}" for part in codebook.state_dict()} - weights.keys()
            if lacking:
                codebook.initialise(writable)
            own = {name: tensor for name, tensor in own.items() if name not in lacking}
    for problem, names in (
        ("misses", sorted(own.keys() - weights.keys())),
        ("holds unexpected", sorted(weights.keys() - own.keys())),
    ):
        if names:
            raise ValueError(f"{where} {problem} {', '.join(names[:5])} ({len(names)} in all)")
    for name, tensor in own.items():
        weight = weights[name]
        with writable(tensor) if isinstance(tensor, nn.Parameter) else nullcontext():
            if tensor.shape != weight.shape:
                raise ValueError(f"{where} holds {name} in shape {tuple(weight.shape)}, not {tuple(tensor.shape)}")
            tensor.copy_(weight)


def _image(pixels: np.ndarray) -> Image:
    return Image(pixels.shape[0], pixels.shape[1], pixels)


def _pixels(segment: Segment) -> np.ndarray:
    assert isinstance(segment, Image)
    assert segment.pixels is not None
    return segment.pixels
