"""Paths from an attention matrix to the perturbed one, applied to outputs.

Every path that scales all off-diagonal weights of a row alike and stays row-stochastic is a blend
``alpha_i O_i + (1 - alpha_i) v_i`` with an ``alpha_i`` that depends on the row's self-attention
``a_ii`` alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attn_control.kernels.targets import Block, self_weight

Path = Callable[[Tensor, Tensor, Tensor, Block], Tensor]


def linear(out: Tensor, target: Tensor, u: Tensor, block: Block) -> Tensor:
    """``(1 - u) O + u O_target``."""
    return torch.lerp(out, target, u)


def slerp(out: Tensor, target: Tensor, u: Tensor, block: Block) -> Tensor:
    """The Fisher-Rao geodesic to the identity: great circles between the square roots of the
    weights.
    """
    theta = torch.arccos(self_weight(block).sqrt())
    ratio = torch.sin((1 - u) * theta) / torch.sin(theta).clamp(min=1e-6)
    return torch.lerp(target, out, torch.where(theta < 1e-6, 1 - u, ratio) ** 2)


def chord(out: Tensor, target: Tensor, u: Tensor, block: Block) -> Tensor:
    """The straight line between the square roots, renormalised (HeadHunter's ``fisher_rao``)."""
    a = self_weight(block)
    rest = (1 - u) ** 2
    return torch.lerp(target, out, rest / (rest * (1 - a) + (u + (1 - u) * a.sqrt()) ** 2))


PATHS: dict[str, Path] = {"linear": linear, "slerp": slerp, "chord": chord}
