"""float32, or bfloat16 autocast around float32 weights."""

import contextlib

import torch


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether run.precision (auto, fp32, bf16) means bfloat16 on this device."""
    return bf16_units(device) if precision == "auto" else precision == "bf16"


def bf16_units(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware. On other CPUs bfloat16 is many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = torch.cpu.get_capabilities()
    return bool(flags.get("amx_bf16") or flags.get("avx512_bf16"))


def autocast(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager:
    """The precision of forward passes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)
