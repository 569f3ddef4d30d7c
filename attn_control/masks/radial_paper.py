"""Eq. 4 of Radial Attention (arXiv 2506.19852): bands measured in tokens, not in blocks."""

from __future__ import annotations

import numpy as np
import torch

from attn_control.masks.block import FIRST_TILE, OFF, WHOLE, BlockMask
from attn_control.masks.grid import Grid
from attn_control.masks.products import product
from attn_control.masks.radial_rules import Rules
from attn_control.masks.relations import within
from attn_control.masks.settle import settle


def paper_mask(
    frames: int, tokens: int, block: int, length: int, seen: int, widths: np.ndarray, rules: Rules
) -> BlockMask:
    """Put together from the band of each distance, which is the same for all pairs of frames."""
    grid = Grid((frames, tokens), block, after=length - frames * tokens, split=1)
    one = Grid((tokens,), block)
    bands = {
        int(width): product(one, {0: within(tokens, int(width))}) for width in {*widths} - {-1}
    }
    parts = torch.full((frames, one.blocks, one.blocks), OFF, dtype=torch.int32)  # by distance
    pool: list[torch.Tensor] = []
    before = 0
    for width, band in bands.items():
        cells = band.cells()[0, 0]
        parts[widths == width] = torch.where(cells >= FIRST_TILE, cells + before, cells)
        pool.append(band.pool)
        before += len(band.pool)
    distance = (torch.arange(frames)[:, None] - torch.arange(frames)).abs()
    video = parts[distance]  # (query frames, key frames, query blocks, key blocks)
    if rules.sink:
        video[:, 0] = WHOLE
    cells = torch.full((1, 1, grid.blocks, grid.blocks), WHOLE, dtype=torch.int32)
    cells[0, 0, grid.spatial, grid.spatial] = video.transpose(1, 2).reshape(
        frames * one.blocks, frames * one.blocks
    )
    return settle(
        cells,
        torch.cat(pool),
        q_block=block,
        k_block=block,
        q_regions=grid.regions,
        k_regions=grid.regions,
    )
