"""The last step of whatever computes bit tiles: from raw cells to a mask that keeps the rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_control.masks import bits
from attn_control.masks.block import FIRST_TILE, OFF, WHOLE, BlockMask
from attn_control.masks.bounds import bounds_of


def settle(
    cells: Tensor,
    tiles: Tensor,
    *,
    q_block: int,
    k_block: int,
    q_regions: Sequence[int],
    k_regions: Sequence[int],
) -> BlockMask:
    """Tiles of zeros are off, tiles that are all on as far as their block goes are whole, equal
    tiles are one, and tiles that nothing refers to are gone.

    Args:
        cells: int32 (batch, heads, q_blocks, k_blocks) as `BlockMask.cells`, written to.
        tiles: int32 (tiles, q_block, words) that the cells refer to; 0 past the end of any block
            that refers to it.
    """
    grid = dict(q_block=q_block, k_block=k_block, q_regions=q_regions, k_regions=k_regions)
    if not len(tiles):
        return BlockMask.from_cells(cells, **grid)  # type: ignore[arg-type]
    flat = cells.view(-1)
    place = (flat >= FIRST_TILE).nonzero().squeeze(-1)
    number = flat[place].long() - FIRST_TILE
    lengths = [
        torch.tensor(bounds_of(regions, block), device=cells.device).diff()
        for regions, block in ((q_regions, q_block), (k_regions, k_block))
    ]
    most = (lengths[0][:, None] * lengths[1]).view(-1)[place % (cells.shape[-2] * cells.shape[-1])]
    inside = bits.popcount(tiles)[number]
    code = torch.full_like(number, FIRST_TILE)
    code[inside == 0] = OFF
    code[inside == most] = WHOLE
    kept = code == FIRST_TILE
    used = torch.zeros(len(tiles), dtype=torch.bool, device=cells.device)
    used[number[kept]] = True
    pool, renumbered = bits.deduplicate(tiles[used])
    code[kept] += renumbered[used.cumsum(0)[number[kept]] - 1]
    flat[place] = code.int()
    return BlockMask.from_cells(cells, pool, **grid)  # type: ignore[arg-type]
