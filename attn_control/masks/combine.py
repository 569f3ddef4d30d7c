"""Masks from masks: union, intersection, transpose, coarser blocks, one mask a head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_control.errors import AttnControlError
from attn_control.masks import bits
from attn_control.masks.block import FIRST_TILE, OFF, WHOLE, BlockMask
from attn_control.masks.bounds import bounds_of
from attn_control.masks.settle import settle


def union(a: BlockMask, b: BlockMask) -> BlockMask:
    """Pairs that are on in either, exactly."""
    return _merge(a, b, either=True)


def intersection(a: BlockMask, b: BlockMask) -> BlockMask:
    """Pairs that are on in both, exactly."""
    return _merge(a, b, either=False)


def _merge(a: BlockMask, b: BlockMask, either: bool) -> BlockMask:
    grid = _one_grid("|" if either else "&", [a, b])
    for what in ("batch", "heads"):
        sizes = getattr(a, what), getattr(b, what)
        if min(sizes) != 1 and sizes[0] != sizes[1]:
            raise AttnControlError(f"BlockMask: {what} {sizes[0]} and {sizes[1]} do not combine")
    return settle(*merge(a.cells(), a.pool, b.cells(), b.pool, either), **grid)


def merge(
    x: Tensor, x_tiles: Tensor, y: Tensor, y_tiles: Tensor, either: bool
) -> tuple[Tensor, Tensor]:
    """Cells and tiles of a union, or an intersection, of cells that broadcast; not yet settled."""
    x, y = torch.broadcast_tensors(x, y)
    # Of a cell that is off and any other, | takes the other and & takes off; whole likewise.
    takes, yields = (WHOLE, OFF) if either else (OFF, WHOLE)
    tiles = torch.cat([x_tiles, y_tiles])
    cells = torch.where(x == yields, torch.where(y >= FIRST_TILE, y + len(x_tiles), y), x)
    cells[(x == takes) | (y == takes)] = takes
    place = ((x >= FIRST_TILE) & (y >= FIRST_TILE)).nonzero(as_tuple=True)
    if len(place[0]):
        span = len(y_tiles)
        keys = (x[place].long() - FIRST_TILE) * span + y[place] - FIRST_TILE
        pairs, number = torch.unique(keys, return_inverse=True)
        left, right = x_tiles[pairs // span], y_tiles[pairs % span]
        cells[place] = (number + len(tiles) + FIRST_TILE).int()
        tiles = torch.cat([tiles, left | right if either else left & right])
    return cells, tiles


def transpose(mask: BlockMask) -> BlockMask:
    """Keys become queries."""
    return BlockMask.from_cells(
        mask.cells().mT,
        bits.transposed(mask.pool, mask.k_block) if len(mask.pool) else None,
        q_block=mask.k_block,
        k_block=mask.q_block,
        q_regions=mask.k_regions,
        k_regions=mask.q_regions,
    )


def coarsen(mask: BlockMask, q: int, k: int) -> BlockMask:
    """Whole blocks, on where any block within is visited; blocks still straddle no region."""
    for name, factor in (("q", q), ("k", k)):
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise AttnControlError(f"BlockMask.coarsen: {name}={factor!r} has to be a positive int")
    visits = mask.cells().ne(OFF).int()
    sides = (
        (3, mask.k_regions, mask.k_block, k),
        (2, mask.q_regions, mask.q_block, q),
    )
    for dim, regions, block, factor in sides:
        fine, coarse = bounds_of(regions, block), bounds_of(regions, block * factor)
        home = torch.tensor(coarse.searchsorted(fine[:-1], side="right") - 1, device=mask.device)
        shape = [*visits.shape]
        shape[dim] = len(coarse) - 1
        visits = visits.new_zeros(shape).index_add_(dim, home, visits)
    return BlockMask.from_cells(
        visits.ne(0).int(),
        q_block=mask.q_block * q,
        k_block=mask.k_block * k,
        q_regions=mask.q_regions,
        k_regions=mask.k_regions,
    )


def per_head(masks: Sequence[BlockMask]) -> BlockMask:
    """One mask for each head, in order: masks of several heads bring all of theirs.

    Raises:
        AttnControlError: no mask, grids that differ, or batches that do not broadcast.
    """
    if not masks:
        raise AttnControlError("per_head: give at least one mask")
    grid = _one_grid("per_head", masks)
    batch = {mask.batch for mask in masks} - {1}
    if len(batch) > 1:
        raise AttnControlError(f"per_head: batches {sorted(batch)} do not combine")
    size = batch.pop() if batch else 1
    most = max(mask.index.shape[-1] for mask in masks)
    pool, number = bits.deduplicate(torch.cat([mask.pool for mask in masks]))
    lists, before = [], 0
    for mask in masks:
        renumbered = number[before : before + len(mask.pool)].int()
        before += len(mask.pool)
        tile = mask.tile
        if len(renumbered):
            tile = torch.where(tile < 0, tile, renumbered[tile.clamp(min=0).long()])
        wide = [_widened(mask.index, most, 0), _widened(tile, most, -1)]
        lists.append([x.expand(size, *x.shape[1:]) for x in (mask.count, *wide)])
    count, index, tile = (torch.cat(parts, 1) for parts in zip(*lists, strict=True))
    return BlockMask(**grid, count=count, index=index, tile=tile, pool=pool)


def _widened(lists: Tensor, most: int, filler: int) -> Tensor:
    short = most - lists.shape[-1]
    return torch.cat([lists, lists.new_full((*lists.shape[:-1], short), filler)], -1)


def _one_grid(what: str, masks: Sequence[BlockMask]) -> dict:
    """The common grid of blocks, or an error that shows two that differ."""
    first = masks[0]
    for other in masks[1:]:
        if other.device != first.device:
            raise AttnControlError(
                f"BlockMask: {what} of masks on {first.device} and {other.device}"
            )
        for side in "qk":
            sizes = [getattr(mask, f"{side}_block") for mask in (first, other)]
            edges = [getattr(mask, f"{side}_bounds") for mask in (first, other)]
            if sizes[0] != sizes[1] or not torch.equal(*edges):
                raise AttnControlError(
                    f"BlockMask: {what} needs one grid of blocks, not {side} regions "
                    f"{_brief(first, side)} and {_brief(other, side)}; regrid() one of them"
                )
    return first.grid


def _brief(mask: BlockMask, side: str) -> str:
    runs, block = getattr(mask, f"{side}_regions"), getattr(mask, f"{side}_block")
    shown = ", ".join(map(str, runs[:4])) + (", ..." if len(runs) > 4 else "")
    return f"({shown}) of {sum(runs)} tokens in blocks of {block}"
