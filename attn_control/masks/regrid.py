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

CHUNK = 256
"""Tiles put together at once."""

Span = tuple[slice, slice]
"""Where a piece lies in the new block, and where in the old one."""


class Cut(NamedTuple):
    """How the new blocks of one side are made of pieces of old ones.

    old: int64 (blocks, pieces), the old block of each piece; where there are fewer, the last again.
    kind: int64 (blocks,), number of the way in which a block is cut.
    spans: for each kind its pieces, in order.
    """

    old: Tensor
    kind: Tensor
    spans: list[list[Span]]


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
    same = q.kind[place[:, 2]] * len(k.spans) + k.kind[place[:, 3]]
    codes = parts[mixed].long()
    for column in codes.unbind(1):
        same = torch.unique(same * (len(mask.pool) + FIRST_TILE) + column, return_inverse=True)[1]
    count = int(same.max()) + 1 if len(same) else 0
    example = torch.zeros(count, dtype=torch.int64, device=mask.device)
    example[same] = torch.arange(len(same), device=mask.device)
    made[mixed] = (same + FIRST_TILE).int()
    rows, columns = q.kind[place[example, 2]], k.kind[place[example, 3]]
    tiles = mask.pool.new_zeros(count, q_block, bits.words(k_block))
    codes = codes[example].view(count, q.old.shape[1], k.old.shape[1])
    cuts, group = torch.unique(rows * len(k.spans) + columns, return_inverse=True)
    members = group.argsort().split(torch.bincount(group, minlength=len(cuts)).tolist())
    for cut, some in zip(cuts.tolist(), members, strict=True):
        spans = q.spans[cut // len(k.spans)], k.spans[cut % len(k.spans)]
        for few in some.split(CHUNK):
            tiles[few] = _assembled(mask, codes[few], *spans, (q_block, k_block))
    return settle(
        made, tiles, q_block=q_block, k_block=k_block, q_regions=q_regions, k_regions=k_regions
    )


def _cut(old: np.ndarray, new: np.ndarray, block: int, device: torch.device) -> Cut:
    first = old.searchsorted(new[:-1], side="right") - 1
    last = old.searchsorted(new[1:] - 1, side="right") - 1
    pieces = int((last - first).max()) + 1
    blocks = np.minimum(first[:, None] + np.arange(pieces), last[:, None])
    seen: dict[tuple[tuple[int, int, int], ...], int] = {}
    kind = []
    for start, stop, begin, end in zip(new, new[1:], first, last, strict=False):
        edges = [
            (max(old[b], start) - start, min(old[b + 1], stop) - start, max(start - old[b], 0))
            for b in range(begin, end + 1)
        ]
        way = tuple((int(a), int(b), int(c)) for a, b, c in edges)
        kind.append(seen.setdefault(way, len(seen)))
    spans = [[(slice(a, b), slice(c, c + b - a)) for a, b, c in way] for way in seen]
    return Cut(
        torch.from_numpy(blocks.astype(np.int64)).to(device),
        torch.tensor(kind, device=device),
        spans,
    )


def _assembled(
    mask: BlockMask, codes: Tensor, rows: list[Span], columns: list[Span], size: tuple[int, int]
) -> Tensor:
    """Tiles of blocks that are all cut alike, from pieces that are ``codes`` (blocks, pieces of the
    rows, pieces of the columns).
    """
    pairs = torch.zeros(len(codes), *size, dtype=torch.bool, device=mask.device)
    for i, (new_rows, old_rows) in enumerate(rows):
        for j, (new_columns, old_columns) in enumerate(columns):
            code = codes[:, i, j]
            part = pairs[:, new_rows, new_columns]
            part |= (code == WHOLE)[:, None, None]
            at = (code >= FIRST_TILE).nonzero().squeeze(-1)
            if len(at):
                old = mask.pool[code[at] - FIRST_TILE, old_rows]
                part[at] = bits.unpack(old, mask.k_block)[:, :, old_columns]
    return bits.pack(pairs)
