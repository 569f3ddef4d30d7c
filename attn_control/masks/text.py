"""Text alone: which of its rows and columns are on. Other patterns leave text on; this one is what
is united with a mask that has it off (``product(..., text=False)``), or cuts it away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_control.errors import AttnControlError
from attn_control.masks.block import BlockMask
from attn_control.masks.grid import Grid


def text_mask(
    shape: Grid | Sequence[int],
    *,
    rows: bool = True,
    columns: bool = True,
    rest: bool = False,
) -> BlockMask:
    """Pairs of text tokens and others, in whole blocks.

    Args:
        shape: a `Grid` with text before or after.
        rows: whether text queries read all tokens, or the text alone.
        columns: whether all queries read the text, or text queries alone.
        rest: whether pairs without text are on. ``mask & text_mask(grid, rows=False, rest=True)``
            keeps text from reading the picture.

    Raises:
        AttnControlError: a grid without text.
    """
    grid = Grid.of(shape)
    if not grid.before + grid.after:
        raise AttnControlError(f"text_mask: {grid} has no text; give it before= or after=")
    text = torch.ones(grid.blocks, dtype=torch.bool)
    text[grid.spatial] = False
    table = torch.full((1, grid.blocks, grid.blocks), rest)
    table[:, text] = rows
    table[:, :, text] = columns
    table[:, text[:, None] & text] = True
    return BlockMask.from_table(table, block_size=grid.block, q_regions=grid.regions)


def main() -> None:
    from attn_control.masks.draw import command

    command(__doc__, lambda grid: text_mask(Grid.of(grid, after=grid.after or 2 * grid.block)))


if __name__ == "__main__":
    main()
