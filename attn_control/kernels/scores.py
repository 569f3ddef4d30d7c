"""What perturbations need to know of the attention scores, without a tokens-by-tokens map in
memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Scores held at once, per call (elements)."""


def scale_of(q: Tensor, scale: float | None) -> float:
    """The softmax scale: given, or ``1 / sqrt(head_dim)``."""
    return float(scale) if scale is not None else q.shape[-1] ** -0.5


def diagonal(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Scores of each query with its own key: float32 (batch, heads, tokens)."""
    return (q.float() * k.float()).sum(-1) * scale_of(q, scale)


def log_mass(
    q: Tensor, k: Tensor, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """Log-sum-exp of each query's scores: float32 (batch, heads, queries), -inf where no key is.

    q: (batch, heads, queries, head_dim); k: (batch, heads, keys, head_dim); mask: broadcastable to
    (batch, heads, queries, keys), boolean (True: may attend) or additive.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    if keys == 0:
        return q.new_full((batch, heads, queries), float("-inf"), dtype=torch.float32)
    factor = scale_of(q, scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = max(1, CHUNK // max(1, batch * heads * keys))
    flipped = k.to(wide).transpose(-1, -2)
    found = []
    for start in range(0, queries, rows):
        scores = q[:, :, start : start + rows].to(wide) @ flipped * factor
        if mask is not None:
            part = mask[..., start : start + rows, :] if mask.shape[-2] != 1 else mask
            if part.dtype == torch.bool:
                scores = scores.masked_fill(~part, float("-inf"))
            else:
                scores = scores + part
        found.append(torch.logsumexp(scores, dim=-1))
    return torch.cat(found, dim=2)
