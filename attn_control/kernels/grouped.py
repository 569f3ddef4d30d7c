"""Groups of tokens for executors that know blocks alone: sorted by atom, run, and put back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attn_control.masks.group import Sorted

Run = Callable[..., tuple[Tensor, Tensor | None]]


def attend_sorted(
    run: Run, q: Tensor, k: Tensor, v: Tensor, groups: Sorted, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Output and lse of ``run(q, k, v, mask of blocks, mask=mask)``, all in the caller's order.

    Queries, keys and values are copied once each; gradients go back the same way.
    """
    plan, q_order, k_order = groups
    q, (k, v) = _take(q, q_order), (_take(x, k_order) for x in (k, v))
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        mask = _take(mask, q_order)
        mask = mask if k_order is None else _take(mask.mT, k_order).mT
    out, lse = run(q, k, v, plan, mask=mask)
    if q_order is not None:
        back = q_order.argsort(-1)
        out = _take(out, back)
        lse = lse if lse is None else _take(lse[..., None], back)[..., 0]
    return out, lse


def _take(x: Tensor, order: Tensor | None) -> Tensor:
    """Of (batch, heads, tokens, .): its tokens in an order (batch | 1, tokens)."""
    if order is None or x.shape[2] == 1:
        return x
    return torch.take_along_dim(x, order[:, None, :, None], dim=2)
