"""The processes of a run: who they are, and the few things they tell each other outside of the backward pass."""

import ctypes
import os
import platform
import re
import socket
from collections.abc import Mapping
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from train.config import Config

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_LOST = re.compile(r"gloo|nccl|connection|closed by peer|socket|broken pipe|timed? ?out|rendezvous", re.IGNORECASE)


class Ranks:
    """One process, or one of several that a launcher started (gloo on CPU, NCCL on GPU).

    A tensor can be divided among the ranks: rank r holds numbers r * k .. (r + 1) * k - 1 of its flat form, where
    k = ceil(numel / world). This is how ZeRO-3 divides parameters.
    """

    def __init__(self, config: Config) -> None:
        """Raises ValueError for cuda without a GPU."""
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device = pick_device(config.run.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
        # DeepSpeed wants a process group for one process too.
        if self.world > 1 or config.engine.backend == "deepspeed":
            _complete_environment()
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=config.engine.timeout))

    def total(self, values: list[float]) -> list[float]:
        """Sums over all ranks."""
        if self.world == 1:
            return values
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()

    def summed(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all ranks, bit by bit the same on each."""
        if self.world > 1:
            tensor = tensor.contiguous()
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, value: int) -> int:
        """Rank 0's value."""
        return int(self.total([float(value) if self.rank == 0 else 0.0])[0])

    def part(self, whole: Tensor) -> Tensor:
        """This rank's numbers of a tensor that all ranks hold, a flat view."""
        size = -(-whole.numel() // self.world)
        return whole.flatten()[self.rank * size : (self.rank + 1) * size]

    def join(self, part: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of which every rank holds a part. A call that all ranks make together."""
        if self.world == 1:
            return part[: prod(shape)].view(shape)
        size = -(-prod(shape) // self.world)
        padded = part.new_zeros(size)
        padded[: len(part)] = part
        whole = part.new_empty(self.world * size)
        dist.all_gather(list(whole.chunk(self.world)), padded)
        return whole[: prod(shape)].view(shape)

    def close(self) -> None:
        if dist.is_initialized():
            dist.barrier()  # The first rank to leave would take the store along that the others still talk to.
            dist.destroy_process_group()


class Joined(Mapping[str, Tensor]):
    """Tensors that are divided among the ranks, each joined when it is asked for, by all ranks together."""

    def __init__(self, ranks: Ranks, parts: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
        self.ranks, self.parts, self.shapes = ranks, parts, shapes

    def __getitem__(self, name: str) -> Tensor:
        return self.ranks.join(self.parts[name], self.shapes[name])

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def pick_device(name: str) -> torch.device:
    """cpu, cuda or auto. Raises ValueError for cuda without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is cuda, but PyTorch finds no GPU; use cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def keep_freed_memory() -> None:
    """Let glibc hand out again what was freed, instead of giving large blocks back to the system, which would have to
    clear every page of them anew: a quarter of the time of `vq` attention over 32,768 slots. Other C libraries stay as
    they are."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def lost_contact(error: BaseException) -> str | None:
    """The line of an exception that says that another rank does not answer, or never has."""
    lines = str(error).splitlines() if _is_one_of_several() else []
    return next((line.strip() for line in lines if _LOST.search(line)), None)


def leave(status: int) -> None:
    """End this process at once if it is one of several: an orderly end can wait for ranks that are gone."""
    if _is_one_of_several():
        os._exit(status)


def _is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _complete_environment() -> None:
    """What a launcher would have set for a single process."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)
