"""Sinks: the first tokens, rows or frames, which every query reads (attention sinks: StreamingLLM,
arXiv 2309.17453; the first frame of a video: Radial Attention, arXiv 2506.19852).
"""

from __future__ import annotations

from collections.abc import Sequence

from attn_control.errors import AttnControlError
from attn_control.masks import relations
from attn_control.masks.block import BlockMask
from attn_control.masks.grid import Grid
from attn_control.masks.products import product
from attn_control.masks.say import at_least


def sink_mask(shape: Grid | Sequence[int], count: int = 1, *, axis: int = 0) -> BlockMask:
    """The first ``count`` places along an axis: of a video, by default, the first frame. Queries
    elsewhere do not read themselves: add what is near with ``|``.

    Raises:
        AttnControlError: an axis that there is not, or a count below 1.
    """
    grid = Grid.of(shape)
    if axis not in range(len(grid.shape)):
        raise AttnControlError(f"sink_mask: axis={axis!r} is not in 0..{len(grid.shape) - 1}")
    at_least("sink_mask", "count", count, 1)
    return product(grid, {axis: relations.first(grid.shape[axis], count)})


def main() -> None:
    from attn_control.masks.draw import command

    command(__doc__, sink_mask)


if __name__ == "__main__":
    main()
