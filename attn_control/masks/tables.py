"""From a table of blocks to a mask of whole blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_control.errors import AttnControlError
from attn_control.masks.block import BlockMask
from attn_control.masks.bounds import bounds_of, check_regions


def from_table(
    table: Tensor,
    block_size: int | tuple[int, int] = 128,
    q_len: int | None = None,
    k_len: int | None = None,
    q_regions: Sequence[int] | None = None,
    k_regions: Sequence[int] | None = None,
) -> BlockMask:
    """Whole blocks, visited where the table says so.

    Args:
        table: bool (heads or 1, q_blocks, k_blocks), or with a batch in front.
        block_size: tokens a block, or (q_block, k_block).
        q_len, k_len: tokens a side, where they are one region. If nothing is said of the keys, they
            are as the queries.
        q_regions, k_regions: instead of the lengths, where no block may straddle a border.

    Raises:
        AttnControlError: a table that does not fit the blocks of these tokens.
    """
    if not isinstance(table, Tensor) or table.dtype != torch.bool or table.dim() not in (3, 4):
        raise AttnControlError(
            "BlockMask.from_table: table has to be a bool tensor (heads or 1, q_blocks, k_blocks), "
            f"or with a batch in front, not {_told(table)}"
        )
    q_block, k_block = (block_size,) * 2 if isinstance(block_size, int) else block_size
    if k_len is None and k_regions is None:
        k_len, k_regions = q_len, q_regions
    q_runs = _runs("q", q_block, q_len, q_regions)
    k_runs = _runs("k", k_block, k_len, k_regions)
    blocks = len(bounds_of(q_runs, q_block)) - 1, len(bounds_of(k_runs, k_block)) - 1
    if tuple(table.shape[-2:]) != blocks:
        raise AttnControlError(
            f"BlockMask.from_table: table has {tuple(table.shape[-2:])} blocks, but regions "
            f"{q_runs} x {k_runs} in blocks of {q_block} x {k_block} have {blocks}"
        )
    cells = table.to(torch.int32)
    return BlockMask.from_cells(
        cells if table.dim() == 4 else cells[None],
        q_block=q_block,
        k_block=k_block,
        q_regions=q_runs,
        k_regions=k_runs,
    )


def _runs(
    side: str, block: int, length: int | None, regions: Sequence[int] | None
) -> tuple[int, ...]:
    if regions is None and length is not None:
        regions = (length,)
    elif regions is None or length is not None:
        raise AttnControlError(f"BlockMask.from_table: give one of {side}_len and {side}_regions")
    return check_regions("BlockMask.from_table", side, regions, block)


def _told(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return repr(value)
