"""What the forward kernel does in passing, as torch operations: where gradients are wanted."""

from __future__ import annotations

import torch
from torch import Tensor

NONE = float("-inf")


def mix(out: Tensor, lse: Tensor, onto: Tensor, onto_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions of the same queries to different keys, as one to all of them.

    out, onto: (batch, heads, queries, head_dim); lse, onto_lse: float32 (batch, heads, queries).
    Both share the weights by their lse; a part with -inf has none.
    """
    top = torch.maximum(lse, onto_lse).detach()
    top = top.masked_fill(top == NONE, 0.0)
    mine, theirs = (lse - top).exp(), (onto_lse - top).exp()
    total = mine + theirs
    some = total > 0
    total = total.where(some, 1.0)
    parts = ((x / total)[..., None] for x in (mine, theirs))
    mixed = sum(part * x.float() for part, x in zip(parts, (out, onto), strict=True))
    return mixed.to(out.dtype), (total.log() + top).where(some, NONE)


def soften(out: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """``(1 - u) O + u V``: query and key i are one token (SoftPAG, arXiv 2506.10978, Eq. 7).

    u: float32 (batch | 1, heads | 1, tokens | 1).
    """
    own = v.repeat_interleave(out.shape[1] // v.shape[1], dim=1).float()
    return torch.lerp(out.float(), own, u[..., None]).to(out.dtype)
