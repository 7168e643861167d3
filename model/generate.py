"""Interleaved generation: text token by token; after <boi> the grid size, then patch by patch; then text again.

The grammar is enforced, so every sequence decodes:

    text: a text token, <boi> (if images are left) or <eos>      <boi>: a rows token      rows: a cols token
    cols: the first patch      patch: the next patch, after the last one <eoi>            <eoi>: text

What a sample must begin with is read as part of its prompt, and nothing is read when all are done. All samples advance
together, whatever each one is writing. With guidance every sample has a second, unconditional stream that holds the
same sequence without its text, and perhaps a third that also lacks the images of the prompt; all streams are rows of
one batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model.attention.dense import KEY_MULTIPLE
from model.attention.documents import Documents
from model.batch import to_bytes, to_pixels
from model.config import Vocabulary
from model.diffusion.field import Field
from model.diffusion.guidance import Guidance
from model.diffusion.path import PATHS
from model.diffusion.sampler import GRIDS, LEARNED, SAMPLERS, grid_of
from model.diffusion.sequence import SequenceHead
from model.positions import Grid
from model.rope import Rotation
from model.ropeway import Ropeway

_ROW_MULTIPLE = 8
"""Rows of a generation batch are filled up to a multiple of this: matrix products of fewer rows take other code paths
with other rounding, and the pixels of a seed must not depend on the batch it is in."""


_PLACE = ("row", "col", "rows", "cols")


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
    streams = _Streams(model, writers, sampling.guidance.streams)
    brush: _Brush | None = None
    with tqdm(total=streams.capacity, disable=not progress, unit="slot", leave=False) as bar:
        while any(not writer.done for writer in writers):
            draws = [b for b, writer in enumerate(writers) if writer.phase == "patch"]
            begun = [b for b in draws if writers[b].written == 0]
            for b in begun:
                streams.begin_image(b, writers[b])
            if begun and model.sequence_head:
                _paint(model, model.sequence_head, writers, begun, streams, sampling)
                continue
            if begun or brush is None or brush.draws != draws:
                brush = _Brush(model, writers, draws, streams, sampling)
            if draws:
                brush.draw()
                for b in draws:
                    writers[b].write_patch()
            tokens = _choose(model, writers, draws, streams, sampling)
            streams.put(tokens)
            bar.update()
            if any(not writer.done for writer in writers):
                streams.advance(draws, tokens)
    drawn_BTP = streams.drawn()
    return [writer.result(drawn_BTP[b]) for b, writer in enumerate(writers)]


def _choose(model: Ropeway, writers: list["_Writer"], draws: list[int], streams: "_Streams",
            sampling: Sampling) -> dict[int, int]:  # fmt: skip
    """The next token of every sample that is not done and does not draw; it is written."""
    writing = [b for b, writer in enumerate(writers) if not writer.done and b not in draws]
    tokens = {b: writers[b].forced() for b in writing}
    asks = [b for b, token in tokens.items() if token is None]
    if asks:
        device = streams.hidden_RD.device
        logits_NV = model.text_head.logits(streams.hidden_RD)[asks]
        allowed_NV = torch.stack([writers[b].allowed() for b in asks]).to(device)
        uniform_N = torch.cat([writers[b].uniform() for b in asks]).to(device)
        chosen = choose_tokens(logits_NV.masked_fill(~allowed_NV, -torch.inf), sampling, uniform_N)
        tokens |= dict(zip(asks, chosen.tolist(), strict=True))
    for b, token in tokens.items():
        assert token is not None
        writers[b].write(token)
    return tokens  # type: ignore[return-value]


class _Brush:
    """Draws the next patch of a set of samples, again and again without a word between host and device."""

    def __init__(self, model: Ropeway, writers: list["_Writer"], draws: list[int], streams: "_Streams",
                 sampling: Sampling) -> None:  # fmt: skip
        self.draws, self.streams, self.sampling = draws, streams, sampling
        if not draws:
            return
        assert model.diffusion_head is not None
        self.head, config = model.diffusion_head, model.config.head
        # Filled up for the same reason as the streams: products of few rows round differently.
        chosen = draws + draws[-1:] * (-len(draws) % _ROW_MULTIPLE)
        device = streams.hidden_RD.device
        self.sample_N = torch.tensor(chosen, device=device)
        self.row_X = torch.cat([first + self.sample_N for first in streams.firsts])
        self.noise_NTP = pad_sequence([streams.noise[b] for b in chosen], batch_first=True)
        path = PATHS[config.path]
        self.times = grid_of(sampling.grid, sampling.steps, path, sampling.time_shift)
        # Jumps are learned in powers of two, and Euler's steps of the uniform grid are jumps; all else is the flow.
        jumps = sampling.sampler == "euler" and sampling.grid == "uniform" and sampling.time_shift == 1
        steps = sampling.steps if jumps and sampling.steps.bit_count() == 1 else 0
        self.shortcut_X = torch.full((len(self.row_X),), steps, device=device)
        self.sampler, self.noise_scale = sampler_of(model, sampling), config.noise_scale * (1 - self.times[0])

        def random() -> Tensor:
            fresh = {b: writers[b].fresh_P() for b in draws}
            stacked_NP = torch.stack([fresh[b] for b in chosen])
            return sampling.noise_temperature * stacked_NP.to(device, non_blocking=True)

        self.field = Field(
            self.head, config, sampling.guidance, random, clamp=sampling.clamp,
            learned_variance=config.objective == "ddpm" and sampling.sampler == "ddpm",
        )  # fmt: skip

    def draw(self) -> None:
        """Put the next patch of every sample into the streams."""
        streams, sample_N = self.streams, self.sample_N
        location_N4 = streams.places(sample_N)
        row, col, rows, cols = location_N4.unbind(-1)
        ordinal_N = (row - 1) * cols + col
        condition_XW = self.head.condition(streams.hidden_RD[self.row_X], location_N4.repeat(len(streams.firsts), 1))
        if self.field.config.objective == "shortcut":
            condition_XW = self.head.shortcut(condition_XW, self.shortcut_X)
        self.field.begin(condition_XW, (ordinal_N / (rows * cols)).unsqueeze(1))
        every_N = torch.arange(len(sample_N), device=sample_N.device)
        z = self.noise_NTP[every_N, ordinal_N - 1] * self.noise_scale
        z = self.sampler(self.field, z, self.times, self.field.noise)
        streams.patch_RTP[self.row_X, streams.length_R[self.row_X]] = to_bytes(z).repeat(len(streams.firsts), 1)


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


@dataclass
class _Painter:
    """The backbone as a head: what it says about noised images, behind all that was written."""

    model: Ropeway
    head: SequenceHead
    token_RS: Tensor
    is_patch_RS: Tensor
    pixels_NP: Tensor
    """All patches; those at noised_M are replaced."""
    noised_M: Tensor
    slot_M: Tensor
    """Where the noised patches are in the flattened slots."""
    angles: Rotation
    documents: Documents

    def embed_time(self, time_1: Tensor) -> Tensor:
        return self.head.embed_time(time_1)

    def __call__(self, z_MP: Tensor, _: None, time_1D: Tensor) -> Tensor:
        clean_1D = self.head.embed_time(z_MP.new_ones(1))
        time_ND = clean_1D.repeat(len(self.pixels_NP), 1).index_copy(0, self.noised_M, time_1D.expand(len(z_MP), -1))
        pixels_NP = self.pixels_NP.index_copy(0, self.noised_M, z_MP)
        x_RSD = self.model.embed(self.token_RS, self.is_patch_RS, pixels_NP, time_ND)
        hidden_RSD, _commit = self.model.backbone(x_RSD, self.angles, self.documents)
        return self.head(hidden_RSD.flatten(0, 1).index_select(0, self.slot_M))


def _paint(model: Ropeway, head: SequenceHead, writers: list["_Writer"], begun: list[int], streams: "_Streams",
           sampling: Sampling) -> None:  # fmt: skip
    """Draw the whole images of the samples in begun, and read them. An evaluation computes the prompts anew."""
    device, config = streams.hidden_RD.device, model.config.head
    counts = torch.tensor([len(streams.noise[b]) for b in begun], device=device).repeat(len(streams.firsts))
    row_R = torch.tensor([first + b for first in streams.firsts for b in begun], device=device)
    end_R = streams.length_R[row_R] + counts
    slot_S = torch.arange(int(end_R.max()), device=device)
    valid_RS = slot_S < end_R[:, None]
    is_patch_RS = (streams.rows_RT[row_R][:, slot_S] > 0) & valid_RS
    is_noised_RS = is_patch_RS & (slot_S >= streams.length_R[row_R, None])
    grid = Grid(*(column[:, slot_S] for column in streams._grid(row_R)))
    painter = _Painter(
        model, head, streams.token_RT[row_R][:, slot_S], is_patch_RS,
        pixels_NP=to_pixels(streams.patch_RTP[row_R][:, slot_S][is_patch_RS]),
        noised_M=is_noised_RS[is_patch_RS].nonzero()[:, 0], slot_M=is_noised_RS.flatten().nonzero()[:, 0],
        angles=model.rotation(streams.positions_RT2[row_R][:, slot_S]),
        documents=model.attended(Documents.of(valid_RS.long().cpu()).to(device), grid),
    )  # fmt: skip

    def random() -> Tensor:
        fresh = [writers[b].fresh_P() for b in begun for _ in streams.noise[b]]
        return sampling.noise_temperature * torch.stack(fresh).to(device)

    field = Field(painter, config, sampling.guidance, random, sampling.clamp)  # type: ignore[arg-type]
    times = grid_of(sampling.grid, sampling.steps, PATHS[config.path], sampling.time_shift)
    z = torch.cat([streams.noise[b] for b in begun]) * config.noise_scale * (1 - times[0])
    field.begin(z.new_zeros(()), z.new_ones(len(z), 1))
    patches_MP = to_bytes(sampler_of(model, sampling)(field, z, times, field.noise)).repeat(len(streams.firsts), 1)
    row_M, place_M = is_noised_RS.nonzero().unbind(1)
    streams.patch_RTP[row_R[row_M], place_M] = patches_MP
    streams.length_R[row_R] = end_R
    for b in begun:
        for _ in streams.noise[b]:
            writers[b].write_patch()
    streams.read(streams.length_R.tolist())


class _Writer:
    """The grammar and randomness of one sample."""

    def __init__(self, request: Request, vocabulary: Vocabulary, patch_width: int) -> None:
        self.request, self.vocabulary, self.patch_width = request, vocabulary, patch_width
        self.segments: list[GeneratedText | tuple[int, int, int]] = []
        """An image as its rows, columns and first slot."""
        self.text_random = torch.Generator().manual_seed(_mix(request.seed, 0))
        self.phase = "boi" if request.begin_image and request.max_images else "text"
        self.num_text = self.num_images = self.rows = self.cols = self.written = 0
        self.length = len(request.prompt.token)
        self._end_if_spent()
        self.opening: list[int] = []
        """Tokens that are known before the model has said anything; they are written."""
        while (token := self.forced()) is not None:
            self.opening.append(token)
            self.write(token)

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
        if not self._text_left and not self._images_left:
            self.phase = "done"

    def forced(self) -> int | None:
        """The id of the next token where it is known."""
        v, grid = self.vocabulary, self.request.grid
        if self.phase == "rows" and grid:
            return v.first_row + grid[0] - 1
        if self.phase == "cols" and grid:
            return v.first_col + grid[1] - 1
        return {"boi": v.boi, "eoi": v.eoi}.get(self.phase)

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

    def noise_NP(self) -> Tensor:
        """Noise of all patches of the image that has begun."""
        self.image_random = torch.Generator().manual_seed(_mix(self.request.seed, self.num_images))
        return torch.randn(self.rows * self.cols, self.patch_width, generator=self.image_random)

    def fresh_P(self) -> Tensor:
        """More noise for the patch that is being drawn."""
        return torch.randn(self.patch_width, generator=self.image_random)

    def write_patch(self) -> None:
        """Take note that the next patch is drawn."""
        self.length += 1
        self.written += 1
        if self.written == self.rows * self.cols:
            self.phase = "eoi"
            self._end_if_spent()

    def write(self, token: int) -> None:
        """Take note of the token that was chosen, and move on in the grammar."""
        v = self.vocabulary
        self.length += 1
        if token == v.boi:
            self.phase = "rows"
        elif self.phase == "rows":
            self.rows, self.phase = token - v.first_row + 1, "cols"
        elif self.phase == "cols":
            self.cols, self.phase, self.written = token - v.first_col + 1, "patch", 0
            self.num_images += 1
            self.segments.append((self.rows, self.cols, self.length))
        elif token == v.eoi:
            self.phase = "text"
        elif token == v.eos:
            self.phase = "done"
        else:
            if not self.segments or not isinstance(self.segments[-1], GeneratedText):
                self.segments.append(GeneratedText([]))
            self.segments[-1].tokens.append(token)  # type: ignore[union-attr]
            self.num_text += 1
            self._end_if_spent()

    def result(self, drawn_TP: np.ndarray) -> list[Segment]:
        """What was written, given the patches by slot."""
        return [
            part
            if isinstance(part, GeneratedText)
            else GeneratedImage(part[0], part[1], drawn_TP[part[2] : part[2] + part[0] * part[1]].copy())
            for part in self.segments
        ]


class _Streams:
    """The rows of the batch: one per sample, then, if guided, one per sample without text, then perhaps one without
    the prompt's images too; with their decode states. What follows from the size of an image (places, positions) is
    written down when it begins, so that its patches need nothing from the host."""

    def __init__(self, model: Ropeway, writers: Sequence["_Writer"], count: int) -> None:
        """count: number of streams, see Guidance.streams."""
        self.model = model
        filled = list(writers) + [writers[-1]] * (-len(writers) % _ROW_MULTIPLE)
        prompts = [writer.request.prompt for writer in filled]
        self.firsts = [stream * len(filled) for stream in range(count)]
        """The row of the first sample in each stream."""
        textless = [_without_text(prompt, model.vocabulary.pad) for prompt in prompts]
        imageless = [_beginning(prompt) for prompt in prompts]
        prompts = [
            _extended(prompt, writer.opening)
            for stream in (prompts, textless, imageless)[:count]
            for prompt, writer in zip(stream, filled, strict=True)
        ]
        self.rows = len(prompts)
        lengths = [len(prompt.token) for prompt in prompts]
        self.longest = -(-max(lengths) // KEY_MULTIPLE) * KEY_MULTIPLE
        self.capacity = max(_new_slots(writer.request) for writer in writers)
        device = model.token_embedding.weight.device
        total = self.longest + self.capacity + 1
        self.token_RT, self.row_RT, self.col_RT, self.rows_RT, self.cols_RT = (
            torch.stack([_padded(getattr(prompt, name), total) for prompt in prompts]).to(device)
            for name in ("token", *_PLACE)
        )
        self.positions_RT2 = model.positions(self._grid(slice(None)))
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
        self._active: list[bool] = []
        self.read(lengths)

    def read(self, lengths: list[int]) -> None:
        """Read all that was written so far, anew. lengths: slots of every row."""
        model, device = self.model, self.length_R.device
        self.longest = -(-max(lengths) // KEY_MULTIPLE) * KEY_MULTIPLE
        slots, valid = slice(0, self.longest), torch.arange(self.longest) < torch.tensor(lengths)[:, None]
        is_patch_RS = (self.rows_RT[:, slots] > 0) & valid.to(device)
        patches_NP = self.patch_RTP[:, slots][is_patch_RS]
        # embed leaves the surplus unused
        pixels_NP = to_pixels(pad(patches_NP, (0, 0, 0, -len(patches_NP) % _ROW_MULTIPLE)))
        x_RSD = model.embed(self.token_RT[:, slots], is_patch_RS, pixels_NP)
        angles = model.rotation(self.positions_RT2[:, slots])
        documents = Documents.of(valid.long(), multiple=KEY_MULTIPLE).to(device)
        documents = model.attended(documents, self._grid(slice(None), slots))
        hidden, self.states = model.backbone.prefill(x_RSD, angles, documents, self.token_RT.shape[1])
        self.hidden_RD = hidden[self.every_R, self.length_R - 1]

    def _grid(self, row_X: slice | list[int] | Tensor, slots: slice = slice(None)) -> Grid:
        columns = [column[row_X, slots] for column in (self.row_RT, self.col_RT, self.rows_RT, self.cols_RT)]
        index_XT = torch.arange(1, columns[0].shape[1] + 1, device=columns[0].device).expand_as(columns[0])
        return Grid(index_XT, *columns)

    def begin_image(self, b: int, writer: "_Writer") -> None:
        """Write down the slots of all patches of the image that sample b has announced."""
        device, every = self.length_R.device, [first + b for first in self.firsts]
        ordinal_N = torch.arange(writer.rows * writer.cols, device=device)
        slot_XN = self.length_R[every].unsqueeze(1) + ordinal_N
        row_X1 = torch.tensor(every, device=device).unsqueeze(1)
        self.token_RT[row_X1, slot_XN] = self.model.vocabulary.patch
        self.row_RT[row_X1, slot_XN] = ordinal_N // writer.cols + 1
        self.col_RT[row_X1, slot_XN] = ordinal_N % writer.cols + 1
        self.rows_RT[row_X1, slot_XN] = writer.rows
        self.cols_RT[row_X1, slot_XN] = writer.cols
        self.positions_RT2[every] = self.model.positions(self._grid(every))
        self.noise[b] = writer.noise_NP().to(device)

    def places(self, row_N: Tensor) -> Tensor:
        """row, col, rows, cols of the next slot of some rows, (N, 4)."""
        columns = (self.row_RT, self.col_RT, self.rows_RT, self.cols_RT)
        return torch.stack([column[row_N, self.length_R[row_N]] for column in columns], dim=-1)

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
        x_R1D = self.model.token_embedding(self.token_RT[self.every_R, self.length_R]).unsqueeze(1)
        if draws:
            patch_RP = self.patch_RTP[self.every_R, self.length_R]
            patch_R1D = self.model.patch_embedding(to_pixels(patch_RP)).unsqueeze(1)
            is_patch_R = self.rows_RT[self.every_R, self.length_R] > 0
            x_R1D = torch.where(is_patch_R[:, None, None], patch_R1D.to(x_R1D.dtype), x_R1D)
        angles = self.model.rotation(self.positions_RT2[self.every_R, self.length_R].unsqueeze(1))
        hidden = self.model.backbone.step(x_R1D, angles, self.length_R, self.longest, self.states)[:, 0]
        self.hidden_RD = torch.where(self.active_R[:, None], hidden, self.hidden_RD)
        self.length_R = self.length_R + self.active_R
        self.longest += 1

    def drawn(self) -> np.ndarray:
        """Patches by sample and slot of its first stream, (B, T, P) uint8, on the host."""
        return self.patch_RTP[: self.rows // len(self.firsts)].cpu().numpy()


def _new_slots(request: Request) -> int:
    patches = request.grid[0] * request.grid[1] if request.grid else request.max_patches
    return request.max_text + request.max_images * (patches + 4) + 1


def _padded(column: np.ndarray, length: int) -> Tensor:
    return torch.from_numpy(np.pad(column.astype(np.int64), (0, length - len(column))))


def _without_text(prompt: Prompt, first_special: int) -> Prompt:
    keep = prompt.token >= first_special
    columns = {name: getattr(prompt, name)[keep] for name in ("token", *_PLACE)}
    return Prompt(**columns, patches=prompt.patches)


def _extended(prompt: Prompt, tokens: list[int]) -> Prompt:
    """With these tokens, which are none of patches, behind it."""
    rest = {name: np.append(getattr(prompt, name), np.zeros(len(tokens), np.int64)) for name in _PLACE}
    return Prompt(np.append(prompt.token, np.array(tokens, np.int64)), **rest, patches=prompt.patches)


def _beginning(prompt: Prompt) -> Prompt:
    """<bos> alone."""
    columns = {name: getattr(prompt, name)[:1] for name in ("token", *_PLACE)}
    return Prompt(**columns, patches=prompt.patches[:0])


def _mix(seed: int, stream: int) -> int:
    """A 63-bit seed for one of a sample's random streams (splitmix64), so that neighbouring seeds share nothing."""
    z = (seed * 0x9E3779B97F4A7C15 + stream * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 1
