"""The fixed grid of `sparse_cpu.py`: which masks, at which lengths and densities, and their bars.

It is decided before anything is measured: every cell of it is published.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from attn_control.errors import AttnControlError
from attn_control.masks import (
    BlockMask,
    Grid,
    band_mask,
    neighborhood_mask,
    radial_block_mask,
    tiles_mask,
)

VIDEOS = {  # tokens: frames, height, width
    2048: (8, 16, 16),
    4096: (16, 16, 16),
    8192: (8, 32, 32),
    16384: (16, 32, 32),
    32768: (32, 32, 32),
}
FRAMES = (64, 128, 256, 512, 1024)
"""Tokens of a frame for Radial Attention, which gets sparse only over many frames."""
TILE = (2, 8, 8)
BLOCK, DIM = 128, 64
HEADS = {2048: 8, 4096: 4, 8192: 4, 16384: 2, 32768: 2}
DENSITIES = (0.0625, 0.125, 0.25, 0.5)
KINDS = ("band", "block band", "radial", "neighbourhood", "tiles", "random")
HIGH = (0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Densities at which only ``auto`` is of interest, at 8,192 tokens, in random blocks."""
BARRED = 8192
"""Tokens from which on the bars hold."""


@dataclass(frozen=True)
class Cell:
    """One measurement: forward or backward, of one mask."""

    kind: str
    tokens: int
    density: float
    dtype: str
    backward: bool = False

    @property
    def name(self) -> str:
        way = "backward" if self.backward else "forward"
        return f"{self.kind} {self.tokens} {self.density:g} {self.dtype} {way}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (1, HEADS[self.tokens], self.tokens, DIM)

    @property
    def with_flex(self) -> bool:
        """flex_attention has no backward on a CPU."""
        return not self.backward and self.density <= max(DENSITIES)

    def bar(self, mask: BlockMask) -> float | None:
        """Time over dense time that the torch executor is held to."""
        d = mask.visited_density()
        if self.tokens < BARRED:
            return None
        if self.kind in ("band", "block band"):
            bar = 1.15 * d + 0.02 if self.dtype == "float32" else 1.3 * d + 0.03
        elif self.kind == "random":
            if self.density not in (0.125, 0.25):
                return None
            bar = 1.6 * d + 0.04
        else:
            bar = 1.3 * d + 0.03
        return 1.3 * bar if self.backward else bar

    def mask(self) -> Callable[[], BlockMask] | None:
        """What builds the mask; None where the kind has none of this density."""
        return MAKERS[self.kind](self)


def _band(cell: Cell) -> Callable[[], BlockMask]:
    """Tokens up to a distance, which cuts through blocks."""
    n, d = cell.tokens, cell.density
    reach = round(n * (1 - (1 - d) ** 0.5))  # the band is cut off at both ends
    return lambda: band_mask((n,), reach)


def _block_band(cell: Cell) -> Callable[[], BlockMask]:
    """Whole blocks up to a distance."""
    blocks = cell.tokens // BLOCK
    at = torch.arange(blocks)
    apart = (at[:, None] - at).abs()
    tables = [apart <= reach for reach in range(blocks)]
    table = min(tables, key=lambda table: abs(float(table.float().mean()) - cell.density))
    return lambda: BlockMask.from_table(table[None], block_size=BLOCK, q_len=cell.tokens)


def _radial(cell: Cell) -> Callable[[], BlockMask] | None:
    """Found by its density once; what is built anew in each call is the mask of that table."""
    found = []
    for frame in FRAMES:
        try:
            frames = cell.tokens // frame
            found.append(radial_block_mask(frames, frame, target_density=cell.density))
        except AttnControlError:  # adjacent frames, and bands no narrower than a block, are denser
            continue
    best = max(found, key=BlockMask.density, default=None)
    if best is None or best.density() < 0.7 * cell.density:
        return None
    regions, table = best.q_regions, best.table
    return lambda: BlockMask.from_table(table, block_size=BLOCK, q_regions=regions)


def _neighbourhood(cell: Cell) -> Callable[[], BlockMask]:
    """A 3-D window of about the video's own proportions, in tiled order."""
    shape = VIDEOS[cell.tokens]
    sizes = {tuple(max(2, round(n * part / 40)) for n in shape) for part in range(1, 41)}
    wanted = cell.density * cell.tokens
    size = min(sorted(sizes), key=lambda size: abs(math.prod(size) - wanted))
    return lambda: neighborhood_mask(Grid(shape, tile=TILE), size)


def _tiles(cell: Cell) -> Callable[[], BlockMask]:
    """A window of whole tiles, which are blocks."""
    shape = VIDEOS[cell.tokens]
    windows = itertools.product(*(range(1, n // t + 1) for n, t in zip(shape, TILE, strict=True)))
    wanted = cell.density * cell.tokens / math.prod(TILE)
    window = min(windows, key=lambda window: abs(math.prod(window) - wanted))
    return lambda: tiles_mask(Grid(shape, tile=TILE), window)


def _random(cell: Cell) -> Callable[[], BlockMask]:
    """Blocks drawn at random, others in each head, always the query's own."""
    blocks, heads = cell.tokens // BLOCK, HEADS[cell.tokens]
    g = torch.Generator().manual_seed(0)
    own = torch.eye(blocks, dtype=torch.bool)
    table = (torch.rand(heads, blocks, blocks, generator=g) < cell.density) | own
    return lambda: BlockMask.from_table(table, block_size=BLOCK, q_len=cell.tokens)


MAKERS: dict[str, Callable[[Cell], Callable[[], BlockMask] | None]] = {
    "band": _band,
    "block band": _block_band,
    "radial": _radial,
    "neighbourhood": _neighbourhood,
    "tiles": _tiles,
    "random": _random,
}
CELLS = [
    *(
        Cell(kind, tokens, density, dtype)
        for tokens in VIDEOS
        for dtype in ("float32", "bfloat16")
        for kind in KINDS
        for density in DENSITIES
    ),
    *(Cell("random", 8192, d, dtype) for dtype in ("float32", "bfloat16") for d in HIGH),
    *(
        Cell(kind, 8192, density, dtype, backward=True)
        for dtype in ("float32", "bfloat16")
        for kind in KINDS
        for density in (0.125, 0.25)
    ),
]
