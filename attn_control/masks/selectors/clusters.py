"""Blocks of tokens that are alike instead of near: k-means brings them together (Routing
Transformer, arXiv 2003.05997; Sparse VideoGen 2, arXiv 2505.18875). Here clusters only sort the
tokens: every token is in exactly one block, and every query reads something.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_control.errors import AttnControlError
from attn_control.masks.block import BlockMask
from attn_control.masks.grid import Grid
from attn_control.masks.say import at_least
from attn_control.masks.selectors.budgets import Budget
from attn_control.masks.selectors.scores import Score, mean_pooled
from attn_control.masks.selectors.select import select_blocks


@dataclass(frozen=True, eq=False)
class Clustered:
    """A mask of sorted tokens, and how they are sorted.

    mask: of ``q.gather(2, q_order)`` against ``k.gather(2, k_order)``, of as many heads as q.
    q_order, k_order: int64 (batch, heads, tokens), the token of each slot; k of its own heads.
    q_means, k_means: float32 (batch, heads, clusters, head_dim), to start the next step from.
    """

    mask: BlockMask
    q_order: Tensor
    k_order: Tensor
    q_means: Tensor
    k_means: Tensor


@torch.no_grad()
def cluster_order(
    x: Tensor, clusters: int, *, steps: int = 4, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens sorted by the cluster that they belong to, and within it as they were.

    Lloyd's algorithm, without random numbers: it starts from evenly spaced tokens, or from the
    means of an earlier call. A mean that no token is nearest to stays where it is.

    Args:
        x: (batch, heads, tokens, head_dim).
        clusters: at most as many as tokens.
        steps: updates of the means.
        start: (batch, heads, clusters, head_dim).

    Returns:
        (order int64 (batch, heads, tokens), means float32 (batch, heads, clusters, head_dim)).

    Raises:
        AttnControlError: more clusters than tokens, or means of another shape.
    """
    at_least("cluster_order", "clusters", clusters, 1)
    at_least("cluster_order", "steps", steps, 0)
    batch, heads, tokens, dim = x.shape
    if clusters > tokens:
        raise AttnControlError(f"cluster_order: {clusters} clusters of {tokens} tokens")
    points = x.float()
    if start is None:
        seeds = torch.arange(clusters, device=x.device) * tokens // clusters
        means = points[:, :, seeds]
    elif tuple(start.shape) != (batch, heads, clusters, dim):
        raise AttnControlError(
            f"cluster_order: start has to be {(batch, heads, clusters, dim)}, not "
            f"{tuple(start.shape)}"
        )
    else:
        means = start.float()
    for _ in range(steps):
        label = _nearest(points, means)
        home = label.unsqueeze(-1).expand_as(points)
        sums = torch.zeros_like(means).scatter_add_(2, home, points)
        counts = torch.zeros_like(means[..., 0]).scatter_add_(
            2, label, torch.ones_like(points[..., 0])
        )
        means = torch.where(
            counts.unsqueeze(-1) > 0, sums / counts.clamp(min=1).unsqueeze(-1), means
        )
    return _nearest(points, means).argsort(dim=-1, stable=True), means


def select_clusters(
    q: Tensor,
    k: Tensor,
    budget: Budget,
    *,
    clusters: int | tuple[int, int],
    block: int = 128,
    score: Score = mean_pooled,
    steps: int = 4,
    start: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Clustered:
    """Sort queries and keys each by their own clusters, then keep the best blocks.

    Args:
        q, k, budget, score, scale: as in `select_blocks`.
        clusters: of the queries and of the keys, one number or two.
        block: tokens a block.
        steps, start: as in `cluster_order`; ``start`` has the means of queries and of keys.

    Raises:
        AttnControlError: as in `cluster_order` and `select_blocks`.
    """
    counts = clusters if isinstance(clusters, tuple) else (clusters, clusters)
    begin = (None, None) if start is None else start
    q_order, q_means = cluster_order(q, counts[0], steps=steps, start=begin[0])
    k_order, k_means = cluster_order(k, counts[1], steps=steps, start=begin[1])
    mask = select_blocks(
        _sorted(q, q_order),
        _sorted(k, k_order),
        budget,
        score=score,
        grid=Grid((q.shape[2],), block),
        own=False,  # a block of queries and the block of keys in its place have nothing in common
        scale=scale,
    )
    return Clustered(mask, q_order, k_order, q_means, k_means)


def _nearest(points: Tensor, means: Tensor) -> Tensor:
    return (points @ means.mT - means.square().sum(-1).unsqueeze(-2) / 2).argmax(-1)


def _sorted(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order.unsqueeze(-1).expand_as(x))
