"""What the hardware at hand can do."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32 (emulation on a CPU is several times slower)."""
    if device.type == "cpu":
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_bf16") or known.get("amx_bf16") or known.get("bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can build kernels here: a C++ compiler for CPUs, Triton for GPUs."""
    if device.type == "cpu":
        return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
    with suppress(ImportError):
        import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401

        return device.type == "cuda"
    return False
