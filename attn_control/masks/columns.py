"""Which queries may read a few chosen keys: columns of a mask, without the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_control.masks.block import FIRST_TILE, WHOLE, BlockMask
from attn_control.masks.group import GroupMask


@torch.compiler.disable
def columns(mask: BlockMask | GroupMask, keys: Tensor) -> Tensor:
    """bool (batch, heads, q_len, chosen) of keys int64 (chosen,), in any order."""
    if isinstance(mask, GroupMask):
        words = mask.allow[mask.q_atom.long()][:, None, :, None]
        found = (words >> mask.k_atom[:, keys].long()[:, None, None, :]) & 1 != 0
        return found if mask.blocks is None else found & columns(mask.blocks, keys)
    entry, place = entries(mask, keys)
    blocks = torch.arange(mask.q_blocks, device=mask.device)
    block = blocks.repeat_interleave(mask.q_bounds.diff().long())
    entry = entry[:, :, block]
    found = entry == WHOLE
    if len(mask.pool):
        row = torch.arange(mask.q_len, device=mask.device) - mask.q_bounds[block]
        number = (entry - FIRST_TILE).clamp(min=0).long()
        word = mask.pool[number, row[:, None], place // 32]
        found |= (entry >= FIRST_TILE) & ((word >> place % 32) & 1 != 0)
    return found


def entries(mask: BlockMask, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Of each chosen key: int32 (batch, heads, q_blocks, chosen), what `BlockMask.cells` says of
    its block; and int64 (chosen,), its place in there.
    """
    block = torch.searchsorted(mask.k_bounds, keys.int(), right=True) - 1
    return mask.cells()[..., block], keys - mask.k_bounds[block]
