"""Installed versions, and the card's peak rates."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from bench.meter import seconds_of
from gpu.check import Check, Row
from opsd.distill.chunks import has_row_kernels

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "flash-attn", "liger-kernel", "trl", "vllm", "numpy")


def environment(check: Check) -> None:
    """Versions, the card, and the rates that bound all others."""
    check.say("versions", python=platform.python_version(), **{name: _version(name) for name in PACKAGES})
    kernels = has_row_kernels(torch.empty(0, device=check.device), torch.float32)
    check.say("row kernels", used=kernels)
    if not check.on_cuda:
        return
    free, total = torch.cuda.mem_get_info()
    check.say(
        "card", name=torch.cuda.get_device_name(), gib=total / 2**30, free_gib=free / 2**30, cuda=torch.version.cuda
    )
    check.tried("copy", lambda: _copy_rate(check))
    for dtype, size in ((torch.bfloat16, 8192), (torch.float32, 4096)):
        check.tried("square product", lambda dtype=dtype, size=size: _rate(check, dtype, size), dtype=str(dtype))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _copy_rate(check: Check) -> Row:
    """Bytes read and written."""
    source = torch.zeros(2**31, dtype=torch.uint8, device=check.device)
    copy = torch.empty_like(source)
    return {"tb_s": 2 * source.numel() / seconds_of(lambda: copy.copy_(source), check.device) / 1e12}


def _rate(check: Check, dtype: torch.dtype, size: int) -> Row:
    left, right = (torch.randn(size, size, device=check.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return {"tflops": 2 * size**3 / seconds_of(lambda: torch.mm(left, right, out=out), check.device) / 1e12}
