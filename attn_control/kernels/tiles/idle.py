"""Tokens that take no part: queries without a key, and keys that no query reads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attn_control.masks.block import FIRST_TILE, WHOLE, BlockMask


def idle(mask: BlockMask, cells: NDArray[np.int32]) -> tuple[Tensor | None, Tensor | None]:
    """Queries and keys, bool (batch, heads, tokens) with batch and heads as the mask has them, True
    where idle; None where none is. cells: the mask's own.
    """
    pool = mask.pool.cpu().numpy()
    whole = cells == WHOLE

    def of_queries() -> NDArray[np.bool_]:
        return (pool != 0).any(2)

    def of_keys() -> NDArray[np.bool_]:
        octets = np.bitwise_or.reduce(pool, axis=1).view(np.uint8)
        return np.unpackbits(octets, axis=1, bitorder="little")[:, : mask.k_block] != 0

    sides = cells.swapaxes(-1, -2), whole.swapaxes(-1, -2)
    return (
        _idle(cells, whole, of_queries, mask.q_bounds, mask.q_block),
        _idle(*sides, of_keys, mask.k_bounds, mask.k_block),
    )


def _idle(
    cells: NDArray[np.int32],
    whole: NDArray[np.bool_],
    used: Callable[[], NDArray[np.bool_]],
    bounds: Tensor,
    block: int,
) -> Tensor | None:
    """Of the first side of ``cells``; used: bool (tiles, block), which of its tokens a tile has."""
    busy = whole.any(-1)
    if busy.all():  # so it mostly is, and nothing else needs to be looked at
        return None
    lengths = np.diff(bounds.cpu().numpy())
    tokens = np.zeros((*busy.shape, block), bool)
    tokens[busy] = True
    place = (~busy).nonzero()
    row, column = (cells[place] >= FIRST_TILE).nonzero()
    if len(row):
        b, h, i = (x[row] for x in place)
        np.logical_or.at(tokens, (b, h, i), used()[cells[b, h, i, column] - FIRST_TILE])
    there = np.arange(block) < lengths[:, None]
    found = ~tokens[..., there]
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
