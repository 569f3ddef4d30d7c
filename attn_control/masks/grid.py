"""Grid: the tokens of one side of a mask, their order, and the blocks that they are cut into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from attn_control.errors import AttnControlError
from attn_control.masks.bounds import bounds_of
from attn_control.masks.say import at_least

NEARLY_WHOLE = 8
"""Blocks that a run of tokens has to fill before a block of its own for its rest, of 8 at worst one
that is nearly empty, costs less than the bit tiles of blocks that straddle two runs."""


@dataclass(frozen=True)
class Grid:
    """Tokens of a picture, a video or a sequence, and the text tokens before or after them.

    Args:
        shape: tokens along 1 to 3 axes, the last the fastest: (height, width), (frames, height,
            width).
        block: tokens a block.
        tile: extent of a tile, along as many axes. The tokens of a tile then lie together, tiles
            in raster order, each tile a block; those cut off by the border are shorter. None:
            raster order, as models have it.
        before, after: text tokens before and after, in blocks of their own.
        split: in raster order, at how many of the leading axes blocks begin anew at each place; 0
            cuts the whole sequence at one go, 1 frame by frame. None: as many as leave blocks full,
            or nearly so.

    Raises:
        AttnControlError: a size that is not a positive int, more axes than 3, a tile that is
            larger than a block, a split of tiled order or of the last axis.
    """

    shape: tuple[int, ...]
    block: int = 128
    tile: tuple[int, ...] | None = None
    before: int = 0
    after: int = 0
    split: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _sizes("shape", self.shape))
        if len(self.shape) > 3:
            raise AttnControlError(f"Grid: shape={self.shape} has more than 3 axes")
        for name, least in (("block", 1), ("before", 0), ("after", 0)):
            at_least("Grid", name, getattr(self, name), least)
        if self.split is not None and self.split not in range(len(self.shape)):
            raise AttnControlError(f"Grid: split={self.split!r} is not in 0..{len(self.shape) - 1}")
        if self.tile is None:
            return
        if self.split is not None:
            raise AttnControlError(f"Grid: split={self.split} has no meaning beside a tile")
        object.__setattr__(self, "tile", _sizes("tile", self.tile))
        if len(self.tile) != len(self.shape):
            raise AttnControlError(f"Grid: tile={self.tile} for a shape of {self.shape}")
        if math.prod(self.tile) > self.block:
            raise AttnControlError(
                f"Grid: tile={self.tile} has {math.prod(self.tile)} tokens, more than "
                f"block={self.block}"
            )

    @classmethod
    def of(cls, tokens: Grid | Sequence[int] | int, **changes: Any) -> Grid:
        """A grid as it is, or of a bare shape."""
        if isinstance(tokens, Grid):
            return replace(tokens, **changes) if changes else tokens
        return cls((tokens,) if isinstance(tokens, int) else tuple(tokens), **changes)

    @property
    def tokens(self) -> int:
        """Without the text."""
        return math.prod(self.shape)

    @property
    def length(self) -> int:
        """With the text."""
        return self.before + self.tokens + self.after

    @cached_property
    def runs(self) -> tuple[int, ...]:
        """Runs of spatial tokens at which blocks begin anew.

        In raster order these are the frames (or the rows of a picture) if they fill blocks, or
        nearly so: blocks of one frame are cut as those of any other, hence their bit tiles are the
        same ones.
        """
        if self.tile is not None:
            return _merged(self._tile_volumes(), self.block)
        split = self.split or 0
        for axis in range(1, len(self.shape)) if self.split is None else ():
            inner = math.prod(self.shape[axis:])
            if inner % self.block == 0 or inner >= NEARLY_WHOLE * self.block:
                split = axis
        return (math.prod(self.shape[split:]),) * math.prod(self.shape[:split])

    @cached_property
    def regions(self) -> tuple[int, ...]:
        """Of all tokens, as `BlockMask` takes them."""
        return tuple(n for n in (self.before, *self.runs, self.after) if n)

    @property
    def spatial(self) -> slice:
        """The blocks that hold no text."""
        first = -(-self.before // self.block)
        return slice(first, first + len(bounds_of(self.runs, self.block)) - 1)

    @property
    def blocks(self) -> int:
        return len(bounds_of(self.regions, self.block)) - 1

    def order(self) -> np.ndarray:
        """int64 (length,): for each slot the place of its token in raster order, text included."""
        spatial = self.before + self._raster
        text = np.arange(self.length)
        return np.concatenate([text[: self.before], spatial, text[self.length - self.after :]])

    def lengths(self) -> np.ndarray:
        """int32 (spatial blocks,): tokens of each."""
        return np.diff(bounds_of(self.runs, self.block))

    def coordinates(self, axes: tuple[int, ...]) -> np.ndarray:
        """int32 (spatial blocks, block): of each token its place along the axes, taken together in
        raster order. Short blocks repeat their last token.
        """
        edges = bounds_of(self.runs, self.block)
        slot = np.minimum(edges[:-1, None] + np.arange(self.block), edges[1:, None] - 1)
        place = self._raster[slot] if self.tile is not None else slot
        found = np.zeros_like(place)
        for axis in axes:
            inner = math.prod(self.shape[axis + 1 :])
            found = found * self.shape[axis] + place // inner % self.shape[axis]
        return found.astype(np.int32)

    def extent(self, axes: tuple[int, ...]) -> int:
        """Places along the axes, taken together."""
        return math.prod(self.shape[axis] for axis in axes)

    @cached_property
    def _raster(self) -> np.ndarray:
        """int64 (tokens,): for each slot the place of its token in raster order, without text."""
        place = np.arange(self.tokens)
        if self.tile is None:
            return place
        home, inside = np.zeros_like(place), np.zeros_like(place)
        for axis, (size, extent) in enumerate(zip(self.shape, self.tile, strict=True)):
            along = place // math.prod(self.shape[axis + 1 :]) % size
            home = home * -(-size // extent) + along // extent
            inside = inside * extent + along % extent
        return np.lexsort((inside, home))

    def _tile_volumes(self) -> list[int]:
        assert self.tile is not None
        volume = np.ones(1, dtype=np.int64)
        for size, extent in zip(self.shape, self.tile, strict=True):
            edges = np.minimum(np.arange(0, size + extent, extent), size)
            lengths = np.diff(edges)
            volume = np.outer(volume, lengths[lengths > 0]).ravel()
        return volume.tolist()


def _merged(lengths: list[int], block: int) -> tuple[int, ...]:
    """Neighbours that fill their blocks are one region: the same blocks, fewer numbers."""
    found: list[int] = []
    for length in lengths:
        if found and found[-1] % block == 0 and length == block:
            found[-1] += length
        else:
            found.append(length)
    return tuple(found)


def _sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    given = tuple(sizes) if isinstance(sizes, Sequence) else (sizes,)
    if not given or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in given):
        raise AttnControlError(f"Grid: {name}={sizes!r} has to be positive ints")
    return given
