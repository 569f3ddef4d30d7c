"""The model's own mask, where a block mask is to stand beside it: keys that are padding."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024
"""Rows of a mask of pairs looked at at once."""


def keys_of(mask: Tensor, queries: int, keys: int) -> Tensor | None:
    """Which keys are padding, as a mask (rows, heads, 1, keys); None if the mask says more.

    Beside masks of keys alone this reads masks of pairs that let every valid token see every valid
    one, as HunyuanVideo 1.5 writes them out: what its padding would see, nobody reads.

    mask: (rows, keys), (keys,) or (rows, heads, queries, keys), with 1 for all; bool or additive.
    """
    if mask.ndim < 3 and not (mask.ndim == 2 and mask.shape[0] == queries != 1):
        return mask.reshape(-1, 1, 1, mask.shape[-1])
    wide = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    if mask.ndim == 3:
        wide = mask[:, None]
    if wide.shape[-2] == 1:
        return wide
    if queries != keys or wide.shape[-2:] != (queries, keys):
        return None
    return _valid(wide) if wide.dtype == torch.bool else _same_rows(wide)


def pairs_of(
    mask: Tensor | None, causal: bool, queries: int, keys: int, like: Tensor
) -> Tensor | None:
    """The model's mask of a call on text, of whatever pairs: boolean or additive, (rows or 1, heads
    or 1, queries or 1, keys); None where everyone reads everyone.

    mask: that, perhaps with keys to spare, or (rows, keys) with 1 for tokens and 0 for padding;
    causal: asked for instead of a mask.
    """
    if mask is None:
        if not causal:
            return None
        on = torch.ones(queries, keys, dtype=torch.bool, device=like.device)
        return on.tril()[None, None]
    if mask.ndim == 2:
        mask = mask.bool()[:, None, None]
    return mask[..., :keys]


def _valid(mask: Tensor) -> Tensor | None:
    seen = torch.zeros_like(mask[..., :1, :])
    for part in mask.split(ROWS, -2):
        seen = seen | part.any(-2, keepdim=True)
    for n, part in enumerate(mask.split(ROWS, -2)):
        own = seen[..., 0, n * ROWS : n * ROWS + part.shape[-2], None]
        if not torch.equal(part, own & seen.expand_as(part)):
            return None
    return seen


def _same_rows(mask: Tensor) -> Tensor | None:
    first = mask[..., :1, :]
    same = all(bool((part == first).all()) for part in mask.split(ROWS, -2))
    return first if same else None
