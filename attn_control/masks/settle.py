"""The last step of whatever computes bit tiles: from raw cells to a mask that keeps the rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_control.masks import bits
from attn_control.masks.block import CHUNK, FIRST_TILE, OFF, WHOLE, BlockMask
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
    rows, columns = (
        torch.tensor(bounds_of(regions, block), device=cells.device).diff()
        for regions, block in ((q_regions, q_block), (k_regions, k_block))
    )
    inside = bits.popcount(tiles)
    used = torch.zeros(len(tiles), dtype=torch.bool, device=cells.device)
    lines = cells.view(-1, len(columns))  # one a head and query block
    few = max(1, CHUNK // len(columns))
    for start in range(0, len(lines), few):
        part = lines[start : start + few]
        line, column = (part >= FIRST_TILE).nonzero(as_tuple=True)
        number = part[line, column].long() - FIRST_TILE
        most = rows[(start + line) % len(rows)] * columns[column]
        empty, full = inside[number] == 0, inside[number] == most
        part[line[empty], column[empty]] = OFF
        part[line[full], column[full]] = WHOLE
        used[number[~empty & ~full]] = True
    pool, renumbered = bits.deduplicate(tiles[used])
    code = torch.arange(len(tiles) + FIRST_TILE, dtype=torch.int32, device=cells.device)
    code[FIRST_TILE:][used] = (renumbered + FIRST_TILE).int()
    for part in lines.split(few):
        part.copy_(code[part.long()])
    return BlockMask.from_cells(cells, pool, **grid)  # type: ignore[arg-type]
