"""Normalized attention guidance: extrapolate an attention output away from a negative one (arXiv
2505.21179).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_control.call import Call
from attn_control.kernels.epilogues import Region


@dataclass(frozen=True, eq=False)
class Extrapolate:
    """``Z = a N + (1 - a) Z+`` with ``N = s Z+ - (s - 1) Z-``, capped at ``|N| <= tau |Z+|`` per
    token.

    Z+ are the outputs of ``region``'s rows, Z- those of the ``negative`` rows of the same call. The
    result goes to both, so that the picture stays one and the same in both halves of the batch.

    Attributes:
        region: positive rows, heads and tokens; rows are given.
        negative: half-open range of the negative rows, as many.
        numbers: float32 (3,): s, tau and a; a tensor, so that changing them adds no graph.
        order: of the norm over the head dimension: 1 in the paper, 2 in its FLUX code.
    """

    region: Region
    negative: tuple[int, int]
    numbers: Tensor
    order: int

    def __call__(self, out: Tensor, call: Call) -> Tensor:
        new = out.clone()
        scale, tau, alpha = self.numbers.to(out.device).unbind()
        for (rows, heads, tokens), _ in self.region.slices():
            other = slice(*self.negative)
            wide = torch.promote_types(out.dtype, torch.float32)
            good, bad = out[rows, heads, tokens].to(wide), out[other, heads, tokens].to(wide)
            far = good * scale - bad * (scale - 1)
            ratio = far.norm(self.order, -1, True) / good.norm(self.order, -1, True).clamp(
                min=1e-12
            )
            far = far * (tau / ratio.clamp(min=1e-12)).clamp(max=1.0)
            mixed = torch.lerp(good, far, alpha).to(out.dtype)
            new[rows, heads, tokens] = mixed
            new[other, heads, tokens] = mixed
        return new
