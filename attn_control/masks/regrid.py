"""The same pairs on another grid of blocks, for kernels whose grid is their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attn_control.errors import AttnControlError
from attn_control.masks import bits
from attn_control.masks.block import FIRST_TILE, OFF, WHOLE, BlockMask
from attn_control.masks.bounds import bounds_of, check_regions
from attn_control.masks.settle import settle

CHUNK = 64
"""Tiles put together at once: 64 x 128 x 128 gathers."""


class Cut(NamedTuple):
    """How the new blocks of one side are made of pieces of old ones.

    old: (blocks, pieces) the old block of each piece; a block with fewer pieces repeats its last.
    kind: (blocks,) number of the block's way of being cut.
    piece, place: (kinds, tokens a block) which piece a token lies in, and where in the old block;
        piece is -1 past the end of a short block.
    """

    old: Tensor
    kind: Tensor
    piece: Tensor
    place: Tensor


def regrid(
    mask: BlockMask,
    q_block: int,
    k_block: int,
    q_regions: Sequence[int],
    k_regions: Sequence[int],
) -> BlockMask:
    """Exact, and in blocks throughout; new blocks that are cut alike from the same old tiles are
    put together once.

    Raises:
        AttnControlError: regions of another number of tokens.
    """
    sides = []
    for side, block, given in (("q", q_block, q_regions), ("k", k_block, k_regions)):
        regions = check_regions("BlockMask.regrid", side, given, block)
        length = getattr(mask, f"{side}_len")
        if sum(regions) != length:
            raise AttnControlError(
                f"BlockMask.regrid: {side}_regions={regions} are {sum(regions)} tokens, "
                f"the mask has {length}"
            )
        old = bounds_of(getattr(mask, f"{side}_regions"), getattr(mask, f"{side}_block"))
        sides.append(_cut(old, bounds_of(regions, block), block, mask.device))
    q, k = sides
    cells = mask.cells()
    parts = torch.stack(
        [
            cells[:, :, rows][..., columns]
            for rows in q.old.unbind(1)
            for columns in k.old.unbind(1)
        ],
        -1,
    )  # (batch, heads, q_blocks, k_blocks, pieces of the one x pieces of the other)
    made = torch.where((parts == WHOLE).all(-1), WHOLE, OFF).int()
    mixed = (parts != OFF).any(-1) & (made == OFF)
    place = mixed.nonzero()
    # Blocks alike in every code and both cuts have the same tile.
    same = q.kind[place[:, 2]] * len(k.piece) + k.kind[place[:, 3]]
    codes = parts[mixed].long()
    for column in codes.unbind(1):
        same = torch.unique(same * (len(mask.pool) + FIRST_TILE) + column, return_inverse=True)[1]
    count = int(same.max()) + 1 if len(same) else 0
    example = torch.zeros(count, dtype=torch.int64, device=mask.device)
    example[same] = torch.arange(len(same), device=mask.device)
    made[mixed] = (same + FIRST_TILE).int()
    rows, columns = q.kind[place[example, 2]], k.kind[place[example, 3]]
    tiles = [
        _assemble(mask, codes[example[at]].view(-1, q.old.shape[1], k.old.shape[1]), q, k, r, c)
        for at, r, c in zip(
            torch.arange(count, device=mask.device).split(CHUNK),
            rows.split(CHUNK),
            columns.split(CHUNK),
            strict=True,
        )
        if len(at)
    ]
    return settle(
        made,
        torch.cat([mask.pool.new_zeros(0, q_block, bits.words(k_block)), *tiles]),
        q_block=q_block,
        k_block=k_block,
        q_regions=q_regions,
        k_regions=k_regions,
    )


def _cut(old: np.ndarray, new: np.ndarray, block: int, device: torch.device) -> Cut:
    token = np.minimum(new[:-1, None] + np.arange(block), new[1:, None] - 1)
    home = old.searchsorted(token, side="right") - 1  # the old block of each token
    piece, place = home - home[:, :1], token - old[home]
    piece[np.arange(block) >= (new[1:] - new[:-1])[:, None]] = -1
    pieces = int(piece.max()) + 1
    blocks = np.minimum(home[:, :1] + np.arange(pieces), home[:, -1:])
    kinds, kind = np.unique(np.stack([piece, place], 1), axis=0, return_inverse=True)
    return Cut(
        *(torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (blocks, kind.reshape(-1))),
        *(torch.from_numpy(kinds[:, i].astype(np.int64)).to(device) for i in (0, 1)),
    )


def _assemble(
    mask: BlockMask, codes: Tensor, q: Cut, k: Cut, rows: Tensor, columns: Tensor
) -> Tensor:
    """Tiles of (chunk,) blocks cut as ``rows`` and ``columns`` tell, from pieces that are
    ``codes`` (chunk, pieces, pieces).
    """
    row_piece, column_piece = q.piece[rows], k.piece[columns]
    each = torch.arange(len(codes), device=mask.device)[:, None, None]
    code = codes[each, row_piece.clamp(min=0)[:, :, None], column_piece.clamp(min=0)[:, None, :]]
    pairs = code == WHOLE
    if len(mask.pool):
        column = k.place[columns][:, None, :]
        tile = (code - FIRST_TILE).clamp(min=0)
        word = mask.pool[tile, q.place[rows][:, :, None], column // 32]
        pairs |= (code >= FIRST_TILE) & ((word >> (column % 32)) & 1).bool()
    pairs &= (row_piece >= 0)[:, :, None] & (column_piece >= 0)[:, None, :]
    return bits.pack(pairs)
