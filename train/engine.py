"""How an optimizer step is computed: plain PyTorch on one process, or DistributedDataParallel under torchrun.

Losses are sums; the engine divides them by the global counts of the whole step (all ranks, all micro-batches), so the
same gradient comes out for any number of processes and any split into micro-batches.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model.batch import Batch
from model.ropeway import Losses, Ropeway
from train.config import Config, OptimSection
from train.optimizer import adamw


class Counts(NamedTuple):
    """Learned text tokens and learned patches."""

    text: int
    image: int


class Engine(Protocol):
    """What the loop needs of a backend."""

    rank: int
    world: int
    device: torch.device
    model: Ropeway
    bf16: bool

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision of forward passes."""
        ...

    def total(self, values: list[float]) -> list[float]:
        """Sums over all ranks."""
        ...

    def micro_step(self, batch: Batch, counts: Counts, is_last: bool) -> Losses:
        """Forward and backward of one micro-batch; counts are those of the whole step over all ranks."""
        ...

    def step(self, lr: float) -> float:
        """Clip, update unless the gradient is not finite, and clear the gradient. Returns its global norm."""
        ...

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """Moments by kind, then parameter name; with `step` as a scalar of every parameter."""
        ...

    def load_optimizer_state(self, state: dict[str, dict[str, Tensor]]) -> None: ...

    def barrier(self) -> None: ...

    def close(self) -> None: ...


def bf16_units(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware. On other CPUs bfloat16 is many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = torch.cpu.get_capabilities()
    return bool(flags.get("amx_bf16") or flags.get("avx512_bf16"))


def pick_device(name: str) -> torch.device:
    """cpu, cuda or auto. Raises ValueError for cuda without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is cuda, but PyTorch finds no GPU; use cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


class TorchEngine:
    """One process, or one of several under torchrun (gloo on CPU, NCCL on GPU)."""

    def __init__(self, model: Ropeway, config: Config, device: torch.device) -> None:
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device, self.optim = device, config.optim
        precision = config.run.precision
        self.bf16 = bf16_units(device) if precision == "auto" else precision == "bf16"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.model = model.to(device)
        self.parallel: DistributedDataParallel | None = None
        if self.world > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
            self.parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.optimizer = adamw(self.model, self.optim)

    def total(self, values: list[float]) -> list[float]:
        if self.world == 1:
            return values
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()

    def micro_step(self, batch: Batch, counts: Counts, is_last: bool) -> Losses:
        with self._synchronised(is_last):
            with self.autocast():
                losses = (self.parallel or self.model)(batch.to(self.device))
            # DistributedDataParallel averages over ranks; the counts already cover all of them.
            (self.world * objective(losses, counts, self.optim)).backward()
        return Losses(losses.text.detach(), losses.image.detach())

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @contextlib.contextmanager
    def _synchronised(self, is_last: bool) -> Iterator[None]:
        with self.parallel.no_sync() if self.parallel and not is_last else contextlib.nullcontext():
            yield

    def step(self, lr: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip, foreach=True).item()
        # All ranks hold the same averaged gradient, so all of them take the same branch.
        if norm < float("inf"):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state[parameter].items():
                state.setdefault(kind, {})[name] = value
        return state

    def load_optimizer_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        for name, parameter in self.model.named_parameters():
            # The step counter stays where fused AdamW keeps it: on the parameter's device, float32.
            self.optimizer.state[parameter] = {kind: values[name].to(self.device) for kind, values in state.items()}

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


def objective(losses: Losses, counts: Counts, optim: OptimSection) -> Tensor:
    """Weighted sum of the two losses, each divided by its global count."""
    text = optim.text_weight / max(counts.text, 1) * losses.text
    return text + optim.image_weight / max(counts.image, 1) * losses.image
