"""A mask as a matrix of tokens: what tests compare with, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_control.errors import AttnControlError
from attn_control.masks import bits
from attn_control.masks.block import BlockMask


def to_dense(mask: BlockMask, limit: int) -> Tensor:
    """bool (batch, heads, q_len, k_len), one block at a time: slow and plain.

    Raises:
        AttnControlError: more than ``limit`` elements.
    """
    size = mask.batch * mask.heads * mask.q_len * mask.k_len
    if size > limit:
        raise AttnControlError(
            f"BlockMask.to_dense: {mask.batch} x {mask.heads} x {mask.q_len} x {mask.k_len} = "
            f"{size} elements, more than limit={limit}; kernels read the lists instead"
        )
    out = torch.zeros(mask.batch, mask.heads, mask.q_len, mask.k_len, dtype=torch.bool)
    pairs = bits.unpack(mask.pool.cpu(), mask.k_block)
    q_bounds, k_bounds = mask.q_bounds.tolist(), mask.k_bounds.tolist()
    count, index, tile = mask.count.tolist(), mask.index.tolist(), mask.tile.tolist()
    for b in range(mask.batch):
        for h in range(mask.heads):
            for row in range(mask.q_blocks):
                queries = slice(q_bounds[row], q_bounds[row + 1])
                for slot in range(count[b][h][row]):
                    column = index[b][h][row][slot]
                    keys = slice(k_bounds[column], k_bounds[column + 1])
                    if tile[b][h][row][slot] < 0:
                        out[b, h, queries, keys] = True
                    else:
                        part = pairs[tile[b][h][row][slot]]
                        out[b, h, queries, keys] = part[
                            : queries.stop - queries.start, : keys.stop - keys.start
                        ]
    return out.to(mask.device)
