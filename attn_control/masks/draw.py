"""Masks as pictures: a pixel a block, the darker the more of its pairs are on."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from attn_control.masks import bits
from attn_control.masks.block import FIRST_TILE, BlockMask
from attn_control.masks.grid import Grid

OFF, FAINT, FULL = np.array([[255, 255, 255], [190, 214, 235], [16, 52, 96]], dtype=np.float64)


def shares(mask: BlockMask, batch: int = 0, head: int = 0) -> np.ndarray:
    """float64 (q_blocks, k_blocks): the share of each block's pairs that is on."""
    cells = mask.cells()[batch, head].cpu()
    pairs = mask.q_bounds.cpu().diff()[:, None] * mask.k_bounds.cpu().diff()
    found = cells.double()  # off is 0, whole is 1
    if len(mask.pool):
        inside = bits.popcount(mask.pool.cpu())[(cells - FIRST_TILE).clamp(min=0).long()]
        found = (inside / pairs).where(cells >= FIRST_TILE, found)
    return found.numpy()


def draw(mask: BlockMask, *, batch: int = 0, head: int = 0, width: int = 720) -> Image.Image:
    """RGB, queries downwards, about ``width`` pixels wide; white is off."""
    share = shares(mask, batch, head)[..., None]
    colours = np.where(share > 0, FAINT + (FULL - FAINT) * share, OFF)
    scale = max(1, width // mask.k_blocks)
    return Image.fromarray(colours.round().astype(np.uint8).repeat(scale, 0).repeat(scale, 1))


def command(about: str | None, make: Callable[[Grid], BlockMask]) -> None:
    """The command line of a pattern: draws it on a grid of the user's, and says what it costs."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--shape", default="5,16,24", help="tokens along each axis")
    parser.add_argument("--block", type=int, default=64, help="tokens a block")
    parser.add_argument("--tile", help="tokens of a tile along each axis; raster order without")
    parser.add_argument("--text", type=int, default=0, help="text tokens at the end")
    given = parser.parse_args()

    def sizes(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    tile = sizes(given.tile) if given.tile else None
    mask = make(Grid(sizes(given.shape), given.block, tile, after=given.text))
    draw(mask).save(given.out)
    print(
        f"{given.out}: {mask.q_len} x {mask.k_len} tokens, density {mask.density():.4f}, "
        f"visited {mask.visited_density():.4f}, {len(mask.pool)} bit tiles"
    )
