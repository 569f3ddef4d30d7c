"""What all trainings share: schedule, averaged weights, checkpoints, the log, randomness."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float = 0.05) -> float:
    """Linear warm-up, then a cosine from `peak` down to `floor * peak` at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step: it depends on nothing else, so a resumed run repeats it."""
    return torch.Generator().manual_seed(seed * 10_000_019 + step)


def logit_normal(size: int, mean: float, std: float, g: torch.Generator) -> torch.Tensor:
    """Times float32 (size,) in (0, 1): one from each of `size` equally likely slices."""
    u = (torch.arange(size) + torch.rand(size, generator=g)) / size
    return torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))


class Average:
    """Exponential moving average of a module's parameters, float32; shorter memory at the start."""

    def __init__(self, module: torch.nn.Module, decay: float):
        self.decay = decay
        self.count = 0
        self.params = list(module.parameters())
        self.values = [p.detach().float().clone() for p in self.params]

    @torch.no_grad()
    def update(self) -> None:
        """Blend the current parameters in."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.params], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the current parameters (call twice to undo)."""
        for p, v in zip(self.params, self.values, strict=True):
            keep = p.detach().clone()
            p.copy_(v)
            v.copy_(keep)

    def state(self) -> dict[str, Any]:
        """What `load` takes back."""
        return {"count": self.count, "values": self.values}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.count = state["count"]
        for v, s in zip(self.values, state["values"], strict=True):
            v.copy_(s)


def save(state: dict[str, Any], file: Path) -> None:
    """Write a checkpoint under a temporary name first: a killed run leaves the old one whole."""
    part = file.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, file)


def load(file: Path) -> dict[str, Any]:
    """Read a checkpoint (tensors and plain values only)."""
    return torch.load(file, map_location="cpu", weights_only=True)


class Log:
    """Appends one JSON line now and then: step, means since the last line, seconds."""

    def __init__(self, file: Path, every: int):
        self.file, self.every = file, every
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.since = time.perf_counter()

    def add(self, step: int, **values: float) -> dict[str, float] | None:
        """Record one step; returns the line's values where it wrote one."""
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
            self.counts[key] = self.counts.get(key, 0) + 1
        if (step + 1) % self.every:
            return None
        now = time.perf_counter()
        line = {key: round(self.sums[key] / self.counts[key], 5) for key in self.sums}
        line = {"step": step + 1, **line, "s_per_step": round((now - self.since) / self.every, 4)}
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        self.sums, self.counts, self.since = {}, {}, now
        return line
