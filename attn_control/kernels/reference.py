"""``impl="reference"``: dense attention as it is written in textbooks, against which all other
executors are held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_control.masks.block import BlockMask
from attn_control.masks.group import GroupMask


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockMask | GroupMask | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale + mask) v, and its lse; float64 for float64 inputs, else float32.

    Arguments as `kernels.attend` has checked them. Memory is tokens squared.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    repeats = q.shape[1] // k.shape[1]
    keys, values = (x.to(dtype).repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q.to(dtype) @ keys.mT * scale
    off = torch.zeros((), dtype=torch.bool, device=q.device)
    if plan is not None:
        off = ~plan.to_dense().to(q.device)
    if mask is not None and mask.dtype == torch.bool:
        off = off | ~mask
    elif mask is not None:
        scores = scores + mask.to(dtype)
        off = off | mask.isneginf()
    off = off.expand(scores.shape)
    scores = scores.masked_fill(off, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    # A row without keys has no softmax: all of its weights, and so its gradients, are 0.
    empty = off.all(dim=-1)
    finite = scores.masked_fill(empty[..., None], 0.0)
    weights = finite.softmax(dim=-1).masked_fill(off, 0.0)
    return (weights @ values).to(q.dtype), lse.float()
