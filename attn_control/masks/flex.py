"""To and from the BlockMask of torch's flex_attention, whose grid of blocks is uniform."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from attn_control.errors import AttnControlError
from attn_control.masks import bits
from attn_control.masks.block import FIRST_TILE, OFF, WHOLE, BlockMask
from attn_control.masks.bounds import bounds_of
from attn_control.masks.settle import settle

CHUNK = 64
"""Blocks whose ``mask_mod`` is asked at once: 64 x 128 x 128 calls."""


def to_flex(mask: BlockMask) -> flex_attention.BlockMask:
    """Always with a ``mask_mod``: flex_attention that is not compiled reads nothing else, and is
    dense without one. Regions that do not fit a uniform grid are re-gridded, exactly.
    """
    mask = _uniform(mask)
    cells = mask.cells()
    partial, whole = (_lists(kept) for kept in (cells >= FIRST_TILE, cells == WHOLE))
    return flex_attention.BlockMask.from_kv_blocks(
        *partial,
        *whole,
        (mask.q_block, mask.k_block),
        _asked(mask, cells),
        (mask.q_len, mask.k_len),
    )


def _lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    order = kept.int().argsort(dim=-1, descending=True, stable=True)
    return kept.sum(-1, dtype=torch.int32), order.int()


def _uniform(mask: BlockMask) -> BlockMask:
    q, k = bounds_of((mask.q_len,), mask.q_block), bounds_of((mask.k_len,), mask.k_block)
    if q.tolist() == mask.q_bounds.tolist() and k.tolist() == mask.k_bounds.tolist():
        return mask
    return mask.regrid(q_regions=(mask.q_len,), k_regions=(mask.k_len,))


def _asked(mask: BlockMask, cells: Tensor) -> Any:
    """The mask as a function of (batch, head, query, key)."""
    q_block, k_block, pool = mask.q_block, mask.k_block, mask.pool
    shared_batch, shared_heads = mask.batch == 1, mask.heads == 1

    def cell(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b, h = b * 0 if shared_batch else b, h * 0 if shared_heads else h
        return cells[b, h, q // q_block, k // k_block]

    def whole(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cell(b, h, q, k) != OFF

    def looked_up(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        code = cell(b, h, q, k)
        tile = torch.clamp(code - FIRST_TILE, min=0)
        word = pool[tile, q % q_block, k % k_block // 32]
        return (code == WHOLE) | ((code >= FIRST_TILE) & (((word >> (k % 32)) & 1) == 1))

    return looked_up if len(pool) else whole


def from_flex(mask: flex_attention.BlockMask) -> BlockMask:
    """The pairs that compiled flex_attention attends to: blocks that it lists as partial are asked
    pair by pair, at the batch row and head of their list. (A mask with one list for all heads says
    no more than its ``mask_mod`` does for head 0.)

    Raises:
        AttnControlError: not a BlockMask of flex_attention.
    """
    if not isinstance(mask, flex_attention.BlockMask):
        raise AttnControlError(f"BlockMask.from_flex: {type(mask).__name__} is no flex BlockMask")
    (q_block, k_block), (q_len, k_len) = mask.BLOCK_SIZE, mask.seq_lengths
    q_bounds, k_bounds = bounds_of((q_len,), q_block), bounds_of((k_len,), k_block)
    shape = *mask.kv_num_blocks.shape[:2], len(q_bounds) - 1, len(k_bounds) - 1
    cells = torch.zeros(shape, dtype=torch.int32, device=mask.kv_num_blocks.device)
    partial = _table(mask.kv_num_blocks, mask.kv_indices, shape)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        cells[_table(mask.full_kv_num_blocks, mask.full_kv_indices, shape)] = WHOLE
    place = (partial & (cells == OFF)).nonzero()
    cells[tuple(place.T)] = torch.arange(
        FIRST_TILE, FIRST_TILE + len(place), device=cells.device
    ).int()
    tiles = [_read(mask, chunk) for chunk in place.split(CHUNK) if len(chunk)]
    empty = torch.zeros(0, q_block, bits.words(k_block), dtype=torch.int32, device=cells.device)
    return settle(
        cells,
        torch.cat([empty, *tiles]),
        q_block=q_block,
        k_block=k_block,
        q_regions=(q_len,),
        k_regions=(k_len,),
    )


def _table(count: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Lists to a table; flex's own table may be wider, for blocks past the end."""
    slot = torch.arange(index.shape[-1], device=index.device)
    listed = (slot < count.unsqueeze(-1)).int()
    width = max(index.shape[-1], shape[-1])
    found = listed.new_zeros(*index.shape[:-1], width).scatter_add_(-1, index.long(), listed)
    return found[..., : shape[-2], : shape[-1]] > 0


def _read(mask: flex_attention.BlockMask, place: Tensor) -> Tensor:
    """Tiles of the blocks at ``place`` (blocks, 4), pairs past the end off."""
    (q_block, k_block), (q_len, k_len) = mask.BLOCK_SIZE, mask.seq_lengths
    b, h, row, column = (x.view(-1, 1, 1) for x in place.unbind(1))
    q = row * q_block + torch.arange(q_block, device=place.device).view(1, -1, 1)
    k = column * k_block + torch.arange(k_block, device=place.device)
    inside = (q < q_len) & (k < k_len)
    asked = torch.broadcast_tensors(b, h, q.clamp(max=q_len - 1), k.clamp(max=k_len - 1))
    said = torch.vmap(mask.mask_mod)(*(x.flatten() for x in asked))
    return bits.pack(said.view(inside.shape) & inside)
