"""Muon: momentum, made orthogonal. For the matrices inside the blocks; all of one shape at once.
A convolution's kernel (out, in, ...) counts as the matrix (out, in * ...).

After K. Jordan's Muon (2024) with the step size of Moonlight (arXiv 2502.16982), so that a learning
rate means about what it means to AdamW. Stacking equal shapes makes it cheap on one CPU core.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def orthogonal(g: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Stacked matrices (n, rows, columns), each with its singular values brought close to 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    if tall := g.shape[-2] > g.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum 0.95 with Nesterov's look-ahead, orthogonalised; decoupled weight decay."""

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95,
        weight_decay: float = 0.01,
    ):  # fmt: skip
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                looks = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    looks.append(p.grad.lerp(state["momentum"], group["momentum"]))
                flat = torch.stack(looks).flatten(2)
                rate = group["lr"] * 0.2 * max(flat.shape[1:]) ** 0.5
                updates = orthogonal(flat).view(-1, *shape)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates.unbind()), alpha=-rate)
