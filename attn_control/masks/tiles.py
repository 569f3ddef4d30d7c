"""Windows of whole tiles: every query of a tile reads the same tiles around its own (Sliding Tile
Attention, arXiv 2502.04507).
"""

from __future__ import annotations

from collections.abc import Sequence

from attn_control.errors import AttnControlError
from attn_control.masks import relations
from attn_control.masks.block import BlockMask
from attn_control.masks.grid import Grid
from attn_control.masks.products import product
from attn_control.masks.say import at_least, each


def tiles_mask(
    shape: Grid | Sequence[int],
    window: int | Sequence[int],
    *,
    tile: int | Sequence[int] | None = None,
) -> BlockMask:
    """Tiles within ``window`` tiles around the query's own, moved inwards at the borders.

    In tiled order with this tile, every visited block is on as a whole.

    Args:
        shape: tokens along each axis, or a `Grid`.
        window: in tiles, one or one an axis; an even window leans to the left.
        tile: in tokens, one or one an axis; left out, the grid's own.

    Raises:
        AttnControlError: no tile given and none in the grid, or a size below 1.

    >>> tiled = Grid((8, 24, 32), block=128, tile=(4, 4, 8))
    >>> tiles_mask(tiled, (1, 3, 3)).is_fully_block_sparse()
    True
    """
    grid = Grid.of(shape)
    if tile is None and grid.tile is None:
        raise AttnControlError("tiles_mask: give tile=, or a Grid in tiled order")
    extents = each("tiles_mask", "tile", tile if tile is not None else grid.tile, len(grid.shape))
    windows = each("tiles_mask", "window", window, len(grid.shape))
    for name, sizes in (("tile", extents), ("window", windows)):
        for size in sizes:
            at_least("tiles_mask", name, size, 1)
    return product(
        grid,
        {
            axis: relations.tiles(places, extents[axis], windows[axis])
            for axis, places in enumerate(grid.shape)
        },
    )


def main() -> None:
    from attn_control.masks.draw import command

    command(__doc__, lambda grid: tiles_mask(grid, 3, tile=grid.tile or 4))


if __name__ == "__main__":
    main()
