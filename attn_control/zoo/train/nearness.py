"""Half of a video denoiser's heads learn to look nearby, as those of large ones do by themselves.

Sparse attention lives off heads whose softmax stays within a part of the frames, or of the picture
(Sparse VideoGen, arXiv 2502.01776). A denoiser of 2,304 tokens has no need for that, and a quarter
of its heads came to it unasked. So training takes a few queries' attention in every block, and asks
of the nearer half of its heads that `ENOUGH` of it lies in a box of a quarter of the tokens around
the query. The boxes are those that `eval.mass` measures by; both say so in code of their own.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

Grid = tuple[int, int, int]  # frames, rows, columns

ENOUGH = 0.7  # of a head's attention; 60 % is what counts as near


@lru_cache(maxsize=4)
def boxes(grid: Grid) -> torch.Tensor:
    """bool (tokens, 3, tokens): for each query the keys of its boxes of a quarter of the grid: all
    frames and half the rows and columns, a quarter of the frames, .63 of each. At a border a box is
    moved inwards; one that a grid of few frames has no room for is left out.
    """
    third = 0.25 ** (1 / 3)
    shares = ((1.0, 0.5, 0.5), (0.25, 1.0, 1.0), (third, third, third))
    found = []
    for share in shares:
        axes = []
        for n, part in zip(grid, share, strict=True):
            side, at = max(1, int(n * part)), torch.arange(n)
            first = (at - side // 2).clamp(0, n - side)[:, None]
            axes.append((at >= first) & (at < first + side))
        if math.prod(int(axis[0].sum()) for axis in axes) > 0.25 * math.prod(grid):
            continue
        frames, rows, columns = axes
        box = frames[:, None, None, :, None, None] & rows[None, :, None, None, :, None]
        box = box & columns[None, None, :, None, None, :]
        found.append(box.reshape(len(frames) * len(rows) * len(columns), -1))
    return torch.stack(found, 1)


def mass(
    block: WanTransformerBlock,
    h: torch.Tensor,
    gates: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    queries: torch.Tensor,
    inside: torch.Tensor,
) -> torch.Tensor:
    """What every head of a block's self-attention gives to each box, float32 (heads, boxes): the
    mean over the batch and the queries.

    h, gates, rotary: what the block is called with; queries: int64 (queries,), tokens to take;
    inside: bool (queries, boxes, tokens), theirs of `boxes`.
    """
    attn = block.attn1
    shift, scale = (block.scale_shift_table + gates.float())[:, :2].chunk(2, 1)
    x = (block.norm1(h.float()) * (1 + scale) + shift).type_as(h)
    cos, sin = rotary
    q = attn.norm_q(attn.to_q(x[:, queries])).unflatten(2, (attn.heads, -1))
    k = attn.norm_k(attn.to_k(x)).unflatten(2, (attn.heads, -1))
    q, k = turn(q, cos[:, queries], sin[:, queries]), turn(k, cos, sin)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).float() * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,qnk->hn", scores.softmax(-1), inside.float()) / (
        len(h) * len(queries)
    )


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions of (batch, tokens, heads, channels), pairs of neighbouring channels."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., ::2], sin[..., 1::2]
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)


def shortfall(masses: list[torch.Tensor]) -> torch.Tensor:
    """How much of `ENOUGH` the nearer half of each block's heads lacks in its best box, a mean.

    masses: of each block, as `mass` gives them.
    """
    best = torch.stack(masses).amax(-1)  # (blocks, heads)
    near = best.topk((best.shape[1] + 1) // 2, dim=1).values
    return (ENOUGH - near).clamp(min=0).mean()
