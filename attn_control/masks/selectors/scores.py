"""How much of its attention a block of queries would spend on a block of keys.

Every score is a logarithm, float32 (batch, heads, q_blocks, k_blocks): of the attention mass
itself, or of a stand-in for it, up to a constant for each row. Its softmax over a row is shares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attn_control.masks.bounds import bounds_of
from attn_control.masks.grid import Grid
from attn_control.masks.line import Cut
from attn_control.masks.say import at_least

ROWS = 1024
"""Queries whose scores on all keys are held at once."""


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of one side lie.

    bounds: (blocks + 1,), on the CPU.
    home: int64 (tokens,), the block of each token.
    sizes: float32 (blocks,), tokens of each block.
    slots: int64 (blocks, tokens a block), short blocks repeat their last token.
    """

    bounds: np.ndarray
    home: Tensor
    sizes: Tensor
    slots: Tensor

    @classmethod
    def of(cls, grid: Grid | Cut, device: torch.device) -> Blocks:
        bounds = bounds_of(grid.regions, grid.block)
        sizes = np.diff(bounds)
        slots = np.minimum(bounds[:-1, None] + np.arange(grid.block), bounds[1:, None] - 1)
        return cls(
            bounds,
            torch.from_numpy(np.arange(len(sizes)).repeat(sizes)).to(device),
            torch.from_numpy(sizes.astype(np.float32)).to(device),
            torch.from_numpy(slots.astype(np.int64)).to(device),
        )

    def part(self, first: int, last: int) -> Blocks:
        """Blocks first .. last - 1, counted from 0, as are their tokens."""
        start, stop = self.bounds[first], self.bounds[last]
        return Blocks(
            self.bounds[first : last + 1] - start,
            self.home[start:stop] - first,
            self.sizes[first:last],
            self.slots[first:last] - int(start),
        )

    def __len__(self) -> int:
        return len(self.bounds) - 1


Score = Callable[[Tensor, Tensor, Blocks, Blocks, float], Tensor]
"""Of q (batch, heads, q_tokens, head_dim), k of as many heads, the blocks of both, the scale."""


def mean_pooled(q: Tensor, k: Tensor, q_blocks: Blocks, k_blocks: Blocks, scale: float) -> Tensor:
    """The mean query on the mean key (MInference, arXiv 2407.02490; NABLA, arXiv 2507.13546), times
    the keys of the block: short blocks hold less.
    """
    means = [
        _into(x.float(), 2, blocks) / blocks.sizes[:, None]
        for x, blocks in ((q, q_blocks), (k, k_blocks))
    ]
    return means[0] @ means[1].mT * scale + k_blocks.sizes.log()


def min_max_bound(q: Tensor, k: Tensor, q_blocks: Blocks, k_blocks: Blocks, scale: float) -> Tensor:
    """What no key of the block can exceed for any query of the block, from the least and greatest
    value of the keys in each channel (Quest, arXiv 2406.10774), times the keys of the block.
    """
    keys = k.float()[:, :, k_blocks.slots] * scale  # of either sign
    low, high = keys.amin(3).mT, keys.amax(3).mT
    found = []
    for slots in q_blocks.slots.split(max(1, ROWS // q_blocks.slots.shape[1])):
        rows = q.float()[:, :, slots.flatten()]
        # Of each channel the greater of q * low and q * high.
        bound = rows.clamp(min=0) @ high + rows.clamp(max=0) @ low
        found.append(bound.unflatten(2, slots.shape).amax(3))
    return torch.cat(found, 2) + k_blocks.sizes.log()


@dataclass(frozen=True)
class Sampled:
    """The attention of a few queries of each block, exactly (as the vertical-slash estimate of
    MInference and the profiling of Sparse VideoGen do with queries from one place).

    rows: evenly spaced queries of each block, at most so many.
    """

    rows: int

    def __post_init__(self) -> None:
        at_least("Sampled", "rows", self.rows, 1)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        q_blocks: Blocks,
        k_blocks: Blocks,
        scale: float,
        allowed: Tensor | None = None,
    ) -> Tensor:
        asked = []
        for start, stop in zip(q_blocks.bounds, q_blocks.bounds[1:], strict=False):
            count = min(self.rows, stop - start)
            asked.append(start + (2 * np.arange(count) + 1) * (stop - start) // (2 * count))
        return _mass(q, k, q_blocks, k_blocks, scale, np.concatenate(asked), allowed)


def exact_pooled(
    q: Tensor,
    k: Tensor,
    q_blocks: Blocks,
    k_blocks: Blocks,
    scale: float,
    allowed: Tensor | None = None,
) -> Tensor:
    """The attention of all queries (SparseD, arXiv 2509.24014): as dear as dense attention, for
    steps that pay for it anyway.

    allowed: as in `select_blocks`.
    """
    return _mass(q, k, q_blocks, k_blocks, scale, np.arange(q.shape[2]), allowed)


def _mass(
    q: Tensor,
    k: Tensor,
    q_blocks: Blocks,
    k_blocks: Blocks,
    scale: float,
    asked: np.ndarray,
    allowed: Tensor | None,
) -> Tensor:
    """Logarithm of the mean share of the queries ``asked`` (int, ascending)."""
    out = q.new_zeros(*q.shape[:2], len(q_blocks), len(k_blocks), dtype=torch.float32)
    keys = k.float().mT * scale
    rows = torch.from_numpy(asked).to(q.device)
    for chunk in rows.split(ROWS):
        weights = q[:, :, chunk].float() @ keys
        if allowed is None:
            weights = weights.softmax(-1)
        else:
            reads = allowed if allowed.shape[2] == 1 else allowed[:, :, chunk]
            # A query that may read nothing has no shares.
            weights = weights.masked_fill(~reads, float("-inf")).softmax(-1).nan_to_num(0.0)
        out.index_add_(2, q_blocks.home[chunk], _into(weights, 3, k_blocks))
    asks = torch.bincount(q_blocks.home[rows], minlength=len(q_blocks))
    return (out / asks[:, None]).clamp(min=torch.finfo(torch.float32).tiny).log()


def any_in(allowed: Tensor, q_blocks: Blocks, k_blocks: Blocks) -> Tensor:
    """Which pairs of blocks hold an allowed pair: bool (batch, heads, q_blocks or 1, k_blocks).

    allowed: bool (batch, heads, q_tokens or 1, k_tokens).
    """
    found = _into(allowed.float(), 3, k_blocks)
    return (found if found.shape[2] == 1 else _into(found, 2, q_blocks)) > 0


def _into(x: Tensor, dim: int, blocks: Blocks) -> Tensor:
    """Tokens along ``dim`` added up by blocks."""
    shape = list(x.shape)
    shape[dim] = len(blocks)
    return x.new_zeros(shape).index_add_(dim, blocks.home, x)
