"""A band over all tokens in raster order: keys that come shortly before or after the query.

It knows nothing of rows and frames: on a picture it is a few rows high. DiTFastAttn (arXiv
2406.08552) and Re-ttention (arXiv 2505.22918) use it; as a baseline it is what a mask has to beat.
"""

from __future__ import annotations

from collections.abc import Sequence

from attn_control.masks import relations
from attn_control.masks.block import BlockMask
from attn_control.masks.grid import Grid
from attn_control.masks.products import product
from attn_control.masks.say import at_least


def band_mask(shape: Grid | Sequence[int], reach: int) -> BlockMask:
    """Keys at most ``reach`` tokens away, fewer at both ends.

    A published window of w tokens is a reach of w // 2; Re-ttention keeps 1/32 of N tokens in w.

    Raises:
        AttnControlError: a negative reach.

    >>> band_mask((64, 64), reach=64).density() < 0.032
    True
    """
    grid = Grid.of(shape)
    at_least("band_mask", "reach", reach, 0)
    return product(grid, {tuple(range(len(grid.shape))): relations.within(grid.tokens, reach)})


def main() -> None:
    from attn_control.masks.draw import command

    command(__doc__, lambda grid: band_mask(grid, grid.tokens // 32))


if __name__ == "__main__":
    main()
