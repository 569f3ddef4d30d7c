"""Crosses: keys that differ from the query along one axis only (criss-cross attention, arXiv
1811.11721, as axial attention, arXiv 1912.12180).
"""

from __future__ import annotations

from collections.abc import Sequence

from attn_control.errors import AttnControlError
from attn_control.masks import relations
from attn_control.masks.block import BlockMask
from attn_control.masks.grid import Grid
from attn_control.masks.products import union_of_products


def cross_mask(
    shape: Grid | Sequence[int], free: Sequence[Sequence[int]] | None = None
) -> BlockMask:
    """The union, over the sets of axes in ``free``, of keys that differ along those axes only.

    Args:
        shape: tokens along each axis, or a `Grid`.
        free: left out, each axis by itself: a query's row and its column, and in a video its place
            in all frames. ``[(1, 2), (0,)]`` is a query's frame, and its place in all frames.

    Raises:
        AttnControlError: an axis that there is not.
    """
    grid = Grid.of(shape)
    axes = range(len(grid.shape))
    sets = [(axis,) for axis in axes] if free is None else [tuple(given) for given in free]
    if not sets or any(axis not in axes for given in sets for axis in given):
        raise AttnControlError(
            f"cross_mask: free={free!r} has to name sets of the axes 0..{len(axes) - 1}"
        )
    arms = [
        {a: relations.within(grid.shape[a], 0) for a in axes if a not in given} for given in sets
    ]
    return union_of_products(grid, arms)


def main() -> None:
    from attn_control.masks.draw import command

    command(__doc__, cross_mask)


if __name__ == "__main__":
    main()
