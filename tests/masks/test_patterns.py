"""Each pattern against its one-line definition, pair by pair, in several orders of tokens."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from masks_by_hand import places, with_text
from PIL import Image

from attn_control import AttnControlError
from attn_control.masks import (
    BlockMask,
    Grid,
    along,
    band_mask,
    cross_mask,
    frame_band_mask,
    power_of_two_mask,
    radial_block_mask,
    sink_mask,
    spatial_mask,
    spatial_temporal_mask,
    strided_mask,
    temporal_mask,
    text_mask,
    tiles_mask,
)
from attn_control.masks.draw import draw, shares

SHAPE = 5, 6, 10
GRIDS = {
    "raster": Grid(SHAPE, 32),
    "one run": Grid(SHAPE, 32, split=0),
    "by frames": Grid(SHAPE, 32, split=1),
    "tiled": Grid(SHAPE, 32, (2, 3, 5)),
    "text first": Grid(SHAPE, 32, before=35),
    "text last": Grid(SHAPE, 32, (1, 4, 8), after=7),
}


def raster(at):
    return at[..., 0] * 60 + at[..., 1] * 10 + at[..., 2]


def in_frame(at):
    return at[..., 1] * 10 + at[..., 2]


def near_tile(q, k, sizes, windows):
    """Every axis: the key's tile is among the window's, which stays inside the grid."""
    found = True
    for axis, (n, size, window) in enumerate(zip(SHAPE, sizes, windows, strict=True)):
        tiles = -(-n // size)
        start = np.minimum(
            np.maximum(q[..., axis] // size - window // 2, 0), max(tiles - window, 0)
        )
        own = k[..., axis] // size
        found = found & (own >= start) & (own < start + window)
    return found


def power(q, k, axes, unit, near):
    found = True
    for axis in axes:
        apart = np.abs(q[..., axis] // unit - k[..., axis] // unit)
        found = found & ((apart <= near) | (apart & (apart - 1) == 0))
    return found


# name -> (mask of a grid, definition on places of queries and keys, whether all read themselves)
PATTERNS = {
    "band": (
        lambda g: band_mask(g, 37),
        lambda q, k: np.abs(raster(q) - raster(k)) <= 37,
        True,
    ),
    "band of one": (lambda g: band_mask(g, 0), lambda q, k: raster(q) == raster(k), True),
    "frame_band": (
        lambda g: frame_band_mask(g, 7),
        lambda q, k: np.abs(in_frame(q) - in_frame(k)) <= 7,
        True,
    ),
    "tiles": (
        lambda g: tiles_mask(g, (1, 2, 1), tile=(2, 2, 4)),
        lambda q, k: near_tile(q, k, (2, 2, 4), (1, 2, 1)),
        True,
    ),
    "tiles, windows wider than the grid": (
        lambda g: tiles_mask(g, (9, 3, 3), tile=2),
        lambda q, k: near_tile(q, k, (2, 2, 2), (9, 3, 3)),
        True,
    ),
    "cross": (cross_mask, lambda q, k: (q != k).sum(-1) <= 1, True),
    "cross of frames and times": (
        lambda g: cross_mask(g, [(1, 2), (0,)]),
        lambda q, k: (q[..., 0] == k[..., 0]) | (in_frame(q) == in_frame(k)),
        True,
    ),
    "strided": (
        lambda g: strided_mask(g, (1, 2, 3), offset=(0, 1, 5)),
        lambda q, k: (k[..., 1] % 2 == 1) & (k[..., 2] % 3 == 2) & (q[..., 0] >= 0),
        False,
    ),
    "power_of_two": (power_of_two_mask, lambda q, k: power(q, k, (0, 1, 2), 1, 1), True),
    "power_of_two of one axis": (
        lambda g: power_of_two_mask(g, axes=[2], unit=2, near=0),
        lambda q, k: power(q, k, [2], 2, 0),
        True,
    ),
    "sink": (
        lambda g: sink_mask(g, 2, axis=1),
        lambda q, k: (k[..., 1] < 2) & (q[..., 0] >= 0),
        False,
    ),
    "spatial": (
        lambda g: spatial_mask(g, 1),
        lambda q, k: np.abs(q[..., 0] - k[..., 0]) <= 1,
        True,
    ),
    "temporal": (
        lambda g: temporal_mask(g, (0, 2)),
        lambda q, k: (q[..., 1] == k[..., 1]) & (np.abs(q[..., 2] - k[..., 2]) <= 2),
        True,
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("order", GRIDS)
@pytest.mark.parametrize("short", [0, along.SHORT])
def test_patterns_are_what_they_say(name, order, short, monkeypatch):
    monkeypatch.setattr(along, "SHORT", short)  # 0: as if every axis were a long one
    make, reads, own = PATTERNS[name]
    grid = GRIDS[order]
    at = places(SHAPE, grid.tile)
    expected = with_text(reads(at[:, None], at[None]), grid.before, grid.after)
    mask = make(grid).validate(own=own)
    assert np.array_equal(mask.to_dense()[0, 0].numpy(), expected)


@pytest.mark.parametrize("order", ["text first", "text last"])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("rest", [True, False])
def test_text(order, rows, columns, rest):
    grid = GRIDS[order]
    text = np.ones(grid.length, bool)
    text[grid.before : grid.before + grid.tokens] = False
    q, k = text[:, None], text[None]
    expected = (q & k) | (q & ~k & rows) | (~q & k & columns) | (~q & ~k & rest)
    mask = text_mask(grid, rows=rows, columns=columns, rest=rest)
    assert np.array_equal(mask.to_dense()[0, 0].numpy(), expected)


def test_text_may_be_kept_from_reading():
    grid = GRIDS["text last"]
    mask = (band_mask(grid, 5) & text_mask(grid, rows=False, rest=True)).validate()
    dense = mask.to_dense()[0, 0]
    assert (
        not dense[grid.tokens :, : grid.tokens].any() and dense[: grid.tokens, grid.tokens :].all()
    )


def test_heads_of_two_kinds():
    grid = GRIDS["raster"]
    mask = spatial_temporal_mask(
        grid, ["temporal", "both", "spatial", "temporal"], frames=1, reach=2
    )
    spatial, temporal = (
        m.to_dense()[0, 0] for m in (spatial_mask(grid, 1), temporal_mask(grid, 2))
    )
    expected = torch.stack([temporal, spatial | temporal, spatial, temporal])
    assert torch.equal(mask.validate().to_dense()[0], expected)


def test_power_attention_of_blocks():
    grid = Grid((1000,), 32)
    mask = power_of_two_mask(grid, unit=32, near=2) | sink_mask(grid, 32)
    assert mask.is_fully_block_sparse()
    apart = (torch.arange(32)[:, None] - torch.arange(32)).abs()
    expected = (apart <= 2) | (apart & (apart - 1) == 0) | (torch.arange(32) == 0)
    assert torch.equal(mask.table[0], expected)


def test_tiles_in_tiled_order_waste_nothing():
    grid = Grid((6, 16, 21), 64, (2, 4, 8))  # ragged: 3 tiles of a row have 8, 8 and 5 tokens
    mask = tiles_mask(grid, (1, 3, 2)).validate()
    assert mask.is_fully_block_sparse() and mask.waste() == 1
    assert tiles_mask(Grid((6, 16, 21), 64), (1, 3, 2), tile=(2, 4, 8)).waste() > 1.5


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: band_mask((4, 4), -1), "band_mask: reach=-1"),
        (lambda: band_mask((4, 4), 1.5), "band_mask: reach=1.5"),
        (lambda: frame_band_mask((4,), 1), "has no frames, only one axis"),
        (lambda: tiles_mask((4, 4), 1), "give tile=, or a Grid in tiled order"),
        (lambda: tiles_mask((4, 4), (1, 0), tile=2), "window=0"),
        (lambda: tiles_mask((4, 4), 1, tile=(2, 2, 2)), "tile=(2, 2, 2) has to be int, or one for"),
        (lambda: cross_mask((4, 4), []), "free=[] has to name sets of the axes 0..1"),
        (lambda: cross_mask((4, 4), [(2,)]), "free=[(2,)]"),
        (lambda: strided_mask((4, 4), 0), "step=0"),
        (lambda: strided_mask((4, 4), 9, offset=5), "axis 0, for its first anchor,=4"),
        (lambda: power_of_two_mask((4, 4), axes=[2]), "axes=[2] are not of 0..1"),
        (lambda: power_of_two_mask((4, 4), unit=0), "unit=0"),
        (lambda: power_of_two_mask((4, 4), near=(0, -1)), "near=-1"),
        (lambda: sink_mask((4, 4), axis=2), "axis=2 is not in 0..1"),
        (lambda: sink_mask((4, 4), 0), "count=0"),
        (lambda: text_mask((4, 4)), "has no text"),
        (lambda: spatial_mask((4,)), "has no frames"),
        (lambda: temporal_mask((4, 4), (1, 1)), "reach=(1, 1)"),
        (lambda: spatial_temporal_mask((4, 4), ["spatial", "up"]), "head 1 is 'up'"),
        (lambda: spatial_temporal_mask((4, 4), []), "at least one mask"),
    ],
)
def test_patterns_refuse(call, said):
    with pytest.raises(AttnControlError) as error:
        call()
    assert said in str(error.value)


def test_two_geometries_in_one_process():
    """Nothing of one geometry is left for the next: published code reuses its first mask."""
    makes = [
        lambda frames, height: radial_block_mask(frames, height * 8, block_size=16),
        lambda frames, height: band_mask(Grid((frames, height, 8), 32), 9),
        lambda frames, height: tiles_mask(Grid((frames, height, 8), 32, (1, 4, 8)), 3),
    ]
    for make in makes:
        alone = [make(*size).to_dense() for size in ((4, 8), (6, 5))]
        for size, expected in zip(
            [(6, 5), (4, 8), (6, 5)], [alone[1], alone[0], alone[1]], strict=True
        ):
            assert torch.equal(make(*size).to_dense(), expected)


def test_drawn_shades_are_shares():
    grid = Grid((40,), 32)
    mask = band_mask(grid, 3)
    dense = mask.to_dense()[0, 0].double()
    expected = [
        [dense[r, c].mean() for c in (slice(32), slice(32, 40))] for r in (slice(32), slice(32, 40))
    ]
    np.testing.assert_allclose(shares(mask), np.array(expected))
    image = draw(mask, width=10)
    assert image.size == (10, 10)
    darkness = 255 - np.asarray(image.convert("L")).astype(int)[::5, ::5]
    assert (np.argsort(darkness.ravel()) == np.argsort(shares(mask).ravel())).all()
    off = BlockMask.from_table(torch.zeros(1, 2, 2, dtype=torch.bool), block_size=32, q_len=40)
    assert (np.asarray(draw(off)) == 255).all()


FILES = (
    "band cross frame_band neighborhood power_of_two radial sink spatial_temporal "
    "strided text tiles"
)


@pytest.mark.parametrize("name", FILES.split())
def test_each_file_draws_its_pattern(name, tmp_path, monkeypatch, capsys):
    module = __import__(f"attn_control.masks.{name}", fromlist=["main"])
    out = tmp_path / "x.png"
    monkeypatch.setattr(sys, "argv", [name, "--out", str(out), "--shape", "4,8,12", "--text", "9"])
    module.main()
    said = capsys.readouterr().out
    tokens, density = re.search(r"(\d+) x \d+ tokens, density ([\d.]+)", said).groups()
    drawn = np.asarray(Image.open(out))
    assert int(tokens) == 4 * 8 * 12 + 9
    assert 0 < float(density) <= 1 and (drawn < 255).any()


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "attn_control.masks.tiles", "--out", tmp_path / "x.png"]
    command += ["--shape", "16,16", "--tile", "4,4", "--block", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "256 x 256 tokens, density 0.5625, visited 0.5625, 0 bit tiles" in done.stdout
    assert Image.open(tmp_path / "x.png").size == (720, 720)
