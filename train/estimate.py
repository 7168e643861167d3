"""What a run needs, worked out before it starts: memory, disk, floating-point operations, bytes sent between ranks.

Arithmetic on the configuration alone. What autograd keeps was derived from the model's operations and is compared with
what it really keeps in tests/train/test_estimate.py; what DeepSpeed holds and sends was read in its source (0.19.8) and
is compared with what it really sends by `python -m benchmarks communication`. docs/distributed.md explains the terms.

Not in it: the temporaries of single operations, the allocator's fragmentation, CUDA's context (about 1 GB), and the
few scalars that ranks exchange. Allow ten per cent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from model.attention.dense import FLOAT_UP_TO
from model.config import LOCATION_FEATURES, TIME_FEATURES, ModelConfig
from model.text_head import _CHUNK_ELEMENTS as CHUNK_ELEMENTS
from train.checkpoint import SHARD_BYTES
from train.config import REDUCE_BUCKET, Config
from train.precision import uses_bf16
from train.ranks import pick_device

RING = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}
"""What a rank of W sends in a ring, in units of (W - 1) / W times the bytes of the whole tensor."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank on its device, unless a field says otherwise."""

    world: int
    weights: int
    gradients: int
    optimizer: int
    """Moments of AdamW and Muon, and ZeRO's own float32 copy of the weights; not what Muon works on at a time."""
    average: int
    casts: int
    """bfloat16 copies of the weights, which autocast makes and the backward pass uses."""
    gathered: int
    """ZeRO-3: whole weights that are joined at a time."""
    buckets: int
    """ZeRO: where gradients are collected before they are sent."""
    activations: int
    """What autograd keeps of embeddings, backbone and text head in a micro-batch."""
    head: int
    """What autograd keeps of the diffusion head."""
    recomputed: int
    """The block that is being computed again, with activation checkpointing."""
    logits: int
    """Of one chunk: scores, their log-softmax and its gradient."""
    evaluation: int
    """A copy of the averaged weights, while held-out losses and samples are made."""
    host: int
    """In the host's memory, per rank: what is offloaded, and a copy of the weights while a model is built on a GPU."""
    saving: int
    """In the host's memory of rank 0, while a checkpoint is written."""
    checkpoint: int
    """On disk, one checkpoint."""
    disk: int
    """On disk, all checkpoints of the run, with the one being written."""
    flops: float
    """Of a step on this rank, forward and backward; what is recomputed does not count."""
    collectives: Mapping[str, int]
    """Bytes of the whole tensors that a step hands to each kind of collective."""

    @property
    def state(self) -> int:
        """What is there between two steps."""
        return self.weights + self.optimizer + self.average

    @property
    def training(self) -> int:
        """The most while a step is computed: at the start of the backward pass of its last micro-batch."""
        shared = self.casts + self.gathered + self.buckets
        kept = self.activations + self.head + self.recomputed + self.logits
        return self.state + self.gradients + shared + kept

    @property
    def peak(self) -> int:
        return max(self.training, self.state + self.evaluation)

    @property
    def sent(self) -> int:
        """Bytes that a rank sends in a step, and receives as many."""
        return sum(RING[kind] * size * (self.world - 1) // self.world for kind, size in self.collectives.items())


def of(
    config: Config, vocabulary_size: int, world: int,
    slots: int, squared_lengths: int, num_text: int, num_patches: int, num_learned_patches: int,
    groups: Sequence[tuple[int, int]] | None = None, device: torch.device | None = None,
) -> Estimate:  # fmt: skip
    """The estimate for one rank whose micro-batches hold what is given.

    Args:
        slots: of the micro-batch, padding included. squared_lengths: sum over its documents of length squared.
        num_text, num_learned_patches: learned text tokens and patches. num_patches: patches that are read.
        groups: in which documents are attended (Documents.groups), each with the number of its documents and the slots
            of the longest; default: the most that there can be, twice the slots in documents as long as rows.
        device: default: that of run.device.
    """
    model, micro_batches = config.model, config.engine.micro_batches
    device = device or pick_device(config.run.device)
    keeps = _Keeps(uses_bf16(config.run.precision, device), device.type == "cuda", _stage(config) == 3)
    groups = [(-(-2 * slots // config.data.row_length), config.data.row_length)] if groups is None else groups
    counts = (slots, groups, num_text, num_patches, num_learned_patches)
    return Estimate(
        world=world,
        flops=micro_batches
        * model.flops_per_step(slots, squared_lengths, num_text, num_patches, num_learned_patches, vocabulary_size),
        collectives=_collectives(config, vocabulary_size, keeps.bf16) if world > 1 else {},
        **_state(config, vocabulary_size, world, keeps),
        **_activations(config, vocabulary_size, keeps, *counts),
    )


def lines(estimate: Estimate) -> list[str]:
    """The estimate for people, one line per part."""
    e = estimate
    device = {
        "weights": e.weights,
        "gradients": e.gradients,
        "optimizer state": e.optimizer,
        "weight average": e.average,
        "bf16 copies of weights": e.casts,
        "joined weights (ZeRO-3)": e.gathered,
        "gradient buckets (ZeRO)": e.buckets,
        "activations, backbone": e.activations,
        "activations, diffusion head": e.head,
        "block computed again": e.recomputed,
        "logits": e.logits,
    }
    sent = ", ".join(f"{kind} {size(bytes_)}" for kind, bytes_ in e.collectives.items()) or "nothing"
    return [
        f"estimate per rank, on its device ({e.world} rank(s)):",
        *(f"  {name:28s} {size(value):>10s}" for name, value in device.items() if value),
        f"  {'in all while training':28s} {size(e.training):>10s}",
        *([f"  {'in all while evaluating':28s} {size(e.state + e.evaluation):>10s}"] if e.evaluation else []),
        f"estimate of the host's memory: {size(e.host)} per rank, {size(e.saving)} more on rank 0 while saving",
        f"estimate of the disk: {size(e.checkpoint)} per checkpoint, {size(e.disk)} at most",
        f"estimate of a step: {e.flops / 1e12:.3g} TFLOP per rank; between ranks {sent}; a rank sends {size(e.sent)}",
    ]


def size(number: float) -> str:
    """Bytes in the decimal unit that fits."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


@dataclass(frozen=True)
class _Keeps:
    """Bytes per number that autograd keeps of one tensor."""

    bf16: bool
    cuda: bool
    zero3: bool

    @property
    def product(self) -> int:
        """The output of a linear, and what is computed from it in the same precision."""
        return 2 if self.bf16 else 4

    @property
    def rms(self) -> int:
        """Input of an RMSNorm, in float32; without CUDA's fused kernel also the input over its root mean square."""
        return 4 if self.cuda else 8

    @property
    def layer_norm(self) -> int:
        """Input and output of a LayerNorm: float32 under CUDA's autocast, as they come under the CPU's."""
        return 8 if self.cuda else 2 * self.product

    @property
    def modulated(self) -> int:
        """A modulated LayerNorm, as the linear behind it reads it: in the precision of the norm's output."""
        return self.read(1) if self.cuda else self.product

    def read(self, linears: int) -> int:
        """A float32 tensor that so many linears read. Autocast casts it for each; ZeRO-3's own linear keeps it as it
        is."""
        return 2 * linears if self.bf16 and not self.zero3 else 4


def _stage(config: Config) -> int:
    return config.engine.zero_stage if config.engine.backend == "deepspeed" else 0


def _zero(config: Config, key: str, default: float) -> int:
    """A key of DeepSpeed's section zero_optimization, with DeepSpeed's default."""
    return int(float(config.engine.deepspeed.get("zero_optimization", {}).get(key, default)))


def _reused(config: Config, numbers: int) -> int:
    """ZeRO-3: weights that are still joined from the forward pass when the backward pass needs them. They lie within
    `stage3_max_reuse_distance` numbers: on and back, or on, and back with every block computed again."""
    passes = 3 if config.engine.activation_checkpointing else 2
    return min(numbers, _zero(config, "stage3_max_reuse_distance", 1e9) // passes)


def _state(config: Config, vocabulary_size: int, world: int, keeps: _Keeps) -> dict[str, int]:
    """The fields of Estimate that follow from the number of parameters."""
    model, engine, keep, stage = config.model, config.engine, config.checkpoint, _stage(config)
    numbers = sum(model.num_parameters(vocabulary_size).values())
    part, table, books = -(-numbers // world), vocabulary_size * model.dim, _codebooks(model)
    gradients = 4 * (part if stage >= 2 else numbers)
    checkpoint = 16 * numbers + 8 * books
    optimizer = 12 * part if stage else 8 * numbers
    if config.optim.muon_lr is not None:  # one moment instead of two
        optimizer, checkpoint = optimizer - 4 * _decayed(model), checkpoint - 4 * _decayed(model)
    host = 4 * (numbers + books) if keeps.cuda and (stage < 3 or config.eval.every) else 0
    if engine.offload and stage:
        host += 20 * part  # weights, both moments, gradient, and its sum over micro-batches
        gradients, optimizer = gradients if stage == 1 else 0, 0
    casts = gathered = 0
    if stage == 3:
        ahead = _zero(config, "stage3_prefetch_bucket_size", 5e7) + max(table, model.dim * model.ffn_width)
        gathered = 4 * min(numbers, _reused(config, numbers) + ahead)
    elif keeps.bf16:
        width = model.dim if model.image_mode == "transfusion" else model.head.width
        time = width * (TIME_FEATURES + width + 2)  # the time's embedding stays float32
        casts = 2 * (_in_linears(model) - time + table)
    # One bucket for what is sent in float32 and one for bfloat16; stages 1 and 2 fill both with float32.
    bucket = (0, 4, 4, 4)[stage] + ((0, 4, 4, 2)[stage] if keeps.bf16 else 0)
    checkpoints = keep.keep_last + (config.run.steps // keep.keep_every if keep.keep_every else 0) + 1
    return {
        "weights": 4 * (part if stage == 3 else numbers) + 8 * books,  # and the sums for their next step
        "gradients": gradients,
        "optimizer": optimizer,
        "average": 4 * (part + -(-books // world)),
        "casts": casts,
        "gathered": gathered,
        "buckets": bucket * _zero(config, "reduce_bucket_size", REDUCE_BUCKET),
        "evaluation": 4 * (numbers + books) if config.eval.every else 0,
        "host": host,
        "saving": checkpoint if keep.background else min(checkpoint, 2 * SHARD_BYTES),
        "checkpoint": checkpoint,
        "disk": checkpoint * checkpoints,
    }


def _collectives(config: Config, vocabulary_size: int, bf16: bool) -> dict[str, int]:
    """DeepSpeed's stages 1 to 3 send gradients of linears in bfloat16 under autocast, stage 3 their weights too; all
    else is float32."""
    numbers, micro_batches = sum(config.model.num_parameters(vocabulary_size).values()), config.engine.micro_batches
    mixed = 4 * numbers - (2 * _in_linears(config.model) if bf16 else 0)
    books = 4 * _codebooks(config.model)
    if (stage := _stage(config)) == 0:
        return {"all-reduce": 4 * numbers + books}
    if stage < 3:  # All ranks get whole sums, of which each keeps its part; at stage 2 after every micro-batch.
        return {"all-reduce": mixed * (micro_batches if stage == 2 else 1) + books, "all-gather": 4 * numbers}
    # Once for each direction; whole images also run the backbone for what their draws are compared with.
    passes = 2 + config.model.head.targets * (config.model.image_mode == "transfusion")
    joined = mixed * (passes * numbers - _reused(config, numbers)) // numbers
    sums = {"all-reduce": books} if books else {}
    return {"reduce-scatter": micro_batches * mixed, "all-gather": micro_batches * joined} | sums


def _codebooks(model: ModelConfig) -> int:
    """Numbers of all codebooks, which every rank holds whole: a sum of keys and a count for every codeword."""
    return model.layer_kinds.count("vq") * model.kv_heads * model.vq.codes * (model.head_width + 1)


def _in_linears(model: ModelConfig) -> int:
    """Parameters of linears: all but embeddings, text head, norms and codebooks."""
    norms = model.num_layers * 2 * (model.dim + (model.head_width if model.qk_norm else 0)) + model.dim
    norms += 2 * model.head.width * model.head.depth if model.image_mode == "autoregressive" else 0
    return sum(model.num_parameters(0).values()) - norms - model.codebook_maps()


def _decayed(model: ModelConfig) -> int:
    """Numbers in the matrices that decay."""
    if model.image_mode == "transfusion":
        head = model.dim * (TIME_FEATURES + model.dim + model.patch_width * model.head.outputs)
    else:
        width, depth, patch = model.head.width, model.head.depth, model.patch_width
        head = width * (patch + model.dim + LOCATION_FEATURES + TIME_FEATURES + width)
        head += width * (2 * depth * width + patch * model.head.outputs)
    return model.num_layers * model.layer_matrices() + head


def _activations(config: Config, vocabulary_size: int, keeps: _Keeps,
                 slots: int, groups: Sequence[tuple[int, int]], text: int, patches: int, targets: int,
                 ) -> dict[str, int]:  # fmt: skip
    """The fields of Estimate that follow from what a micro-batch holds."""
    model, draws = config.model, targets * config.model.head.draws
    whole_images = model.image_mode == "transfusion"
    if whole_images:  # no diffusion head
        draws = 0
    chunk = min(text, max(1, CHUNK_ELEMENTS // vocabulary_size))  # beyond one chunk the logits are made again
    attended = {
        "dense": sum(_attended(model, keeps, *group) for group in groups),
        "vq": slots * _quantised(model, keeps) + sum(_attended_vq(model, keeps, *group) for group in groups),
    }
    blocks = [slots * _block(model, keeps) + attended[kind] for kind in model.layer_kinds]
    head_block = draws * _head_block(model.head.width, keeps)
    recompute = config.engine.activation_checkpointing
    cast = draws * model.head.width * (keeps.read(2) - keeps.read(1))  # each block's own, of the modulator
    recomputed = max(*blocks, head_block + cast) if recompute else 0
    if recompute:  # blocks keep their inputs: the residual stream, in the head the stream and the modulator
        blocks = [slots * 4 * model.dim] * model.num_layers
        head_block = draws * keeps.product * model.head.width
    around = (
        slots * (4 * model.head_width + keeps.rms * model.dim + 4)  # angles, final norm
        + patches * (keeps.read(1) * model.patch_width + keeps.product * (model.patch_bottleneck or 0))
        + text * ((keeps.read(1) if chunk == text else 4) * model.dim + 16)
        + targets * (keeps.read(1) * (model.dim + LOCATION_FEATURES) + 8)
        + whole_images * patches * 4 * (TIME_FEATURES + 3 * model.dim + 3 * model.patch_width)
        + whole_images * targets * _objective(model)
    )
    return {
        "activations": sum(blocks) + around,
        "head": model.head.depth * head_block + draws * _head_ends(model, keeps, recompute),
        "recomputed": recomputed,
        "logits": 12 * chunk * vocabulary_size,
    }


def _block(model: ModelConfig, keeps: _Keeps) -> int:
    """Of one slot in one block of the backbone, without what its kind of attention keeps."""
    width, heads = model.head_width, model.num_heads
    normed = heads + model.kv_heads if model.qk_norm else 0
    norms = keeps.rms * (2 * model.dim + normed * width) + 4 * (2 + normed)  # the root of each mean square
    inputs = (keeps.read(3) + keeps.read(2)) * model.dim  # of q, k, v and of gate, up
    outputs = 2 * keeps.product * heads * width + 8  # of attention, as it is put back into rows and as o_proj reads it
    return norms + inputs + outputs + 4 * keeps.product * model.ffn_width  # gate, silu(gate), up, their product


def _attended(model: ModelConfig, keeps: _Keeps, documents: int, longest: int) -> int:
    """Of a group of documents: q, k, v, the output, and the logarithm of each softmax's sum."""
    number = keeps.product if keeps.cuda or longest > FLOAT_UP_TO else 4
    slot = number * 2 * (model.num_heads + model.kv_heads) * model.head_width + 4 * model.num_heads
    return documents * longest * slot


def _quantised(model: ModelConfig, keeps: _Keeps) -> int:
    """Of one slot in one codebook: the error of each key, whether it counts, and what the gradient rule and the
    gradient of a map keep."""
    keys, heads = model.kv_heads * model.head_width, model.kv_heads
    rule = {
        "straight": 0,
        "rotation": keeps.product * (4 * keys + 2 * heads) + heads,
        "diveq": keeps.product * (2 * keys + heads),
    }
    return 4 * keys + 1 + rule[model.vq.gradient] + (8 * heads if model.vq.codebook == "simvq" else 0)  # their codes


def _attended_vq(model: ModelConfig, keeps: _Keeps, documents: int, longest: int) -> int:
    """Of a group of documents in blocks: q and output, angles, keys and values of every set, and, for all blocks but
    the last two, mean value and log count of the codewords. The Triton kernel has one tensor for all sets; PyTorch
    repeats the keys of grouped queries for each."""
    vq, number, strict = model.vq, keeps.product, model.vq.band == "strict"
    if longest <= (vq.window + 1 if strict else 2 * vq.window):
        return _attended(model, keeps, documents, longest)
    width, queries, keys = model.head_width, model.num_heads * model.head_width, model.kv_heads * model.head_width
    repeats = model.num_heads != model.kv_heads and not keeps.cuda
    slots, blocks = documents * vq.window, -(-longest // vq.window)  # slots of one block
    kept = 8 * slots * blocks  # where they lie in the rows
    for begin in range(0, blocks, vq.chunk_blocks):
        lead = min(2, begin)
        own = min(vq.chunk_blocks, blocks - begin)
        held = lead + own
        far = max(0, held - 2)
        between = (strict and held > 1) or keeps.cuda
        kept += own * slots * (number * queries + 4 * model.num_heads)  # output, log of the softmax's sum
        kept += own * slots * number * queries * (2 if between or far else 1)  # q, rotated or not
        kept += held * slots * 4 * width  # cosines and sines
        half = vq.window // 2
        kept += 0 if keeps.cuda or not between else number * (vq.window**2 + half**2 + (vq.window - half) ** 2)  # masks
        kept += held * slots * number * (queries if repeats else keys) * (3 if between else 2)
        if far:
            heads = model.num_heads if repeats else model.kv_heads
            kept += documents * vq.codes * heads * far * (number * width * (2 if repeats else 1) + 4)
            kept += 0 if repeats else number * vq.codes * keys  # the codewords, else as many as mean values
        if vq.grad_through_cache:  # codes, their counts, and values in float32: a copy, where those kept are none
            kept += far * (8 * slots * model.kv_heads + 4 * documents * model.kv_heads * vq.codes)
            if number < 4:
                kept += far * slots * 4 * keys
            elif far and (repeats or keeps.cuda):
                kept += held * slots * 4 * keys
    return kept


def _head_block(width: int, keeps: _Keeps) -> int:
    """Of one draw in one block of the diffusion head: LayerNorm with mean and deviation, 1 + scale, the modulated input
    of `up`, the three modulations, up, silu(up), down."""
    return width * (keeps.layer_norm + keeps.product + keeps.modulated + 6 * keeps.product) + 8


def _head_ends(model: ModelConfig, keeps: _Keeps, recompute: bool) -> int:
    """Of one draw in the diffusion head outside of its blocks: time, modulator, last linears, noised patch, error."""
    width = model.head.width
    time = 4 * TIME_FEATURES + 2 * 4 * width
    # The modulator before its silu, and as every block and the last modulation read it.
    modulator = 4 + keeps.read(model.head.depth + 1)
    if recompute:  # blocks then read one float32 tensor, of which the last modulation may have its own cast
        modulator = 4 + 4 + (keeps.read(1) if keeps.read(1) < 4 else 0)
    final = width * (keeps.layer_norm + keeps.product + keeps.modulated) + 8
    return time + modulator * width + final + (keeps.read(1) + 4) * model.patch_width + _objective(model)


def _objective(model: ModelConfig) -> int:
    """Of one draw. ddpm: both factors of a product in its divergence; shortcut: the index of the jump's size."""
    return {"ddpm": 8 * model.patch_width + 4, "shortcut": 8}.get(model.head.objective, 0)
