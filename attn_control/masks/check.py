"""What can be wrong with a BlockMask, found in this order, each said plainly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_control.errors import AttnControlError
from attn_control.masks import bits

if TYPE_CHECKING:
    from attn_control.masks.block import BlockMask


class TileError(AttnControlError):
    """Bit tiles of key blocks that are no multiple of ``unit`` tokens, the bits of a word."""

    unit = 32


def shapes(mask: BlockMask) -> None:
    """Cheap, for every mask that is made: nothing of what the lists hold is read."""
    if len(mask.pool) and mask.k_block % TileError.unit:
        raise TileError(
            f"BlockMask: k_block={mask.k_block} has to be a multiple of {TileError.unit} to have"
            " bit tiles"
        )
    lists = *mask.index.shape[:2], mask.q_blocks
    expected = {
        "count": lists,
        "index": (*lists, mask.index.shape[-1]),
        "tile": mask.index.shape,
        "pool": (len(mask.pool), mask.q_block, bits.words(mask.k_block)),
    }
    for name, shape in expected.items():
        given = getattr(mask, name)
        if given.shape != shape or given.dtype != torch.int32:
            raise AttnControlError(
                f"BlockMask: {name} has to be int32 {tuple(shape)}, "
                f"not {str(given.dtype).removeprefix('torch.')} {tuple(given.shape)}"
            )
        if given.device != mask.count.device:
            raise AttnControlError(
                f"BlockMask: {name} is on {given.device}, count on {mask.count.device}"
            )


def validate(mask: BlockMask, *, rows: bool = True, own: bool = True) -> None:
    """Raise for lists that a kernel would misread, or that would leave a query without keys.

    Args:
        rows: whether every query has to read at least one key.
        own: whether every query block has to visit its own key block; asked only of masks with one
            grid on both sides.

    Raises:
        AttnControlError: names the fault and its first place.
    """
    _lists(mask)
    _tiles(mask)
    if rows:
        _rows(mask)
    if own and (mask.q_block, mask.q_regions) == (mask.k_block, mask.k_regions):
        diagonal = mask.cells().diagonal(dim1=-2, dim2=-1).eq(0)
        _refuse(mask, diagonal, "query block {2} does not visit its own key block")


def _refuse(mask: BlockMask, wrong: Tensor, what: str) -> None:
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        where = f"batch {place[0]}, head {place[1]}: "
        more = int(wrong.sum())
        rest = f" (and {more - 1} more)" if more > 1 else ""
        raise AttnControlError(f"BlockMask: {where}{what.format(*place)}{rest}")


def _lists(mask: BlockMask) -> None:
    most = mask.index.shape[-1]
    _refuse(
        mask,
        (mask.count < 0) | (mask.count > min(most, mask.k_blocks)),
        f"the count of query block {{2}} is not in 0..{min(most, mask.k_blocks)}",
    )
    listed = mask.listed
    _refuse(
        mask,
        listed & ((mask.index < 0) | (mask.index >= mask.k_blocks)),
        f"entry {{3}} of query block {{2}} is no key block in 0..{mask.k_blocks - 1}",
    )
    descends = mask.index.diff(dim=-1) <= 0
    _refuse(
        mask,
        listed[..., 1:] & descends,
        "key blocks of query block {2} are not strictly ascending after entry {3}",
    )
    _refuse(
        mask,
        listed & ((mask.tile < -1) | (mask.tile >= len(mask.pool))),
        f"entry {{3}} of query block {{2}} has a tile that is neither -1 nor in a pool of "
        f"{len(mask.pool)}",
    )


def _tiles(mask: BlockMask) -> None:
    if not len(mask.pool):
        return
    if len(bits.deduplicate(mask.pool)[0]) < len(mask.pool):
        raise AttnControlError("BlockMask: the pool holds a tile twice")
    # Extents of each tile: the farthest row and key that are on.
    extent = torch.zeros(len(mask.pool), 2, dtype=torch.int64, device=mask.device)
    for start in range(0, len(mask.pool), bits.CHUNK):
        pairs = bits.unpack(mask.pool[start : start + bits.CHUNK], mask.k_block)
        for axis, (other, length) in enumerate(((2, mask.q_block), (1, mask.k_block))):
            reach = torch.arange(1, length + 1, device=mask.device) * pairs.any(other)
            extent[start : start + bits.CHUNK, axis] = reach.amax(-1)
    number = mask.tile.clamp(min=0).long()
    partial = mask.listed & (mask.tile >= 0)
    rows = mask.q_bounds.long().diff()[:, None].expand(mask.index.shape)
    columns = mask.k_bounds.long().diff()[mask.index.long()]
    inside = bits.popcount(mask.pool)[number]
    _refuse(
        mask,
        partial & ((extent[number, 0] > rows) | (extent[number, 1] > columns)),
        "entry {3} of query block {2} has a tile with pairs past the end of its short block",
    )
    _refuse(mask, partial & (inside == 0), "entry {3} of query block {2} has a tile of zeros")
    _refuse(
        mask,
        partial & (inside == rows * columns),
        "entry {3} of query block {2} has a tile that is all on, which has to be listed as -1",
    )


def _rows(mask: BlockMask) -> None:
    """Every query has a key: looked up in tiles only where a row of blocks has no whole one."""
    _refuse(mask, mask.count == 0, "query block {2} reads no key block")
    listed = mask.listed
    doubtful = ~(listed & (mask.tile < 0)).any(-1)
    reads = mask.pool.ne(0).any(-1)  # (tiles, q_block)
    rows = mask.q_bounds.diff().tolist()
    for b, h, row in doubtful.nonzero().tolist():
        tiles = mask.tile[b, h, row][listed[b, h, row]].long()
        empty = ~reads[tiles].any(0)[: rows[row]]
        if empty.any():
            token = int(mask.q_bounds[row]) + int(empty.nonzero()[0])
            raise AttnControlError(
                f"BlockMask: batch {b}, head {h}: query token {token} reads no key"
            )
