"""Neighborhood attention: every query reads the keys around it (NATTEN; Generalized Neighborhood
Attention, arXiv 2504.16922).
"""

from __future__ import annotations

from collections.abc import Sequence

from attn_control.masks import relations
from attn_control.masks.block import BlockMask
from attn_control.masks.grid import Grid
from attn_control.masks.products import product
from attn_control.masks.say import each


def neighborhood_mask(
    shape: Grid | Sequence[int],
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> BlockMask:
    """As NATTEN defines it, on 1 to 3 axes; every argument is one value or one an axis.

    Args:
        shape: tokens along each axis, or a `Grid` that says how they are ordered and cut.
        kernel_size: keys that a query reads along an axis: exactly so many, also at the borders.
        stride: neighbouring queries that share the window of the one in their middle.
        dilation: distance between neighbours; the axis falls apart into so many groups.
        is_causal: whether a query reads no key that comes after it along the axis.

    Raises:
        AttnControlError: what NATTEN refuses: a kernel below 2 or, dilated, longer than the axis; a
            stride above the kernel.

    >>> mask = neighborhood_mask((30, 52), kernel_size=(9, 13))
    >>> round(mask.density() * 30 * 52)
    117
    """
    grid = Grid.of(shape)
    axes = len(grid.shape)
    kernels = each("neighborhood_mask", "kernel_size", kernel_size, axes)
    strides = each("neighborhood_mask", "stride", stride, axes)
    dilations = each("neighborhood_mask", "dilation", dilation, axes)
    causal = each("neighborhood_mask", "is_causal", is_causal, axes, bool)
    given = {}
    for axis, places in enumerate(grid.shape):
        relations.check_natten(
            "neighborhood_mask", places, kernels[axis], strides[axis], dilations[axis], axis
        )
        given[axis] = relations.natten(
            places, kernels[axis], strides[axis], dilations[axis], causal[axis]
        )
    return product(grid, given)


def main() -> None:
    from attn_control.masks.draw import command

    command(__doc__, lambda grid: neighborhood_mask(grid, [min(n, 7) for n in grid.shape]))


if __name__ == "__main__":
    main()
