"""Masks as pictures: a pixel a block, the darker the more of its pairs are on."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

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


def sheet(masks: dict[str, BlockMask], *, columns: int = 6, width: int = 168) -> Image.Image:
    """Several masks, each under its name."""
    space, line = 12, 16
    drawn = {name: draw(mask, width=width) for name, mask in masks.items()}
    wide, high = (max(image.size[i] for image in drawn.values()) + space for i in (0, 1))
    rows = -(-len(drawn) // columns)
    page = Image.new("RGB", (columns * wide + space, rows * (high + line) + space), "white")
    pen = ImageDraw.Draw(page)
    for number, (name, image) in enumerate(drawn.items()):
        left, top = space + number % columns * wide, space + number // columns * (high + line)
        pen.text((left, top), name, fill="black")
        page.paste(image, (left, top + line))
        pen.rectangle(
            (left - 1, top + line - 1, left + image.width, top + line + image.height),
            outline="lightgrey",
        )
    return page


def main() -> None:
    """All patterns on one small video, as docs/masks.md shows them."""
    from attn_control import masks as m

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    out = parser.parse_args().out
    grid = m.Grid((6, 16, 16), 32, split=0, after=64)
    tiled = m.Grid((6, 16, 16), 32, (2, 4, 4), after=64)
    sheet(
        {
            "radial": m.radial_block_mask(6, 256, block_size=32, decay_factor=0.3, text_tokens=64),
            "radial, Eq. 4": m.radial_block_mask(
                6, 256, block_size=32, revision="paper", text_tokens=64
            ),
            "neighborhood": m.neighborhood_mask(grid, (3, 5, 5)),
            "neighborhood, tiled": m.neighborhood_mask(tiled, (3, 5, 5)),
            "tiles, tiled": m.tiles_mask(tiled, (1, 3, 3)),
            "band": m.band_mask(grid, 64),
            "frame_band": m.frame_band_mask(grid, 16),
            "cross": m.cross_mask(grid),
            "strided": m.strided_mask(grid, (2, 4, 4)),
            "power_of_two": m.power_of_two_mask(grid, axes=[0, 1]),
            "sink | spatial": m.sink_mask(grid) | m.spatial_mask(grid),
            "temporal": m.temporal_mask(grid, 1),
        }
    ).save(out)


if __name__ == "__main__":
    main()
