"""Gaussian blur of queries on the image grid (SEG, arXiv 2408.00760)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_control.kernels.targets import Block


def gaussian(size: int, sigma: float, device: torch.device | None = None) -> Tensor:
    """Weights of a 1-D blur, float32 (size, size); each row sums to 1, at the border too."""
    at = torch.arange(size, dtype=torch.float32, device=device)
    weights = torch.exp(-((at[:, None] - at[None]) ** 2) / (2 * sigma**2))
    return weights / weights.sum(dim=1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Blur:
    """Attention of queries blurred over height and width, frame by frame.

    down: float32 (height, height); across: float32 (width, width), both from ``gaussian``; frames:
        of the grid.
    """

    frames: int
    down: Tensor
    across: Tensor

    def __call__(self, b: Block) -> Tensor:
        height, width = len(self.down), len(self.across)
        q = b.q.float().unflatten(2, (self.frames, height, width))
        q = torch.einsum("ih,bnfhwd->bnfiwd", self.down, q)
        q = torch.einsum("jw,bnfhwd->bnfhjd", self.across, q).flatten(2, 4).to(b.q.dtype)
        return torch.nn.functional.scaled_dot_product_attention(
            q, b.k, b.v, attn_mask=b.mask, scale=b.scale
        )
