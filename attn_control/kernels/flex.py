"""``impl="flex"``: torch's compiled flex_attention, with the same mask."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from attn_control.errors import AttnControlError
from attn_control.kernels.tiles.run import attend_tiles
from attn_control.masks.block import BlockMask

_KEPT: weakref.WeakKeyDictionary[BlockMask, flex_attention.BlockMask]
_KEPT = weakref.WeakKeyDictionary()


SHAPES = 256
"""Shapes and masks that one process may compile for; dynamo's own limit is 8."""


@cache
def _compiled() -> Callable[..., Any]:
    # fullgraph: past the limit dynamo raises, instead of running eager flex_attention, which makes
    # the whole tokens-squared matrix.
    return torch.compile(flex_attention.flex_attention, dynamic=False, fullgraph=True)


def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockMask | None,
    mask: Tensor | None,
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output and lse; arguments as `kernels.attend` has checked them.

    The first call of a shape compiles: seconds on a GPU, ten and more on a CPU, where a C++
    compiler is needed, there is no backward, and the kernel keeps its lse to itself: where it is
    wanted, the "torch" executor computes it, at the price of a second attention.

    Raises:
        AttnControlError: gradients on a CPU; float64, or no keys, which flex_attention has not.
    """
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.device.type == "cpu" and needs_grad:
        raise AttnControlError(
            "attend: impl='flex' has no backward on a CPU; take 'torch', or torch.no_grad()"
        )
    if q.dtype == torch.float64:
        raise AttnControlError("attend: impl='flex' has no float64; take 'torch' or 'reference'")
    if not k.shape[2]:
        raise AttnControlError("attend: impl='flex' needs at least one key; take 'torch'")
    block_mask = None
    if plan is not None:
        block_mask = _KEPT.get(plan)
        if block_mask is None:
            block_mask = _KEPT[plan] = plan.to_flex()
        if block_mask.kv_num_blocks.device != q.device:
            block_mask = _KEPT[plan] = plan.to(q.device).to_flex()
    arguments = {
        "score_mod": None if mask is None else _added(mask),
        "block_mask": block_mask,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    on_cpu = q.device.type == "cpu"
    with torch._dynamo.config.patch(recompile_limit=SHAPES):
        found = _compiled()(q, k, v, **arguments, return_lse=not on_cpu)
    if on_cpu:
        return found, attend_tiles(q, k, v, plan, mask, scale)[1] if need_lse else None
    out, lse = found
    return out, lse.float()


def _added(mask: Tensor) -> Callable[..., Tensor]:
    """The model's mask as flex_attention's score_mod."""
    mask = mask[(None,) * (4 - mask.dim())]
    batch, heads, queries, keys = (int(size > 1) for size in mask.shape)
    boolean = mask.dtype == torch.bool

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = mask[b * batch, h * heads, q * queries, k * keys]
        return torch.where(own, score, float("-inf")) if boolean else score + own

    return score_mod
