"""TileAttention: every query reads whole tiles around its own (Sliding Tile Attention, arXiv
2502.04507).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from attn_control.errors import AttnControlError
from attn_control.kernels.pieces import Piece
from attn_control.kernels.sparse import Fixed, Pattern
from attn_control.masks.block import BlockMask
from attn_control.masks.place import Place
from attn_control.masks.solve import densest
from attn_control.masks.tiles import tiles_mask
from attn_control.processors.sparse import (
    QUARTER,
    SparseControl,
    along,
    sizes,
    target,
    unmasked,
    values,
)


@dataclass(frozen=True)
class TileAttention(SparseControl):
    """Let a query read the tiles around its own, whole; every tile is one block, so that nothing is
    computed in vain.

    Args:
        tiles: how many along each axis, (frames, height, width) or one for all; the
            window moves inwards at the borders.
        tile: in tokens along each axis; None: as near to a cube as ``block`` tokens allow.
        target_density: instead of ``tiles``: the largest window, in proportion to the number of
            tiles, that computes at most this share of all pairs. Without either: a quarter.

    Raises:
        AttnControlError: a value out of range; a tile and a block that do not agree.
    """

    tiles: int | tuple[int, ...] | None = None
    tile: int | tuple[int, ...] | None = field(default=None, kw_only=True)
    target_density: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tiles", "tile"):
            given = sizes(self.owner, name, getattr(self, name), 1, optional=True)
            object.__setattr__(self, name, given)
        target(self.owner, self.target_density, "tiles", self.tiles)
        if self.tile is not None and self.block is not None:
            raise AttnControlError(
                f"{self.owner}: a tile is a block: give tile={self.tile!r} or block={self.block},"
                " not both"
            )

    def pattern(self, place: Place, device: torch.device) -> Pattern:
        if self.tile is None:
            block = place.block(self.block)
            tile = place.box(block)
        else:
            tile = along(self, "tile", self.tile, place)
            # Bit tiles, which ragged borders may have, are of words of 32 keys.
            block = -(-math.prod(tile) // 32) * 32
        grid = place.grid(block, tile)
        counts = [-(-n // t) for n, t in zip(place.spatial, tile, strict=True)]
        if self.tiles is not None:
            given = [n for n, _ in values(self, "tiles", self.tiles, place)]
            mask = self._mask(grid, [min(w, n) for w, n in zip(given, counts, strict=True)])
        else:
            most = max(counts)
            _, mask = densest(
                str(self),
                lambda size: self._mask(grid, [max(1, round(n * size / most)) for n in counts]),
                most,
                self.target_density or QUARTER,
            )
        return Fixed((Piece.on(grid, unmasked(mask), device),))

    @staticmethod
    def _mask(grid: object, window: list[int]) -> BlockMask:
        return tiles_mask(grid, window)  # type: ignore[arg-type]
