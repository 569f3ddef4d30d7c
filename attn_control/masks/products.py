"""Masks that are products: a pair is on if it is on along every axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_control.errors import AttnControlError
from attn_control.masks.along import Along, along, packed
from attn_control.masks.block import FIRST_TILE, OFF, WHOLE, BlockMask
from attn_control.masks.combine import merge
from attn_control.masks.grid import Grid
from attn_control.masks.relations import Relation
from attn_control.masks.settle import settle

DIRECT = 1 << 22
"""Combinations of tiles up to which a flag for each is quicker than sorting those that occur."""


def product(
    grid: Grid,
    relations: Mapping[Any, Relation],
    *,
    k_grid: Grid | None = None,
    text: bool = True,
) -> BlockMask:
    """The exact mask of a product, from one relation an axis: blocks are visited where every axis
    visits them and whole where every axis fills them; the rest are bit tiles.

    Args:
        grid: of the queries.
        relations: by axis (0, 1, ...), or by a tuple of axes taken together in raster order. Axes
            that are not named leave every pair on.
        k_grid: of the keys, where it is another.
        text: whether text tokens read and are read by all; else they are off.

    Raises:
        AttnControlError: a relation whose places are not those of its axes.
    """
    keys = grid if k_grid is None else k_grid
    return _settled(grid, keys, *_cells(grid, keys, relations, text))


def union_of_products(
    grid: Grid, terms: Sequence[Mapping[Any, Relation]], *, text: bool = True
) -> BlockMask:
    """The same as ``|`` of a `product` of each, in fewer passes."""
    cells, tiles = _cells(grid, grid, terms[0], text)
    for relations in terms[1:]:
        cells, tiles = merge(cells, tiles, *_cells(grid, grid, relations, text), either=True)
    return _settled(grid, grid, cells, tiles)


def _settled(grid: Grid, keys: Grid, cells: Tensor, tiles: Tensor) -> BlockMask:
    return settle(
        cells,
        tiles,
        q_block=grid.block,
        k_block=keys.block,
        q_regions=grid.regions,
        k_regions=keys.regions,
    )


def _cells(
    grid: Grid, keys: Grid, relations: Mapping[Any, Relation], text: bool
) -> tuple[Tensor, Tensor]:
    """Of all blocks, and the tiles that they refer to."""
    found = []
    for given, relation in relations.items():
        axes = (given,) if isinstance(given, int) else given
        places = grid.extent(axes), keys.extent(axes)
        if places != (relation.queries, relation.keys):
            raise AttnControlError(
                f"product: the relation of axes {axes} is of {relation.queries} x {relation.keys} "
                f"places, the grids have {places[0]} x {places[1]}"
            )
        q_places = grid.coordinates(axes)
        found.append(
            along(relation, q_places, q_places if keys is grid else keys.coordinates(axes))
        )
    inner, tiles = _joined(grid, keys, found)
    cells = np.full((1, 1, grid.blocks, keys.blocks), WHOLE if text else OFF, np.int32)
    cells[0, 0, grid.spatial, keys.spatial] = inner
    return torch.from_numpy(cells), torch.from_numpy(tiles.view(np.int32))


def _joined(grid: Grid, keys: Grid, found: list[Along]) -> tuple[np.ndarray, np.ndarray]:
    """int32 (spatial blocks, spatial blocks) of cells, and the tiles that they refer to."""
    # Which tile a pair of blocks has depends on its code along each axis and on its two lengths.
    q_lengths, q_length = np.unique(grid.lengths(), return_inverse=True)
    k_lengths, k_length = np.unique(keys.lengths(), return_inverse=True)
    sizes = [len(q_lengths), len(k_lengths), *(2 + len(a.tiles) for a in found)]
    total = np.prod(sizes, dtype=np.float64)
    number = q_length[:, None] * sizes[1] + k_length
    number = number.astype(np.int32 if total < 1 << 31 else np.int64)
    off = np.zeros(number.shape, bool)
    partial = np.zeros_like(off)
    for axis, size in zip(found, sizes[2:], strict=True):
        codes = axis.codes.take(axis.q, 0).take(axis.k, 1)
        off |= codes == OFF
        partial |= codes >= FIRST_TILE
        number *= size
        number += codes
    partial &= ~off
    occurring = number[partial]
    if total <= DIRECT:
        flags = np.zeros(int(total), bool)
        flags[occurring] = True
        distinct = np.flatnonzero(flags)
        rank = (np.cumsum(flags, dtype=np.int32) - 1)[occurring]
    else:
        distinct, rank = np.unique(occurring, return_inverse=True)
    cells = (~off).astype(np.int32)  # OFF is 0, WHOLE is 1
    cells[partial] = FIRST_TILE + rank
    parts = np.unravel_index(distinct, sizes)
    row = np.arange(grid.block) < q_lengths[parts[0]][:, None]
    column = packed(np.arange(keys.block) < k_lengths[parts[1]][:, None])
    tiles = row[:, :, None] * column[:, None, :]
    for axis, code in zip(found, parts[2:], strict=True):
        inside = code >= FIRST_TILE
        tiles[inside] &= axis.tiles[code[inside] - FIRST_TILE]
    return cells, tiles
