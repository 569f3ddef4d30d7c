"""Tokens that take no part: queries without a key, and keys that no query reads."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attn_control.masks.block import FIRST_TILE, WHOLE, BlockMask


def idle(mask: BlockMask) -> tuple[Tensor | None, Tensor | None]:
    """Queries and keys, bool (batch, heads, tokens) with batch and heads as the mask has them, True
    where idle; None where none is.
    """
    cells = mask.cells().cpu().numpy()
    pool = mask.pool.cpu().numpy()
    rows = (pool != 0).any(2)
    octets = np.bitwise_or.reduce(pool, axis=1).view(np.uint8) if len(pool) else None
    columns = np.zeros((0, mask.k_block), bool)
    if octets is not None:
        columns = np.unpackbits(octets, axis=1, bitorder="little")[:, : mask.k_block] != 0
    return (
        _idle(cells, rows, mask.q_bounds, mask.q_block),
        _idle(cells.swapaxes(-1, -2), columns, mask.k_bounds, mask.k_block),
    )


def _idle(
    cells: NDArray[np.int32], used: NDArray[np.bool_], bounds: Tensor, block: int
) -> Tensor | None:
    """Of the first side of ``cells``; used: bool (tiles, block), which of its tokens a tile has."""
    lengths = np.diff(bounds.cpu().numpy())
    busy = np.zeros((*cells.shape[:3], block), bool)
    busy[(cells == WHOLE).any(-1)] = True
    b, h, i, j = (cells >= FIRST_TILE).nonzero()
    np.logical_or.at(busy, (b, h, i), used[cells[b, h, i, j] - FIRST_TILE])
    there = np.arange(block) < lengths[:, None]
    found = ~busy[..., there]
    return torch.from_numpy(found) if found.any() else None


def blank(x: Tensor, tokens: Tensor | None) -> Tensor:
    """x (batch, heads, tokens, dim) with zeros in place of idle tokens, whatever lay there.

    With grouped keys a key is idle only if no query head of its group reads it.
    """
    if tokens is None:
        return x
    if tokens.shape[1] not in (1, x.shape[1]):
        tokens = tokens.unflatten(1, (x.shape[1], -1)).all(2)
    return x.masked_fill(tokens[..., None].to(x.device), 0)
