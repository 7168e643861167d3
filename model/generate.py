"""Interleaved generation: text token by token; after <boi> the grid size, then patch by patch; then text again.

The grammar is enforced, so every sequence decodes:

    text: a text token, <boi> (if images are left) or <eos>      <boi>: a rows token      rows: a cols token
    cols: the first patch      patch: the next patch, after the last one <eoi>            <eoi>: text

All samples advance together, whatever each one is writing. With guidance every sample has a second, unconditional
stream that holds the same sequence without its text, and perhaps a third that also lacks the images of the prompt; all
streams are rows of one batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.attention.dense import KEY_MULTIPLE
from model.attention.documents import Documents
from model.batch import to_bytes, to_pixels
from model.diffusion.field import Field
from model.diffusion.guidance import Guidance
from model.diffusion.path import PATHS
from model.diffusion.sampler import GRIDS, LEARNED, SAMPLERS, grid_of
from model.positions import Grid
from model.rope import Rotation
from model.ropeway import Ropeway

_ROW_MULTIPLE = 8
"""Rows of a generation batch are filled up to a multiple of this: matrix products of fewer rows take other code paths
with other rounding, and the pixels of a seed must not depend on the batch it is in."""


@dataclass(frozen=True)
class Sampling:
    """How text tokens and patches are drawn."""

    temperature: float = 1.0
    """Temperature of text; 0 takes the most probable token."""
    top_k: int = 0
    """Keep only the k most probable tokens (0: all)."""
    top_p: float = 1.0
    """Keep the most probable tokens that together reach this probability."""
    guidance: Guidance = field(default_factory=Guidance)
    """Classifier-free guidance of images."""
    sampler: str = "euler"
    """A name of model.diffusion.sampler.SAMPLERS, or learned (model.diffusion.solver)."""
    steps: int = 20
    """Sampler steps per patch (heun, midpoint, geometric and learned evaluate the head twice per step but the last)."""
    grid: str = "uniform"
    """A name of model.diffusion.sampler.GRIDS: where the steps lie in time."""
    time_shift: float = 1.0
    """Factor on noise over signal at the times of the grid: n for pictures n times as wide as those it was made for."""
    noise_temperature: float = 1.0
    """Factor on the noise that ddpm, sde and consistency add."""
    clamp: bool = False
    """Keep the clean patch that each evaluation points to within [-1, 1]; the result always is."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1")
        if self.sampler not in (*SAMPLERS, LEARNED):
            raise ValueError(f"sampler {self.sampler!r} is unknown; choose one of {', '.join((*SAMPLERS, LEARNED))}")
        if self.grid not in GRIDS:
            raise ValueError(f"time grid {self.grid!r} is unknown; choose one of {', '.join(GRIDS)}")
        if self.steps < 1:
            raise ValueError(f"sampler steps is {self.steps}; it must be at least 1")
        if not (self.time_shift > 0 and self.noise_temperature >= 0):
            raise ValueError("sampling needs time_shift > 0 and noise_temperature >= 0")


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


@torch.inference_mode()
def generate(
    model: Ropeway, requests: Sequence[Request], sampling: Sampling, progress: bool = False
) -> list[list[Segment]]:
    """Generate all requests as one batch; returns the new segments of each. progress shows a bar over slots.

    Raises ValueError for a grid outside the vocabulary's limits.
    """
    limit = model.vocabulary.max_grid
    for request in requests:
        if request.grid and not (min(request.grid) >= 1 and max(request.grid) <= limit):
            raise ValueError(f"a grid of {request.grid[0]} x {request.grid[1]} patches is outside 1 .. {limit}")
    model.eval()
    writers = [_Writer(request, model.vocabulary, model.config.patch_width) for request in requests]
    streams = _Streams(model, requests, sampling.guidance.streams)
    with tqdm(total=streams.capacity, disable=not progress, unit="slot", leave=False) as bar:
        while any(not writer.done for writer in writers):
            _advance(model, writers, streams, sampling)
            bar.update()
    return [writer.segments for writer in writers]


def _advance(model: Ropeway, writers: list["_Writer"], streams: "_Streams", sampling: Sampling) -> None:
    """Write one slot of every sample that is not done."""
    device = streams.hidden_RD.device
    slots = [writer.next_forced() for writer in writers]
    asks = [b for b, slot in enumerate(slots) if slot == "token"]
    draws = [b for b, slot in enumerate(slots) if slot == "patch"]
    token = torch.full((streams.rows,), model.vocabulary.pad, dtype=torch.long)
    patch_RP = torch.zeros(streams.rows, model.config.patch_width, dtype=torch.uint8, device=device)
    if asks:
        logits_NV = model.text_head.logits(streams.hidden_RD)[asks]
        allowed_NV = torch.stack([writers[b].allowed() for b in asks]).to(device)
        uniform_N = torch.cat([writers[b].uniform() for b in asks]).to(device)
        chosen = choose_tokens(logits_NV.masked_fill(~allowed_NV, -torch.inf), sampling, uniform_N).tolist()
        for b, choice in zip(asks, chosen, strict=True):
            slots[b] = choice
    if draws:
        patch_NP = _sample_patches(model, writers, draws, streams, sampling)
        for first in streams.firsts:
            patch_RP[[first + b for b in draws]] = patch_NP
    place = torch.zeros(streams.rows, 4, dtype=torch.long)
    active = torch.zeros(streams.rows, dtype=torch.bool)
    for b, slot in enumerate(slots):
        if slot is None:
            continue
        writer, every = writers[b], [first + b for first in streams.firsts]
        is_text = isinstance(slot, int) and slot < model.vocabulary.pad
        active[b] = True
        active[every] |= not is_text  # Text enters the first stream only.
        token[every] = model.vocabulary.patch if slot == "patch" else int(slot)
        if slot == "patch":
            place[every] = torch.tensor(writer.place())
        writer.write(slot, patch_RP[b])
    streams.append(token.to(device), place.to(device), patch_RP, active.to(device), bool(draws))


def _sample_patches(model: Ropeway, writers: list["_Writer"], draws: list[int], streams: "_Streams",
                    sampling: Sampling) -> Tensor:  # fmt: skip
    """The next patch of every sample in draws, (len(draws), P) uint8."""
    device, head, config = streams.hidden_RD.device, model.diffusion_head, model.config.head
    guidance, path = sampling.guidance, PATHS[config.path]
    # Filled up for the same reason as the streams: products of few rows round differently.
    chosen = draws + draws[-1:] * (-len(draws) % _ROW_MULTIPLE)
    rows = [first + b for first in streams.firsts for b in chosen]
    location_N4 = torch.tensor([writers[b].place() for b in chosen], device=device)
    condition = head.condition(streams.hidden_RD[rows], location_N4.repeat(guidance.streams, 1))
    if config.objective == "shortcut":
        # Jumps are learned in powers of two, and Euler's steps of the uniform grid are jumps; all else is the flow.
        jumps = sampling.sampler == "euler" and sampling.grid == "uniform" and sampling.time_shift == 1
        steps = sampling.steps if jumps and sampling.steps.bit_count() == 1 else 0
        condition = head.shortcut(condition, torch.full((len(condition),), steps, device=device))

    def random() -> Tensor:
        fresh = {b: writers[b].fresh_P() for b in draws}
        return sampling.noise_temperature * torch.stack([fresh[b] for b in chosen]).to(device)

    field = Field(
        head, config, condition, guidance,
        fraction_N1=torch.tensor([[writers[b].fraction()] for b in chosen], device=device), random=random,
        clamp=sampling.clamp, learned_variance=config.objective == "ddpm" and sampling.sampler == "ddpm",
    )  # fmt: skip
    times = grid_of(sampling.grid, sampling.steps, path, sampling.time_shift)
    z = torch.stack([writers[b].noise_P() for b in chosen]).to(device) * config.noise_scale * (1 - times[0])
    return to_bytes(sampler_of(model, sampling)(field, z, times, field.noise))[: len(draws)]


def sampler_of(model: Ropeway, sampling: Sampling) -> Callable[..., Tensor]:
    """A function of model.diffusion.sampler, or the model's own solver. Raises ValueError if it has none for this."""
    if sampling.sampler != LEARNED:
        return SAMPLERS[sampling.sampler]
    if not model.solver:
        raise ValueError("this checkpoint has no sampler learned; make one with python -m train.distill solver")
    has, asked = (f"{steps} steps of the {grid} grid" for steps, grid in
                  ((model.solver.steps, model.solver.grid), (sampling.steps, sampling.grid)))  # fmt: skip
    if has != asked:
        raise ValueError(f"the sampler learned of this checkpoint takes {has}, not {asked}; ask for these, or make "
                         "another with python -m train.distill solver")  # fmt: skip
    return model.solver


def choose_tokens(logits_NV: Tensor, sampling: Sampling, uniform_N: Tensor) -> Tensor:
    """Draw tokens by inverting the distribution function at uniform_N in [0, 1). Returns (N,) ids."""
    if sampling.temperature == 0:
        return logits_NV.argmax(-1)
    probability, order = (
        (logits_NV.double() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    )
    if sampling.top_k:
        probability[:, sampling.top_k :] = 0
    reached_before = probability.cumsum(-1) - probability
    probability = probability.masked_fill(reached_before >= sampling.top_p, 0)
    cumulative = probability.cumsum(-1)
    rank = (cumulative <= uniform_N[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    last = (probability > 0).sum(-1, keepdim=True) - 1
    return order.gather(-1, torch.minimum(rank, last))[:, 0]


class _Writer:
    """The grammar and randomness of one sample."""

    def __init__(self, request: Request, vocabulary, patch_width: int) -> None:  # type: ignore[no-untyped-def]
        self.request, self.vocabulary, self.patch_width = request, vocabulary, patch_width
        self.segments: list[Segment] = []
        self.text_random = torch.Generator().manual_seed(_mix(request.seed, 0))
        self.phase = "boi" if request.begin_image and request.max_images else "text"
        self.num_text = self.num_images = self.rows = self.cols = self.written = 0
        self._end_if_spent()

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
        if self.phase == "text" and not self._text_left and not self._images_left:
            self.phase = "done"

    def next_forced(self) -> int | str | None:
        """The id of the next slot where it is known, else "token" or "patch"; None when done."""
        v, grid = self.vocabulary, self.request.grid
        if self.phase == "rows" and grid:
            return v.first_row + grid[0] - 1
        if self.phase == "cols" and grid:
            return v.first_col + grid[1] - 1
        return {"boi": v.boi, "eoi": v.eoi, "patch": "patch", "done": None}.get(self.phase, "token")

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

    def place(self) -> tuple[int, int, int, int]:
        """row, col, rows, cols of the next patch."""
        return self.written // self.cols + 1, self.written % self.cols + 1, self.rows, self.cols

    def fraction(self) -> float:
        """The part of its image that the next patch completes."""
        return (self.written + 1) / (self.rows * self.cols)

    def noise_P(self) -> Tensor:
        return self.noise_NP[self.written]

    def fresh_P(self) -> Tensor:
        """More noise for the patch that is being drawn."""
        return torch.randn(self.patch_width, generator=self.image_random)

    def write(self, slot: int | str, patch_P: Tensor) -> None:
        """Take note of the slot that was chosen, and move on in the grammar."""
        v = self.vocabulary
        if self.phase == "patch":
            image = self.segments[-1]
            assert isinstance(image, GeneratedImage)
            image.patches[self.written] = patch_P.cpu().numpy()
            self.written += 1
            self.phase = "eoi" if self.written == self.rows * self.cols else "patch"
            return
        assert isinstance(slot, int)
        if slot == v.boi:
            self.phase = "rows"
        elif self.phase == "rows":
            self.rows, self.phase = slot - v.first_row + 1, "cols"
        elif self.phase == "cols":
            self.cols, self.phase = slot - v.first_col + 1, "patch"
            self._begin_image()
        elif slot == v.eoi:
            self.phase = "text"
        elif slot == v.eos:
            self.phase = "done"
        else:
            if not self.segments or isinstance(self.segments[-1], GeneratedImage):
                self.segments.append(GeneratedText([]))
            self.segments[-1].tokens.append(slot)  # type: ignore[union-attr]
            self.num_text += 1
        self._end_if_spent()

    def _begin_image(self) -> None:
        self.num_images += 1
        self.written, count = 0, self.rows * self.cols
        self.image_random = torch.Generator().manual_seed(_mix(self.request.seed, self.num_images))
        self.noise_NP = torch.randn(count, self.patch_width, generator=self.image_random)
        self.segments.append(GeneratedImage(self.rows, self.cols, np.zeros((count, self.patch_width), np.uint8)))


class _Streams:
    """The rows of the batch: one per sample, then, if guided, one per sample without text, then perhaps one without
    the prompt's images too; with their decode states."""

    def __init__(self, model: Ropeway, requests: Sequence[Request], count: int) -> None:
        """count: number of streams, see Guidance.streams."""
        self.model = model
        filled = list(requests) + [requests[-1]] * (-len(requests) % _ROW_MULTIPLE)
        prompts = [request.prompt for request in filled]
        self.firsts = [stream * len(filled) for stream in range(count)]
        """The row of the first sample in each stream."""
        textless = [_without_text(prompt, model.vocabulary.pad) for prompt in prompts]
        imageless = [_beginning(prompt) for prompt in prompts]
        prompts = [prompt for stream in (prompts, textless, imageless)[:count] for prompt in stream]
        self.rows = len(prompts)
        lengths = [len(prompt.token) for prompt in prompts]
        self.longest = -(-max(lengths) // KEY_MULTIPLE) * KEY_MULTIPLE
        self.capacity = max(map(_new_slots, requests))
        device = model.token_embedding.weight.device
        total = self.longest + self.capacity + 1
        self.token_RT, self.row_RT, self.col_RT, self.rows_RT, self.cols_RT = (
            torch.stack([_padded(getattr(prompt, name), total) for prompt in prompts]).to(device)
            for name in ("token", "row", "col", "rows", "cols")
        )
        self.length_R = torch.tensor(lengths, device=device)
        valid = torch.arange(self.longest) < torch.tensor(lengths)[:, None]
        patches = np.concatenate([prompt.patches for prompt in prompts])
        patches = np.pad(patches, ((0, -len(patches) % _ROW_MULTIPLE), (0, 0)))  # embed leaves the surplus unused
        slots = slice(0, self.longest)
        pixels = to_pixels(torch.from_numpy(patches).to(device))
        x_RSD = model.embed(self.token_RT[:, slots], self.rows_RT[:, slots] > 0, pixels)
        angles = model.angles(Grid(*(column[:, slots] for column in self._grid())))
        documents = Documents.of(valid.long(), multiple=KEY_MULTIPLE).to(device)
        hidden, self.states = model.backbone.prefill(x_RSD, angles, documents, total)
        self.hidden_RD = hidden[torch.arange(self.rows, device=device), self.length_R - 1]

    def _grid(self) -> Grid:
        index_RT = torch.arange(1, self.token_RT.shape[1] + 1, device=self.token_RT.device).expand_as(self.token_RT)
        return Grid(index_RT, self.row_RT, self.col_RT, self.rows_RT, self.cols_RT)

    def append(self, token_R: Tensor, place_R4: Tensor, patch_RP: Tensor, active_R: Tensor, has_patches: bool) -> None:
        """Write one slot to the active rows. Inactive rows compute on junk that the next write replaces."""
        every = torch.arange(self.rows, device=token_R.device)
        columns = (self.row_RT, self.col_RT, self.rows_RT, self.cols_RT)
        for column, value in zip((self.token_RT, *columns), (token_R, *place_R4.unbind(1)), strict=True):
            column[every, self.length_R] = value
        x_R1D = self.model.token_embedding(token_R).unsqueeze(1)
        if has_patches:
            patch_R1D = self.model.patch_embedding(to_pixels(patch_RP)).to(x_R1D.dtype).unsqueeze(1)
            x_R1D = torch.where((place_R4[:, :1] > 0).unsqueeze(-1), patch_R1D, x_R1D)
        positions = self._positions_at_length()
        hidden = self.model.backbone.step(x_R1D, positions, self.length_R, self.longest, self.states)[:, 0]
        self.hidden_RD = torch.where(active_R[:, None], hidden, self.hidden_RD)
        self.length_R = self.length_R + active_R
        self.longest += 1

    def _positions_at_length(self) -> Rotation:
        slots = slice(0, self.longest + 1)
        return self.model.angles(Grid(*(column[:, slots] for column in self._grid())), self.length_R)


def _new_slots(request: Request) -> int:
    patches = request.grid[0] * request.grid[1] if request.grid else request.max_patches
    return request.max_text + request.max_images * (patches + 4) + 1


def _padded(column: np.ndarray, length: int) -> Tensor:
    return torch.from_numpy(np.pad(column.astype(np.int64), (0, length - len(column))))


def _without_text(prompt: Prompt, first_special: int) -> Prompt:
    keep = prompt.token >= first_special
    columns = {name: getattr(prompt, name)[keep] for name in ("token", "row", "col", "rows", "cols")}
    return Prompt(**columns, patches=prompt.patches)


def _beginning(prompt: Prompt) -> Prompt:
    """<bos> alone."""
    columns = {name: getattr(prompt, name)[:1] for name in ("token", "row", "col", "rows", "cols")}
    return Prompt(**columns, patches=prompt.patches[:0])


def _mix(seed: int, stream: int) -> int:
    """A 63-bit seed for one of a sample's random streams (splitmix64), so that neighbouring seeds share nothing."""
    z = (seed * 0x9E3779B97F4A7C15 + stream * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 1
