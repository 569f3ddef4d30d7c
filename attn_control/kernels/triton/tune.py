"""Tile sizes, warps and pipeline stages by architecture: what fits registers and shared memory."""

from __future__ import annotations

from typing import NamedTuple

SMALLEST = 16
"""Rows, columns or features that tl.dot takes at least."""
BIASED = 32
"""Columns a step at most beside a mask of the model's own, whose piece a program holds, too."""
MOST = 255
"""Registers that a thread of NVIDIA's may have."""


class Tile(NamedTuple):
    """m: rows of a program; n: columns a step; warps; stages: loads in flight; registers: the most
    that a thread may take (NVIDIA's alone), 0 for what the assembler finds best: it may settle for
    few, and spill, where `MOST` would not.

    cut_stages, cut_registers: the same of the loop over cut tiles, and of a kernel that has it, 0
    for the same number: a mask's bits take registers, too.

    turned: a loop over whole tiles alone loads features by tokens, not tokens by features, where
    the product wants them so: AMD's compiler then reads them back by pairs.
    """

    m: int
    n: int
    warps: int
    stages: int
    registers: int = 0
    cut_stages: int = 0
    cut_registers: int = 0
    turned: bool = False


class Tiles(NamedTuple):
    """One for each kernel. of_keys has keys as its rows."""

    forward: Tile
    of_queries: Tile
    of_keys: Tile


def wide(dim: int) -> int:
    """Features as the kernels hold them: a power of two."""
    return max(SMALLEST, 1 << (dim - 1).bit_length())


# By what the matrix unit reads its operands from, and by the features held: the largest tiles
# that spill nothing and keep up with dense (`python -m attn_control.kernels.aot`), none timed yet.
REGISTERS = {
    32: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2, 128, cut_registers=120), Tile(128, 64, 8, 2)),
    64: Tiles(
        Tile(128, 64, 8, 3, 128, cut_registers=MOST),
        Tile(64, 32, 4, 2, 168),
        Tile(64, 32, 8, 2, MOST),
    ),
    128: Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2, 144), Tile(64, 32, 8, 2)),
    256: Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1, 136), Tile(32, 32, 8, 2)),
}
# With the shared memory for one program more, if registers allow it.
A100 = {
    32: Tiles(Tile(128, 32, 8, 2, 80), Tile(64, 64, 4, 2, 128), Tile(128, 32, 8, 2, 128)),
    64: REGISTERS[64]._replace(of_queries=Tile(64, 32, 4, 2, 128), of_keys=Tile(64, 32, 4, 2, 168)),
    128: REGISTERS[128]._replace(of_queries=Tile(64, 32, 8, 2, 128)),
    256: REGISTERS[256]._replace(of_queries=Tile(32, 32, 4, 1)),
}
# The same, but that code for sm_120 comes out with more registers.
CONSUMER_BLACKWELL = {
    32: Tiles(Tile(64, 64, 4, 2, 120, cut_registers=127), Tile(128, 32, 8, 2), Tile(128, 64, 8, 2)),
    64: Tiles(Tile(128, 32, 8, 2, 128), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
    128: Tiles(Tile(64, 32, 4, 1, 168), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
    256: REGISTERS[256]._replace(of_queries=Tile(32, 32, 16, 1)),
}
HOPPER = {
    32: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(128, 32, 8, 2)),
    64: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
    256: Tiles(Tile(64, 64, 8, 2), Tile(32, 64, 8, 1), Tile(32, 32, 8, 2)),
}
BLACKWELL = {
    32: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2, cut_stages=1)),
    64: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2, 168)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    256: REGISTERS[256]._replace(of_queries=Tile(64, 32, 8, 1)),
}
# One stage: more crash or are slower there.
AMD = {
    32: Tiles(Tile(128, 32, 8, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
    64: Tiles(Tile(128, 64, 8, 1), Tile(64, 64, 4, 1), Tile(128, 32, 8, 1)),
    128: Tiles(
        Tile(128, 64, 8, 1),
        Tile(64, 32, 8, 1, turned=True),
        Tile(64, 32, 8, 1, turned=True),
    ),
    256: Tiles(Tile(64, 32, 8, 1), Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
}

# Inputs of 32 bits: twice as much to hold, and without tf32 no matrix unit to feed.
WHOLE = {
    32: Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    64: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 8, 1)),
    128: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1, 128), Tile(32, 32, 8, 1, MOST)),
    256: Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1, 128)),
}
AMD_WHOLE = {
    32: WHOLE[32],
    64: WHOLE[64],
    128: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 4, 1), Tile(32, 16, 8, 1)),
    256: Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}


def tiles(dim: int, half: bool, target: str, biased: bool = False) -> Tiles:
    """For a head dim, before a mask's blocks have their say.

    half: inputs of 16 bits.
    target: "sm_80" and so on, or AMD's "gfx942".
    biased: whether there is a mask of the model's own.
    """
    if not half:
        return (AMD_WHOLE if target.startswith("gfx") else WHOLE)[max(32, wide(dim))]
    if target.startswith("gfx"):
        table = AMD
    elif target in ("sm_100", "sm_103"):
        table = BLACKWELL
    elif target == "sm_90":
        table = HOPPER
    elif target in ("sm_120", "sm_121"):
        table = CONSUMER_BLACKWELL
    else:
        table = A100 if target == "sm_80" else REGISTERS
    found = table[max(32, wide(dim))]
    if biased:
        halved = ["forward", "of_queries"] if wide(dim) > 64 else []
        if table is CONSUMER_BLACKWELL:
            halved = list(Tiles._fields)
        found = Tiles(
            *(
                tile._replace(m=tile.m // (2 if name in halved else 1), n=min(tile.n, BIASED))
                for name, tile in zip(Tiles._fields, found, strict=True)
            )
        )
    return found


def side(block: int, most: int) -> int:
    """The side of a tile for a mask's blocks: the largest power of two that divides them, or, where
    that is small, the next one above them; ``most`` at most.
    """
    divisor = block & -block
    if divisor < 2 * SMALLEST:
        divisor = wide(block)
    return max(SMALLEST, min(most, divisor))
