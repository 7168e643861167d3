"""The typed configuration of a run. YAML files and `--section.key value` are read into it by jsonargparse."""

from dataclasses import dataclass, field
from typing import Any, Literal

from model.config import ModelConfig


@dataclass(frozen=True)
class RunSection:
    """What the run is called, how long it is and what it starts from."""

    dir: str = "runs/default"
    """Folder of the run: config, log, metrics, samples, checkpoints. A run found there is resumed."""
    steps: int = 1000
    """Optimizer steps of the whole run (the learning-rate schedule spans them)."""
    stop_after: int | None = None
    """End this process, with a checkpoint, once this many steps are done; the next one goes on."""
    seed: int = 0
    """Seed of weights, data order, noise and condition dropout."""
    init_from: str | None = None
    """Begin a new run with the weights of this run or checkpoint (step 0, fresh optimizer)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bfloat16 autocast where the GPU or the CPU has matrix units for it, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    threads: int | None = None
    """CPU threads of this process; default: PyTorch's own choice."""


@dataclass(frozen=True)
class ShapesSection:
    """Drawn pictures with captions (data.source.shapes)."""

    documents: int = 100_000
    """Documents per epoch."""
    canvases: tuple[tuple[int, int], ...] = ((32, 32),)
    """(height, width) in pixels of the pictures, in equal parts."""
    max_objects: int = 1
    """Scenes of one to this many objects."""
    caption_fraction: float = 0.5
    """Part of the documents that show the picture first and ask for its caption."""
    seed: int = 0
    """Seed of the pictures."""
    repeats: int = 1
    """Passes over this source per epoch."""
    weight: float | None = None
    """Share of the rows, in relation to the weights of the other sources; each source then has epochs of its own, and
    `repeats` no meaning. Give all sources a weight, or none."""


@dataclass(frozen=True)
class DigitsSection:
    """The 1,797 handwritten digits of scikit-learn with captions (data.source.digits)."""

    drawn: int = 1
    """Passes per epoch with the caption first: learn to draw."""
    read: int = 1
    """Passes per epoch with the picture first, as context: learn to read."""
    weight: float | None = None
    """Share of the rows, see data.shapes.weight; `drawn` and `read` then are the proportion of the two."""


@dataclass(frozen=True)
class TextSection:
    """Source code of the Python standard library (data.source.stdlib)."""

    max_bytes: int = 1024
    """Longest document in bytes; files are cut at line borders."""
    repeats: int = 1
    """Passes over this source per epoch."""
    weight: float | None = None
    """Share of the rows, see data.shapes.weight."""


@dataclass(frozen=True)
class FilesSection:
    """The user's own documents as JSONL in the canonical schema (docs/data-format.md)."""

    path: str
    """The JSONL file; image paths are relative to its folder."""
    repeats: int = 1
    """Passes over this source per epoch."""
    weight: float | None = None
    """Share of the rows, see data.shapes.weight."""


@dataclass(frozen=True)
class PreparedSection:
    """The user's own documents as `python -m data.prepare` left them."""

    path: str
    """The folder that was written."""
    repeats: int = 1
    """Passes over this source per epoch."""
    weight: float | None = None
    """Share of the rows, see data.shapes.weight."""


@dataclass(frozen=True)
class StageSection:
    """What changes from a step of the run on. What is not given is as at the start of the run."""

    from_step: int
    """The first step of the stage; it ends where the next one begins."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights by the names of the sources in the log; sources that are not named are not read in this stage."""
    max_patches: int | None = None
    """data.max_patches of the stage. Its sources begin anew, in another order; of prepared sets name those in `weights`
    that were prepared with it."""


@dataclass(frozen=True)
class DataSection:
    """Where documents come from and how they are packed. Several sources make one mixture."""

    shapes: ShapesSection | None = None
    digits: DigitsSection | None = None
    text: TextSection | None = None
    files: list[FilesSection] = field(default_factory=list)
    prepared: list[PreparedSection] = field(default_factory=list)
    stages: list[StageSection] = field(default_factory=list)
    """Later parts of the run with other weights or another resolution, in order of their first steps."""
    tokenizer: str = "bytes"
    """bytes, a tokenizer.json, or what transformers.AutoTokenizer loads (extra `hf`)."""
    max_grid: int = 64
    """Most patch rows or columns that can be announced, where the tokenizer has no tokens for them yet."""
    min_patches: int = 1
    """Patches of an image at least; smaller images are enlarged."""
    max_patches: int = 1024
    """Patches of an image at most; larger images are reduced, keeping their aspect ratio."""
    row_length: int = 256
    """Slots of a row."""
    rows_per_step: int = 16
    """Rows of an optimizer step over all ranks and micro-batches."""
    condition_dropout: float = 0.1
    """Part of the documents with a learned image that lose the text before it, and half of these the images before it
    that are only read, too (for guidance)."""
    picture_first: float = 0.0
    """Part of the documents of one text and then one picture (that keep their condition) where these change places."""
    workers: int = 1
    """Processes that make rows ahead of time; 0 makes them in the training process."""


@dataclass(frozen=True)
class OptimSection:
    """AdamW, and Muon for matrices if wanted, with warm-up and cosine decay."""

    lr: float = 1e-3
    """Peak learning rate."""
    muon_lr: float | None = None
    """Peak learning rate of Muon, which then updates the matrices that decay, and AdamW the rest. null: AdamW updates
    all. With engine.backend torch only."""
    final_lr_ratio: float = 0.05
    """Learning rate at the end, as a part of the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices; not on embeddings, norms, biases and the head's modulation."""
    clip: float = 1.0
    """Global gradient norm at most."""
    ema_decay: float = 0.999
    """Decay of the weight average; it warms up as (1 + step) / (10 + step)."""
    text_weight: float = 1.0
    """Weight of the text loss (nats per token)."""
    image_weight: float = 1.0
    """Weight of the image loss (velocity error per patch)."""
    commit_weight: float = 1e-4
    """Weight of the distance of quantised keys to their codewords, in layers of attention vq. It draws keys to their
    codewords and, with model.vq.codebook simvq, these to their keys."""
    max_skipped: int = 10
    """Stop after this many non-finite steps in a row, with the rows of the last one saved in run.dir/non_finite."""
    spike: float = 2.0
    """Warn when the loss of a step exceeds its mean over the last steps this many times."""

    def __post_init__(self) -> None:
        for name, rate in (("lr", self.lr), ("muon_lr", 1.0 if self.muon_lr is None else self.muon_lr)):
            if not rate > 0:
                raise ValueError(f"optim.{name} is {rate}; it must be positive")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and 0 <= self.ema_decay < 1):
            raise ValueError("optim.beta1, optim.beta2 and optim.ema_decay must lie in 0 <= x < 1")
        if not self.clip > 0:
            raise ValueError(f"optim.clip is {self.clip}; it must be positive")
        if not self.spike > 1:
            raise ValueError(f"optim.spike is {self.spike}; it must be above 1")


REDUCE_BUCKET = 5 * 10**7
"""Numbers that DeepSpeed sums over the ranks at a time, unless engine.deepspeed says otherwise. Its own default takes
gigabytes on every GPU, whatever the size of the model."""


@dataclass(frozen=True)
class EngineSection:
    """How a step is computed."""

    backend: Literal["torch", "deepspeed"] = "torch"
    """torch: one process, or DistributedDataParallel under torchrun. deepspeed: DeepSpeed ZeRO, any launcher."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """deepspeed: what is divided among the ranks. 1: optimizer state; 2: gradients too; 3: weights too; 0: nothing."""
    offload: bool = False
    """deepspeed, stages 1 to 3: keep the optimizer state in the host's memory and update the weights there."""
    micro_batches: int = 1
    """Parts that each rank's rows of a step are computed in, to save memory. The numbers stay the same."""
    activation_checkpointing: bool = False
    """Keep only each block's input and compute the rest again in the backward pass: less memory, a third more time."""
    compile: bool = False
    """torch.compile each block but the attention of `vq` (not with zero_stage 3)."""
    timeout: int = 600
    """Seconds that ranks wait for each other before the job ends with an error."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Keys of DeepSpeed's own JSON, merged over what is derived from this configuration."""

    def __post_init__(self) -> None:
        if self.backend == "torch" and (self.offload or self.deepspeed):
            name = "engine.offload" if self.offload else "engine.deepspeed"
            raise ValueError(f"{name} needs engine.backend deepspeed")
        if self.offload and self.zero_stage == 0:
            raise ValueError("engine.offload needs engine.zero_stage 1, 2 or 3: stage 0 divides nothing")
        if self.compile and self.backend == "deepspeed" and self.zero_stage == 3:
            raise ValueError("engine.compile does not work with engine.zero_stage 3, which gathers weights in between; "
                             "use stage 2, or switch engine.compile off")  # fmt: skip


@dataclass(frozen=True)
class CheckpointSection:
    """When checkpoints are written and how many stay. The last step always writes one."""

    every: int = 500
    """Steps between checkpoints."""
    keep_last: int = 2
    """Newest checkpoints that stay."""
    keep_every: int | None = None
    """Checkpoints at multiples of this many steps stay for good."""
    background: bool = False
    """Write while training goes on; rank 0 holds a copy of the whole state in the host's memory meanwhile."""


@dataclass(frozen=True)
class EvalSection:
    """Held-out losses, sample pictures and captions while training (python -m train.evaluate scores a checkpoint)."""

    every: int = 0
    """Steps between evaluations (0: none)."""
    rows: int = 8
    """Held-out rows for the losses."""
    samples: int = 8
    """Pictures and captions to draw (0: none)."""
    guidance: float = 1.0
    """Guidance scale of the sample pictures."""
    sampler_steps: int = 20
    """Sampler steps per patch."""


@dataclass(frozen=True)
class LogSection:
    """What is written while training."""

    every: int = 10
    """Steps between lines of metrics.jsonl and of the console."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `log`)."""


@dataclass(frozen=True)
class Config:
    """A complete run."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    engine: EngineSection = field(default_factory=EngineSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    eval: EvalSection = field(default_factory=EvalSection)
    log: LogSection = field(default_factory=LogSection)

    def __post_init__(self) -> None:
        data = self.data
        for name, value, least in (
            ("run.steps", self.run.steps, 1),
            ("run.stop_after", 1 if self.run.stop_after is None else self.run.stop_after, 1),
            ("run.threads", 1 if self.run.threads is None else self.run.threads, 1),
            ("data.row_length", data.row_length, 2),
            ("data.rows_per_step", data.rows_per_step, 1),
            ("data.workers", data.workers, 0),
            ("optim.warmup_steps", self.optim.warmup_steps, 0),
            ("engine.micro_batches", self.engine.micro_batches, 1),
            ("engine.timeout", self.engine.timeout, 1),
            ("checkpoint.every", self.checkpoint.every, 1),
            ("checkpoint.keep_last", self.checkpoint.keep_last, 1),
            ("checkpoint.keep_every", 1 if self.checkpoint.keep_every is None else self.checkpoint.keep_every, 1),
            ("eval.every", self.eval.every, 0),
            ("eval.samples", self.eval.samples, 0),
            ("eval.sampler_steps", self.eval.sampler_steps, 1),
            ("eval.guidance", self.eval.guidance, 0),
            ("log.every", self.log.every, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if not 0 <= self.run.seed < 2**63:
            raise ValueError(f"run.seed is {self.run.seed}; it must lie in 0 <= seed < 2**63")
        sections = [s for s in (data.shapes, data.digits, data.text, *data.files, *data.prepared) if s]
        weighted = [section.weight is not None for section in sections]
        if any(weighted) and not all(weighted):
            raise ValueError("some sources of data have a weight and others none; give all of them one, or none")
        first_steps = [stage.from_step for stage in data.stages]
        if [0, *first_steps] != sorted({0, *first_steps}):
            raise ValueError(f"data.stages begin at steps {first_steps}; they must be above 0 and ascend")
        for stage in data.stages:
            if stage.weights and not any(weighted):
                raise ValueError(f"the stage from step {stage.from_step} has weights; give every source of data one")
        if self.model.codebook_maps() and not self.optim.commit_weight:
            raise ValueError("optim.commit_weight is 0; with model.vq.codebook simvq it must be positive, "
                             "as nothing else moves the codewords")  # fmt: skip
        if self.optim.muon_lr is not None and self.engine.backend == "deepspeed":
            raise ValueError(
                "optim.muon_lr needs engine.backend torch, as Muon works on whole matrices; set it to null"
            )
        most = max(data.max_patches, *(stage.max_patches or 0 for stage in data.stages), 0)
        if "vq" in self.model.layer_kinds and self.model.vq.window < most:
            raise ValueError(f"model.vq.window is {self.model.vq.window}; it must be at least data.max_patches "
                             f"{most}, for all patches of an image to see each other in place")  # fmt: skip
        if data.shapes:
            for height, width in data.shapes.canvases:
                if height % self.model.patch_size or width % self.model.patch_size:
                    raise ValueError(
                        f"data.shapes.canvases holds {height} x {width}, which are not both multiples of "
                        f"model.patch_size {self.model.patch_size}"
                    )
