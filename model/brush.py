"""Drawing of images: patch by patch with the diffusion head, or whole through the backbone (image_mode transfusion)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.attention.documents import Documents
from model.batch import to_bytes, to_pixels
from model.config import HeadConfig
from model.diffusion.field import Field
from model.diffusion.path import PATHS
from model.diffusion.sampler import grid_of
from model.diffusion.sequence import SequenceHead
from model.positions import Grid
from model.rope import Rotation
from model.ropeway import Ropeway
from model.sampling import Sampling, sampler_of
from model.streams import ROW_MULTIPLE, Streams, places
from model.writer import Writer


class Brush:
    """Draws the next patch of a set of samples, again and again. Nothing goes between host and device meanwhile."""

    def __init__(self, model: Ropeway, writers: list[Writer], draws: list[int], streams: Streams,
                 sampling: Sampling) -> None:  # fmt: skip
        self.draws, self.streams, self.sampling = draws, streams, sampling
        if not draws:
            return
        assert model.diffusion_head is not None
        self.head, config = model.diffusion_head, model.config.head
        # Filled up for the same reason as the streams: products of few rows round differently.
        chosen = draws + draws[-1:] * (-len(draws) % ROW_MULTIPLE)
        device = streams.hidden_RD.device
        sample_N = torch.tensor(chosen, device=device)
        self.row_X = torch.cat([first + sample_N for first in streams.firsts])
        self.every_N = torch.arange(len(chosen), device=device)
        grids = [(writers[b].rows, writers[b].cols) for b in chosen]
        every = list(dict.fromkeys(grids))
        self.place_GTW = pad_sequence([self.head.locate(places(*grid, device)) for grid in every], batch_first=True)
        self.written_N, self.count_N, self.grid_N = torch.tensor(
            [[writers[b].written, rows * cols, every.index((rows, cols))]
             for b, (rows, cols) in zip(chosen, grids, strict=True)], device=device,
        ).unbind(1)  # fmt: skip
        self.noise_NTP = pad_sequence([streams.noise[b] for b in chosen], batch_first=True)
        self.key_NT = pad_sequence([streams.key[b] for b in chosen], batch_first=True)
        path = PATHS[config.path]
        self.times = grid_of(sampling.grid, sampling.steps, path, sampling.time_shift)
        self.shortcut_X = torch.full((len(self.row_X),), jumps(sampling), device=device)
        self.sampler, self.noise_scale = sampler_of(model, sampling), config.noise_scale * (1 - self.times[0])
        self.field = Field(
            self.head, config, sampling.guidance, sampling.noise_temperature, sampling.clamp,
            learned_variance=learns_variance(config, sampling),
        )  # fmt: skip

    def draw(self) -> None:
        """Put the next patch of every sample into the streams."""
        streams, every_N, written_N = self.streams, self.every_N, self.written_N
        place_NW = self.place_GTW[self.grid_N, written_N].repeat(len(streams.firsts), 1)
        condition_XW = self.head.condition_in(streams.hidden_RD[self.row_X]) + place_NW
        if self.field.config.objective == "shortcut":
            condition_XW = condition_XW + self.head.shortcut_in(self.shortcut_X)
        self.written_N = written_N + 1
        self.field.begin(condition_XW, (self.written_N / self.count_N).unsqueeze(1), self.key_NT[every_N, written_N])
        z = self.noise_NTP[every_N, written_N] * self.noise_scale
        z = self.sampler(self.field, z, self.times, self.field.noise)
        streams.patch_RTP[self.row_X, streams.length_R[self.row_X]] = to_bytes(z).repeat(len(streams.firsts), 1)


def jumps(sampling: Sampling) -> int:
    """Of how many jumps a patch is drawn by a head that learned them, each 1 / n of the way; 0: as the flow goes. Jumps
    are learned in powers of two, and Euler's steps of the uniform grid are jumps."""
    plain = sampling.sampler == "euler" and sampling.grid == "uniform" and sampling.time_shift == 1
    return sampling.steps if plain and sampling.steps.bit_count() == 1 else 0


def learns_variance(head: HeadConfig, sampling: Sampling) -> bool:
    """Whether the noise of a step is as large as the head says."""
    return head.objective == "ddpm" and sampling.sampler == "ddpm"


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

    def __call__(self, z_MP: Tensor, _: None, condition_MD: Tensor) -> Tensor:
        clean_1D = self.head.embed_time(z_MP.new_ones(1))
        # Where the first stream alone has a say, the others are computed too: all are one batch.
        streams = len(self.noised_M) // len(z_MP)
        time_ND = clean_1D.repeat(len(self.pixels_NP), 1).index_copy(0, self.noised_M, condition_MD.repeat(streams, 1))
        pixels_NP = self.pixels_NP.index_copy(0, self.noised_M, z_MP.repeat(streams, 1))
        x_RSD = self.model.embed(self.token_RS, self.is_patch_RS, pixels_NP, time_ND)
        hidden_RSD, _commit = self.model.backbone(x_RSD, self.angles, self.documents)
        return self.head(hidden_RSD.flatten(0, 1).index_select(0, self.slot_M[: len(z_MP)]))


def paint(model: Ropeway, head: SequenceHead, writers: list[Writer], begun: list[int], streams: Streams,
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
    grid = Grid(*(column[:, slot_S] for column in streams.grid(row_R)))
    painter = _Painter(
        model, head, streams.token_RT[row_R][:, slot_S], is_patch_RS,
        pixels_NP=to_pixels(streams.patch_RTP[row_R][:, slot_S][is_patch_RS]),
        noised_M=is_noised_RS[is_patch_RS].nonzero()[:, 0], slot_M=is_noised_RS.flatten().nonzero()[:, 0],
        angles=model.rotation(streams.positions_RT2[row_R][:, slot_S]),
        documents=model.attended(Documents.of(valid_RS.long().cpu()).to(device), grid),
    )  # fmt: skip

    field = Field(painter, config, sampling.guidance, sampling.noise_temperature, sampling.clamp,
                  learned_variance=learns_variance(config, sampling))  # fmt: skip
    times = grid_of(sampling.grid, sampling.steps, PATHS[config.path], sampling.time_shift)
    z = torch.cat([streams.noise[b] for b in begun]) * config.noise_scale * (1 - times[0])
    condition_RD = z.new_zeros(len(z) * sampling.guidance.streams, model.config.dim)
    if config.objective == "shortcut":
        condition_RD = condition_RD + head.shortcut_in(torch.full((1,), jumps(sampling), device=device))
    field.begin(condition_RD, z.new_ones(len(z), 1), torch.cat([streams.key[b] for b in begun]))
    patches_MP = to_bytes(sampler_of(model, sampling)(field, z, times, field.noise)).repeat(len(streams.firsts), 1)
    row_M, place_M = is_noised_RS.nonzero().unbind(1)
    streams.patch_RTP[row_R[row_M], place_M] = patches_MP
    streams.length_R[row_R] = end_R
    for b in begun:
        for _ in streams.noise[b]:
            writers[b].write_patch()
    streams.read(streams.length_R.tolist(), like=list(range(streams.rows)))
