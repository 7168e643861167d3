"""How an optimizer step is computed: plain PyTorch on one process, or DistributedDataParallel under torchrun.

Losses are sums; the engine divides them by the global counts of the whole step (all ranks, all micro-batches), so the
same gradient comes out for any number of processes and any split into micro-batches.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data.tokenizer import Tokenizer
from model.attention.codebook import Codebook
from model.batch import Batch
from model.ropeway import Losses, Ropeway
from train.config import Config, OptimSection
from train.generator import build_model, load_weights
from train.optimizer import MOMENTS, MUON_MOMENTS, Muon
from train.optimizer import optimizers as make_optimizers
from train.precision import autocast, uses_bf16
from train.ranks import Ranks


class Counts(NamedTuple):
    """Learned text tokens and learned patches."""

    text: int
    image: int


class Engine(Protocol):
    """What the loop needs of a backend."""

    ranks: Ranks
    model: Ropeway
    bf16: bool
    shapes: dict[str, torch.Size]
    """Of every parameter and codebook."""

    def micro_step(self, batch: Batch, counts: Counts, is_last: bool) -> Losses:
        """Forward and backward of one micro-batch; counts are those of the whole step over all ranks."""
        ...

    def step(self, lr: float) -> float:
        """Clip, update unless the gradient is not finite, and clear the gradient. Returns its global norm; inf or nan
        where nothing was updated. All ranks get the same."""
        ...

    def parts(self) -> dict[str, Tensor]:
        """This rank's numbers of every float32 weight and codebook, as `Ranks.part` divides them."""
        ...

    def moments(self) -> dict[str, Mapping[str, Tensor]]:
        """Whole moments of the optimizers in float32, by kind and parameter. A value is made by all ranks together."""
        ...

    def load_moments(self, moments: Mapping[str, Mapping[str, Tensor]], updates: int) -> None:
        """Go on with these moments, after `updates` steps of the optimizers."""
        ...

    def close(self) -> None:
        """Let go of what belongs to the process group, before it is left."""
        ...


def make_engine(config: Config, tokenizer: Tokenizer, ranks: Ranks, fill: Callable[..., None]) -> Engine:
    """The engine of the configuration around a new model.

    fill(model, writable) gives the model its weights; it writes a parameter within writable(parameter) only.
    Raises ValueError where DeepSpeed is asked for but not installed, or asked for something that it cannot do.
    """
    if config.engine.backend == "torch":
        model = build_model(config, tokenizer)
        fill(model, contextlib.nullcontext)
        return TorchEngine(model, config, ranks)
    try:
        from train.deepspeed_engine import DeepSpeedEngine
    except ImportError as error:
        raise ValueError(f"engine.backend deepspeed needs DeepSpeed ({error}); "
                         "install it with pip install -e '.[deepspeed]'") from None  # fmt: skip
    return DeepSpeedEngine(config, tokenizer, ranks, fill)


class TorchEngine:
    """One process, or one of several under torchrun."""

    def __init__(self, model: Ropeway, config: Config, ranks: Ranks) -> None:
        self.ranks, self.optim, self.bf16 = ranks, config.optim, uses_bf16(config.run.precision, ranks.device)
        self.model = model.to(ranks.device)
        prepare(self.model, config)
        self.shapes = {name: tensor.shape for name, tensor in self.model.tensors().items()}
        self.parallel: DistributedDataParallel | None = None
        if ranks.world > 1:
            self.parallel = DistributedDataParallel(
                self.model,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # codebooks: all ranks make the same step of them
            )
        self.optimizers = make_optimizers(self.model, self.optim, self.bf16)

    def micro_step(self, batch: Batch, counts: Counts, is_last: bool) -> Losses:
        with self.parallel.no_sync() if self.parallel and not is_last else contextlib.nullcontext():
            with autocast(self.ranks.device, self.bf16):
                losses = (self.parallel or self.model)(batch.to(self.ranks.device))
            # DistributedDataParallel averages over ranks; the counts already cover all of them.
            (self.ranks.world * objective(losses, counts, self.optim)).backward()
        return Losses(*(part.detach() for part in losses))

    def step(self, lr: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip, foreach=True).item()
        # All ranks hold the same averaged gradient, so all of them take the same branch.
        for optimizer in self.optimizers:
            if norm < float("inf"):
                for group in optimizer.param_groups:
                    group["lr"] = lr * group.get("scale", 1.0)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_codebooks(self.model, self.ranks, applied=norm < float("inf"))
        return norm

    def parts(self) -> dict[str, Tensor]:
        return {name: self.ranks.part(tensor.detach()) for name, tensor in self.model.tensors().items()}

    def moments(self) -> dict[str, Mapping[str, Tensor]]:
        return whole_moments(self.model, self.optimizers)

    def load_moments(self, moments: Mapping[str, Mapping[str, Tensor]], updates: int) -> None:
        load_whole_moments(self.model, self.optimizers, moments, updates)

    def close(self) -> None:
        # If DistributedDataParallel were the last to hold the process group, freeing it could deadlock: it then waits
        # for the group's threads with Python's lock in its hands.
        self.parallel = None
        gc.collect()


def prepare(model: Ropeway, config: Config) -> None:
    """The options that change how blocks are computed, but not what."""
    if config.engine.activation_checkpointing:
        model.recompute_activations()
    if config.engine.compile:
        model.compile_blocks()


def objective(losses: Losses, counts: Counts, optim: OptimSection) -> Tensor:
    """Weighted sum of the losses, each divided by its global count; the commitment of keys by that of both."""
    text = optim.text_weight / max(counts.text, 1) * losses.text
    image = optim.image_weight / max(counts.image, 1) * losses.image
    return text + image + optim.commit_weight / max(counts.text + counts.image, 1) * losses.commit


def update_codebooks(model: Ropeway, ranks: Ranks, applied: bool) -> None:
    """One step of every codebook from the keys of all micro-batches and ranks; none where the weights took none. A call
    that all ranks make together."""
    codebooks = list(model.codebooks().values())
    sums = [codebook.take() for codebook in codebooks]
    if codebooks and applied:
        summed = ranks.summed(torch.cat(sums)).split([len(part) for part in sums])
        for codebook, part in zip(codebooks, summed, strict=True):
            codebook.update(part)


@torch.no_grad()
def fit_codebooks(engine: Engine, codebooks: list[Codebook], batch: Batch) -> None:
    """Move the codewords of these codebooks to the means of the batch's keys (k-means), one layer after the other."""
    model, ranks = engine.model.eval(), engine.ranks
    for codebook in codebooks:
        codebook.fitting = True
    with autocast(ranks.device, engine.bf16):
        model(batch.to(ranks.device))
    model.train()
    for codebook in codebooks:
        codebook.fitting = False
        for buffer in codebook.buffers():  # Every rank did the same, but rounding may differ from machine to machine.
            buffer.copy_(ranks.summed(buffer if ranks.rank == 0 else torch.zeros_like(buffer)))


def whole_moments(model: Ropeway, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Mapping[str, Tensor]]:
    """Moments of optimizers that hold them whole; zeros before their first step."""
    return {
        kind: {name: optimizer.state[p].get(kind, torch.zeros_like(p)) for name, p in parameters.items()}
        for optimizer, parameters in _parameters_of(model, optimizers)
        for kind in _kinds(optimizer)
    }


def load_whole_moments(
    model: Ropeway,
    optimizers: Sequence[torch.optim.Optimizer],
    moments: Mapping[str, Mapping[str, Tensor]],
    updates: int,
) -> None:
    """The reverse of `whole_moments`."""
    for optimizer, parameters in _parameters_of(model, optimizers):
        for name, p in parameters.items():
            # The step counter, which Muon does not read, stays where fused AdamW keeps it: on the device, float32.
            state = {"step": torch.tensor(float(updates), device=p.device)}
            optimizer.state[p] = state | {k: moments[k][name].to(p.device, copy=True) for k in _kinds(optimizer)}


def _kinds(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    return MUON_MOMENTS if isinstance(optimizer, Muon) else MOMENTS


def _parameters_of(
    model: Ropeway, optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Tensor]]]:
    """Every optimizer with the parameters that it updates, by name."""
    for optimizer in optimizers:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        yield optimizer, {name: p for name, p in model.named_parameters() if id(p) in own}


def fill_from(
    seed: int, weights: Mapping[str, Tensor] | None, where: str, may_lack_codebooks: bool = False
) -> Callable[..., None]:
    """What `make_engine` fills a model with: weights by name, or new ones from a seed."""

    def fill(model: Ropeway, writable: Callable[[Tensor], contextlib.AbstractContextManager]) -> None:
        if weights is None:
            model.initialise(seed, writable)
        else:
            load_weights(model, weights, where, writable, may_lack_codebooks)

    return fill
