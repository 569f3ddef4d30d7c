"""Distances that are powers of two: any token is reached in a number of layers that is logarithmic
in its distance (PowerAttention, arXiv 2503.03588; here on both sides, and on each axis).
"""

from __future__ import annotations

from collections.abc import Sequence

from attn_control.errors import AttnControlError
from attn_control.masks import relations
from attn_control.masks.block import BlockMask
from attn_control.masks.grid import Grid
from attn_control.masks.products import product
from attn_control.masks.say import at_least, each


def power_of_two_mask(
    shape: Grid | Sequence[int],
    *,
    axes: Sequence[int] | None = None,
    unit: int | Sequence[int] = 1,
    near: int | Sequence[int] = 1,
) -> BlockMask:
    """Keys whose distance, along every one of ``axes``, is 0, 1, 2, 4, 8, ... units, or at most
    ``near``; other axes are free.

    PowerAttention itself is ``power_of_two_mask((tokens,), unit=block, near=5) | sink``: distances
    are counted in blocks, and every visited block is on as a whole.

    Args:
        shape: tokens along each axis, or a `Grid`.
        axes: left out, all.
        unit: tokens that are one place, one or one an axis.
        near: in units, one or one an axis.

    Raises:
        AttnControlError: an axis that there is not, a unit below 1, a negative ``near``.
    """
    grid = Grid.of(shape)
    count = len(grid.shape)
    chosen = range(count) if axes is None else axes
    if not chosen or any(axis not in range(count) for axis in chosen):
        raise AttnControlError(f"power_of_two_mask: axes={axes!r} are not of 0..{count - 1}")
    units = each("power_of_two_mask", "unit", unit, count)
    nears = each("power_of_two_mask", "near", near, count)
    for axis in chosen:
        at_least("power_of_two_mask", "unit", units[axis], 1)
        at_least("power_of_two_mask", "near", nears[axis], 0)
    return product(grid, {a: relations.powers(grid.shape[a], units[a], nears[a]) for a in chosen})


def main() -> None:
    from attn_control.masks.draw import command

    command(__doc__, power_of_two_mask)


if __name__ == "__main__":
    main()
