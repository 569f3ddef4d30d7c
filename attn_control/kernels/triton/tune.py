"""Tile sizes, warps and pipeline stages by architecture: what fits registers and shared memory."""

from __future__ import annotations

from typing import NamedTuple

SMALLEST = 16
"""Rows, columns or features that tl.dot takes at least."""


class Tile(NamedTuple):
    """m: rows of a program; n: columns a step; warps; stages: loads in flight."""

    m: int
    n: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """One for each kernel. of_keys has keys as its rows."""

    forward: Tile
    of_queries: Tile
    of_keys: Tile


def wide(dim: int) -> int:
    """Features as the kernels hold them: a power of two."""
    return max(SMALLEST, 1 << (dim - 1).bit_length())


def tiles(dim: int, half: bool, hip: bool = False) -> Tiles:
    """For a head dim, before a mask's blocks have their say.

    half: inputs of 16 bits. With 32 bits there is twice as much to hold, and without tf32 no matrix
    unit to feed.
    """
    stages = 1 if hip else 2
    size = wide(dim)
    if not half:
        side = 32 if size <= 128 else 16
        return Tiles(*[Tile(side, side, 4, 1)] * 3)
    if size <= 64:
        backward = Tile(64, 64, 4, stages)
        return Tiles(Tile(128, 64, 8, 1 if hip else 3), backward, backward)
    if size == 128:
        backward = Tile(64, 32, 8, stages)
        return Tiles(Tile(128, 64, 8, stages), backward, backward)
    backward = Tile(32, 32, 8, 1)
    return Tiles(Tile(64, 32, 8, stages), backward, backward)


def side(block: int, most: int) -> int:
    """The side of a tile for a mask's blocks: the largest power of two that divides them, or, where
    that is small, the next one above them; ``most`` at most.
    """
    divisor = block & -block
    if divisor < 2 * SMALLEST:
        divisor = wide(block)
    return max(SMALLEST, min(most, divisor))
