"""A model of time, not a measurement: what a kernel's loop could take at best on a chip.

The loop of a compiled kernel is read from its binary; what it does is set against the datasheet:
matrix products, instructions to issue, exponentials, and memory to read once. The slowest of them
bounds it, and all else is taken to overlap. Latency, caches and clocks under load are left out, so
real kernels are slower, by a factor that only `make gpu-report` can tell.
"""

from __future__ import annotations

from typing import NamedTuple

from attn_control.kernels.chips import Chip

PRODUCTS = {"forward": 2, "of_queries": 3, "of_keys": 4}
"""Matrix products of a tile."""
TENSORS = {"forward": 4, "of_queries": 5, "of_keys": 6}
"""Of tokens by head dim, read or written."""


class Loop(NamedTuple):
    """One kernel's innermost loop. m, n: its tile; wide: the head dim that it holds; warps and
    instructions: of a program, the latter of one warp in one pass, that is, of one tile.
    """

    kernel: str
    m: int
    n: int
    wide: int
    warps: int
    instructions: int


def cycles(chip: Chip, loop: Loop, precision: str) -> dict[str, float]:
    """Of a multiprocessor, a pass of the loop takes at least so many for each of its resources."""
    operations = PRODUCTS[loop.kernel] * 2 * loop.m * loop.n * loop.wide
    return {
        "matrix": operations / chip.a_cycle(precision),
        "issue": loop.instructions * loop.warps / chip.issue,
        "exp": loop.m * loop.n / chip.exponents,
    }


def seconds(
    chip: Chip,
    loop: Loop,
    precision: str,
    *,
    heads: int,
    tokens: int,
    dim: int,
    density: float = 1.0,
) -> tuple[float, str]:
    """Of one call over ``heads`` (of all batch rows), and what bounds it."""
    each = cycles(chip, loop, precision)
    passes = heads * density * tokens / loop.m * tokens / loop.n
    rate = chip.multiprocessors * chip.clock * 1e9
    size = 2 if precision == "half" else 4
    taken = {name: passes * count / rate for name, count in each.items()}
    moved = TENSORS[loop.kernel] * heads * tokens * dim * size
    taken["memory"] = moved / (chip.bandwidth * 1e9)
    bound = max(taken, key=lambda name: taken[name])
    return taken[bound], bound
