"""The whole model: embeddings, positions, backbone, text head and diffusion head."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention.codebook import Codebook
from model.attention.documents import Documents
from model.batch import Batch, to_pixels
from model.config import ModelConfig, Vocabulary
from model.diffusion.head import DiffusionHead
from model.diffusion.objective import Draws, draw, head_loss, loss_of
from model.diffusion.path import PATHS, noised
from model.diffusion.sequence import SequenceHead
from model.diffusion.solver import LearnedMidpoint
from model.positions import LAYOUTS, Grid
from model.rope import Rotation, frequencies, rotation
from model.text_head import TextHead
from model.transformer import Backbone

TIME_BINS = 10
"""Equal parts of the time, 0 noise to 1 data, that the image loss is also summed in."""
_CONTEXT_STREAM = 0x5EED_C0DE  # apart from the row's stream of times and noises of the diffusion head
_IMAGE_STREAM = 0x1A6E_C0DE  # of the times of whole images
Writable = Callable[[Tensor], AbstractContextManager]


class Losses(NamedTuple):
    """Sums over the labels of a batch, never means: the caller divides by the counts of the whole optimizer step."""

    text: Tensor
    """Cross-entropy in nats, summed over learned text tokens."""
    image: Tensor
    """Loss of the diffusion head (mean over a patch's numbers and draws), summed over learned patches."""
    image_by_time: Tensor
    """(2, TIME_BINS): the same loss summed over the draws in each part of the time, and the number of those draws. It
    has no gradient."""
    commit: Tensor = torch.zeros(())
    """Distance of quantised keys to their codewords, summed over slots, heads and layers (0 outside of training)."""


class Ropeway(nn.Module):
    """One Transformer that reads and writes text tokens and raw pixel patches in one sequence."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.token_embedding = nn.Embedding(vocabulary.size, config.dim)
        rank = config.patch_bottleneck
        self.patch_embedding: nn.Module = nn.Linear(config.patch_width, config.dim)
        if rank is not None:
            self.patch_embedding = nn.Sequential(
                nn.Linear(config.patch_width, rank, bias=False), nn.Linear(rank, config.dim)
            )
        self.backbone = Backbone(config)
        untied = config.output_embedding == "untied"
        own = nn.Parameter(torch.empty(vocabulary.size, config.dim)) if untied else self.token_embedding.weight
        self.text_head = TextHead(own, half_swap=config.output_embedding == "tied_half_swap")
        self.diffusion_head = self.sequence_head = None
        if config.image_mode == "transfusion":
            self.sequence_head = SequenceHead(config)
        else:
            self.diffusion_head = DiffusionHead(config)
        self.solver: LearnedMidpoint | None = None
        """The sampler `learned`, for models that have been given one; no part of training."""

    @torch.no_grad()
    def initialise(self, seed: int, writable: Writable = nullcontext) -> None:
        """Fill every parameter from a seed. Matrices N(0, 1/fan_in) with the ones that write to the residual stream
        divided by sqrt(2 * layers) (GPT-2); embeddings N(0, 0.02); norms 1. The diffusion head has its own rule.

        writable(parameter): within it the parameter may be written (ZeRO-3 holds a part of each one only).
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, parameter in self.backbone.named_parameters():
                with writable(parameter):
                    if parameter.dim() < 2:
                        nn.init.ones_(parameter)
                        continue
                    writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                    depth = 2 * self.config.num_layers if writes else 1
                    nn.init.normal_(parameter, std=(parameter.shape[1] * depth) ** -0.5)
            for parameter in self.patch_embedding.parameters():
                with writable(parameter):
                    if parameter.dim() < 2:
                        nn.init.zeros_(parameter)
                    else:
                        nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            with writable(self.token_embedding.weight):
                nn.init.normal_(self.token_embedding.weight, std=0.02)
            if self.config.output_embedding == "untied":
                with writable(self.text_head.weight):
                    nn.init.normal_(self.text_head.weight, std=0.02)
            for head in (self.sequence_head, self.diffusion_head):
                if head:
                    head.initialise(writable)
            for codebook in self.codebooks().values():
                codebook.initialise(writable)

    def codebooks(self) -> dict[str, Codebook]:
        """The codebook of every quantised layer, by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Codebook)}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was learned, by name: parameters, and the codebooks, which are none."""
        return dict(self.named_parameters()) | dict(self.named_buffers())

    def recompute_activations(self) -> None:
        """Keep only the inputs of blocks while training, and compute the rest again in the backward pass."""
        self.backbone.recompute = True
        if self.diffusion_head:
            self.diffusion_head.recompute = True

    def compile_blocks(self) -> None:
        """torch.compile every block of the backbone and of the diffusion head."""
        for block in (*self.backbone.layers, *(self.diffusion_head.blocks if self.diffusion_head else ())):
            block.compile()

    def compile_drawing(self) -> None:
        """torch.compile what draws patch by patch: a step of the model, and evaluations of the head.

        Raises ValueError for a model that draws whole images.
        """
        if not self.diffusion_head:
            raise ValueError("a model with model.image_mode transfusion draws whole images, which cannot be compiled")
        self.step = torch.compile(self.step)  # type: ignore[method-assign]
        self.diffusion_head.compile()

    def embed(self, token_BS: Tensor, is_patch_BS: Tensor, patches_NP: Tensor,
              time_ND: Tensor | None = None) -> Tensor:  # fmt: skip
        """Token embeddings, with patches (in [-1, 1]) put into their slots in order. Returns (B, S, D).

        time_ND: what the sequence head adds to noised patches; by default they are clean.
        """
        x_BSD = self.token_embedding(token_BS)
        # With no patch in the batch this still links the patch embedding to the loss, so no rank's gradient is missing.
        patches_ND = self.patch_embedding(patches_NP)
        if self.sequence_head:
            clean_1 = patches_NP.new_ones(1)
            patches_ND = patches_ND + (self.sequence_head.embed_time(clean_1) if time_ND is None else time_ND)
        patches_ND = patches_ND.to(x_BSD.dtype)
        return x_BSD.masked_scatter(is_patch_BS.unsqueeze(-1), patches_ND)

    def positions(self, grid: Grid) -> Tensor:
        """The two coordinates of every slot, (B, S, 2) float32."""
        return LAYOUTS[self.config.positions](grid)

    def rotation(self, positions_BS2: Tensor) -> Rotation:
        """Rotary angles in float32 at some positions."""
        config = self.config
        theta_F = frequencies(config.head_width, config.rope_base, config.rope_frequencies, positions_BS2.device)
        return rotation(positions_BS2, theta_F)

    def angles(self, grid: Grid) -> Rotation:
        """Rotary angles in float32 of every slot."""
        return self.rotation(self.positions(grid))

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm, (B, S, D); that of slot k predicts slot k + 1."""
        return self._read(batch)[0]

    def _read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states, and the commitment of quantised keys."""
        patches_NP = to_pixels(batch.patches_NP)
        if self.training and self.config.context_noise:
            patches_NP = self._noised_context(batch, patches_NP)
        x_BSD = self.embed(batch.token_BS, batch.rows_BS > 0, patches_NP)
        return self.read(x_BSD, self.angles(batch.grid), batch.documents, batch.grid)

    def read(self, x_BSD: Tensor, angles: Rotation, documents: Documents, grid: Grid) -> tuple[Tensor, Tensor]:
        """The backbone over whole rows: hidden states, and the commitment of quantised keys."""
        return self.backbone(x_BSD, angles, self.attended(documents, grid))

    def step(self, token_R: Tensor, patch_RP: Tensor | None, is_patch_R: Tensor, positions_R2: Tensor, length_R: Tensor,
             reach: int, states: list) -> Tensor:  # fmt: skip
        """One more slot for every row: its hidden state, (R, D).

        patch_RP: uint8, for the rows where is_patch_R; None: there are none. length_R, reach: see model.attention.
        """
        x_RD = self.token_embedding(token_R)
        if patch_RP is not None:
            embedded_RD = self.patch_embedding(to_pixels(patch_RP)).to(x_RD.dtype)
            x_RD = torch.where(is_patch_R[:, None], embedded_RD, x_RD)
        angles = self.rotation(positions_R2.unsqueeze(1))
        return self.backbone.step(x_RD.unsqueeze(1), angles, length_R, reach, states)[:, 0]

    def attended(self, documents: Documents, grid: Grid) -> Documents:
        """What attention shall know: in image mode transfusion also the images."""
        return documents.with_images(grid.row_BS, grid.col_BS) if self.sequence_head else documents

    def _noised_context(self, batch: Batch, patches_NP: Tensor) -> Tensor:
        """(1 - s) patch + s noise for the patches of learned images, s uniform in (0, 1) for a part of the documents,
        else 0; a function of the row's seed alone."""
        document_BS, is_patch_BS = batch.document_BS, batch.rows_BS > 0
        shares, noises = [], []
        for document_S, is_patch_S, learn_S, seed in zip(
            document_BS, is_patch_BS, batch.learn_BS, batch.seed_B, strict=True
        ):
            generator = torch.Generator(patches_NP.device).manual_seed(seed ^ _CONTEXT_STREAM)
            draw_D2 = torch.rand(int(document_S.max()) + 1, 2, generator=generator, device=patches_NP.device)
            share_D = draw_D2[:, 1] * (draw_D2[:, 0] < self.config.context_noise)
            shares.append((share_D[document_S] * learn_S)[is_patch_S])
            noises.append(torch.randn(int(is_patch_S.sum()), patches_NP.shape[1], generator=generator,
                                      device=patches_NP.device))  # fmt: skip
        share_N1 = torch.cat(shares).unsqueeze(1)
        return torch.lerp(patches_NP, torch.cat(noises), share_N1)

    def forward(self, batch: Batch) -> Losses:
        """Loss sums of a batch. Every parameter takes part, whatever kinds of targets the batch holds."""
        if self.sequence_head:
            return self._whole_images(batch, self.sequence_head)
        assert self.diffusion_head is not None
        hidden_BSD, commit = self._read(batch)
        hidden_XD = hidden_BSD.flatten(0, 1)
        text_BS, image_BS = batch.targets()
        text_slot, image_slot = (mask.flatten().nonzero()[:, 0] for mask in (text_BS, image_BS))
        text_N = self.text_head(hidden_XD.index_select(0, text_slot), batch.token_BS.flatten()[text_slot + 1])

        head, target = self.config.head, image_slot + 1
        patch_ordinal = (batch.rows_BS > 0).flatten().cumsum(0) - 1
        x_NP = to_pixels(batch.patches_NP[patch_ordinal[target]])
        place = (batch.row_BS, batch.col_BS, batch.rows_BS, batch.cols_BS)
        location_N4 = torch.stack([column.flatten()[target] for column in place], dim=-1)
        draws = draw(image_BS.sum(1).tolist(), list(batch.seed_B), self.config.patch_width, head, hidden_XD.device)
        image_M = head_loss(self.diffusion_head, hidden_XD.index_select(0, image_slot), location_N4, x_NP, draws, head)
        by_time = _by_time(image_M.detach(), draws.time_M1[:, 0])
        return Losses(text_N.sum(), image_M.sum() / head.draws, by_time, commit)

    def _whole_images(self, batch: Batch, head: SequenceHead) -> Losses:
        """Loss sums where images are one diffusion inside the backbone: one time for each image that is learned. The
        others are clean."""
        text_BS, image_BS = batch.targets()
        config, seeds = replace(self.config.head, draws=1), list(batch.seed_B)
        is_patch_BS, clean_NP = batch.rows_BS > 0, to_pixels(batch.patches_NP)
        is_learned_BS = is_patch_BS & batch.learn_BS
        learned_M, slot_M = is_learned_BS[is_patch_BS].nonzero()[:, 0], is_learned_BS.flatten().nonzero()[:, 0]
        first_BS = is_learned_BS & (batch.row_BS == 1) & (batch.col_BS == 1)
        of_patches = draw(image_BS.sum(1).tolist(), seeds, self.config.patch_width, config, clean_NP.device)
        image_seeds = [seed ^ _IMAGE_STREAM for seed in seeds]
        of_images = draw(first_BS.sum(1).tolist(), image_seeds, 0, config, clean_NP.device)
        image_M = first_BS.flatten()[slot_M].cumsum(0) - 1
        draws = Draws(of_images.time_M1[image_M], of_patches.noise_MP, of_images.steps_M1[image_M])
        x_MP = clean_NP[learned_M]
        drawn = noised(x_MP, draws.noise_MP, PATHS[config.path].at(draws.time_M1)), draws.time_M1, draws.steps_M1
        hidden_XD: Tensor

        def says(z: Tensor, time: Tensor, steps: Tensor | None = None, chosen: Tensor | None = None) -> Tensor:
            nonlocal hidden_XD  # in the end that of the pass which is trained, the last one
            if chosen is not None:  # other images stay as they were drawn
                assert steps is not None
                z, time, steps = (_with(all_M, chosen, own) for all_M, own in zip(drawn, (z, time, steps), strict=True))
            time_N = torch.ones_like(clean_NP[:, 0]).index_copy(0, learned_M, time[:, 0])
            time_ND = head.embed_time(time_N)
            if steps is not None:
                time_ND = time_ND.index_add(0, learned_M, head.shortcut_in(steps[:, 0]))
            noised_NP = clean_NP.index_copy(0, learned_M, z)
            x_BSD = self.embed(batch.token_BS, is_patch_BS, noised_NP, time_ND)
            hidden_XD = self.read(x_BSD, self.angles(batch.grid), batch.documents, batch.grid)[0].flatten(0, 1)
            out_MQ = head(hidden_XD.index_select(0, slot_M)).float()
            return out_MQ if chosen is None else out_MQ[chosen]

        image_M = loss_of(says, x_MP, draws, config)
        text_slot = text_BS.flatten().nonzero()[:, 0]
        text_N = self.text_head(hidden_XD.index_select(0, text_slot), batch.token_BS.flatten()[text_slot + 1])
        return Losses(text_N.sum(), image_M.sum(), _by_time(image_M.detach(), draws.time_M1[:, 0]))


def _with(all_MX: Tensor, chosen_M: Tensor, own_KX: Tensor) -> Tensor:
    """A copy with other rows where chosen."""
    return all_MX.index_put((chosen_M.nonzero()[:, 0],), own_KX)


def _by_time(loss_M: Tensor, time_M: Tensor) -> Tensor:
    bin_M = (time_M * TIME_BINS).long().clamp(0, TIME_BINS - 1)
    both_2M = torch.stack((loss_M, torch.ones_like(loss_M)))
    return loss_M.new_zeros(2, TIME_BINS).index_add_(1, bin_M, both_2M)
