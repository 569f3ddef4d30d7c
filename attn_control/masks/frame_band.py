"""A band in every pair of frames: keys at nearly the same place of any frame, in raster order.

The "multi-diagonal" mask that Re-ttention (arXiv 2505.22918) uses for video, with text on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from attn_control.errors import AttnControlError
from attn_control.masks import relations
from attn_control.masks.block import BlockMask
from attn_control.masks.grid import Grid
from attn_control.masks.products import product
from attn_control.masks.say import at_least


def frame_band_mask(shape: Grid | Sequence[int], reach: int) -> BlockMask:
    """Keys of all frames whose place within the frame is at most ``reach`` tokens away.

    Args:
        shape: (frames, ...); a shape of two axes is taken as frames of one row.
        reach: in tokens of a frame's raster; Re-ttention takes 42 of CogVideoX's 1350, halved.

    Raises:
        AttnControlError: a single axis, or a negative reach.
    """
    grid = Grid.of(shape)
    if len(grid.shape) < 2:
        raise AttnControlError(f"frame_band_mask: shape={grid.shape} has no frames, only one axis")
    at_least("frame_band_mask", "reach", reach, 0)
    inner = tuple(range(1, len(grid.shape)))
    return product(grid, {inner: relations.within(math.prod(grid.shape[1:]), reach)})


def main() -> None:
    from attn_control.masks.draw import command

    command(__doc__, lambda grid: frame_band_mask(grid, grid.tokens // grid.shape[0] // 16))


if __name__ == "__main__":
    main()
