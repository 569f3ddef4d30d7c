"""What masks cost to build, and how large they are: ``python benchmarks/masks.py``.

A triple of setup, benchmark and verify for each of three videos, in raster order and in tiles: Wan
at 480p (21 x 30 x 52 tokens) and 720p (21 x 45 x 80), HunyuanVideo's 117 frames at 768p (30 x 48 x
80 and 256 of text). Each pattern: under 50 ms and 20 MB. Times are of one thread; nothing but the
edges of blocks is kept from one call to the next.

Verified are whole rows of each mask, all keys of 40 random queries, against the pattern's
definition on places; of Radial Attention, published digests, and that no query is without keys.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timing import Row, report, side_by_side

from attn_control.masks import (
    BlockMask,
    Grid,
    band_mask,
    bits,
    cross_mask,
    frame_band_mask,
    neighborhood_mask,
    power_of_two_mask,
    radial_block_mask,
    sink_mask,
    spatial_temporal_mask,
    strided_mask,
    text_mask,
    tiles_mask,
)

CPU = torch.device("cpu")
DIGESTS = Path(__file__).parents[1] / "tests" / "data" / "radial_digests.json"
Places = np.ndarray
Reads = Callable[[Places, Places], np.ndarray]
"""Which keys (keys, axes) a query (axes,) reads: bool (keys,)."""


@dataclass(frozen=True)
class Video:
    """A latent video as a transformer sees it."""

    name: str
    shape: tuple[int, int, int]
    tile: tuple[int, int, int]
    text: int = 0

    def grid(self, tiled: bool) -> Grid:
        return Grid(self.shape, tile=self.tile if tiled else None, after=self.text)


VIDEOS = (
    Video("Wan 480p", (21, 30, 52), (3, 6, 7)),
    Video("Wan 720p", (21, 45, 80), (3, 5, 8)),
    Video("HunyuanVideo 768p", (30, 48, 80), (2, 8, 8), 256),
)


def patterns(video: Video) -> dict[str, tuple[Callable[[Grid], BlockMask], Reads | None, int]]:
    """(mask of a grid, definition, head that it is the definition of)."""
    frames, height, width = video.shape
    kernel = [n // 2 for n in video.shape]
    sizes, tile = np.array(video.shape), np.array(video.tile)

    def raster(at: Places) -> np.ndarray:
        return (at[..., 0] * height + at[..., 1]) * width + at[..., 2]

    def in_frame(at: Places) -> np.ndarray:
        return at[..., 1] * width + at[..., 2]

    def window(q: Places, k: Places) -> np.ndarray:
        """As NATTEN: as many keys everywhere."""
        start = np.clip(q - np.array(kernel) // 2, 0, sizes - kernel)
        return ((k >= start) & (k < start + kernel)).all(-1)

    def tiles(q: Places, k: Places) -> np.ndarray:
        count = -(-sizes // tile)
        start = np.clip(q // tile - 1, 0, count - 3)
        return ((k // tile >= start) & (k // tile < start + 3)).all(-1)

    def powers(q: Places, k: Places) -> np.ndarray:
        apart = np.abs(q - k)
        return ((apart & (apart - 1)) == 0).all(-1)  # 0 & -1 is 0 too

    reach, inner = frames * height * width // 32, height * width // 16
    return {
        "neighborhood": (lambda g: neighborhood_mask(g, kernel), window, 0),
        "band": (
            lambda g: band_mask(g, reach),
            lambda q, k: abs(raster(q) - raster(k)) <= reach,
            0,
        ),
        "frame_band": (
            lambda g: frame_band_mask(g, inner),
            lambda q, k: abs(in_frame(q) - in_frame(k)) <= inner,
            0,
        ),
        "tiles": (lambda g: tiles_mask(g, 3, tile=video.tile), tiles, 0),
        "cross": (cross_mask, lambda q, k: (q != k).sum(-1) <= 1, 0),
        "strided": (lambda g: strided_mask(g, 4), lambda q, k: (k % 4 == 0).all(-1), 0),
        "power_of_two": (power_of_two_mask, powers, 0),
        "sink": (sink_mask, lambda q, k: k[..., 0] == 0, 0),
        "spatial_temporal, 2 heads": (
            lambda g: spatial_temporal_mask(g, ["spatial", "temporal"]),
            lambda q, k: (abs(q - k)[..., 1:] <= 1).all(-1),
            1,
        ),
        "text": (
            lambda g: text_mask(Grid.of(g, after=g.after or 256)),
            lambda q, k: np.zeros(len(k), bool),
            0,
        ),
    }


def radials(video: Video) -> dict[str, Callable[[], BlockMask]]:
    """Raster order only."""
    given = dict(
        num_frames=video.shape[0],
        tokens_per_frame=video.shape[1] * video.shape[2],
        text_tokens=video.text,
        model="hunyuan" if video.text else "wan",
    )
    return {
        f"radial, {name}": lambda more=more: radial_block_mask(**given, **more)
        for name, more in {
            "repaired": dict(decay_factor=0.2),
            "r2": dict(decay_factor=0.2, revision="r2"),
            "Eq. 4": dict(revision="paper"),
        }.items()
    }


def row_of(mask: BlockMask, head: int, query: int) -> np.ndarray:
    """bool (k_len,): the keys that one query reads, from the lists alone."""
    bounds = mask.k_bounds.numpy()
    block = int(np.searchsorted(mask.q_bounds.numpy(), query, side="right")) - 1
    found = np.zeros(mask.k_len, bool)
    for slot in range(int(mask.count[0, head, block])):
        start, stop = bounds[mask.index[0, head, block, slot] :][:2]
        tile = int(mask.tile[0, head, block, slot])
        found[start:stop] = True
        if tile >= 0:
            line = mask.pool[tile, query - int(mask.q_bounds[block])]
            found[start:stop] = bits.unpack(line, stop - start).numpy()
    return found


class Masks:
    """All patterns of one video in one order."""

    def __init__(self, video: Video, tiled: bool) -> None:
        self.video, self.tiled = video, tiled
        self.grid = video.grid(tiled)
        self.patterns = patterns(video)
        self.makes: dict[str, Callable[[], BlockMask]] = {
            name: lambda make=make: make(self.grid) for name, (make, *_) in self.patterns.items()
        }
        if not tiled:
            self.makes |= radials(video)

    def benchmark(self, rounds: int) -> list[Row]:
        spent = side_by_side(self.makes, CPU, rounds, warmup=1)
        order = "tiled" if self.tiled else "raster"
        rows, largest = [], 0.0
        for name, make in self.makes.items():
            mask = make()
            what = f"{self.video.name}, {order}, {name}"
            blocks = f"{mask.q_blocks} x {mask.k_blocks} blocks, {len(mask.pool)} tiles"
            shares = f"density {mask.density():.4f}, visited {mask.visited_density():.4f}"
            took = statistics.median(spent[name]) * 1e3
            size = mask.nbytes / 1e6
            largest = max(largest, size)
            rows.append(Row(what, took, "ms", 50.0, f"{size:.2f} MB; {blocks}; {shares}"))
        how = f"of the {len(self.makes)} above; times are medians of {rounds}"
        return [*rows, Row(f"{self.video.name}, {order}, largest", largest, "MB", 20.0, how)]

    def verify(self) -> None:
        random = np.random.default_rng(0)
        for name, (make, reads, head) in self.patterns.items():
            mask = make(self.grid)
            mask.validate(rows=name != "text", own=name not in ("text", "strided", "sink"))
            raster = np.arange(mask.q_len)
            raster[: self.grid.length] = self.grid.order()
            text = raster >= self.grid.tokens
            places = np.stack(np.unravel_index(np.where(text, 0, raster), self.video.shape), 1)
            for query in random.integers(0, mask.q_len, 40):
                expected = text | bool(text[query]) | reads(places[query], places)
                assert np.array_equal(row_of(mask, head, query), expected), (name, query)
        if self.tiled:
            return
        for make in radials(self.video).values():
            make().validate()
        for row in json.loads(DIGESTS.read_text()):
            frames, height, width = self.video.shape
            if (row["num_frames"], row["tokens_per_frame"]) == (frames, height * width):
                digest, blocks = row.pop("sha256"), row.pop("blocks")
                given = {k: v for k, v in row.items() if k not in ("density", "official")}
                table = radial_block_mask(**given).table[0, :blocks, :blocks]
                made = hashlib.sha256(table.numpy().astype(np.uint8).tobytes()).hexdigest()
                assert made == digest, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for video in VIDEOS:
        for tiled in (False, True):
            subject = Masks(video, tiled)
            subject.verify()
            rows += subject.benchmark(options.rounds)
    report("masks", rows, CPU)


if __name__ == "__main__":
    main()
