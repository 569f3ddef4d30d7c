"""The largest size of a pattern whose mask costs no more than asked."""

from __future__ import annotations

from collections.abc import Callable

from attn_control.errors import AttnControlError
from attn_control.masks.block import BlockMask


def densest(
    who: str, make: Callable[[int], BlockMask], sizes: int, target: float
) -> tuple[int, BlockMask]:
    """A size in 1 .. ``sizes``, and its mask.

    Args:
        who: named in the error.
        make: from a size to a mask that visits no less for a larger size.
        target: largest share of pairs in visited blocks.

    Raises:
        AttnControlError: the smallest size visits more than that.
    """
    found = make(1)
    if found.visited_density() > target:
        raise AttnControlError(
            f"{who}: target_density={target:g} is out of reach for this geometry: the sparsest mask"
            f" computes {found.visited_density():.4f} of all pairs"
        )
    low, high = 1, sizes + 1  # low is sparse enough, high is not, or is no size
    while high - low > 1:
        middle = (low + high) // 2
        mask = make(middle)
        if mask.visited_density() <= target:
            low, found = middle, mask
        else:
            high = middle
    return low, found
