"""Where blocks begin and end: the grid of blocks restarts at each region of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from attn_control.errors import AttnControlError


@lru_cache(maxsize=256)
def _bounds(regions: tuple[int, ...], block: int) -> np.ndarray:
    edges, start = [0], 0
    for length in regions:
        edges += [*range(start + block, start + length, block), start + length]
        start += length
    found = np.array(edges, dtype=np.int32)
    found.flags.writeable = False  # it is shared by whoever asks again
    return found


def bounds_of(regions: Sequence[int], block: int) -> np.ndarray:
    """int32 (blocks + 1,): block b covers tokens [bounds[b], bounds[b + 1]). Read-only."""
    return _bounds(tuple(regions), block)


def check_regions(owner: str, side: str, regions: Sequence[int], block: int) -> tuple[int, ...]:
    """The regions as a tuple, or an error that says which of them cannot be."""
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise AttnControlError(f"{owner}: {side}_block={block!r} has to be a positive int")
    given = tuple(regions)
    if not given or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in given):
        raise AttnControlError(
            f"{owner}: {side}_regions={given!r} have to be positive lengths in tokens"
        )
    return given
