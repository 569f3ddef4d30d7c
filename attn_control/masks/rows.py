"""Single rows of a mask: what some queries read, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_control.masks import bits
from attn_control.masks.block import FIRST_TILE, WHOLE, BlockMask


def rows_of(mask: BlockMask, queries: Tensor) -> Tensor:
    """bool (batch, heads, queries, k_len): the keys that each of some queries reads.

    queries: int64, tokens of the mask's own order. Memory is queries x keys.
    """
    queries = queries.to(mask.device)
    q_bounds, k_bounds = mask.q_bounds.long(), mask.k_bounds.long()
    home = torch.searchsorted(q_bounds, queries, right=True) - 1
    cells = mask.cells()[:, :, home]  # (batch, heads, queries, k_blocks)
    lengths = k_bounds.diff()
    on = (cells == WHOLE).repeat_interleave(lengths, -1)
    place = (cells >= FIRST_TILE).nonzero()
    if len(place):
        batch, head, row, column = place.unbind(1)
        tile = cells[batch, head, row, column].long() - FIRST_TILE
        pairs = bits.unpack(mask.pool[tile, (queries - q_bounds[home])[row], None], mask.k_block)
        slot = torch.arange(mask.k_block, device=mask.device)
        inside = slot < lengths[column, None]
        keys = (k_bounds[column, None] + slot)[inside]
        which = torch.arange(len(place), device=mask.device)[:, None].expand_as(inside)[inside]
        on[batch[which], head[which], row[which], keys] = pairs[:, 0][inside]
    return on


def keys_per_query(mask: BlockMask, *, batch: int = 0, head: int = 0) -> Tensor:
    """int64 (q_len,): how many keys each query reads."""
    cells = mask.cells()[batch, head]
    lengths = mask.k_bounds.long().diff()
    rows = mask.q_bounds.long().diff()
    found = ((cells == WHOLE) * lengths).sum(-1).repeat_interleave(rows)
    if len(mask.pool):
        # Popcounts of the rows of each tile; a tile's short rows hold nothing past their block.
        count = bits.popcount(mask.pool.flatten(0, 1)[:, None]).view(len(mask.pool), mask.q_block)
        for block, start in enumerate(mask.q_bounds.tolist()[:-1]):
            tiles = cells[block][cells[block] >= FIRST_TILE].long() - FIRST_TILE
            found[start : start + int(rows[block])] += count[tiles].sum(0)[: int(rows[block])]
    return found
