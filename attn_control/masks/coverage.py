"""How many keys each token reads, and how many queries read it: what a map of blocks does not show.

Masks that are cut off at the borders of frames read less there, which is seen in videos as glitches
at the top and bottom.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from attn_control.masks.block import BlockMask
from attn_control.masks.draw import FAINT, FULL, draw
from attn_control.masks.grid import Grid
from attn_control.masks.rows import keys_per_query

SPACE, LINE = 12, 16


def keys_read(mask: BlockMask, grid: Grid, *, head: int = 0) -> np.ndarray:
    """int64 (frames, height, width): the keys that each token of the picture reads, in raster
    order; a sequence is one row.
    """
    counts = keys_per_query(mask.to("cpu"), head=head).numpy()
    raster = np.empty_like(counts)
    raster[grid.order()] = counts
    inside = raster[grid.before : grid.length - grid.after]
    return inside.reshape((1,) * (3 - len(grid.shape)) + grid.shape)


def queries_reading(mask: BlockMask, grid: Grid, *, head: int = 0) -> np.ndarray:
    """The other way round: how many queries read each token, as `keys_read`."""
    return keys_read(mask.transpose(), grid, head=head)


def by_row(counts: np.ndarray) -> np.ndarray:
    """float64 (height,): means over frames and columns: the coverage of each latent row."""
    return counts.mean((0, 2))


def describe(mask: BlockMask, grid: Grid) -> list[str]:
    """What a mask costs and covers, in lines of text."""
    read, rows = keys_read(mask, grid), by_row(keys_read(mask, grid))
    seen = queries_reading(mask, grid)
    kind = "whole blocks only" if mask.is_fully_block_sparse() else f"{len(mask.pool)} bit tiles"
    return [
        f"{mask.q_len} tokens in blocks of {mask.q_block}; {kind}, {mask.nbytes / 2**20:.2f} MiB",
        f"density {mask.density():.4f}, computed {mask.visited_density():.4f} of all pairs",
        f"keys a token reads: {read.min()} to {read.max()}, mean {read.mean():.1f}",
        f"queries that read a token: {seen.min()} to {seen.max()}",
        f"keys read by latent row: {rows.min():.1f} (row {int(rows.argmin())}) to"
        f" {rows.max():.1f} (row {int(rows.argmax())})",
    ]


def picture(mask: BlockMask, grid: Grid, *, width: int = 720) -> Image.Image:
    """The mask's blocks; beside it the keys that tokens of the middle frame read, and the mean by
    latent row.
    """
    blocks = draw(mask, width=width)
    counts = keys_read(mask, grid)
    frame = counts[len(counts) // 2]
    scale = max(1, 360 // max(frame.shape))
    heat = _heat(frame, scale)
    bars = _bars(by_row(counts), 360)
    right = max(heat.width, bars.width)
    high = max(blocks.height, heat.height + bars.height + LINE + SPACE) + 2 * SPACE + LINE
    page = Image.new("RGB", (blocks.width + right + 3 * SPACE, high), "white")
    pen = ImageDraw.Draw(page)
    left, top = SPACE, SPACE + LINE
    pen.text((left, SPACE - 2), "queries down, keys across", fill="black")
    page.paste(blocks, (left, top))
    left += blocks.width + SPACE
    told = f"keys read in frame {len(counts) // 2}: {frame.min()} to {frame.max()}"
    pen.text((left, SPACE - 2), told, fill="black")
    page.paste(heat, (left, top))
    top += heat.height + SPACE
    pen.text((left, top - 2), "mean by latent row", fill="black")
    page.paste(bars, (left, top + LINE))
    return page


def _shade(share: np.ndarray) -> np.ndarray:
    return (FAINT + (FULL - FAINT) * share[..., None]).round().astype(np.uint8)


def _heat(counts: np.ndarray, scale: int) -> Image.Image:
    share = counts / max(1, counts.max())
    return Image.fromarray(_shade(share).repeat(scale, 0).repeat(scale, 1))


def _bars(means: np.ndarray, width: int) -> Image.Image:
    """One bar a row, from 0 to the largest mean."""
    high = max(2, math.ceil(180 / len(means)))
    image = Image.new("RGB", (width, high * len(means)), "white")
    pen = ImageDraw.Draw(image)
    colour = tuple(int(value) for value in FULL)
    for row, mean in enumerate(means):
        long = round(width * mean / max(1.0, means.max()))
        pen.rectangle((0, row * high, long, (row + 1) * high - 2), fill=colour)
    return image
