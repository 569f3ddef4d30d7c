"""Pieces: which heads run under which mask, and in which order of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attn_control.kernels.attention import attend
from attn_control.masks.block import BlockMask
from attn_control.masks.grid import Grid


@dataclass(frozen=True, eq=False)
class View:
    """The rows and heads of a call that one branch of one control sees.

    q, k, v: (rows, heads, tokens, head_dim), keys as many heads as queries; keys: the model's mask
        of padding, (rows or 1, heads or 1, 1, tokens), or None; scale: of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor | None
    scale: float

    def flat(self, which: Tensor) -> View:
        """Some of all (row, head) pairs, numbered row by row, as heads of a single row."""
        rows, heads = self.q.shape[:2]
        q, k, v = (x.flatten(0, 1)[which][None] for x in (self.q, self.k, self.v))
        keys = self.keys
        if keys is not None:
            keys = keys.expand(rows, heads, *keys.shape[2:]).flatten(0, 1)[which][None]
        return View(q, k, v, keys, self.scale)

    def sorted(self, order: Tensor) -> View:
        """The same tokens in another order."""
        q, k, v = (x[:, :, order] for x in (self.q, self.k, self.v))
        keys = self.keys if self.keys is None else self.keys[..., order]
        return View(q, k, v, keys, self.scale)


@dataclass(frozen=True, eq=False)
class Piece:
    """Heads under one mask.

    mask: of tokens in the order ``order``, int64 (tokens,): the place of the token in each slot;
        None: as they are. which: int64, numbers of the (row, head) pairs that run under it, whose
        mask then has one row and as many heads, or 1; None: all of them.
    """

    mask: BlockMask
    order: Tensor | None = None
    which: Tensor | None = None

    @classmethod
    def on(cls, grid: Grid, mask: BlockMask, device: torch.device) -> Piece:
        """A mask of a grid, in the order of that grid."""
        order = None
        if grid.tile is not None:
            order = torch.from_numpy(grid.order()).to(device)
        return cls(mask.to(device), order)

    @cached_property
    def density(self) -> float:
        """Share of all pairs that is on."""
        return self.mask.density()

    @cached_property
    def computed(self) -> float:
        """Share of all pairs in blocks that are visited."""
        return self.mask.visited_density()

    def of(self, which: Tensor) -> Piece:
        """For some (row, head) pairs only."""
        return replace(self, which=which)


def shares(pieces: Sequence[Piece], pairs: int) -> tuple[float, float]:
    """Mean density, and mean share computed, over ``pairs`` (row, head) pairs."""
    weights = [1.0 if p.which is None else len(p.which) / pairs for p in pieces]
    kept = sum(w * p.density for w, p in zip(weights, pieces, strict=True))
    return kept, sum(w * p.computed for w, p in zip(weights, pieces, strict=True))


def execute(pieces: Sequence[Piece], view: View, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Sparse attention of a view: (rows, heads, tokens, head_dim), and its lse, float32 (rows,
    heads, tokens), or None.
    """
    if len(pieces) == 1 and pieces[0].which is None:
        return _one(pieces[0], view, need_lse)
    rows, heads, tokens, _ = view.q.shape
    out = torch.empty_like(view.q).flatten(0, 1)
    lse = view.q.new_empty(rows * heads, tokens, dtype=torch.float32) if need_lse else None
    for piece in pieces:
        which = piece.which
        assert which is not None
        part, part_lse = _one(piece, view.flat(which), need_lse)
        out = out.index_copy(0, which, part[0])
        if lse is not None and part_lse is not None:
            lse = lse.index_copy(0, which, part_lse[0])
    return out.view_as(view.q), None if lse is None else lse.view(rows, heads, tokens)


def _one(piece: Piece, view: View, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    if piece.order is None:
        return _attend(piece.mask, view, need_lse)
    out, lse = _attend(piece.mask, view.sorted(piece.order), need_lse)
    out = torch.empty_like(out).index_copy(2, piece.order, out)
    if lse is not None:
        lse = torch.empty_like(lse).index_copy(2, piece.order, lse)
    return out, lse


def _attend(mask: BlockMask, view: View, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    return attend(view.q, view.k, view.v, mask, mask=view.keys, scale=view.scale, need_lse=need_lse)
