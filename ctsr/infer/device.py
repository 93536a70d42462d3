"""Where a network runs, and in which number format."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from ctsr.errors import ResourceError, UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["check_names", "choose_device", "choose_dtype"]

DTYPES = ("auto", "fp32", "bf16", "fp16")


def check_names(device: str, dtype: str) -> None:
    """UsageError for a device or a number format that does not exist on any machine; without loading torch."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9]\d*))?", device):
        raise UsageError(f"--device: {device} is not auto, cpu, cuda, cuda:N or mps")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype: {dtype} is not {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")


def choose_device(name: str) -> torch.device:
    """auto (CUDA, then MPS, then the CPU), cpu, cuda, cuda:N or mps. Never falls back silently.

    Raises UsageError for a name that is none of these, ResourceError for a device this machine lacks.
    """
    import torch

    check_names(name, "auto")
    has_mps = torch.backends.mps.is_available()
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if n_cuda else "mps" if has_mps else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # under torchrun each process has its own
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= n_cuda:
        found = f"has {n_cuda} CUDA devices" if n_cuda else "has no CUDA device"
        raise ResourceError(f"--device {name}: this machine {found}", hint="--device cpu")
    if device.type == "mps" and not has_mps:
        raise ResourceError("--device mps: this machine has no Apple GPU", hint="--device cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The number format of the convolutions, and why. auto: bf16 where the device multiplies it, else fp32.

    Those are CUDA ≥ 8.0, and CPUs with AVX512-BF16 (a doubling in 0.56 of the time of fp32) or AMX.
    """
    import torch

    check_names("auto", name)
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name in named:
        return named[name], f"{name} as asked"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16, "bf16: a CUDA device of capability 8.0 or more"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16, "bf16: a CPU with AVX512-BF16 or AMX"
    return torch.float32, f"fp32: no faster format on this {device.type}"
