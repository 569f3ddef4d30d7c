"""Boxes around the queries of a grid, and the attention weights that lie inside them.

At the border a box is moved inwards instead of cut, as NATTEN does (arXiv 2204.07143), so that
every query has equally many keys in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Grid = tuple[int, int, int]

QUARTER = 0.25
SHAPES = {"spatial": (1, 2), "temporal": (0,), "cube": (0, 1, 2)}
"""The axes of (frames, height, width) along which a box is a window; it is whole along others."""


def boxes_of(grid: Grid) -> dict[str, Grid]:
    """Sides of the boxes on a grid, the same share of every windowed axis, rounded down.

    A shape that a grid has no room for (frames of a picture, or of three) is left out, and so is
    one that comes out as another does.
    """
    found: dict[str, Grid] = {}
    for name, axes in SHAPES.items():
        windowed = [axis for axis in axes if grid[axis] > 1]
        if not windowed:
            continue
        share = QUARTER ** (1 / len(windowed))
        frames, height, width = (
            max(1, int(n * share)) if axis in windowed else n for axis, n in enumerate(grid)
        )
        sides = (frames, height, width)
        if math.prod(sides) <= QUARTER * math.prod(grid) and sides not in found.values():
            found[name] = sides
    return found


def windows(n: int, side: int) -> Tensor:
    """Which of n keys each of n queries has in its window: float32 (n, n) of 0 and 1.

    Every row holds `side` ones around its own place, moved inwards at the border.
    """
    keys = torch.arange(n)
    first = (keys - side // 2).clamp(0, n - side)[:, None]
    return ((keys >= first) & (keys < first + side)).float()


def mass_inside(weights: Tensor, queries: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """The weights inside each query's boxes.

    weights: (queries, keys of the grid); queries: int64 (queries,), places on the grid in its
        order; tables: for each axis float (n, n, boxes), as from `windows`.
    Returns (queries, boxes). One axis is summed after the other: no mask of queries by keys.
    """
    frames, height, width = (len(table) for table in tables)
    own = (queries // (height * width), queries // width % height, queries % width)
    at_frames, at_rows, at_columns = (t[at] for t, at in zip(tables, own, strict=True))
    lines = weights.reshape(len(queries), frames * height, width) @ at_columns
    planes = lines.reshape(len(queries), frames, height, -1) * at_rows[:, None]
    return (planes.sum(2) * at_frames).sum(1)
