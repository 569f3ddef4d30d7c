"""Attention over shuffled values: the head-level form of token perturbation (TPG, arXiv
2506.10036).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_control.call import Step
from attn_control.kernels.targets import Block


@dataclass(frozen=True, eq=False)
class Permute:
    """``A P V``: the block's own values change places among themselves, all other values stay.

    order: int64 (tokens of the span,), drawn anew for each step from ``seed``, the layer and the
        step, so that a run
    repeats exactly and no global generator is touched.
    """

    order: Tensor
    seed: int
    layer: int

    def prepare(self, step: Step) -> None:
        """Draw the order of a step, in place: nothing is traced, nothing recompiles."""
        mixed = (self.seed * 1_000_003 + self.layer) * 1_000_003 + (step.index or 0)
        generator = torch.Generator().manual_seed(mixed % (1 << 63))
        self.order.copy_(torch.randperm(len(self.order), generator=generator))

    def __call__(self, b: Block) -> Tensor:
        start, stop = b.span
        # Autograd keeps the order it was given until backward, and the next step writes into ours.
        order = self.order.clone() if torch.is_grad_enabled() else self.order
        v = torch.cat([b.v[:, :, :start], b.own[:, :, order], b.v[:, :, stop:]], dim=2)
        return torch.nn.functional.scaled_dot_product_attention(
            b.q, b.k, v, attn_mask=b.mask, scale=b.scale
        )
