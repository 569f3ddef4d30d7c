"""From a BlockMask to what the kernels walk: for each block of rows, the tiles of keys to visit.

Two lists a row, in CSR form. *Whole* tiles are on as far as they go and have all of their columns:
no mask, no bounds. *Cut* tiles come after them, with bits, with fewer columns, or with both.
Columns of a mask's block are cut into tiles as wide as the kernel's, and what a tile of bits says
is looked at again at that width: halves that are empty go, halves that are all on become whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from attn_control.masks import bits
from attn_control.masks.block import BlockMask
from attn_control.masks.group import meet, present, tiled

STEPS = 8
"""Lengths that the launch order tells apart."""


class Lists(NamedTuple):
    """One mask for one kernel; all int32, on the mask's device.

    order: (rows,), rows of the lists by work, longest first: so that no long one starts when
        all others have ended. In `STEPS` steps only, so that rows of one head, which read the same
        keys, stay together. A row is ``(list * blocks) + block``.
    bounds: (blocks + 1,), where blocks of rows begin, in tokens.
    whole_at: (lists * blocks + 1,), where each row's whole tiles begin.
    whole: (whole tiles,), the first column of each, in tokens.
    cut_at: (lists * blocks + 1,), as `whole_at`.
    cut: (cut tiles, 4): first column, columns, number of the bit tile or -1, its first bit.
    pool: (tiles, rows of a block, words): as the mask's, at least one tile.
    """

    order: Tensor
    bounds: Tensor
    whole_at: Tensor
    whole: Tensor
    cut_at: Tensor
    cut: Tensor
    pool: Tensor


def lower(mask: BlockMask, width: int, group: int = 1, met: Met | None = None) -> Lists:
    """The lists of a mask, its columns in tiles of ``width``.

    group: lists of so many heads in a row are walked by one program, so that they share a place in
    the launch order. met: what groups of tokens let pass of each tile, besides the mask.
    """
    if met is not None and met.batch > mask.batch:
        mask = _repeated(mask, met.batch)
    rows_long, first_column = mask.q_bounds.diff(), mask.k_bounds[:-1]
    columns_long = mask.k_bounds.diff()
    batch, heads, blocks, most = mask.index.shape
    owner, slot = mask.listed.flatten(0, 2).nonzero(as_tuple=True)
    column, tile = (x.flatten(0, 2)[owner, slot] for x in (mask.index, mask.tile))
    parts = -(-mask.k_block // width)
    begin = torch.arange(parts, device=mask.device, dtype=torch.int32) * width
    # (kept blocks, parts); a short block has fewer parts than a long one.
    length = (columns_long[column.long()][:, None] - begin).clamp(0, width)
    there, is_whole = length > 0, (length == width) & (tile < 0)[:, None]
    if len(mask.pool):
        inside = _inside(mask.pool, mask.k_block, width)[tile.clamp(min=0).long()]
        bitten, area = (tile >= 0)[:, None], rows_long[owner % blocks][:, None] * length
        there &= ~bitten | (inside > 0)
        full = bitten & (inside == area)
        is_whole |= full & (length == width)
    else:
        full = torch.zeros_like(there)
    if met is not None:
        some, every = met.of(owner // (heads * blocks), owner % blocks, column)
        there, is_whole = there & some, is_whole & every
    start = first_column[column.long()][:, None] + begin
    number = torch.where(full, -1, tile[:, None])
    which, rest = there & is_whole, there & ~is_whole
    cut = torch.stack([start, length, number, begin.expand_as(start)], -1)[rest]
    lists = batch * heads * blocks
    tiles = [torch.zeros(lists, dtype=torch.int64, device=mask.device) for _ in range(2)]
    for total, kind in zip(tiles, (which, rest), strict=True):
        total.index_add_(0, owner, kind.sum(-1))
    whole_at, cut_at = (torch.nn.functional.pad(x.cumsum(0), (1, 0)).int() for x in tiles)
    work = (tiles[0] + tiles[1]).view(batch, heads, blocks)
    if group > 1 and heads > 1:
        work = work.unflatten(1, (-1, group)).sum(2)
    pool = mask.pool if len(mask.pool) else mask.pool.new_zeros(1, mask.q_block, 1)
    return Lists(
        _longest_first(work.flatten()),
        mask.q_bounds,
        whole_at,
        start[which],
        cut_at,
        cut.contiguous(),
        pool.contiguous(),
    )


class Met(NamedTuple):
    """Which pairs of a tile groups let pass: bool (batch | 1, blocks of rows, blocks of columns,
    parts of a block): some, all.
    """

    some: Tensor
    every: Tensor

    @property
    def batch(self) -> int:
        return len(self.some)

    def of(self, row: Tensor, block: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """bool (tiles, parts) each."""
        at = row if self.batch > 1 else torch.zeros_like(row), block, column.long()
        return self.some[at], self.every[at]


def met(
    mask: BlockMask, width: int, rows: Tensor, columns: Tensor, table: Tensor, sure: bool = True
) -> Met:
    """What groups let pass of a mask's tiles.

    rows, columns: atoms (batch | 1, places) of the mask's queries and keys, in its order. table:
    bool (atoms of rows, atoms of columns). sure: False where the places are not known here, so
    that kernels have to look at each pair.
    """
    blocks, parts = len(mask.k_bounds) - 1, -(-mask.k_block // width)
    by_row = tiled(rows, mask.q_bounds[:-1], mask.q_bounds.diff(), mask.q_block)
    begin = torch.arange(parts, device=mask.device) * width
    start = (mask.k_bounds[:-1, None] + begin).flatten()
    length = (mask.k_bounds.diff()[:, None] - begin).clamp(0, width).flatten()
    by_column = tiled(columns, start, length, width)
    found = meet(
        table, *(present(x, n) for x, n in zip((by_row, by_column), table.shape, strict=True))
    )
    some, every = (x.unflatten(-1, (blocks, parts)) for x in found)
    return Met(some, every) if sure else Met(torch.ones_like(some), torch.zeros_like(every))


def _repeated(mask: BlockMask, batch: int) -> BlockMask:
    names = ("count", "index", "tile")
    lists = {n: getattr(mask, n).repeat(batch, *[1] * (getattr(mask, n).dim() - 1)) for n in names}
    return replace(mask, **lists)


def _inside(pool: Tensor, columns: int, width: int) -> Tensor:
    """int64 (tiles, parts): pairs that are on in each part of ``width`` columns of each tile."""
    parts = -(-columns // width)
    found = []
    for chunk in pool.split(bits.CHUNK):
        on = bits.unpack(chunk, columns)
        on = torch.nn.functional.pad(on, (0, parts * width - columns))
        found.append(on.unflatten(-1, (parts, width)).sum((1, 3)))
    return torch.cat(found)


def _longest_first(work: Tensor) -> Tensor:
    longest = int(work.max())
    step = work * STEPS // max(1, longest)
    return step.argsort(descending=True, stable=True).int()


def turned(mask: BlockMask) -> BlockMask:
    """The mask with keys as rows; on a finer grid of queries than bits allow, on a coarser one."""
    if len(mask.pool) and mask.q_block % 32:
        mask = mask.regrid(q_block=-(-mask.q_block // 32) * 32)
    return mask.transpose()
