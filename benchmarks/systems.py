"""The systems that `benchmarks.peers` compares, behind one interface: learn from captioned pictures, draw pictures.

Each one is built as its README builds it, at its own defaults except for the sizes. Peers are imported when built.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.document import Document, Image, Text
from data.encode import Columns, Encoder, pack_row
from data.image import patchify, unpatchify
from data.tokenizer import Tokenizer
from model.batch import Batch, to_bytes
from model.config import ModelConfig
from model.generate import generate
from model.ropeway import Ropeway
from model.sampling import Sampling
from model.writer import GeneratedImage, Prompt, Request
from train.pipeline import vocabulary_of

_ROW_LENGTH = 256
_PEER_DEPTH = 6
_PEER_HEAD_WIDTH = 32
_WIDTHS = range(64, 513, 8)


class System(Protocol):
    """One system at one size."""

    name: str
    settings: str
    """How it learns, and draws by default, for the report."""
    reads_captions: bool
    sampling: Any
    """How it draws; at first by default."""

    @property
    def model(self) -> nn.Module:
        """The weights that are trained."""

    def prepare(self, documents: Sequence[Document]) -> Any:
        """What the system's own data pipeline would hand to the model. Not timed."""

    def loss(self, batch: Any) -> Tensor:
        """Mean loss of a prepared batch."""

    def positions(self, documents: Sequence[Document]) -> int:
        """Places in the Transformer's sequence that the documents take: text, markers and patches, no padding."""

    def draw(self, captions: Sequence[str]) -> np.ndarray:
        """One picture per caption, (N, H, W, 3) uint8, as `sampling` says. A system without captions draws as many."""


def picture_of(document: Document) -> np.ndarray:
    """The picture of a document, (H, W, 3) uint8."""
    pixels = next(segment.pixels for segment in document.segments if isinstance(segment, Image))
    assert pixels is not None
    return pixels


def caption_of(document: Document) -> str:
    """The text of a document."""
    return "".join(segment.text for segment in document.segments if isinstance(segment, Text))


class RopewaySystem:
    """This repository's model: text and patches in one causal sequence, documents packed into rows."""

    reads_captions = True

    def __init__(self, name: str, config: ModelConfig, side: int) -> None:
        self.name, self.config, self.side = name, config, side
        self.sampling, self.first_seed, self.rows_prepared = Sampling(), 0, 0
        self.settings = (
            f"{config.num_heads} query and {config.kv_heads} key heads; learns {config.head.draws} noise draw(s) per "
            f"patch; draws by default with {self.sampling.sampler}, {self.sampling.steps} evaluations per patch, "
            f"guidance scale {self.sampling.guidance.scale:g}"
        )
        tokenizer = Tokenizer.bytes()
        self.grid = side // config.patch_size
        self.encoder = Encoder(tokenizer, config.patch_size, 1, self.grid**2)
        self.model = Ropeway(config, vocabulary_of(tokenizer))
        self.model.initialise(0)

    def prepare(self, documents: Sequence[Document]) -> Batch:
        rows: list[list[Columns]] = []
        for columns in map(self.encoder.encode, documents):
            if not rows or sum(len(part.token) for part in [*rows[-1], columns]) > _ROW_LENGTH:
                rows.append([])
            rows[-1].append(columns)
        pad, first = self.encoder.tokenizer.pad, self.rows_prepared
        self.rows_prepared += len(rows)  # every row has noise of its own
        return Batch.collate([pack_row(row, _ROW_LENGTH, pad) for row in rows], list(range(first, first + len(rows))))

    def loss(self, batch: Batch) -> Tensor:
        losses, (text, patches) = self.model(batch), batch.counts()
        return losses.text / text + losses.image / patches

    def positions(self, documents: Sequence[Document]) -> int:
        return sum(map(self.encoder.length, documents))

    def draw(self, captions: Sequence[str]) -> np.ndarray:
        tokenizer, size = self.encoder.tokenizer, self.config.patch_size
        requests = []
        for seed, caption in enumerate(captions, self.first_seed):
            token = np.array([tokenizer.bos, *tokenizer.encode(caption)])
            zero, patches = np.zeros_like(token), np.zeros((0, self.config.patch_width), np.uint8)
            prompt = Prompt(token, zero, zero, zero, zero, patches)
            requests.append(Request(prompt, seed, begin_image=True, grid=(self.grid, self.grid), max_text=0))
        images = [
            next(s for s in new if isinstance(s, GeneratedImage))
            for new in generate(self.model, requests, self.sampling)
        ]
        return np.stack([unpatchify(image.patches, self.grid, self.grid, size) for image in images])


@dataclass(frozen=True)
class PeerSampling:
    """How a peer draws."""

    steps: int
    """As its package counts them."""
    scale: float = 1.0
    """Of guidance."""


class AutoregressiveSystem:
    """autoregressive-diffusion-pytorch: pictures only, patch by patch, a small denoiser on a causal Transformer."""

    reads_captions = False

    def __init__(self, kind: str, parameters: int, side: int, patch_size: int) -> None:
        """kind: "flow" (rectified flow, predicting the clean patch) or "diffusion" (EDM)."""
        self.name = f"autoregressive-diffusion-pytorch, {kind}"
        module = _without_trainer("autoregressive_diffusion_pytorch", f"autoregressive_{kind}")
        module.__dict__["tqdm"] = partial(tqdm, disable=True)  # it shows a bar per patch
        build = module.ImageAutoregressiveFlow if kind == "flow" else module.ImageAutoregressiveDiffusion
        self.kind, self.sampling = kind, PeerSampling(16 if kind == "flow" else 32)
        self.patches = (side // patch_size) ** 2
        solver, evaluations = "midpoint" if kind == "flow" else "Heun", self.evaluations_of(self.sampling)
        self.settings = (f"no captions; learns 1 noise draw per patch; draws by default with {solver}, {evaluations} "
                         "evaluations per patch")  # fmt: skip
        self.model = _of_size(
            parameters,
            lambda dim: build(
                image_size=side,
                patch_size=patch_size,
                model={"dim": dim, "depth": _PEER_DEPTH, "dim_head": _PEER_HEAD_WIDTH, "heads": _heads(dim)},
            ),
        )

    def evaluations_of(self, sampling: PeerSampling) -> int:
        """Of the denoiser, per patch: Heun, or midpoint between as many times as there are steps."""
        return 2 * (sampling.steps - 1) if self.kind == "flow" else 2 * sampling.steps - 1

    def prepare(self, documents: Sequence[Document]) -> Tensor:
        pixels = torch.from_numpy(np.stack([picture_of(document) for document in documents]))
        return pixels.permute(0, 3, 1, 2).float() / 255

    def loss(self, batch: Tensor) -> Tensor:
        return self.model(batch)

    def positions(self, documents: Sequence[Document]) -> int:
        return len(documents) * self.patches

    def draw(self, captions: Sequence[str]) -> np.ndarray:
        inner: Any = self.model.model
        denoiser = inner.flow if self.kind == "flow" else inner.diffusion
        denoiser.sample = partial(type(denoiser).sample, denoiser, num_sample_steps=self.sampling.steps)
        images: Tensor = self.model.sample(batch_size=len(captions))  # type: ignore[operator]
        return to_bytes(images.permute(0, 2, 3, 1) * 2 - 1).numpy()


class _Placed(nn.Module):
    """Patches (..., rows, columns, values) to the Transformer's width, with an embedding of their place.

    In place of the package's `add_pos_emb`: its 0.20.0 adds that in training, but not where it draws a batch, and then
    draws the same speckle in every patch."""

    def __init__(self, values: int, dim: int, grid: int) -> None:
        super().__init__()
        self.project = nn.Linear(values, dim)
        self.place = nn.Parameter(torch.randn(grid, grid, dim))

    def forward(self, patches: Tensor) -> Tensor:
        return self.project(patches) + self.place


class TransfusionSystem:
    """transfusion-pytorch: causal text, and whole pictures by flow matching through the same Transformer."""

    reads_captions = True

    def __init__(self, parameters: int, side: int, patch_size: int) -> None:
        _folder_of("transfusion_pytorch")
        module = import_module("transfusion_pytorch.transfusion")
        module.__dict__["tqdm"] = partial(tqdm, disable=True)
        import_module("loguru").logger.disable("transfusion_pytorch")
        self.name = "transfusion-pytorch"
        self.sampling = PeerSampling(16, 3.0)
        self.settings = ("learns 1 noise draw per picture, drops 10 % of the captions; draws by default with midpoint, "
                         "30 guided evaluations per picture (scale 3)")  # fmt: skip
        self.patch_size, self.grid = patch_size, side // patch_size
        self.model = _of_size(
            parameters,
            lambda dim: module.Transfusion(
                num_text_tokens=256,
                dim_latent=3 * patch_size**2,
                modality_default_shape=(self.grid, self.grid),
                pre_post_transformer_enc_dec=(
                    _Placed(3 * patch_size**2, dim, self.grid),
                    nn.Linear(dim, 3 * patch_size**2, bias=False),
                ),
                prob_uncond=0.1,  # its default, and what its guidance needs
                transformer={"dim": dim, "depth": _PEER_DEPTH, "dim_head": _PEER_HEAD_WIDTH, "heads": _heads(dim)},
            ),
        )

    def prepare(self, documents: Sequence[Document]) -> list[list[Tensor]]:
        def parts(document: Document) -> list[Tensor]:
            patches = patchify(picture_of(document), self.patch_size).reshape(self.grid, self.grid, -1)
            return [self._bytes(caption_of(document)), torch.from_numpy(patches).float() / 127.5 - 1]

        return [parts(document) for document in documents]

    def loss(self, batch: list[list[Tensor]]) -> Tensor:
        return self.model(batch)

    def evaluations_of(self, sampling: PeerSampling) -> int:
        """Of the Transformer, per picture: midpoint between as many times as there are steps."""
        return 2 * (sampling.steps - 1)

    def positions(self, documents: Sequence[Document]) -> int:
        # Start and end of the sequence; around the picture its announcement, its shape as text, and two marks.
        frame = 2 + 3 + len(f"{self.grid},{self.grid}")
        return sum(frame + self.grid**2 + len(caption_of(document).encode()) for document in documents)

    def draw(self, captions: Sequence[str]) -> np.ndarray:
        patches = self.grid**2
        samples = self.model.sample_many(  # type: ignore[operator]
            [[self._bytes(caption)] for caption in captions],
            force_modality_at_start=(0, (self.grid, self.grid)),
            max_length=patches - 1,  # it stops when the picture is complete
            return_without_prompt=True,
            modality_steps=self.sampling.steps,
            cfg_scale=self.sampling.scale,
        )
        images = [to_bytes(sample[0].tensor.reshape(patches, -1)).numpy() for sample in samples]
        return np.stack([unpatchify(image, self.grid, self.grid, self.patch_size) for image in images])

    @staticmethod
    def _bytes(text: str) -> Tensor:
        return torch.tensor(list(text.encode()))


def count(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _heads(dim: int) -> int:
    return max(1, round(dim / _PEER_HEAD_WIDTH))


def _of_size(parameters: int, build: Callable[[int], nn.Module]) -> nn.Module:
    """The model of the width whose number of parameters is nearest. Sizes grow with the width: bisection finds it."""
    low, high = 0, len(_WIDTHS) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(build(_WIDTHS[middle])) < parameters else (low, middle)
    torch.manual_seed(0)
    return min((build(_WIDTHS[i]) for i in (low, high)), key=lambda model: abs(count(model) - parameters))


def _folder_of(package: str) -> list[str]:
    """Where a package lies, without importing it. Raises ImportError if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"{package} is not installed: run `make bench`")
    return list(spec.submodule_search_locations)


def _without_trainer(package: str, module: str) -> ModuleType:
    """Import one module of a package whose __init__ also imports a trainer, which needs torchvision."""
    if package not in sys.modules:
        shell = ModuleType(package)
        shell.__path__ = _folder_of(package)
        sys.modules[package] = shell
    return import_module(f"{package}.{module}")
