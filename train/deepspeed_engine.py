"""The engine on DeepSpeed ZeRO 0 to 3. The only module that imports DeepSpeed.

Weights are float32 and bf16 is autocast around them, as in the plain engine, so that all backends compute the same.
Accumulation is unmanaged: one backward pass per micro-batch, one step per optimizer step, and no count of DeepSpeed's
own in between. The optimizer is PyTorch's AdamW at every stage, also in the host's memory, so that no op is compiled.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.utils import (
    logger,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)

from data.tokenizer import Tokenizer
from model.batch import Batch
from model.ropeway import Losses, Ropeway
from train.config import REDUCE_BUCKET, Config
from train.engine import Counts, load_whole_moments, objective, prepare, update_codebooks, whole_moments
from train.generator import build_model
from train.optimizer import MOMENTS, adamw
from train.pipeline import vocabulary_of
from train.precision import uses_bf16
from train.ranks import Ranks

_DERIVED = {
    "optimizer": "the optimizer is AdamW of section optim",
    "scheduler": "the learning rate is that of section optim",
    "gradient_clipping": "set optim.clip",
    "fp16": "float16 overflows where bfloat16 does not; set run.precision",
    "bf16": "set run.precision: bf16 is autocast around float32 weights",
    "torch_autocast": "set run.precision",
    "train_batch_size": "set data.rows_per_step",
    "train_micro_batch_size_per_gpu": "set data.rows_per_step and engine.micro_batches",
    "gradient_accumulation_steps": "set engine.micro_batches",
    "managed_gradient_accumulation": "the loop owns the accumulation",
    "checkpoint": "checkpoints are Ropeway's own",
    "elasticity": "any number of ranks can resume a run",
    "compile": "DeepCompile does not work with unmanaged accumulation; set engine.compile",
    "pipeline": "pipelines do not work with unmanaged accumulation",
}
"""Keys of DeepSpeed's JSON that engine.deepspeed must not hold, and why."""


def derive(config: Config, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's JSON. Raises ValueError for what is known to break."""
    own = config.engine.deepspeed
    for key in own:
        if key in _DERIVED:
            raise ValueError(f"engine.deepspeed must not hold {key}: {_DERIVED[key]}")
    zero = dict(own.get("zero_optimization", {}))
    stage = config.engine.zero_stage
    if "stage" in zero:
        raise ValueError("engine.deepspeed must not hold zero_optimization.stage: set engine.zero_stage")
    if zero.get("overlap_comm") and stage != 2:
        raise ValueError("engine.deepspeed: zero_optimization.overlap_comm works with engine.zero_stage 2 only, "
                         "because accumulation is unmanaged")  # fmt: skip
    if config.engine.offload:
        pinned = ranks.device.type == "cuda"
        zero = {"offload_optimizer": {"device": "cpu", "pin_memory": pinned}} | zero
    derived = {
        "train_micro_batch_size_per_gpu": config.data.rows_per_step // ranks.world // config.engine.micro_batches,
        "gradient_accumulation_steps": config.engine.micro_batches,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optim.clip if stage else 0.0,  # at stage 0 the engine clips
        "zero_optimization": {"overlap_comm": False, "reduce_bucket_size": REDUCE_BUCKET} | zero | {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": "fp32"},
        "torch_autocast": {"enabled": uses_bf16(config.run.precision, ranks.device), "dtype": "bfloat16"},
    }
    return derived | {key: value for key, value in own.items() if key != "zero_optimization"}


class DeepSpeedEngine:
    """One process or several, whoever launched them."""

    def __init__(self, config: Config, tokenizer: Tokenizer, ranks: Ranks, fill: Callable[..., None]) -> None:
        self.ranks, self.optim, self.bf16 = ranks, config.optim, uses_bf16(config.run.precision, ranks.device)
        self.stage = config.engine.zero_stage
        settings = derive(config, ranks)
        logger.setLevel("ERROR")  # the loop reports skipped steps itself
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        # No op may be compiled on the way: one on CPUs, for an inference-only collective, takes minutes.
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        if self.stage == 3:
            # Without dtype: given one, DeepSpeed 0.19 replaces it on processors that lack float16.
            with deepspeed.zero.Init(config_dict_or_path=settings):
                self.model = Ropeway(config.model, vocabulary_of(tokenizer))
            fill(self.model, _writable)
        else:
            self.model = build_model(config, tokenizer)
            fill(self.model, nullcontext)
            self.model.to(ranks.device)
        prepare(self.model, config)
        self.shapes = {name: _shape(tensor) for name, tensor in self.model.tensors().items()}
        self.optimizer = adamw(self.model, config.optim)
        if self.stage == 0:
            self.optimizer.register_step_pre_hook(self._clip)
        self.norm = 0.0
        self.parallel, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        for flat in self._flat_weights():
            zeros = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            self.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **zeros}
        if self.stage in (1, 2):
            self.parallel.optimizer._lazy_init_hp_params_optimizer_state()  # makes the moments known by parameter

    def micro_step(self, batch: Batch, counts: Counts, is_last: bool) -> Losses:
        losses = self.parallel(batch.to(self.ranks.device))
        # DeepSpeed averages over ranks; the counts already cover all of them.
        self.parallel.backward(self.ranks.world * objective(losses, counts, self.optim), scale_wrt_gas=False)
        return Losses(*(part.detach() for part in losses))

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.parallel.step()
        if self.stage:
            applied = self.parallel.was_step_applied()
            self.norm = float(self.parallel.get_global_grad_norm()) if applied else float("inf")
        update_codebooks(self.model, self.ranks, applied=self.norm < float("inf"))
        return self.norm

    def _clip(self, *_: object) -> None:
        """At stage 0 DeepSpeed calls AdamW itself, after the gradients were summed over ranks."""
        parameters = list(self.model.parameters())
        self.norm = torch.nn.utils.clip_grad_norm_(parameters, self.optim.clip, foreach=True).item()
        if not self.norm < float("inf"):
            for parameter in parameters:
                parameter.grad = None  # AdamW passes over it

    def parts(self) -> dict[str, Tensor]:
        parts = {name: self.ranks.part(tensor.detach()) for name, tensor in self.model.tensors().items()}
        if self.stage == 3:
            parts |= {name: _own(p).detach().flatten() for name, p in self.model.named_parameters()}
        return parts

    def moments(self) -> dict[str, Mapping[str, Tensor]]:
        if self.stage == 0:
            return whole_moments(self.model, [self.optimizer])
        return {kind: _Moments(self.model, kind) for kind in MOMENTS}

    def load_moments(self, moments: Mapping[str, Mapping[str, Tensor]], updates: int) -> None:
        if self.stage == 0:
            load_whole_moments(self.model, [self.optimizer], moments, updates)
            return
        for flat in self._flat_weights():
            self.optimizer.state[flat]["step"].fill_(updates)
        for kind in MOMENTS:
            for name, parameter in self.model.named_parameters():
                value = moments[kind][name].to(self.ranks.device)
                if self.stage < 3:
                    safe_set_full_optimizer_state(parameter, value, kind)
                    continue
                part = torch.zeros_like(_own(parameter))
                own = self.ranks.part(value)
                part[: len(own)] = own
                safe_set_local_optimizer_state(parameter, part, kind)

    def close(self) -> None:
        """Nothing to do: DeepSpeed's references to the process group are Python's."""

    def _flat_weights(self) -> list[Tensor]:
        """This rank's share of the float32 weights as DeepSpeed gives it to AdamW."""
        if self.stage == 0:
            return []
        zero = self.parallel.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups


class _Moments(Mapping[str, Tensor]):
    """One moment of every parameter, joined when it is asked for, by all ranks together."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        self.parameters, self.kind = dict(model.named_parameters()), kind

    def __getitem__(self, name: str) -> Tensor:
        return safe_get_full_optimizer_state(self.parameters[name], self.kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)


def _writable(parameter: Tensor) -> AbstractContextManager:
    """ZeRO-3 holds a part of each parameter: join one, and divide it again when it was written. All ranks write the
    same, rank 0's values are kept."""
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def _shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _own(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter under ZeRO-3, padded to the same length on all ranks."""
    return parameter.ds_tensor  # type: ignore[attr-defined]
