"""What a picture or video cost in memory, and what made it."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata


def reset_peak(device: str) -> None:
    """Start counting peak memory anew, where the device can."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> tuple[int, str]:
    """Peak bytes and what they count: tensors of this picture on CUDA, the whole process else."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device)), "cuda, allocated by this picture"
    from attn_control.report import peak_memory as peak_of_process

    return peak_of_process(), "resident memory of the process, its peak so far"


@cache
def versions() -> dict[str, str]:
    """Versions of what decides the pixels."""
    found = {"python": platform.python_version()}
    for name in ("attn-control", "torch", "diffusers", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
