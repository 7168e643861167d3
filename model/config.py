"""Sizes and choices of a model: frozen, validated, and able to count their own parameters and FLOPs."""

from dataclasses import dataclass, field
from typing import Literal

from model.attention import KINDS
from model.attention.codebook import VQConfig
from model.attention.documents import BLOCK
from model.positions import LAYOUTS


@dataclass(frozen=True)
class Vocabulary:
    """Token ids that shape a sequence. They come from the tokenizer; ids below `pad` are text.

    `first_row + h - 1` announces an image of h patch rows, `first_col + w - 1` one of w patch columns.
    """

    size: int
    pad: int
    bos: int
    eos: int
    boi: int
    eoi: int
    patch: int
    first_row: int
    first_col: int
    max_grid: int


@dataclass(frozen=True)
class HeadConfig:
    """The per-patch diffusion head: an AdaLN MLP (spec of MAR's DiffLoss) trained by flow matching."""

    width: int = 512
    """Hidden width."""
    depth: int = 4
    """Residual blocks."""
    prediction: Literal["x", "v", "eps"] = "x"
    """What the network outputs: the clean patch, the velocity or the noise."""
    loss: Literal["x", "v", "eps"] = "v"
    """What the error is measured in, whatever the network outputs (JiT)."""
    loss_scales: int = 1
    """The error is averaged over a patch as it is and pooled by 2, 4, ..., to this many scales."""
    path: Literal["flow", "linear", "cosine"] = "flow"
    """From noise to data: the straight line of rectified flow, or a variance-preserving schedule of DDPM."""
    objective: Literal["matching", "ddpm", "shortcut", "consistency"] = "matching"
    """matching: regress to the data. ddpm: also learn the variance of the steps of 1000. shortcut: also learn jumps of
    1/64 to 1 (sample with euler in 1, 2, ..., 64 steps). consistency: learn to jump to the end
    (time_law uniform, loss x; sample with consistency, or with euler in one step)."""
    consistency_steps: int = 32
    """Times on which neighbours shall agree where a jump ends (objective consistency)."""
    draws: int = 4
    """Independent (time, noise) draws per patch and step; the backbone runs once for all of them."""
    time_law: Literal["logit-normal", "uniform"] = "logit-normal"
    """Law of the training time."""
    time_mean: float = -0.8
    """Mean of the logit-normal law."""
    time_std: float = 0.8
    """Standard deviation of the logit-normal law."""
    time_shift: float = 1.0
    """Factor on noise over signal of the times that are drawn: n keeps a law found for pictures 1/n as wide."""
    time_eps: float = 0.05
    """Lower bound of what a loss divides by: the share of noise 1 - t (of data, t, for prediction eps)."""
    time_scale: float = 1.0
    """Factor on t before its sinusoidal embedding."""
    noise_scale: float = 1.0
    """Standard deviation of the noise at t = 0."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "draws", "loss_scales", "consistency_steps"):
            _positive(f"model.head.{name}", getattr(self, name))
        for name in ("time_std", "time_shift", "time_scale", "noise_scale"):
            _positive(f"model.head.{name}", getattr(self, name))
        if not 0 < self.time_eps < 1:
            raise ValueError(f"model.head.time_eps is {self.time_eps}; it must lie between 0 and 1")
        if self.objective == "consistency" and self.time_law != "uniform":
            # Sampling starts at t = 0, which the logit-normal law hardly ever draws.
            raise ValueError(f"model.head.time_law {self.time_law} does not go with model.head.objective consistency; "
                             "choose uniform")  # fmt: skip
        if self.objective == "consistency" and self.loss != "x":
            # Divided by 1 - t, the errors near the data outweigh by up to 1 / time_eps^2 those of the long jumps.
            raise ValueError(f"model.head.loss {self.loss} does not go with model.head.objective consistency; "
                             "choose x")  # fmt: skip
        if self.objective in ("shortcut", "consistency"):
            # At t = 0, where few-step sampling starts, eps is known: it says nothing about the jump to x.
            for name, value, wanted in (("path", self.path, ("flow",)), ("prediction", self.prediction, ("x", "v")),
                                        ("loss", self.loss, ("x", "v"))):  # fmt: skip
                if value not in wanted:
                    raise ValueError(f"model.head.{name} {value} does not go with model.head.objective "
                                     f"{self.objective}; choose {' or '.join(wanted)}")  # fmt: skip

    @property
    def outputs(self) -> int:
        """Numbers that the network says about each number of a patch."""
        return 2 if self.objective == "ddpm" else 1

    @property
    def targets(self) -> int:
        """Evaluations without gradient that a draw is compared with."""
        return {"shortcut": 2, "consistency": 1}.get(self.objective, 0)

    @property
    def evaluations(self) -> float:
        """Forward and backward passes per draw; one without backward counts a third. Every fourth draw is a jump."""
        return 1 + self.targets / 3 * (1 / 4 if self.objective == "shortcut" else 1)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer: pre-RMSNorm, SwiGLU, grouped-query attention, rotary positions of text and images."""

    dim: int = 256
    """Width of the residual stream."""
    num_layers: int = 6
    """Transformer blocks."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads (grouped-query attention); default: num_heads."""
    head_dim: int | None = None
    """Width of a head; default: dim / num_heads. A multiple of 4, so that both coordinates get equal pairs."""
    ffn_dim: int | None = None
    """Inner width of SwiGLU; default: 8/3 dim rounded up to a multiple of 64."""
    qk_norm: bool = True
    """RMS-normalise queries and keys, per head, before the rotation."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm of the backbone."""
    attention: list[str] | str = "dense"
    """Kind of attention, a name of model.attention.KINDS: one for all layers, or a list with one for each."""
    vq: VQConfig = field(default_factory=VQConfig)
    """Of the layers of kind vq."""
    positions: str = "tv"
    """Position layout, a name of model.positions.LAYOUTS."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    rope_frequencies: Literal["alternate", "paired"] = "alternate"
    """alternate: text is exactly RoPE-1D. paired: both coordinates share each frequency, text is not RoPE-1D."""
    output_embedding: Literal["untied", "tied", "tied_half_swap"] = "untied"
    """Text head. tied_half_swap ties the embedding but swaps its halves, which cures the loss at the start."""
    patch_size: int = 8
    """Side of a patch in pixels."""
    patch_bottleneck: int | None = None
    """Rank of a low-rank patch embedding (JiT uses 128 or 256); default: none."""
    image_mode: Literal["autoregressive", "transfusion"] = "autoregressive"
    """autoregressive: patch by patch, each drawn by the diffusion head. transfusion: all patches of an image by one
    diffusion through the backbone, within which they see each other; width, depth and draws of `head` have no meaning
    then. What follows a learned image in training sees it noised."""
    context_noise: float = 0.0
    """Part of the documents whose learned images are shown noised to what follows them, while training. Otherwise the
    color of an object can be copied from its first patch, and hardly any patch teaches to read it in the caption."""
    head: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "patch_size", "rope_base"):
            _positive(f"model.{name}", getattr(self, name))
        for name in ("num_kv_heads", "head_dim", "ffn_dim", "patch_bottleneck"):
            if getattr(self, name) is not None:
                _positive(f"model.{name}", getattr(self, name))
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"model.dim {self.dim} is not a multiple of model.num_heads {self.num_heads}; set model.head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.kv_heads}"
            )
        if not 0 <= self.context_noise <= 1:
            raise ValueError(f"model.context_noise is {self.context_noise}; it must lie in 0 <= x <= 1")
        if self.head_width % 4:
            raise ValueError(f"the head width {self.head_width} (model.dim / model.num_heads) must be a multiple of 4")
        if self.patch_size % 2 ** (self.head.loss_scales - 1):
            raise ValueError(f"model.head.loss_scales {self.head.loss_scales} needs a model.patch_size that is a "
                             f"multiple of {2 ** (self.head.loss_scales - 1)}, not {self.patch_size}")  # fmt: skip
        if self.output_embedding == "tied_half_swap" and self.dim % 2:
            raise ValueError(f"model.output_embedding tied_half_swap needs an even model.dim, not {self.dim}")
        if self.positions not in LAYOUTS:
            raise ValueError(f"model.positions {self.positions!r} is unknown; choose one of {', '.join(LAYOUTS)}")
        if self.image_mode == "transfusion":
            if self.context_noise:
                raise ValueError(f"model.context_noise {self.context_noise} does not go with model.image_mode "
                                 "transfusion; choose 0")  # fmt: skip
            if "vq" in self.layer_kinds:
                raise ValueError("model.attention vq does not go with model.image_mode transfusion, whose patches see "
                                 "each other; choose dense")  # fmt: skip
        for kind in self.layer_kinds:
            if kind not in KINDS:
                raise ValueError(f"model.attention {kind!r} is unknown; choose one of {', '.join(KINDS)}")
        if len(self.layer_kinds) != self.num_layers:
            raise ValueError(f"model.attention lists {len(self.layer_kinds)} kinds for {self.num_layers} layers "
                             "(model.num_layers)")  # fmt: skip

    @property
    def layer_kinds(self) -> list[str]:
        """Kind of attention of every layer."""
        return [self.attention] * self.num_layers if isinstance(self.attention, str) else self.attention

    @property
    def block(self) -> int:
        """Slots that the padding of a document stays below: `vq` computes whole windows."""
        return self.vq.window if "vq" in self.layer_kinds else BLOCK

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.dim // self.num_heads

    @property
    def ffn_width(self) -> int:
        return self.ffn_dim or -(-8 * self.dim // 3 // 64) * 64

    @property
    def patch_width(self) -> int:
        """Numbers in a patch."""
        return 3 * self.patch_size**2

    def layer_matrices(self) -> int:
        """Numbers in the matrices of a layer."""
        attention = self.dim * self.head_width * 2 * (self.num_heads + self.kv_heads)
        return attention + 3 * self.dim * self.ffn_width

    def codebook_maps(self) -> int:
        """Parameters of all codebooks: those of kind simvq have a matrix per key/value head."""
        has_maps = self.vq.codebook == "simvq"
        return has_maps * self.layer_kinds.count("vq") * self.kv_heads * self.head_width**2

    def num_parameters(self, vocabulary_size: int) -> dict[str, int]:
        """Trainable parameters of each part; their sum is the whole model."""
        per_layer = self.layer_matrices() + 2 * self.dim + (2 * self.head_width if self.qk_norm else 0)
        rank, patch, dim = self.patch_bottleneck, self.patch_width, self.dim
        embed = patch * rank + rank * dim + dim if rank else patch * dim + dim
        tokens = vocabulary_size * dim * (2 if self.output_embedding == "untied" else 1)
        return {
            "backbone": self.num_layers * per_layer + dim + self.codebook_maps(),
            "tokens": tokens,
            "patch_embedding": embed,
            "diffusion_head": self._head_parameters(),
        }

    def _head_parameters(self) -> int:
        width, depth, patch = self.head.width, self.head.depth, self.patch_width
        if self.image_mode == "transfusion":
            moves = SHORTCUTS * self.dim if self.head.objective == "shortcut" else 0
            time = TIME_FEATURES * self.dim + self.dim + self.dim**2 + self.dim
            return time + moves + (self.dim + 1) * patch * self.head.outputs
        blocks = depth * (5 * width**2 + 7 * width)
        final = 2 * width**2 + 2 * width + (width + 1) * patch * self.head.outputs
        time = TIME_FEATURES * width + width + width**2 + width
        if self.head.objective == "shortcut":
            time += SHORTCUTS * width
        location = LOCATION_FEATURES * width + width
        return blocks + final + time + location + (self.dim * width + width) + (patch * width + width)

    def flops_per_step(self, slots: int, squared_lengths: int, text_targets: int, patches: int, patch_targets: int,
                       vocabulary_size: int) -> float:  # fmt: skip
        """Matrix FLOPs of one forward and backward pass (3 x forward, 2 per multiply-add).

        Args:
            slots: occupied slots. squared_lengths: sum over documents of length squared (attention follows the
            documents and is causal, so half of it counts). text_targets, patch_targets: learned labels.
            patches: patches that are read.
        """
        backbone = slots * self.num_layers * self.layer_matrices()
        num_vq = self.layer_kinds.count("vq")
        # No more than with all keys: documents shorter than the window see no codewords.
        seen = min(2 * slots * (self.vq.window + self.vq.codes), squared_lengths)
        heads = self.num_heads * self.head_width
        attention = heads * ((self.num_layers - num_vq) * squared_lengths + num_vq * seen)
        text = text_targets * self.dim * vocabulary_size
        rank = self.patch_bottleneck
        embed = patches * (self.patch_width * rank + rank * self.dim if rank else self.patch_width * self.dim)
        head = patch_targets * self._head_parameters()
        if self.image_mode == "transfusion":  # the backbone runs for every evaluation, over all images
            return 6.0 * ((1 + self.head.targets / 3) * (backbone + attention + embed + head) + text)
        return 6.0 * (backbone + attention + text + embed + self.head.draws * self.head.evaluations * head)


SHORTCUTS = 8
"""Sizes of a shortcut: none (flow matching, which also stands for 1/128), 1/64, 1/32, ..., 1 of the way."""
TIME_FEATURES = 256
"""Sinusoidal features of a time."""
LOCATION_FEATURES = 256
"""Sinusoidal features of a target patch: 64 each for row, column and the distances to the far edges."""


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be positive")
