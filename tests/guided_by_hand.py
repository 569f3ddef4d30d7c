"""Guided predictions written out: another mechanism than the package, for a model in any state."""

from __future__ import annotations

from typing import Any

import torch
from tiny_oracle import attention, toward_identity
from torch import Tensor

from attn_control.processors import SoftPAG

SITES = {
    "sd15": ("mid_block.attentions.0.transformer_blocks.0.attn1", "L2H1"),
    "sd3": ("transformer_blocks.1.attn", "L1H1"),
    "flux": ("transformer_blocks.1.attn", "L1H1"),
    "wan": ("blocks.1.attn1", "L1H1"),
}
U, SCALE = 0.6, 2.0


def control(family: str) -> SoftPAG:
    return SoftPAG(SITES[family][1], u=U, scale=SCALE)


@torch.no_grad()
def by_hand(family: str, model: Any, call: dict[str, Any]) -> Tensor:
    """``plain + scale (plain - perturbed)``, the perturbed map dense, in float64."""
    plain = model(**call)[0]
    with attention(model, {SITES[family][0]: toward_identity((1,), U)}):
        perturbed = model(**call)[0]
    assert (plain - perturbed).abs().max() > 1e-4
    return plain + SCALE * (plain - perturbed)
