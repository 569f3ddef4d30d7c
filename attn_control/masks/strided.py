"""Anchors: a coarse raster of keys that every query reads (the strided half of Sparse Transformers,
arXiv 1904.10509). No query need be on it: add what is near with ``|``.
"""

from __future__ import annotations

from collections.abc import Sequence

from attn_control.masks import relations
from attn_control.masks.block import BlockMask
from attn_control.masks.grid import Grid
from attn_control.masks.products import product
from attn_control.masks.say import at_least, each


def strided_mask(
    shape: Grid | Sequence[int], step: int | Sequence[int], *, offset: int | Sequence[int] = 0
) -> BlockMask:
    """Keys at offset, offset + step, ... along every axis.

    Args:
        shape: tokens along each axis, or a `Grid`.
        step: one or one an axis; 1 takes every place.
        offset: one or one an axis, taken modulo the step.

    Raises:
        AttnControlError: a step below 1, a negative offset, or one past the end of its axis.
    """
    grid = Grid.of(shape)
    steps = each("strided_mask", "step", step, len(grid.shape))
    offsets = each("strided_mask", "offset", offset, len(grid.shape))
    for axis, places in enumerate(grid.shape):
        at_least("strided_mask", "step", steps[axis], 1)
        at_least("strided_mask", "offset", offsets[axis], 0)
        at_least("strided_mask", f"axis {axis}, for its first anchor,", places, offsets[axis] + 1)
    return product(
        grid,
        {
            axis: relations.anchors(places, steps[axis], offsets[axis])
            for axis, places in enumerate(grid.shape)
            if steps[axis] > 1
        },
    )


def main() -> None:
    from attn_control.masks.draw import command

    command(__doc__, lambda grid: strided_mask(grid, 4))


if __name__ == "__main__":
    main()
