"""Rows of masks, coverage, and `attn-control mask`: against dense masks, and what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from attn_control import masks
from attn_control.cli import app
from attn_control.masks.coverage import by_row, keys_read, picture, queries_reading
from attn_control.masks.grid import Grid
from attn_control.masks.rows import keys_per_query, rows_of

TILED = Grid((4, 6, 10), 32, (2, 4, 4), before=5, after=7)
RASTER = Grid((4, 6, 10), 32, before=5, after=7)
MADE = {
    "bits": masks.neighborhood_mask(RASTER, (3, 3, 5)),
    "tiled": masks.neighborhood_mask(TILED, (3, 3, 5)),
    "whole": masks.radial_block_mask(5, 60, block_size=16),
    "heads": masks.spatial_temporal_mask(RASTER, ["spatial", "both", "temporal"]),
}


@pytest.mark.parametrize("name", MADE)
def test_rows_are_those_of_the_dense_mask(name):
    mask = MADE[name]
    dense, some = mask.to_dense(), torch.tensor([0, 4, 5, 77, mask.q_len - 1])
    assert torch.equal(rows_of(mask, some), dense[:, :, some])
    for head in range(mask.heads):
        assert torch.equal(keys_per_query(mask, head=head), dense[0, head].sum(-1))


@pytest.mark.parametrize("grid", [RASTER, TILED], ids=["raster", "tiled"])
def test_coverage_is_in_raster_order_and_without_text(grid):
    mask = masks.neighborhood_mask(grid, (3, 3, 5), is_causal=True)
    slots = torch.from_numpy(grid.order())
    dense = torch.zeros(grid.length, grid.length, dtype=torch.bool)
    dense[slots[:, None], slots] = mask.to_dense()[0, 0]
    for found, expected in ((keys_read, dense.sum(1)), (queries_reading, dense.sum(0))):
        counts = found(mask, grid)
        assert counts.shape == (4, 6, 10)
        assert np.array_equal(counts.ravel(), expected[5:-7].numpy())
    rows = by_row(keys_read(mask, grid))
    assert rows[0] < rows[3], "a causal window is cut off at the top"
    assert rows == pytest.approx(keys_read(mask, grid).swapaxes(0, 1).reshape(6, -1).mean(1))


def run(*arguments):
    return CliRunner().invoke(app, ["mask", *map(str, arguments)])


def test_the_command_tells_and_draws(tmp_path):
    out = tmp_path / "a.png"
    done = run("neighborhood", "kernel_size=3,3,5", "--grid", "4,6,10", "--block", 32,
               "--tile", "2,4,4", "--text-after", 7, "--png", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    grid = Grid((4, 6, 10), 32, (2, 4, 4), after=7)
    mask = masks.neighborhood_mask(grid, (3, 3, 5))
    assert f"density {mask.density():.4f}, computed {mask.visited_density():.4f}" in done.output
    assert "keys a token reads: 52 to 52, mean 52.0" in done.output  # 3 * 3 * 5 and the text
    assert np.array_equal(np.array(Image.open(out)), np.array(picture(mask, grid)))


def test_patterns_unite_and_take_their_own_options(tmp_path):
    done = run("sink+spatial", "frames=0", "count=2", "--grid", "5,4,4", "--block", 16)
    assert done.exit_code == 0 and "keys a token reads: 32 to 48" in done.output
    done = run("radial", "target_density=0.9", "--grid", "5,4,8", "--block", 16)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["radail"], "did you mean 'radial'"), (["band"], "missing 1 required"),
     (["band", "width=3"], "unknown option 'width'; known are band: reach"),
     (["band", "reach"], "expected an option such as reach=64, got 'reach'"),
     (["band", "reach=x"], "reach='x' has to be an int"),
     (["band", "reach=3", "--grid", "a,b"], "--grid expects sizes"),
     (["band", "reach=3", "--grid", "4,4", "--png", "/no/where.png"], "there is no folder /no")],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2 and words in done.output
    assert done.output.startswith("error: ") and done.output.count("\n") == 1
