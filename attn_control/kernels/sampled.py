"""How far a mask's output is from dense attention's, estimated from a few queries of every head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_control.kernels.pieces import Piece, View
from attn_control.masks.rows import rows_of

ELEMENTS = 1 << 24
"""Attention weights held at once."""


def evenly(first: int, last: int, count: int, device: torch.device) -> Tensor:
    """int64: at most ``count`` tokens of first .. last - 1, evenly spaced."""
    count = min(count, last - first)
    places = (2 * torch.arange(count, device=device) + 1) * (last - first) // (2 * count)
    return first + places


def errors(view: View, queries: Tensor, candidates: Sequence[Piece]) -> Tensor:
    """|o' - o|^2 / |o|^2 over some queries: float32 (rows, heads, candidates).

    queries: int64, places in raster order; candidates: masks of 1 head, or of all rows and heads.
    """
    return torch.cat([_row(view, queries, candidates, n) for n in range(view.q.shape[0])])


def _row(view: View, queries: Tensor, candidates: Sequence[Piece], row: int) -> Tensor:
    heads, tokens = view.q.shape[1], view.k.shape[2]
    on = [_reads(piece, queries, row) for piece in candidates]
    keys = view.keys
    if keys is not None:
        keys = keys[min(row, keys.shape[0] - 1)].expand(heads, 1, tokens)
    few = max(1, ELEMENTS // (len(queries) * tokens))
    found = []
    for start in range(0, heads, few):
        cut = slice(start, start + few)
        q, k, v = (x[row, cut].float() for x in (view.q, view.k, view.v))
        scores = q[:, queries] @ k.mT * view.scale
        if keys is not None:
            pad = keys[cut]
            if pad.dtype == torch.bool:
                scores = scores.masked_fill(~pad, float("-inf"))
            else:
                scores = scores + pad
        weights = scores.softmax(-1)
        out = weights @ v
        size = out.square().sum((-1, -2)).clamp(min=1e-30)
        each = []
        for reads in on:
            part = weights * (reads[cut] if len(reads) > 1 else reads)
            kept = (part @ v) / part.sum(-1, keepdim=True).clamp(min=1e-30)
            each.append((kept - out).square().sum((-1, -2)) / size)
        found.append(torch.stack(each, -1))
    return torch.cat(found)[None]


def _reads(piece: Piece, queries: Tensor, row: int) -> Tensor:
    """bool (heads or 1, queries, keys), keys in raster order."""
    mask, order = piece.mask, piece.order
    if order is None:
        return rows_of(mask, queries)[min(row, mask.batch - 1)]
    slots = torch.empty_like(order)
    slots[order] = torch.arange(len(order), device=order.device)
    return rows_of(mask, slots[queries])[min(row, mask.batch - 1)][..., slots]
