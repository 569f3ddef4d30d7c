"""Masks that are chosen for each head from the queries and keys of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_control.kernels.pieces import Piece, View
from attn_control.kernels.sampled import errors, evenly
from attn_control.kernels.sparse import Where
from attn_control.masks.block import BlockMask
from attn_control.masks.grid import Grid
from attn_control.masks.line import Cut
from attn_control.masks.selectors import Budget, Sampled, Score, exact_pooled, select_blocks


@dataclass(frozen=True, eq=False)
class Best:
    """Of some masks the one that a head's sampled queries lose least by (Sparse VideoGen, arXiv
    2502.01776).

    queries: int64, places of the sampled queries in raster order.
    """

    candidates: tuple[Piece, ...]
    queries: Tensor
    keeps: bool
    line = None

    def cost(self, view: View) -> float:
        """As `sparse.Pattern`: scores once, values once and once a candidate."""
        return len(self.queries) / view.q.shape[2] * (1 + len(self.candidates) / 2)

    def pieces(self, view: View, where: Where) -> Sequence[Piece]:
        """As `sparse.Pattern`."""
        best = errors(view, self.queries, self.candidates).argmin(-1).flatten()
        return parted(self.candidates, best)


def parted(candidates: Sequence[Piece], best: Tensor) -> list[Piece]:
    """One piece for each candidate that some (row, head) pair takes. best: int64 (pairs,)."""
    found = []
    for number, piece in enumerate(candidates):
        which = (best == number).nonzero().flatten()
        if len(which) == len(best):
            return [piece]
        if len(which):
            found.append(piece.of(which))
    return found


@dataclass(frozen=True, eq=False)
class Selected:
    """Blocks of keys that score best, for each head and block of queries.

    grid, order: of the tokens; always: blocks that are kept whatever they score; keys: of text the
    blocks of the keys, which may be more than the queries.
    """

    grid: Grid | Cut
    order: Tensor | None
    budget: Budget
    score: Score
    always: BlockMask | None
    keeps: bool
    keys: Cut | None = None

    @property
    def line(self) -> tuple[int, int] | None:
        """As `sparse.Pattern`."""
        return None if self.keys is None else (self.grid.length, self.keys.length)

    def cost(self, view: View) -> float:
        """As `sparse.Pattern`: scores of the queries that are asked, without values."""
        if self.score is exact_pooled:
            return 0.5
        rows = self.score.rows if isinstance(self.score, Sampled) else 1
        return min(0.5, 0.5 * rows / self.grid.block)

    def pieces(self, view: View, where: Where) -> Sequence[Piece]:
        """As `sparse.Pattern`."""
        seen = view if self.order is None else view.sorted(self.order)
        mask = select_blocks(
            seen.q,
            seen.k,
            self.budget,
            score=self.score,
            grid=self.grid,
            k_grid=self.keys,
            always=self.always,
            scale=view.scale,
            allowed=_allowed(seen.keys) if self.keys is not None else None,
        )
        return [Piece(mask, self.order)]


def _allowed(mask: Tensor | None) -> Tensor | None:
    """The pairs that a mask, boolean or additive, lets through."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def sampled_queries(before: int, tokens: int, count: int, device: torch.device) -> Tensor:
    """Evenly spaced queries of the picture, text left out."""
    return evenly(before, before + tokens, count, device)
