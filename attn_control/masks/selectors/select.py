"""From the queries and keys of a call to a mask of whole blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_control.errors import AttnControlError
from attn_control.masks.block import BlockMask
from attn_control.masks.grid import Grid
from attn_control.masks.line import Cut
from attn_control.masks.selectors.budgets import Budget
from attn_control.masks.selectors.scores import (
    Blocks,
    Sampled,
    Score,
    any_in,
    exact_pooled,
    mean_pooled,
)


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    budget: Budget,
    *,
    score: Score = mean_pooled,
    grid: Grid | Cut | None = None,
    k_grid: Grid | Cut | None = None,
    always: BlockMask | None = None,
    own: bool = True,
    scale: float | None = None,
    allowed: Tensor | None = None,
) -> BlockMask:
    """Keep the key blocks that score best, for each batch row, head and query block.

    Args:
        q: (batch, heads, q_tokens, head_dim), as the softmax gets it.
        k: (batch, heads or a divisor of them, k_tokens, head_dim).
        budget: how many are kept.
        score: by what.
        grid: of the queries, in their order; left out, one run in blocks of 128.
        k_grid: of the keys; left out, that of the queries, or, where there are more or fewer keys,
            one run in blocks of the same size.
        always: what is kept whatever it scores: text, a sink, a neighbourhood.
        own: whether each query block keeps its own key block, where both sides have one grid.
        scale: of the scores, 1 / sqrt(head_dim) if left out.
        allowed: bool (batch or 1, heads or 1, q_tokens or 1, k_tokens), the pairs that the model
            itself lets through. Blocks without one are the last that a budget takes, and are then
            left out; attention that is computed (`exact_pooled`, `Sampled`) is that of these pairs.

    Returns:
        A mask of batch x heads lists on q's device.

    Raises:
        AttnControlError: tensors that do not fit each other or their grids.
    """
    _fits(q, k)
    grid = Grid((q.shape[2],)) if grid is None else grid
    if k_grid is None:
        k_grid = grid if q.shape[2] == k.shape[2] else Grid((k.shape[2],), grid.block)
    for side, x, its in (("q", q, grid), ("k", k, k_grid)):
        if x.shape[2] != its.length:
            raise AttnControlError(
                f"select_blocks: {side} has {x.shape[2]} tokens, its grid {its.length}"
            )
    q_blocks, k_blocks = Blocks.of(grid, q.device), Blocks.of(k_grid, q.device)
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if allowed is None:
        table = budget.keep(score(q, keys, q_blocks, k_blocks, scale), k_blocks)
    else:
        computed = score is exact_pooled or isinstance(score, Sampled)
        more = {"allowed": allowed} if computed else {}
        some = any_in(allowed, q_blocks, k_blocks)
        scores = score(q, keys, q_blocks, k_blocks, scale, **more)
        table = budget.keep(scores.masked_fill(~some, float("-inf")), k_blocks) & some
    if own and grid == k_grid:
        table = table | torch.eye(len(q_blocks), dtype=torch.bool, device=q.device)
    mask = BlockMask.from_table(
        table,
        block_size=(grid.block, k_grid.block),
        q_regions=grid.regions,
        k_regions=k_grid.regions,
    )
    return mask if always is None else mask | always.to(q.device)


def _fits(q: Tensor, k: Tensor) -> None:
    shapes = tuple(q.shape), tuple(k.shape)
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise AttnControlError(
            "select_blocks: q and k have to be (batch, heads, tokens, head_dim) of one batch and "
            f"head_dim, not {shapes[0]} and {shapes[1]}"
        )
    if q.shape[1] % k.shape[1]:
        raise AttnControlError(
            f"select_blocks: {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads"
        )
    if q.device != k.device:
        raise AttnControlError(f"select_blocks: q is on {q.device}, k on {k.device}")
